"""Decoding for the rows of several members, which drops rows that have ended.

`model.generate` carries a text that has ended until the last one of its batch ends. Here it stops as soon as a share
of each member's rows has ended, and goes on with the others from the same cache. Members keep equally many rows, as
many as the one with the most unfinished texts has.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import ModelOutput

from ..utils.memory import out_of_memory
from .cache import KeptMemory, Room, cache_with_room, show_all
from .decoding import CACHE, Tokens, until_ended
from .encoding import embedded_tokens
from .memory import RowBytes, peak_bytes
from .probe import Carried, same_but_for_rounding
from .sampling import SeededSampling
from .threads import Threads

# Rows are dropped when no member has more than this share of its rows unfinished: each time costs a copy of the cache.
SHARE = 0.8
# Rows by which memory is measured, and so many tokens in all of them at most, if those are not fewer than two rows'.
MEASURED_ROWS, MEASURED_TOKENS = 8, 4096
# Prompts are read by parts of so many tokens on a CPU, so that what a forward pass takes and frees again stays little.
# Of 1920 prompts with 8 tokens, parts of 4096 tokens take the time of all at once. With parts of 2048 their texts take
# 2 % longer and a tenth less memory (those of 480 prompts a fourth less), with parts of 1024 they take 10 % longer.
READ_AT_ONCE = 2048
# Rows of each member that are read at once elsewhere
ALL = 2**31


class Dropping:
    """model.generate for rows of several members, member by member, the same number for each.

    drops    whether rows that have ended leave the batch; the model's cache must allow it, see `can_drop`
    room     whether the cache takes its memory once, see `cache_with_room`
    threads  chooses the number of threads before each forward pass; None: it stays as it is

    With `keeps_memory` the memory of the cache is kept for the next batch, until `close`.
    """

    def __init__(
        self, model, config: GenerationConfig, drops: bool = True, room: bool = False, threads: Threads | None = None
    ):
        self.model, self.drops, self.room, self.threads = model, drops, room, threads
        self.config = copy.deepcopy(config)
        self.config.return_dict_in_generate = True
        self.keeps_memory, self._memory = False, KeptMemory()
        self._ends = torch.tensor(config.eos_token_id or [], device=model.device)

    def __call__(
        self,
        rows: Sequence[Sequence[int]],
        members: int,
        sampling: SeededSampling | None = None,
        most: int | None = None,
        counts: Sequence[bool] | None = None,
    ) -> tuple[Tokens, list[bool]]:
        """See `_decode`."""
        try:
            return self._decode(rows, members, sampling, most, counts)
        finally:
            if not self.keeps_memory:
                self._memory.free()

    def _decode(
        self,
        rows: Sequence[Sequence[int]],
        members: int,
        sampling: SeededSampling | None,
        most: int | None,
        counts: Sequence[bool] | None,
    ) -> tuple[Tokens, list[bool]]:
        """New tokens of each row, up to and including the one that ended it; and for each member, whether all of its
        logits were numbers. A row has at most `most` tokens, by default the config's. With `counts` rows that don't
        count are carried only as long as their places are needed."""
        pad, device, width = self.config.pad_token_id, self.model.device, max(map(len, rows))
        most = self.config.max_new_tokens if most is None else most
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        texts = ids.new_full((len(rows), most), pad)
        fine = torch.ones(len(rows), dtype=torch.bool, device=device)
        # numbers of the rows in the batch, and which of them are unfinished: (members, rows of each)
        which = torch.arange(len(rows), device=device).view(members, -1)
        counting = torch.tensor([True] * len(rows) if counts is None else list(counts), device=device)
        unfinished = counting.view(members, -1)
        done = 0
        room = Room(width + most - 1, self._memory, members, which.shape[1])
        cache = self._cache(room)
        if cache and read_at_once(device, members, width) < len(rows):
            ids, mask = self._read(ids, mask, cache, room, fine, sampling)
            texts[:, 0], done = ids[:, -1], 1
            unfinished = unfinished & ~torch.isin(ids[:, -1], self._ends).view(unfinished.shape)
        while done < most and bool(unfinished.any()):
            watch = Unfinished(self._ends, unfinished, SHARE if self.drops else 0.0, self.threads)
            output, finite = self._generate(ids, mask, most - done, cache, which.flatten(), sampling, width, [watch])
            new = output.sequences[:, ids.shape[1] :]
            fine[which.flatten()] &= finite
            texts[which.flatten(), done : done + new.shape[1]] = new
            done, unfinished = done + new.shape[1], watch.unfinished
            if done >= most or not unfinished.any():
                break
            most_left = int(unfinished.sum(1).max())
            # In their order: they then move towards the beginning, within the same memory.
            places = unfinished_first(unfinished)[:, :most_left].sort(1).values
            kept = (places + torch.arange(members, device=device)[:, None] * unfinished.shape[1]).flatten()
            which, unfinished = which.gather(1, places), unfinished.gather(1, places)
            ids = output.sequences[kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), new.shape[1])], 1)[kept]
            output[CACHE].reorder_cache(kept)
            cache = {CACHE: output[CACHE]}
        return until_ended(texts, self._ends), (fine | ~counting).view(members, -1).all(1).tolist()

    def _generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        most: int,
        cache: dict,
        rows: torch.Tensor,
        sampling: SeededSampling | None,
        width: int,
        criteria: Sequence[StoppingCriteria] = (),
    ) -> tuple[ModelOutput, torch.Tensor]:
        """At most so many tokens for rows with these numbers, whose prompts are `width` tokens long; and of which rows
        all logits were numbers."""
        finite, config = RowsFinite(), copy.copy(self.config)
        config.max_new_tokens = most
        if self.threads is not None:
            self.threads.choose(ids.numel() if ids.shape[1] == width else len(ids))
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList(
                    [finite, *([] if sampling is None else [sampling.of_rows(rows, width)])]
                ),
                stopping_criteria=StoppingCriteriaList(criteria),
                **cache,
            )
        return output, finite.fine

    def _read(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: dict,
        room: Room,
        fine: torch.Tensor,
        sampling: SeededSampling | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads prompts by parts, a few rows of each member at once. Returns tokens and mask with the first token of
        each text; notes in `fine` which logits were numbers."""
        width, which = ids.shape[1], torch.arange(len(ids), device=ids.device).view(room.members, room.each)
        first, size = ids.new_empty(len(ids), 1), read_at_once(ids.device, room.members, width) // room.members
        for begin in range(0, room.each, size):
            room.part = slice(begin, begin + size)
            rows = which[:, room.part].flatten()
            output, finite = self._generate(ids[rows], mask[rows], 1, cache, rows, sampling, width)
            first[rows] = output.sequences[:, -1:]
            fine[rows] &= finite
        room.part = None
        show_all(cache[CACHE], width)
        return torch.cat([ids, first], 1), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)

    def row_bytes(self, tokens: int, sampling: SeededSampling | None = None) -> RowBytes:
        """Bytes that a row of so many prompt tokens takes: to read the prompt and, if the cache has room, to generate
        the last token. Measured with a few rows."""
        device, longest = self.model.device, tokens + self.config.max_new_tokens - 1
        count = max(2, min(MEASURED_ROWS, MEASURED_TOKENS // longest))
        ids, rows = torch.ones(count, longest, dtype=torch.long, device=device), torch.arange(count, device=device)
        cache = self._cache(Room(longest))

        def generate(given: int, most: int) -> None:
            self._generate(ids[:, :given], torch.ones_like(ids[:, :given]), most, cache, rows, sampling, tokens)

        reading = peak_bytes(lambda: generate(tokens, 1)) // count
        if not cache or longest == tokens:
            return RowBytes(reading)
        kept = sum(layer.nbytes for layer in cache[CACHE].layers) // count
        # Two tokens: `generate` holds the logits of one while it computes the next.
        last = min(2, longest - tokens)
        show_all(cache[CACHE], longest - last)
        step = peak_bytes(lambda: generate(longest - last + 1, last)) // count
        # the text so far, its mask, and the new tokens, as `_decode` has them
        own = (2 * (tokens + 1) + self.config.max_new_tokens) * ids.element_size()
        return RowBytes(kept + own, max(0, reading - kept), step)

    def close(self) -> None:
        self._memory.free()

    def _cache(self, room: Room) -> dict:
        """The argument of `generate`."""
        return {CACHE: cache_with_room(self.model, room)} if self.room else {}


def read_at_once(device: torch.device, members: int, tokens: int) -> int:
    """How many rows of so many members, equally many of each, are read at once if their prompts have so many tokens."""
    return members * (max(1, READ_AT_ONCE // (members * tokens)) if device.type == "cpu" else ALL)


def unfinished_first(unfinished: torch.Tensor) -> torch.Tensor:
    """The numbers of each member's rows (members, rows of each), unfinished ones first, otherwise in their order."""
    return (~unfinished).to(torch.uint8).argsort(dim=1, stable=True)


class RowsFinite(LogitsProcessor):
    """Leaves scores as they are, and remembers of which rows all were numbers."""

    def __init__(self):
        self.fine: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The greatest of a row tells: it is NaN if one is NaN, and infinite if one is inf or all are -inf.
        fine = scores.amax(-1).isfinite()
        self.fine = fine if self.fine is None else self.fine & fine
        return scores


class Unfinished(StoppingCriteria):
    """Stops all rows when no member has more than `share` of its rows unfinished. Chooses the threads of the next
    forward pass."""

    def __init__(self, ends: torch.Tensor, unfinished: torch.Tensor, share: float, threads: Threads | None = None):
        self.ends, self.unfinished, self.threads = ends, unfinished, threads
        self.most = int(share * unfinished.shape[1])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options) -> torch.Tensor:
        ended = torch.isin(input_ids[:, -1], self.ends).view(self.unfinished.shape)
        self.unfinished = self.unfinished & ~ended
        stop = bool(self.unfinished.sum(1).max() <= self.most)
        if self.threads is not None and not stop:
            self.threads.choose(len(input_ids))
        return torch.full((len(input_ids),), stop, device=input_ids.device)


def can_drop(model, config: GenerationConfig, room: bool = False) -> bool:
    """Whether generating in two parts, the second with fewer rows, gives the logits of generating at once; with `room`
    from a cache of `cache_with_room`, otherwise from the one that `generate` makes."""
    device, steps = model.device, 4
    usual = range(3, max(4, min(embedded_tokens(model), 200)))
    rows = [[usual[(31 * i + 17 * j) % len(usual)] for j in range(5)] for i in range(4)]
    ids = torch.tensor(rows, device=device)
    kept = torch.tensor([3, 1], device=device)

    def logits(ids: torch.Tensor, steps: int, **cache):
        made = GenerationConfig(
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=made, **cache)
        return torch.stack(output.logits, 1).float().clamp(min=-1e4), output

    carried = Carried(model)
    try:
        with torch.no_grad():
            whole, _ = logits(ids, steps)
            carried.find()
            carried.forget()
            found, given = [], {}
            if room:
                # Prompts are read by parts.
                shared = Room(ids.shape[1] + steps - 1, members=1, each=len(ids))
                cache = cache_with_room(model, shared)
                if cache is None:
                    return False
                given, parts = {CACHE: cache}, []
                for shared.part in (slice(0, 3), slice(3, 4)):
                    parts.append(logits(ids[shared.part], 1, **given))
                shared.part = None
                show_all(cache, ids.shape[1])
                found.append(torch.cat([part for part, _ in parts])[kept])
                ids = torch.cat([output.sequences for _, output in parts])
            first, output = logits(ids, steps // 2 - len(found), **given)
            found.append(first[kept])
            output[CACHE].reorder_cache(kept)
            found.append(logits(output.sequences[kept], steps - steps // 2, **{CACHE: output[CACHE]})[0])
    # of models without a cache, or with one that can't go on
    except Exception as error:
        if out_of_memory(error):
            raise
        return False
    finally:
        carried.forget()
    return same_but_for_rounding(whole[kept], torch.cat(found, 1), model.dtype)
