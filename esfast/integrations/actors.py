"""Ray actors that do the same work: whoever is free gets the next piece; what one does not finish, another does.

An actor is given up if it dies, if a call raises an error that is not the caller's fault (it ran out of memory, its
engine died), or if a call takes longer than its time limit.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ..utils.errors import BadState, BadValue, EsfastError

log = logging.getLogger(__name__)

# Seconds. Until a call of its kind has been answered nobody knows how long it takes: models are loaded and compiled.
FIRST_LIMIT = 2 * 3600.0
LEAST_LIMIT = 300.0
# For an actor that has not answered what another one has.
LEAST_TOGETHER = 60.0
TIMES_THE_LONGEST = 10
# Errors of arguments: every actor would raise them.
REFUSALS = (EsfastError, ValueError, TypeError)


class Job(NamedTuple):
    """Arguments of a call, and its size in units of any kind, to which the time that it takes is proportional."""

    key: Any
    arguments: tuple
    size: int = 1


class _Call(NamedTuple):
    number: int
    job: Job
    began: float
    limit: float


class TimeLimits:
    """How long a call may take.

    seconds: of every call that is handed out. None: as of calls that all actors get, ten times the longest that calls
    of this kind took before for each unit of their size, at least five minutes; two hours for the first of its kind.
    ValueError for numbers that are not above 0.
    """

    def __init__(self, seconds: float | None = None):
        if seconds is not None and not 0 < seconds < float("inf"):
            raise BadValue(f"engine_timeout: expected seconds, more than 0, or None, got {seconds!r}")
        self._given = seconds
        self._longest: dict[str, float] = {}

    def of(self, kind: str, size: int = 1) -> float:
        """The limit of a call that is handed out."""
        return self._given if self._given is not None else self.usual(kind, size)

    def usual(self, kind: str, size: int = 1) -> float:
        longest = self._longest.get(kind)
        return FIRST_LIMIT if longest is None else max(LEAST_LIMIT, TIMES_THE_LONGEST * longest * size)

    def note(self, kind: str, size: int, seconds: float) -> None:
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds / size)


class Actors:
    """
    Args:
        ray: the module.
        actors: the actors by number.
        limits: time limits of their calls.

    Attribute: `running`, the actors that have not been given up.
    """

    def __init__(self, ray, actors: dict[int, Any], limits: TimeLimits):
        self._ray, self.running, self._limits = ray, actors, limits

    @property
    def alive(self) -> list[int]:
        return sorted(self.running)

    def hand_out(
        self,
        method: str,
        jobs: Iterable[Job],
        split: Callable[[Job], list[Job]] | None = None,
        given: bool = True,
    ) -> Iterator[tuple[Any, Any]]:
        """Yields (key, answer) for each job, which it takes when an actor is free. A job that was not finished is done
        again elsewhere; if memory ran out, in the parts that `split` makes of it. `given`: whether the limit that the
        user gave counts."""
        self.check_open()
        limit_of = self._limits.of if given else self._limits.usual
        waiting, again, idle = iter(jobs), deque[Job](), deque(self.alive)
        busy: dict[Any, _Call] = {}
        while True:
            while idle and (job := again.popleft() if again else next(waiting, None)) is not None:
                number = idle.popleft()
                reference = getattr(self.running[number], method).remote(*job.arguments)
                busy[reference] = _Call(number, job, time.monotonic(), limit_of(method, job.size))
            if not busy:
                return
            nearest = min(call.began + call.limit for call in busy.values())
            done, _ = self._ray.wait(list(busy), num_returns=1, timeout=max(0.0, nearest - time.monotonic()))
            for reference in done or self._overdue(busy):
                call = busy.pop(reference)
                try:
                    if not done:
                        raise TimeoutError(_overdue(method, call.limit))
                    answer = self._ray.get(reference)
                except REFUSALS:
                    raise
                except Exception as error:
                    self.lose(call.number, error)
                    parts = split(call.job) if split is not None and _no_memory(error) else [call.job]
                    again += parts
                    continue
                self._limits.note(method, call.job.size, time.monotonic() - call.began)
                idle.append(call.number)
                yield call.job.key, answer

    def all(self, method: str, *args):
        """The answer of all actors; RuntimeError if they differ."""
        self.check_open()
        what, began = str(args[0] if args else method), time.monotonic()
        limit = self._limits.usual(what)
        waiting = {getattr(actor, method).remote(*args): number for number, actor in self.running.items()}
        answers: dict[int, Any] = {}
        while waiting:
            left = began + limit - time.monotonic()
            done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=max(0.0, left))
            for reference in done or list(waiting):
                number = waiting.pop(reference)
                try:
                    if not done:
                        raise TimeoutError(_overdue(what, limit))
                    answers[number] = self._ray.get(reference)
                except REFUSALS:
                    raise
                except Exception as error:
                    self.lose(number, error)
                    continue
                # All do the same work: once one has answered, it is known how long it takes.
                took = time.monotonic() - began
                limit = min(limit, took + max(LEAST_TOGETHER, TIMES_THE_LONGEST * took))
        self._limits.note(what, 1, time.monotonic() - began)
        first = answers[self.alive[0]]
        for number, answer in answers.items():
            if answer != first:
                raise RuntimeError(f"{what}: engine {self.alive[0]} says {first}, engine {number} says {answer}")
        return first

    def check_open(self) -> None:
        if not self.running:
            raise BadState("the fleet is closed, and its engines are gone with the weights: make another one")

    def lose(self, number: int, error: Exception) -> None:
        """Gives an actor up. RuntimeError if it was the last."""
        self._ray.kill(self.running.pop(number))
        if not self.running:
            raise BadState(f"no engine is left; the last to go, {number}, said: {error}") from error
        text = str(error).strip() or type(error).__name__
        log.warning("engine %d is gone, %d are left: %s", number, len(self.running), text.splitlines()[0])

    def close(self) -> None:
        for actor in self.running.values():
            self._ray.kill(actor)
        self.running = {}

    @staticmethod
    def _overdue(busy: dict[Any, _Call]) -> list:
        now = time.monotonic()
        return [reference for reference, call in busy.items() if call.began + call.limit <= now]


def _overdue(what: str, limit: float) -> str:
    return f"{what} took longer than {limit:.0f} seconds; engine_timeout sets another limit"


def _no_memory(error: Exception) -> bool:
    """Whether memory ran out; Ray wraps errors, and those of a GPU are PyTorch's."""
    causes = (error, getattr(error, "cause", None))
    return any(
        isinstance(e, MemoryError) or "OutOfMemory" in "".join(c.__name__ for c in type(e).__mro__) for e in causes
    )
