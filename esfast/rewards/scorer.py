"""Calls reward functions, which follow TRL's conventions, in this process or in worker processes."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import pickle
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

from ..utils.errors import BadType, BadValue
from ..utils.interrupts import came_by_signal
from ..utils.rows import Rows, check_text, columns
from ..utils.stats import mean, standard_error
from ..utils.time_limit import TooSlow, limited
from .worker import Job, NotRewards, Worker, importable, now, numbers, raised

log = logging.getLogger(__name__)

RewardFunc = Callable[..., Sequence[float]]

# The largest reward, about float32's maximum: larger ones make sums and squares infinite.
LARGEST = 3.4e38
# Exceptions that count as a failure of the function; KeyboardInterrupt counts only if no signal raised it. Any other
# BaseException is not the function's, but for example that of a test's time limit, and is passed on.
FAILURES = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError, KeyboardInterrupt)
# Names that metrics can't have: the trainer logs the first four as eval_NAME itself, the others are in each row.
RESERVED = ("reward", "reward_se", "length", "kl_to_base", "generation", "seconds")


class RewardError(BadValue):
    """A reward function raised, exited, took too long, or did not return one finite number for each completion. The
    message begins with the function's name."""


class Scores:
    """The rewards of one member's completions, which may not be there yet."""

    def __init__(self, result: Callable[[], list[list[float | None]]]):
        self._result = result

    def result(self) -> list[list[float | None]]:
        """Waits for the rewards: a list for each function, with one reward a completion. Raises RewardError."""
        return self._result()


class Scorer:
    """Calls reward functions, in this process or in processes of their own.

        scorer = Scorer([accuracy, brevity], workers=1, timeout=60)
        scores = scorer.submit([accuracy], rows, completions)  # returns at once; the next member may be generated
        scores.result()                                        # [[1.0, 0.0, ...]]: a list for each function

    functions   all functions that will be submitted, each f(prompts=, completions=, **columns) -> one number a
    completion workers     processes that score, each one member at a time; 0: this process scores, during `submit`. A
    worker
                imports the functions by name, and sees neither this process's variables nor its model. If one of them
                can't be imported (a closure, a lambda, a function of the script), all run in this process, and a
                message says so
    timeout     seconds that a function may take for one member's completions. A worker that takes longer is killed. In
                this process the function is interrupted; see time_limit.limited for what can't be interrupted

    Each call gets its own copies of the arguments, so a function may change them.
    Workers start when they are first needed, and again after one was killed. `submit` and `result` give workers their
    next member and notice that one hangs. If scoring takes longer than generating, take more workers.
    """

    def __init__(self, functions: Sequence[RewardFunc], workers: int = 0, timeout: float = math.inf):
        self._functions = list(dict.fromkeys(functions))
        self._workers, self._timeout = workers, timeout
        names = [importable(f) for f in self._functions]
        if workers and None in names:
            alone = name_of(self._functions[names.index(None)])
            log.warning(
                "reward functions are called in this process: %s can't be imported by name in another; "
                "a function at the top of a module of its own can",
                alone,
            )
            self._workers = 0
        self._names = names
        self._running: list[Worker] = []
        self._waiting: deque[Job] = deque()

    def submit(self, functions: Sequence[RewardFunc], rows: Rows, completions: Sequence[str]) -> Scores:
        """Begins to score the completions; returns at once."""
        if self._workers:
            try:
                pickled = pickle.dumps(columns(rows, completions))
            except Exception as error:
                # pickle raises exceptions of many types.
                log.warning("reward functions are called in this process: the rows can't be sent to another: %s", error)
                self._workers = 0
        if not self._workers:
            try:
                scores = [self._call(f, columns(rows, completions)) for f in functions]
            except RewardError as error:
                return Scores(functools.partial(_raise, error))
            return Scores(lambda: scores)
        task = Job([self._functions.index(f) for f in functions], pickled)
        self._waiting.append(task)
        self._look()
        return Scores(lambda: self._result(task, len(completions)))

    def close(self) -> None:
        """Ends the workers; scores that are not there yet fail. The Scorer can be used again."""
        for worker in self._running:
            worker.stop("was stopped: the scorer was closed")
        for task in self._waiting:
            task.error = "was not called: the scorer was closed"
        self._running, self._waiting = [], deque()

    def _look(self, until: Job | None = None) -> None:
        """Gives tasks to free workers and reads the answers that are there; with a task, waits until it is done."""
        while True:
            self._running = [worker for worker in self._running if worker.alive or worker.task is not None]
            idle = [worker for worker in self._running if worker.task is None]
            while self._waiting and (idle or len(self._running) < self._workers):
                if not idle:
                    idle.append(Worker(self._names, self._timeout))
                    self._running.append(idle[-1])
                idle.pop().give(self._waiting.popleft())
            busy: dict[Any, Worker] = {worker.connection: worker for worker in self._running if worker.task is not None}
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

    def _result(self, task: Job, count: int) -> list[list[float | None]]:
        self._look(task)
        functions = [self._functions[job] for job in task.jobs]
        if task.error is not None:
            raise RewardError(f"reward function {name_of(functions[len(task.answers)])} {task.error}")
        return [
            check_rewards(function, values, count) for function, values in zip(functions, task.answers, strict=True)
        ]

    def _call(self, function: RewardFunc, arguments: Mapping[str, list]) -> list[float | None]:
        count = len(arguments["completions"])
        try:
            values = limited(self._timeout, lambda: numbers(function(**arguments), count))
        except TooSlow:
            raise RewardError(f"reward function {name_of(function)} gave no rewards in {self._timeout:g} s") from None
        except NotRewards as error:
            raise RewardError(f"reward function {name_of(function)} {error}") from None
        except RewardError:
            # Its message says it all: an episode of an environment failed.
            raise
        except FAILURES as error:
            if isinstance(error, KeyboardInterrupt) and came_by_signal(error):
                raise
            raise RewardError(f"reward function {name_of(function)} {raised(error)}") from error
        return check_rewards(function, values, count)


