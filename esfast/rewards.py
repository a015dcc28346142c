"""The functions that score completions, in TRL's conventions, in this process or in others."""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

from .reward_worker import Worker, WorkerError, importable, plain
from .rows import Rows

log = logging.getLogger(__name__)

RewardFunc = Callable[..., Sequence[float]]


class RewardError(ValueError):
    """A reward function raised, took too long, or gave something other than one finite number a completion; the
    message begins with its name."""


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

    Workers start when they are first needed, and again after one was killed.
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
        self._pool: ThreadPoolExecutor | None = None
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._all: list[Worker] = []

    def submit(self, functions: Sequence[RewardFunc], rows: Rows, completions: Sequence[str]) -> Future:
        """A future of the rewards, as lists of floats, one for each function; its result() raises RewardError."""
        arguments = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        arguments |= {"prompts": [row["prompt"] for row in rows], "completions": list(completions)}
        if self._workers:
            try:
                pickled = pickle.dumps(arguments)
            except Exception as error:  # pickle has no one kind of its own
                log.warning("reward functions are called in this process: the rows can't be sent to another: %s", error)
                self._workers = 0
        if not self._workers:
            return _completed(lambda: [self._call(f, arguments) for f in functions])
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, "esfast-rewards")  # a thread waits for each process
        return self._pool.submit(self._ask, [self._functions.index(f) for f in functions], pickled, len(completions))

    def close(self) -> None:
        """Ends the processes; what is being scored fails. It may be used again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in self._all:
                worker.kill()
            pool.shutdown()
        self._all, self._idle = [], SimpleQueue()

    def _ask(self, jobs: list[int], pickled: bytes, count: int) -> list[list[float]]:
        try:
            worker = self._idle.get_nowait()
        except Empty:
            worker = Worker(self._names)
            self._all.append(worker)
        answers = []
        try:
            for answer in worker.ask(jobs, pickled, self._timeout):
                answers.append(answer)
        except WorkerError as error:
            name = name_of(self._functions[jobs[len(answers)]])
            raise RewardError(f"reward function {name} {error}") from None
        finally:
            if worker.alive:
                self._idle.put(worker)
        return [check_rewards(self._functions[job], values, count) for job, values in zip(jobs, answers, strict=True)]

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
    there is no SIGALRM, and where somebody else's alarm is set."""
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if seconds == math.inf or not usable or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def late(*received):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _completed(work: Callable[[], Any]) -> Future:
    future: Future = Future()
    try:
        future.set_result(work())
    except RewardError as error:
        future.set_exception(error)
    return future
