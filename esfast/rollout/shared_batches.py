"""Answers requests of several members in shared batches, in which every row has the weights of its member.

All members of a batch have equally many rows, because the matrix products of members are one batched product. A member
with fewer requests than another gets rows that count as ended from the beginning. Members without requests are not in
the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from ..utils.memory import own_memory
from .completion import OWN, Asked, Completion
from .decoding import Tokens
from .dropping import MEASURED_ROWS, Dropping, read_at_once
from .engine import TransformersEngine
from .memory import RowBytes
from .sampling import LogitsError, SeededSampling
from .stacked_model import StackedModel
from .static_steps import StaticSteps

# Share of the device's memory that texts get.
TEXTS_SHARE = 0.25
# A batch of more rows takes longer for each of them on a CPU, whose caches it leaves.
MOST_ROWS_ON_CPU = 2048
# To write a member's weights takes as long as a forward pass over so many of its tokens.
TOKENS_OF_WRITING = 10


class SharedBatches:
    """Generates for members whose weights a StackedModel holds.

    engine     of the model: its tokenizer and settings apply
    way        decodes a batch
    processes  of the team; they may share the cores

    `tokens` is the number of tokens generated so far, `rows` the size of the last batch.
    """

    def __init__(self, engine: TransformersEngine, way: Dropping | StaticSteps, processes: int = 1):
        self.engine, self.way, self.processes = engine, way, processes
        self.tokens = self.rows = 0
        self._bytes_of_row: dict[tuple[int, bool, bool], RowBytes] = {}

    def __call__(
        self,
        stack: StackedModel,
        owners: Sequence[int],
        texts: Sequence[str],
        seeds: Sequence[int] | None,
        asked: Asked = OWN,
    ) -> list[Completion | LogitsError]:
        """What the owner of each text answers, a number among the members that were written to the stack. A member
        whose logits are not numbers gets a LogitsError for each of its texts.

        Raises ValueError as `TransformersEngine.complete_texts`, torch.OutOfMemoryError for a batch that doesn't fit.
        """
        engine = self.engine
        seeds = None if asked.temperature == 0 else seeds
        longest, members = max(map(len, engine.prompts.tokens(texts))), len(set(owners))
        room = self.room(longest, seeds is not None, asked.top_p, members)
        new: list[list[int]] = [[]] * len(texts)
        broken: set[int] = set()
        with engine.as_asked(asked), self._threads(), engine.own_settings():
            encoded = engine.prompts(texts)
            for chosen in self._cut(list(map(len, encoded)), owners, room):
                order = stack.choose(list(chosen))
                most = max(map(len, chosen.values()))
                batch = [i for k in order for i in _filled(chosen[k], most)]
                counts = [place < len(chosen[k]) for k in order for place in range(most)]
                self.rows = len(batch)
                with stack.in_place():
                    found, fine = self._generate(
                        [encoded[i] for i in batch],
                        len(order),
                        None if seeds is None else [seeds[i] for i in batch],
                        counts,
                    )
                for i, tokens, own in zip(batch, found, counts, strict=True):
                    if own:
                        new[i] = tokens
                broken |= {k for k, numbers in zip(order, fine, strict=True) if not numbers}
        self.tokens += sum(map(len, new))
        bad = LogitsError("the model's logits are NaN or infinite")
        return [bad if k in broken else c for k, c in zip(owners, engine.completions(new), strict=True)]

    def room(self, tokens: int, sampled: bool, top_p: float = 1.0, members: int | None = None) -> int:
        """How many rows with prompts of at most so many tokens are generated at once, of so many members; None: of as
        many members as rows."""
        device, rows = self.engine.model.device, self.engine.batch_size
        if rows is None:
            # Lengths are rounded up, so that few are measured.
            tokens, share = self._rounded(tokens), int(TEXTS_SHARE * own_memory(device))
            row = self.row_bytes(tokens, sampled, top_p)
            rows = share // row.whole if members is None else row.fitting(share, self._read_at_once(members, tokens))
        return max(1, min(rows, MOST_ROWS_ON_CPU) if device.type == "cpu" else rows)

    def bytes_of(self, rows: int, members: int, tokens: int, sampled: bool) -> tuple[int, int]:
        """Bytes that so many rows of so many members take at most while their texts are generated, and the part of them
        that is transient (see RowBytes)."""
        row, read_at_once = self.row_bytes(tokens, sampled), self._read_at_once(members, tokens)
        return row.of(rows, read_at_once), row.transient(rows, read_at_once)

    def _read_at_once(self, members: int, tokens: int) -> int:
        return read_at_once(self.engine.model.device, members, tokens)

    def row_bytes(self, tokens: int, sampled: bool, top_p: float = 1.0) -> RowBytes:
        """Bytes that a row of so many prompt tokens takes while its text is generated."""
        engine, way, key = self.engine, self.way, (tokens, sampled, top_p < 1)
        if key not in self._bytes_of_row:
            steps, seeds = way.config.max_new_tokens, [0] * MEASURED_ROWS
            sampling = SeededSampling(seeds, 1.0, steps, engine.model.device, top_p) if sampled else None
            with engine.own_settings():
                engine.begin_batch(None)
                found = way.row_bytes(tokens, sampling)
            traits = engine.traits
            if not way.room and traits.bytes_fixed is not None:
                # Appending a token to a cache copies it: of one layer there are two.
                grown = 2 * (traits.bytes_fixed + traits.bytes_per_token * (tokens + steps))
                found = RowBytes(max(found.whole, grown))
            self._bytes_of_row[key] = found
        return self._bytes_of_row[key]

    @contextlib.contextmanager
    def threads_to_write(self, members: int) -> Iterator[None]:
        """In the block there are as many threads as are worth it to write so many members."""
        with self._threads():
            if self.way.threads is not None:
                self.way.threads.choose(members * TOKENS_OF_WRITING)
            yield

    def _threads(self) -> contextlib.AbstractContextManager:
        if self.way.threads is None:
            return contextlib.nullcontext()
        return self.way.threads.at_most(torch.get_num_threads() // self.processes)

    def _rounded(self, tokens: int) -> int:
        step = 1 << max(0, tokens.bit_length() - 3)
        rounded, limit = -(-tokens // step) * step, self.engine.prompts.limit
        return rounded if limit is None else max(1, min(rounded, limit - self.way.config.max_new_tokens))

    def _cut(self, lengths: Sequence[int], owners: Sequence[int], room: int) -> Iterator[dict[int, list[int]]]:
        """The numbers of the texts of each batch, by the members that own them; long texts come first."""
        left: dict[int, list[int]] = {k: [] for k in sorted(set(owners))}
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            left[owners[i]].append(i)
        while left:
            some = list(left)[:room]
            each, longest = room // len(some), max(lengths[left[k][0]] for k in some)
            chosen = {}
            for k in some:
                own = left[k][:each]
                fitting = self.engine.traits.batchable([longest, *(lengths[i] for i in own)]) - 1
                if fitting:
                    chosen[k], left[k] = own[:fitting], left[k][fitting:]
            left = {k: own for k, own in left.items() if own}
            yield chosen

    def _generate(
        self, rows: list[list[int]], members: int, seeds: Sequence[int] | None, counts: Sequence[bool]
    ) -> tuple[Tokens, list[bool]]:
        return self.way(rows, members, self.engine.begin_batch(seeds), self.engine.max_new_tokens, counts)


def _filled(own: list[int], most: int) -> list[int]:
    """So many numbers: the member's own, and then its first one, for rows that don't count."""
    return own + own[:1] * (most - len(own))
