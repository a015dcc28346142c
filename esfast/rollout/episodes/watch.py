"""What code of an episode may not do to the run: block it, end it, or write to its standard output."""

from __future__ import annotations

import asyncio
import collections.abc
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from ...utils.interrupts import came_by_signal
from ...utils.time_limit import TooSlow, now


class Exited(Exception):
    """Code of an episode raised SystemExit or KeyboardInterrupt, which ends the episode and not the run."""


# Shorter steps, in seconds, can't be told from the loop's own work.
LONG_STEP = 0.01


class Watch:
    """Limits how long one step of a task, from one `await` to the next, may take.

    on_long_step  called with a task and the seconds of its step, if it took long
    """

    def __init__(self, seconds: float, on_long_step: Callable[[asyncio.Task | None, float], None]):
        self.seconds, self.on_long_step = seconds, on_long_step
        # When the step that runs began.
        self.since: float | None = None

    def late(self) -> bool:
        return self.since is not None and now() - self.since > self.seconds

    def task(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine,
        on_end: Callable[[], object] | None = None,
        **options: Any,
    ) -> asyncio.Task:
        """A task factory: steps of the tasks of episodes, and of tasks that they make, are limited. `on_end`: see
        Steps."""
        return asyncio.Task(Steps(coroutine, self, on_end), loop=loop, **options)


class Steps(collections.abc.Coroutine):
    """A coroutine whose steps are limited. `on_end` is called in the last one, before its task is done."""

    def __init__(self, coroutine: Any, watch: Watch, on_end: Callable[[], object] | None = None):
        self._coroutine, self._send, self._watch, self._on_end = coroutine, coroutine.send, watch, on_end

    def send(self, value: Any, step: Callable[[Any], Any] | None = None) -> Any:
        """Does one step, `step(value)`. Raises TooSlow if it takes too long, also if it swallows the TooSlow raised
        inside and then waits, and Exited if it exits."""
        watch = self._watch
        outer, watch.since = watch.since, now()
        try:
            try:
                result = (step or self._send)(value)
            except (SystemExit, KeyboardInterrupt) as error:
                if isinstance(error, KeyboardInterrupt) and came_by_signal(error):
                    raise
                raise Exited(f"{type(error).__name__}: {error}") from error
            finally:
                took, watch.since = now() - watch.since, outer
                if took > LONG_STEP and outer is None:
                    watch.on_long_step(asyncio.current_task(), took)
            if took > watch.seconds:
                raise TooSlow
            return result
        except BaseException:
            # Whatever leaves it ends the task, StopIteration as well. A done task keeps its coroutine, and would keep
            # what on_end refers to.
            on_end, self._on_end = self._on_end, None
            if on_end is not None:
                on_end()
            raise

    def throw(self, *error: Any) -> Any:
        return self.send(error, lambda error: self._coroutine.throw(*error))

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Any:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        # libraries ask a task's coroutine for its name and its state
        return getattr(self._coroutine, name)


def described(describe: Callable[[], str], otherwise: str) -> str:
    """`describe()`, which may call code of an episode; `otherwise` if that raises anything but Ctrl-C."""
    try:
        return describe()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and came_by_signal(error):
            raise
        return otherwise


class _Output:
    """The standard output of the process, which blocks in several threads may have redirected."""

    def __init__(self):
        self._lock, self._blocks = threading.Lock(), 0
        self._restore = contextlib.ExitStack()

    def begin(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._redirect()

    def end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                self._restore.close()

    def _redirect(self) -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            kept = os.dup(1)
            self._restore.callback(os.close, kept)
            os.dup2(2, 1)
            self._restore.callback(os.dup2, kept, 1)
        self._restore.enter_context(contextlib.redirect_stdout(sys.stderr))


_output = _Output()


@contextlib.contextmanager
def stdout_is_stderr() -> Iterator[None]:
    """What is written to standard output in the block, by this process or by those that it starts, goes to standard
    error: output of a command stays what the command prints. Blocks of several threads may overlap."""
    _output.begin()
    try:
        yield
    finally:
        _output.end()
