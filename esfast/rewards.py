"""The functions that score completions, in TRL's conventions, in this process or in others."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait

from .reward_worker import Task, Worker, importable, now, plain
from .rows import Rows

log = logging.getLogger(__name__)

RewardFunc = Callable[..., Sequence[float]]


class RewardError(ValueError):
    """A reward function raised, took too long, or gave something other than one finite number a completion; the
    message begins with its name."""


class Scores:
    """The rewards of one member's completions, which may still be in the making."""

    def __init__(self, result: Callable[[], list[list[float | None]]]):
        self._result = result

    def result(self) -> list[list[float | None]]:
        """A list for each function, of one reward a completion; waits for them. Raises RewardError."""
        return self._result()


class Scorer:
    """Calls reward functions, in this process or in processes of their own.

        scorer = Scorer([accuracy, brevity], workers=1, timeout=60)
        scores = scorer.submit([accuracy], rows, completions)  # returns at once; the next member may be generated
        scores.result()                                        # [[1.0, 0.0, ...]]: a list for each function

    functions   all that will ever be submitted, each f(prompts=, completions=, **columns) -> one number a completion
    workers     processes that score, each one member at a time; 0: in this process, during `submit`. A process imports
                the functions by name and sees neither this process's variables nor its model. Where one of them has no
                name to import it by (a closure, a lambda, the script that runs), all are called here, with a word
    timeout     seconds that a function may take for one member's completions. A worker that takes longer is killed; in
                this process, the function is interrupted, which C code that never returns to Python escapes

    Workers start when they are first needed, and again after one was killed. They are handed their next member, and it
    is seen that one hangs, in `submit` and in `result`: where scoring takes longer than generating, take more workers.
    """

    def __init__(self, functions: Sequence[RewardFunc], workers: int = 0, timeout: float = math.inf):
        self._functions = list(dict.fromkeys(functions))
        self._workers, self._timeout = workers, timeout
        names = [importable(f) for f in self._functions]
        if workers and None in names:
            alone = name_of(self._functions[names.index(None)])
            log.warning("reward functions are called in this process: %s can't be imported by name in another; "
                        "a function at the top of a module of its own can", alone)  # fmt: skip
            self._workers = 0
        self._names = names
        self._running: list[Worker] = []
        self._waiting: deque[Task] = deque()

    def submit(self, functions: Sequence[RewardFunc], rows: Rows, completions: Sequence[str]) -> Scores:
        """Their rewards, soon."""
        arguments = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        arguments |= {"prompts": [row["prompt"] for row in rows], "completions": list(completions)}
        if self._workers:
            try:
                pickled = pickle.dumps(arguments)
            except Exception as error:  # pickle has no one kind of its own
                log.warning("reward functions are called in this process: the rows can't be sent to another: %s", error)
                self._workers = 0
        if not self._workers:
            try:
                scores = [self._call(f, arguments) for f in functions]
            except RewardError as error:
                return Scores(functools.partial(_raise, error))
            return Scores(lambda: scores)
        task = Task([self._functions.index(f) for f in functions], pickled)
        self._waiting.append(task)
        self._look()
        return Scores(lambda: self._result(task, len(completions)))

    def close(self) -> None:
        """Ends the processes; what is not scored yet fails. It may be used again."""
        for worker in self._running:
            worker.stop("was stopped: the scorer was closed")
        for task in self._waiting:
            task.error = "was not called: the scorer was closed"
        self._running, self._waiting = [], deque()

    def _look(self, until: Task | None = None) -> None:
        """Hands out tasks and takes what answers are there, or waits until the task is done."""
        while True:
            self._running = [worker for worker in self._running if worker.alive or worker.task is not None]
            idle = [worker for worker in self._running if worker.task is None]
            while self._waiting and (idle or len(self._running) < self._workers):
                if not idle:
                    idle.append(Worker(self._names, self._timeout))
                    self._running.append(idle[-1])
                idle.pop().give(self._waiting.popleft())
            busy = {worker.connection: worker for worker in self._running if worker.task is not None}
            first = min((worker.deadline for worker in busy.values()), default=math.inf)
            patience = 0.0 if until is None else None if first == math.inf else max(0.0, first - now())
            answered = [] if until is not None and until.done else wait(list(busy), patience)
            for connection in answered:
                busy[connection].take()
            for worker in busy.values():
                if worker.task is not None and worker.connection not in answered and now() > worker.deadline:
                    worker.expire()
            if not answered if until is None else until.done:
                return

    def _result(self, task: Task, count: int) -> list[list[float | None]]:
        self._look(task)
        functions = [self._functions[job] for job in task.jobs]
        if task.error is not None:
            raise RewardError(f"reward function {name_of(functions[len(task.answers)])} {task.error}")
        return [
            check_rewards(function, values, count) for function, values in zip(functions, task.answers, strict=True)
        ]

    def _call(self, function: RewardFunc, arguments: Mapping[str, list]) -> list[float]:
        try:
            with time_limit(self._timeout):
                values = plain(function(**arguments))
        except TooSlow:
            raise RewardError(f"reward function {name_of(function)} gave no rewards in {self._timeout:g} s") from None
        except Exception as error:
            raise RewardError(f"reward function {name_of(function)} raised {type(error).__name__}: {error}") from error
        return check_rewards(function, values, len(arguments["completions"]))


def name_of(function: RewardFunc) -> str:
    return getattr(function, "__name__", repr(function))


def combine(scores: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float]:
    """Each completion's reward: the weighted sum of the functions' (`scores`, a list each). As in TRL, a function that
    returns None has no say in that completion, and a completion on which all do is left out; RewardError if all are."""
    rewards = []
    for values in zip(*scores, strict=True):
        said = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
        if said:
            rewards.append(math.fsum(said))
    if not rewards:
        raise RewardError("reward functions: there is no completion of which one of them returned anything but None")
    return rewards


def check_rewards(function: RewardFunc, values: list, count: int) -> list[float | None]:
    """Raises RewardError unless they are `count` finite numbers, or None for "not mine to say"."""
    if len(values) != count:
        raise RewardError(f"reward function {name_of(function)}: expected {count} rewards, got {len(values)}")
    for i, value in enumerate(values):
        if value is not None and (not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise RewardError(
                f"reward function {name_of(function)}: its reward for completion {i} is {value}, no finite number"
            )
    return [None if v is None else float(v) for v in values]


class TooSlow(BaseException):
    """Raised inside a reward function, where `except Exception` shall not catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow in the block after so many seconds. Without effect in other threads than the main one, where
    there is no SIGALRM, and where somebody else's alarm rings before; one that rings later is set again afterwards."""
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    theirs, interval = signal.getitimer(signal.ITIMER_REAL) if usable else (0.0, 0.0)
    if not usable or seconds == math.inf or 0 < theirs <= seconds:
        yield
        return

    def late(*received):
        raise TooSlow

    began = now()
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if theirs:  # at once, if it has become due
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, theirs - (now() - began)), interval)


def _raise(error: Exception):
    raise error