def name_of(function: RewardFunc) -> str:
    """The name for messages: the function's, of a functools.partial that of its function, of an object that of its
    class."""
    function = getattr(function, "func", function)
    return getattr(function, "__name__", None) or type(function).__name__


def check_metrics(metrics: Mapping[str, RewardFunc] | None) -> dict[str, RewardFunc]:
    """The metrics as a dict. TypeError if they are not a mapping; ValueError for a name that can't be logged as
    eval_NAME."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise BadType(f"metrics: expected functions by name, as {{'accuracy': f}}, got {type(metrics).__name__}")
    for name in metrics or ():
        if isinstance(name, str):
            check_text("metrics", name)
        if not isinstance(name, str) or not re.fullmatch(r"[^\W_][\w./-]{0,63}", name):
            raise BadValue(
                f"metrics: expected a name of at most 64 letters, digits and . _ - /, a letter first, got {name!r:.80}"
            )
        if name in RESERVED:
            raise BadValue(
                f"metrics: {name!r} is a name of the trainer's own; choose one other than {', '.join(RESERVED)}"
            )
    return dict(metrics or {})


def judge(
    scorer: Scorer,
    reward_funcs: Sequence[RewardFunc],
    weights: Sequence[float],
    metrics: Mapping[str, RewardFunc],
    rows: Rows,
    completions: Sequence,
    skip: bool = False,
) -> tuple[list[list[float | None]], dict[str, float]]:
    """Scores an evaluation. Returns a list for each reward function, and the figures to log: eval_reward with its
    standard error, and eval_NAME of each metric.

    With `skip`, a function that fails gives a warning, and its figures are left out (for a reward function eval_reward,
    and its list holds only None). Without `skip` it raises RewardError. A metric that is None for every row is left
    out.
    """

    def of(scores: Callable[..., list], *arguments) -> list:
        try:
            return scores(*arguments)
        except RewardError as error:
            if not skip:
                raise
            log.warning("the evaluation goes without: %s", error)
            return []

    pending = [scorer.submit([f], rows, completions) for f in [*reward_funcs, *metrics.values()]]
    values = [of(lambda future: future.result()[0], p) for p in pending]
    scores, named = values[: len(reward_funcs)], zip(metrics, values[len(reward_funcs) :], strict=True)
    rewards = of(combine, scores, weights) if all(scores) else []
    figures = {"eval_reward": mean(rewards)} if rewards else {}
    if len(rewards) > 1:
        figures["eval_reward_se"] = standard_error(rewards)
    for name, each in named:
        if said := [value for value in each if value is not None]:
            figures[f"eval_{name}"] = mean(said)
    return [s or [None] * len(completions) for s in scores], figures


def combine(scores: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float]:
    """The reward of each completion: the weighted sum over the functions (`scores` has a list for each). As in TRL, a
    None leaves that function out for this completion. A completion for which all return None is left out; RewardError
    if no completion remains."""
    rewards = []
    for i, values in enumerate(zip(*scores, strict=True)):
        said = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
        if said and not sum(map(abs, said)) <= LARGEST:
            raise RewardError(
                f"reward functions: the weighted sum for completion {i} is too large ({said}): rewards, "
                f"and their sums with reward_weights, are limited to {LARGEST:g}"
            )
        if said:
            rewards.append(math.fsum(said))
    if not rewards:
        raise RewardError("reward functions: there is no completion of which one of them returned anything but None")
    return rewards


def each(scores: Sequence[Sequence[float | None]], weights: Sequence[float]) -> list[float]:
    """As `combine`, but with a number for each completion: NaN for one that all functions abstain from."""
    rows = list(zip(*scores, strict=True))
    return [math.nan if all(v is None for v in row) else combine([[v] for v in row], weights)[0] for row in rows]


def check_rewards(function: RewardFunc, values: list, count: int) -> list[float | None]:
    """Raises RewardError unless there are `count` rewards, each a finite number or None (the function abstains)."""
    if len(values) != count:
        got = len(values) if len(values) < count else "more"
        raise RewardError(f"reward function {name_of(function)}: expected {count} rewards, got {got}")
    for i, value in enumerate(values):
        wrong = None
        if isinstance(value, str) or (value is not None and not math.isfinite(value)):
            wrong = "no finite number"
        elif value is not None and abs(value) > LARGEST:
            wrong = f"too large: rewards are limited to {LARGEST:g}"
        if wrong:
            raise RewardError(f"reward function {name_of(function)}: its reward for completion {i} is {value}, {wrong}")
    return values


def _raise(error: Exception):
    raise error
