"""The members of a generation: who they are, and how each of them comes to be in the model's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..core.noise import DOMAINS, philox
from ..utils.errors import BadState

if TYPE_CHECKING:
    from .es import ES


def member_seed(seed: int, generation: int, index: int) -> int:
    """The 64-bit noise seed of one member (of one pair, if mirrored): Philox of (generation, index) under the run's
    seed, in a domain of its own."""
    words = philox(seed, np.uint64(generation << 32 | index), 0, DOMAINS["member_seeds"])
    return int(words[0]) | int(words[1]) << 32


@dataclass
class Member:
    """One perturbed model: theta + sign * sigma * noise(seed). Set `reward` (higher is better) in the loop's body."""

    index: int
    seed: int
    sign: int
    reward: float | None = None


class Population:
    """The members of one generation, each in place while the body of the loop runs.

    From one member to the next there is one pass over the weights; they are restored after the last, on break, return
    or an exception. Leaving a `for` loop early restores at once on CPython, which closes the abandoned iterator; the
    `with` form doesn't lean on that.

    Attributes: `members`, all of the generation's; `sigma`; `on_placed`, which is called whenever a member is in place,
    for clocks.
    """

    def __init__(self, es: ES, members: list[Member]):
        self._es, self.members = es, members
        self.on_placed: Callable[[], None] = _nothing

    @property
    def sigma(self) -> float:
        return self._es.sigma

    def handed_out(self) -> Iterator[Member]:
        """The members that fall to this process, none of them in place: for evaluators that make members elsewhere.

        In a team the next one is taken when it is asked for, so who is slow gets fewer: ask when ready for it.
        """
        for packet in self.packets(1):
            yield from packet

    def packets(self, at_once: int) -> Iterator[list[Member]]:
        """As `handed_out`, in lists of `at_once` members, the last one perhaps shorter. Processes of a team may ask for
        lists of different lengths."""
        es = self._es
        for numbers in es.team.packets(es._turn, len(self.members), at_once):
            if self.members is not es.members:
                raise BadState("this population is of the past; ask for a new one with es.population()")
            packet = [self.members[i] for i in numbers]
            es._mine += packet
            yield packet

    def __iter__(self) -> Iterator[Member]:
        es, mine = self._es, []
        try:
            for member in self.handed_out():
                if es._inside is not (mine[-1] if mine else None):
                    raise BadState("population: this loop was left, or another loop has its member in place")
                mine.append(member)
                es._enter(member)
                self.on_placed()
                yield member
        finally:
            try:
                self._leave(mine)
            except KeyboardInterrupt:
                # Ctrl-C just before the restore in ES._leave: restore, then raise.
                self._leave(mine)
                raise

    def __len__(self) -> int:
        return len(self.members)

    def __enter__(self) -> Population:
        return self

    def __exit__(self, *exc) -> None:
        try:
            self._leave(self.members)
        except KeyboardInterrupt:
            self._leave(self.members)
            raise

    def _leave(self, members: Sequence[Member]) -> None:
        # An abandoned iterator may be closed at any time; it must not restore the member of a later loop.
        inside = self._es._inside
        if inside is not None and id(inside) in map(id, members):
            self._es._leave()


class Packets:
    """The members of one generation in lists of `at_once`, for a body that perturbs and evaluates them itself.

    The model keeps its unperturbed weights, and its buffers are put back after each list.
    """

    def __init__(self, population: Population, at_once: int):
        self.population, self.at_once = population, at_once

    def __iter__(self) -> Iterator[list[Member]]:
        buffers = self.population._es._buffers
        buffers.note()
        for packet in self.population.packets(self.at_once):
            try:
                yield packet
            finally:
                buffers.put_back()

    def __len__(self) -> int:
        """How many lists there are, if this process gets all of them."""
        return -(-len(self.population) // self.at_once)


def _nothing() -> None: ...
