"""Members that play episodes: as many at the same time as are in place at once."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ...es.population import Member, Population
from ...utils.errors import BadType
from ..completion import Complete
from ..sampling import LogitsError
from .engine import Episodes
from .episode import Episode
from .session import MEMBER

Answers = Generator[tuple[Member, "list[Episode] | LogitsError"], None, None]


class Places(Protocol):
    """A MemberEvaluator whose members can be asked many times."""

    tokens: int

    def placed(self, members: Population, sampled: bool) -> Iterator[tuple[list[Member], Complete]]:
        """Yields the members of this process in lists: those that are in place until the next list is asked for, and
        how their texts are completed. `sampled` says whether there are seeds. With the last list, or when the iterator
        is closed, the weights are the original ones again."""

    def close(self) -> None: ...


def check_places(evaluator: Any) -> None:
    """TypeError if members that play episodes can't be asked through this evaluator, or not in its own way."""
    if not callable(getattr(evaluator, "placed", None)):
        raise BadType(
            "evaluator: an environment's members are asked many times, for which it needs a method `placed` (see "
            "esfast.rollout.episodes.Places); or give an engine"
        )
    # Where each of the two is defined, the nearest place first; what __getattr__ finds comes last.
    levels = [getattr(evaluator, "__dict__", {}), *map(vars, type(evaluator).__mro__)]
    evaluate, placed = (
        next((place for place, names in enumerate(levels) if name in names), len(levels))
        for name in ("evaluate", "placed")
    )
    if evaluate < placed:
        raise BadType(
            f"evaluator: {type(evaluator).__name__} has an `evaluate` of its own, but not a `placed`: an environment's "
            "members are asked through `placed` alone (see esfast.rollout.episodes.Places), so its `evaluate` would "
            "never be called; override `placed`, too"
        )


class EpisodesEvaluator:
    """The MemberEvaluator whose prompts are rows, and whose completions are episodes.

    engine  plays the episodes
    places  puts members in place; those of one list play at the same time. Requests of all their episodes are
            answered together
    """

    own_prompts = True

    def __init__(self, engine: Episodes, places: Places):
        self.engine, self._places = engine, places

    @property
    def tokens(self) -> int:
        return self._places.tokens

    def evaluate(self, members: Population, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None) -> Answers:
        for some, complete in self._places.placed(members, seeds is not None):
            own = [members.prompts_of(member) for member in some]
            yield from zip(
                some,
                self.engine.of_members(
                    [rows[o] for o in own],
                    None if seeds is None else [seeds[o] for o in own],
                    complete,
                    [f"{MEMBER}-{member.index}" for member in some],
                ),
                strict=True,
            )

    def close(self) -> None:
        self.engine.close_endpoint()
        self._places.close()
