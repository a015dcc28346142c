"""The event loop that episodes run on. It reports when no task can continue, and ends a step that blocks it."""

from __future__ import annotations

import asyncio
import collections.abc
import contextlib
import os
import selectors
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ...utils.interrupts import came_by_signal
from ...utils.time_limit import TooSlow, interrupting, now


class Exited(Exception):
    """Code of an episode raised SystemExit or KeyboardInterrupt, which ends the episode and not the run."""


class Selector(selectors.DefaultSelector):
    """Calls `before(timeout)` whenever the loop looks for events, and waits for the timeout that it returns. A timeout
    of None or above 0 means that no task can continue: each waits for a timer, for something outside, or for the
    engine."""

    def __init__(self, before: Callable[[float | None], float | None]):
        super().__init__()
        self._before = before

    def select(self, timeout: float | None = None):
        return super().select(self._before(timeout))


# Shorter steps, in seconds, can't be told from the loop's own work.
LONG_STEP = 0.01


class Watch:
    """Limits how long one step of a task, from one `await` to the next, may take.

    on_long_step  called with a task and the seconds of its step, if it took long
    """

    def __init__(self, seconds: float, on_long_step: Callable[[asyncio.Task | None, float], None]):
        self.seconds, self._on_long_step = seconds, on_long_step
        self._since: float | None = None

    def late(self) -> bool:
        return self._since is not None and now() - self._since > self.seconds

    def step(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """`call(*arguments)`. Raises TooSlow if it takes too long, also if it swallows the TooSlow raised inside, and
        Exited if it exits."""
        outer, self._since = self._since, now()
        try:
            result = call(*arguments)
        except (SystemExit, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt) and came_by_signal(error):
                raise
            raise Exited(f"{type(error).__name__}: {error}") from error
        else:
            if self.late():
                raise TooSlow
            return result
        finally:
            took, self._since = now() - self._since, outer
            if outer is None and took > LONG_STEP:
                self._on_long_step(asyncio.current_task(), took)

    def task(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine, **options: Any) -> asyncio.Task:
        """A task factory: steps of the tasks of episodes, and of tasks that they make, are limited."""
        return asyncio.Task(Steps(coroutine, self), loop=loop, **options)


class Steps(collections.abc.Coroutine):
    """A coroutine whose steps are limited."""

    def __init__(self, coroutine: Any, watch: Watch):
        self._coroutine, self._watch = coroutine, watch

    def send(self, value: Any) -> Any:
        return self._watch.step(self._coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        return self._watch.step(self._coroutine.throw, *error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        # libraries ask a task's coroutine for its name and its state
        return getattr(self._coroutine, name)


class DaemonThreads(ThreadPoolExecutor):
    """Runs each call in a thread of its own, which does not keep the process from ending."""

    def submit(self, function, /, *arguments, **options) -> Future:
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(function(*arguments, **options))
            except BaseException as error:
                with contextlib.suppress(Exception):
                    future.set_exception(error)

        threading.Thread(target=run, name="esfast episode", daemon=True).start()
        return future


@contextlib.contextmanager
def event_loop(
    before_select: Callable[[float | None], float | None],
    step_seconds: float,
    on_long_step: Callable[[asyncio.Task | None, float], None],
) -> Iterator[asyncio.AbstractEventLoop]:
    """A new event loop for this thread, which may be running another one (as notebooks do). Tasks that are left at the
    end are cancelled, and forgotten if they don't end."""
    outer, watch = asyncio._get_running_loop(), Watch(step_seconds, on_long_step)
    asyncio._set_running_loop(None)
    loop = asyncio.SelectorEventLoop(Selector(before_select))
    factory: Any = watch.task
    loop.set_task_factory(factory)
    loop.set_default_executor(DaemonThreads())
    # What episodes leave behind is theirs: a run does not show it.
    loop.set_exception_handler(lambda loop, context: None)
    try:
        with interrupting(watch.late, min(1.0, step_seconds / 4)):
            try:
                yield loop
            finally:
                # Steps are limited here, too: a task may block when it is cancelled.
                _end(loop)
    finally:
        asyncio._set_running_loop(outer)


def _end(loop: asyncio.AbstractEventLoop) -> None:
    for _ in range(3):
        left = asyncio.all_tasks(loop)
        if not left:
            break
        for task in left:
            task.cancel()
        loop.call_soon(loop.stop)
        loop.run_forever()
    for task in asyncio.all_tasks(loop):
        # asyncio would print that it was destroyed
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()


@contextlib.contextmanager
def stdout_is_stderr() -> Iterator[None]:
    """What is written to standard output in the block, by this process or by those that it starts, goes to standard
    error: output of a command stays what the command prints."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
