"""The members of a generation: their seeds, and how they are written into the model one after another."""

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
    """The 64-bit noise seed of a member (of a pair, if mirrored): Philox of (generation, index) under the run's seed,
    in a domain of its own."""
    words = philox(seed, np.uint64(generation << 32 | index), 0, DOMAINS["member_seeds"])
    return int(words[0]) | int(words[1]) << 32


@dataclass
class Member:
    """One perturbed model: theta + sign * sigma * noise(seed). Set `reward` in the loop's body.

    Attributes:
        index: number of the member in its population, from 0.
        seed: seed of its noise, 0 <= seed < 2**64.
        sign: +1 or -1; -1 only for the second member of a mirrored pair.
        reward: a finite number, higher is better; None until it is set, or if the member is to be set aside.
    """

    index: int
    seed: int
    sign: int
    reward: float | None = None


class Population:
    """The members of one generation, each in place while the body of the loop runs.

    Moving from one member to the next is one pass over the weights. They are restored after the last member, and on
    break, return or an exception. Leaving a `for` loop early restores at once on CPython, which closes the abandoned
    iterator. The `with` form restores at once on any interpreter.

    Attributes: `members`, all members of the generation; `es`, the ES that they belong to; `sigma`; `on_placed`, a
    function that is called whenever a member is in place, so that a caller can measure time; `prompts_of`, a function
    that gives the slice of a generation's prompts that a member answers: all of them, unless the trainer sets another.
    """

    def __init__(self, es: ES, members: list[Member]):
        self.es, self.members = es, members
        self.on_placed: Callable[[], None] = _nothing
        self.prompts_of: Callable[[Member], slice] = _all

    @property
    def sigma(self) -> float:
        return self.es.sigma

    def handed_out(self) -> Iterator[Member]:
        """Yields the members of this process without writing them: for evaluators that make members elsewhere.

        In a team a process takes a member when it asks for the next one, so ask only when ready. A slow process then
        gets fewer members.
        """
        for packet in self.packets(1):
            yield from packet

    def packets(self, at_once: int) -> Iterator[list[Member]]:
        """Like `handed_out`, but yields lists of `at_once` members; the last list may be shorter. The processes of a
        team may use different lengths."""
        es = self.es
        for numbers in es.team.packets(es._turn, len(self.members), at_once):
            if self.members is not es.members:
                raise BadState("this population is of the past; ask for a new one with es.population()")
            packet = [self.members[i] for i in numbers]
            es._mine += packet
            yield packet

    def __iter__(self) -> Iterator[Member]:
        es = self.es
        mine: list[Member] = []
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
        inside = self.es._inside
        if inside is not None and id(inside) in map(id, members):
            self.es._leave()


class Packets:
    """The members of one generation in lists of `at_once`, for a body that perturbs and evaluates them itself.

    The model keeps its unperturbed weights, and its buffers are put back after each list.
    """

    def __init__(self, population: Population, at_once: int):
        self.population, self.at_once = population, at_once

    def __iter__(self) -> Iterator[list[Member]]:
        buffers = self.population.es._buffers
        buffers.note()
        for packet in self.population.packets(self.at_once):
            try:
                yield packet
            finally:
                buffers.put_back()

    def __len__(self) -> int:
        """The number of lists, if this process gets all of them."""
        return -(-len(self.population) // self.at_once)


def _nothing() -> None: ...


def _all(member: Member) -> slice:
    return slice(None)
