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

from ..utils.memory import out_of_memory
from .cache import cache_with_room
from .decoding import CACHE, Tokens, until_ended
from .encoding import embedded_tokens
from .memory import peak_bytes
from .probe import Carried, same_but_for_rounding
from .sampling import SeededSampling
from .threads import Threads

# Rows are dropped when no member has more than this share of its rows unfinished: each time costs a copy of the cache.
SHARE = 0.8
# Rows by which memory is measured, and so many tokens in all of them at most, if those are not fewer than two rows'.
MEASURED_ROWS, MEASURED_TOKENS = 8, 4096


class Dropping:
    """model.generate for rows of several members, member by member, the same number for each.

    drops    whether rows that have ended leave the batch; the model's cache must allow it, see `can_drop`
    room     whether the cache takes its memory once, see `cache_with_room`
    threads  chooses the number of threads before each forward pass; None: it stays as it is
    """

    def __init__(
        self, model, config: GenerationConfig, drops: bool = True, room: bool = False, threads: Threads | None = None
    ):
        self.model, self.drops, self.room, self.threads = model, drops, room, threads
        self.config = copy.deepcopy(config)
        self.config.return_dict_in_generate = True
        self._ends = torch.tensor(config.eos_token_id or [], device=model.device)

    def __call__(
        self,
        rows: Sequence[Sequence[int]],
        members: int,
        sampling: SeededSampling | None = None,
        most: int | None = None,
        counts: Sequence[bool] | None = None,
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
        done, config = 0, copy.copy(self.config)
        cache = self._cache(width, most)
        while True:
            finite = RowsFinite()
            watch = Unfinished(self._ends, unfinished, SHARE if self.drops else 0.0, self.threads)
            processors = [finite] if sampling is None else [finite, sampling.of_rows(which.flatten(), width)]
            config.max_new_tokens = most - done
            if self.threads is not None:
                self.threads.choose(ids.numel() if done == 0 else len(ids))
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    logits_processor=LogitsProcessorList(processors),
                    stopping_criteria=StoppingCriteriaList([watch]),
                    **cache,
                )
            new = output.sequences[:, ids.shape[1] :]
            fine[which.flatten()] &= finite.fine
            texts[which.flatten(), done : done + new.shape[1]] = new
            done, unfinished = done + new.shape[1], watch.unfinished
            if done >= most or not unfinished.any():
                break
            most_left = int(unfinished.sum(1).max())
            places = unfinished_first(unfinished)[:, :most_left]
            kept = (places + torch.arange(members, device=device)[:, None] * unfinished.shape[1]).flatten()
            which, unfinished = which.gather(1, places), unfinished.gather(1, places)
            ids = output.sequences[kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), new.shape[1])], 1)[kept]
            output[CACHE].reorder_cache(kept)
            cache = {CACHE: output[CACHE]}
        return until_ended(texts, self._ends), (fine | ~counting).view(members, -1).all(1).tolist()

    def row_bytes(self, tokens: int, sampling: SeededSampling | None = None) -> int:
        """Bytes that a row of so many prompt tokens takes at most: to read the prompt and, if the cache has room, to
        generate the last token. Measured with a few rows."""
        device, config, longest = self.model.device, copy.copy(self.config), tokens + self.config.max_new_tokens - 1
        count = max(2, min(MEASURED_ROWS, MEASURED_TOKENS // longest))
        ids, rows = torch.ones(count, longest, dtype=torch.long, device=device), torch.arange(count)
        config.max_new_tokens = 1
        processors = LogitsProcessorList(
            [RowsFinite(), *([] if sampling is None else [sampling.of_rows(rows.to(device), tokens)])]
        )

        def one_token(given: int, cache: dict) -> None:
            with torch.no_grad():
                self.model.generate(
                    input_ids=ids[:, :given],
                    attention_mask=torch.ones_like(ids[:, :given]),
                    generation_config=config,
                    logits_processor=processors,
                    **cache,
                )

        def first_and_last() -> None:
            cache = self._cache(tokens, self.config.max_new_tokens)
            one_token(tokens, cache)
            if cache and longest > tokens:
                for layer in cache[CACHE].layers:
                    layer.show(longest - 1)
                one_token(longest, cache)

        return peak_bytes(first_and_last) // count

    def close(self) -> None:
        """There is nothing to free."""

    def _cache(self, width: int, most: int) -> dict:
        """The argument of `generate` for prompts of `width` tokens and at most so many new ones."""
        return {CACHE: cache_with_room(self.model, width + most - 1)} if self.room else {}


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
            given = {CACHE: cache_with_room(model, ids.shape[1] + steps - 1)} if room else {}
            if None in given.values():
                return False
            first, output = logits(ids, steps // 2, **given)
            output[CACHE].reorder_cache(kept)
            second, _ = logits(output.sequences[kept], steps - steps // 2, **{CACHE: output[CACHE]})
    # of models without a cache, or with one that can't go on
    except Exception as error:
        if out_of_memory(error):
            raise
        return False
    finally:
        carried.forget()
    return same_but_for_rounding(whole[kept], torch.cat([first[kept], second], 1), model.dtype)
