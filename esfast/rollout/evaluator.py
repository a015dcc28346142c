"""MemberEvaluator: the interface by which the trainer asks members for completions, and its simplest implementation."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

from ..es.population import Member, Population
from .completion import Asked, Complete, Completion, complete
from .engine import Engine
from .sampling import LogitsError


class MemberEvaluator(Protocol):
    """Asks the members of a population for completions. The trainer does not know where the weights are: a member may
    be the model of this process, one of several in a batch, or in an engine elsewhere.

        trainer = ESTrainer(model, reward, config, rows, evaluator=MyEvaluator(...))

    Attributes:
        engine: generates from the weights between populations, for evaluations on held-out prompts.
        tokens: number of tokens generated so far, by members and by `engine`; 0 if they are not counted.
        own_prompts: optional. True says that it reads `members.prompts_of(member)`, the slice of prompts and seeds that
            a member answers. Otherwise a run with prompts_per_member="own" is refused.
    """

    engine: Engine
    tokens: int

    def evaluate(
        self, members: Population, prompts: Sequence[str], seeds: Sequence[int] | None
    ) -> Generator[tuple[Member, list[str] | LogitsError], None, None]:
        """Yields (member, completions) for each member of this process, in any order. `completions` is a list of
        strings, one for each prompt.

        Args:
            members: the population. Perturbing is the evaluator's work: iterating over `members` writes one member
                after another into the model of this process.
            prompts: strings. All members answer all of them, unless `members.prompts_of` says otherwise; then each
                member answers equally many.
            seeds: for sampled responses an int for each prompt; None: greedy decoding.

        `members.handed_out()` leaves the model alone; use it to make members elsewhere, from their `seed` and `sign`
        and from `members.sigma`. A member's completions must depend only on its weights, the prompts and the seeds, not
        on the order of the members or on the process.

        Between two items the caller scores completions and does not touch the model. The evaluator may work on other
        members meanwhile. Yield a pair as soon as it is there, so that scoring overlaps.

        The weights must be the original ones after the generator has ended, was closed early (Ctrl-C, an error of the
        caller), or raised. A member that iterating left in place is restored by the caller, who holds
        `with es.population() as members`. The evaluator undoes anything else that it did, in a `finally`.

        If a member's weights give no text, yield its LogitsError instead of its completions; ESConfig.on_reward_error
        decides whether the run continues without it. Raise any other exception: it ends the run. If an engine dies, the
        evaluator gives its members to other engines.

        In a team each process has an evaluator, and `members` gives each member to one process, when it asks for its
        next one. Processes that hold a sharded model together get the same members in the same order, and all answer.
        """

    def close(self) -> None:
        """Frees the memory kept between calls, also that of `engine`."""


class SequentialEvaluator:
    """Writes one member after another into the model that `engine` generates from."""

    own_prompts = True

    def __init__(self, engine: Engine):
        self.engine = engine

    @property
    def tokens(self) -> int:
        return getattr(self.engine, "tokens", 0)

    def evaluate(
        self, members: Population, prompts: Sequence[str], seeds: Sequence[int] | None
    ) -> Generator[tuple[Member, list[str] | LogitsError], None, None]:
        for member in members:
            completions: list[str] | LogitsError
            own = members.prompts_of(member)
            try:
                completions = self.engine.generate(prompts[own], *([] if seeds is None else [seeds[own]]))
            except LogitsError as error:
                completions = error
            yield member, completions

    def placed(self, members: Population, sampled: bool) -> Iterator[tuple[list[Member], Complete]]:
        """Yields each member, alone in a list, while it is in place, and how its texts are completed. For those who ask
        a member many times; `sampled` says whether there are seeds."""
        for member in members:
            yield [member], self._complete

    def _complete(
        self, owners: Sequence[int], texts: Sequence[str], seeds: Sequence[int] | None, asked: Asked
    ) -> Sequence[Completion | LogitsError]:
        try:
            return complete(self.engine, texts, seeds, asked)
        except LogitsError as error:
            return [error] * len(texts)

    def close(self) -> None:
        self.engine.close()
