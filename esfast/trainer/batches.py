"""The prompts of a generation: rows, their texts for the model, and the seeds of sampled responses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..es.population import Member
from ..rollout import chat
from ..rollout.engine import Engine
from ..rollout.prompts import check_prompts
from ..rollout.sampling import response_seeds
from ..tasks.base import draw
from ..utils.rows import Rows, check_rows
from .config import ESConfig

# Batches of a function that are kept.
KEPT = 8


class Batch(NamedTuple):
    """The prompts of a generation: row i has text i, and seed i if responses are sampled. Episodes of an environment
    begin with their rows, which are their texts, and always have seeds.

    each     rows that a member answers; None: all members answer all rows
    members  how many members, of neighbouring numbers, answer the same rows
    """

    rows: Rows
    texts: list
    seeds: Sequence[int] | None
    each: int | None = None
    members: int = 1

    @property
    def answered(self) -> int:
        """How many rows a member answers."""
        return len(self.texts) if self.each is None else self.each

    def of(self, member: Member) -> slice:
        """The rows that a member answers."""
        if self.each is None:
            return slice(None)
        start = member.index // self.members * self.each
        return slice(start, start + self.each)

    def families(self, members: int) -> list[int] | None:
        """Of so many members those that answer the same rows, as in `ES.step`; None if all or none do."""
        return [i // self.members for i in range(members)] if self.members > 1 else None


class Batches:
    """The batches of a run. The run's seed and the generation's number determine them.

    dataset    rows, drawn without repetition until all were used; or a function (generation, count) -> rows
    tokenizer  whose template turns chats into texts
    episodes   whether each row is an episode's
    """

    def __init__(self, dataset: Rows | Callable[[int, int], Rows], config: ESConfig, tokenizer, episodes: bool = False):
        self._dataset, self._config, self._tokenizer, self._episodes = dataset, config, tokenizer, episodes
        # Cached: the batch that was checked, or searched with, is the batch that is trained on.
        if callable(dataset):
            self._fresh_rows = functools.lru_cache(KEPT)(dataset)

    def __call__(self, generation: int) -> Batch:
        c = self._config
        rows = [row for row in self.rows(generation) for _ in range(c.num_generations)]
        seeds = None
        # The same for members with the same prompts, so that they differ by their weights alone.
        if c.temperature > 0 or self._episodes:
            seeds = response_seeds(c.seed, generation, len(rows) // c.num_generations, c.num_generations)
        batches = c.population_size // c.members_per_batch
        own = (len(rows) // batches, c.members_per_batch) if batches > 1 else ()
        return Batch(rows, self.texts(rows), seeds, *own)

    def first(self, count: int) -> Batch:
        """The first prompts of the run, so many responses or all that there are, those of its first generations."""
        c, parts = self._config, [self(0)]
        fixed = math.inf if callable(self._dataset) else len(self._dataset) * c.num_generations
        while sum(len(part.texts) for part in parts) < min(count, fixed) and len(parts) < KEPT:
            parts.append(self(len(parts)))
        rows = [row for part in parts for row in part.rows][:count]
        texts = [text for part in parts for text in part.texts][:count]
        seeds = None if parts[0].seeds is None else [s for part in parts for s in part.seeds or ()][:count]
        return Batch(rows, texts, seeds)

    def rows(self, generation: int) -> Rows:
        """The rows of all members. A dataset or function that has too few gives some of them to several members."""
        c = self._config
        batches, each = c.population_size // c.members_per_batch, c.prompts_per_generation
        if callable(self._dataset):
            count = batches * each
            fresh = check_rows(f"train_dataset({generation}, {count})", self._fresh_rows(generation, count))
            each = min(each, len(fresh))
            return [fresh[i % len(fresh)] for i in range(batches * each)] if batches > 1 else fresh
        draws = (draw(self._dataset, generation * batches + i, each, c.seed) for i in range(batches))
        return [row for rows in draws for row in rows]

    def texts(self, rows: Rows) -> list:
        return list(rows) if self._episodes else self.rendered(rows)

    def rendered(self, rows: Rows) -> list[str]:
        return chat.render(rows, self._tokenizer, self._config.chat_template_kwargs)

    def check(self, engine: Engine, eval_dataset: Rows | None, progress: bool) -> None:
        """Checks all prompts of fixed data before the run begins; ValueError names the row."""
        for what, rows in (("train_dataset", self._dataset), ("eval_dataset", eval_dataset)):
            if rows is not None and not callable(rows) and not self._episodes:
                check_prompts(what, rows, self.texts, engine, progress)

    def check_fresh(self, engine: Engine, generation: int, progress: bool) -> None:
        """Checks the next batch of rows from a function."""
        if callable(self._dataset) and not self._episodes:
            check_prompts("train_dataset", self.rows(generation), self.texts, engine, progress)
