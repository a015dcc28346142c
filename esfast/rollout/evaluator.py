"""Who scores the members of a population: the protocol that the trainer knows, and its plainest way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from ..es.population import Member, Population
from .engine import Engine
from .sampling import LogitsError


class MemberEvaluator(Protocol):
    """Asks the members of a population for completions. The trainer knows this much of them, and nothing of where
    weights are: a member may be the model of this process, one of several in a batch, or in an engine elsewhere.

        trainer = ESTrainer(model, reward, config, rows, evaluator=MyEvaluator(...))

    engine   answers for the weights as they are between two populations: evaluations on held-out prompts
    tokens   how many were generated so far, by members and by `engine`; 0 where nobody counts
    """

    engine: Engine
    tokens: int

    def evaluate(
        self, members: Population, prompts: Sequence[str], seeds: Sequence[int] | None
    ) -> Iterator[tuple[Member, list[str] | LogitsError]]:
        """A generator of each member that falls to this process, in any order, with a completion for each prompt.

        prompts  the texts to go on with, the same for all members
        seeds    one for each prompt where responses are sampled, the same for all members; None: greedily

        Who perturbs: the evaluator. Iterating over `members` writes one after another into the model of this process.
        `members.handed_out()` leaves the model alone, for who makes a member of its `seed` and `sign` and the
        `members.sigma` elsewhere. A member's completions depend on its weights, the prompts and the seeds alone, not on
        the order or on who asked.

        What holds between two items: the caller scores completions and does not touch the model; the evaluator may
        have other members in the works. A pair is given as soon as it is there, so that scoring overlaps.

        How it ends: used up, closed early (Ctrl-C, an error of the caller's), or with an exception. In each case the
        weights must be those of before. The caller holds `with es.population() as members`, which restores a member
        that iterating left in place, so that an evaluator undoes only what else it did, in a `finally`.

        Exceptions: where one member's weights give no text, its LogitsError takes the place of its completions, and
        ESConfig.on_reward_error says whether the run goes on without it. Any other exception ends the run: raise it.
        Engines that die are the evaluator's to replace: it hands their members to others.

        Teams: each process has an evaluator, and `members` gives each member to one process, when it is asked for the
        next one. Processes that hold a model in shards together get the same members in the same order, and all answer.
        """

    def close(self) -> None:
        """Frees what was kept between calls, of `engine` too."""


class SequentialEvaluator:
    """One member after another in the place of the model that `engine` generates from."""

    def __init__(self, engine: Engine):
        self.engine = engine

    @property
    def tokens(self) -> int:
        return getattr(self.engine, "tokens", 0)

    def evaluate(
        self, members: Population, prompts: Sequence[str], seeds: Sequence[int] | None
    ) -> Iterator[tuple[Member, list[str] | LogitsError]]:
        for member in members:
            try:
                completions = self.engine.generate(prompts, *([] if seeds is None else [seeds]))
            except LogitsError as error:
                completions = error
            yield member, completions

    def close(self) -> None:
        self.engine.close()
