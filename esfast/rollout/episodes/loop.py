"""The event loop that episodes run on. It says when no task can continue, and serves one run after another."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ...utils.time_limit import interrupting
from .watch import Watch

# The timeout of a look for events -> the timeout to wait for.
Look = Callable[[float | None], float | None]


class EpisodeLoop(asyncio.SelectorEventLoop):
    """An event loop that calls `look(timeout)` whenever it looks for events, and waits for the timeout that it returns.
    A timeout of None or above 0 means that no task can continue: each waits for a timer, for something outside, or for
    the engine. `watch` limits the steps of its tasks while it is lent."""

    def __init__(self):
        self.look: Look = _unchanged
        self.watch: Watch | None = None
        self._together: list[tuple[Callable, tuple, Any]] | None = None
        super().__init__(_Selector(self))
        self.set_default_executor(DaemonThreads())
        # What episodes leave behind is theirs: a run does not show it.
        self.set_exception_handler(lambda loop, context: None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """The tasks that are woken in the block go on in one callback of the loop. One for each takes longer."""
        calls = self._together = []
        try:
            yield
        finally:
            self._together = None
            super().call_soon(self._call_all, iter(calls))

    def start(self, coroutine: Coroutine, on_end: Callable[[], object]) -> asyncio.Task:
        """A task whose steps are limited, and whose last step calls `on_end`, however it ends; the task is done after
        that step. `add_done_callback` would take another pass of the loop, 2 microseconds."""
        assert self.watch is not None
        return self.watch.task(self, coroutine, on_end)

    def call_soon(self, callback: Callable, *arguments: Any, context: Any = None) -> Any:  # type: ignore[override]
        if self._together is None or context is None:
            return super().call_soon(callback, *arguments, context=context)
        self._together.append((callback, arguments, context))

    def _call_all(self, calls: Iterator[tuple[Callable, tuple, Any]]) -> None:
        try:
            for callback, arguments, context in calls:
                try:
                    context.run(callback, *arguments)
                except Exception:
                    # One that fails keeps no other one from being called. The loop shows no error of a callback either.
                    continue
        finally:
            # After Ctrl-C some may be left. Their tasks, which are cancelled, end only in such a callback.
            if rest := list(calls):
                super().call_soon(self._call_all, iter(rest))

    def stopped(self) -> bool:
        """Cancels the tasks and timers that are left. Whether the tasks have ended, and no callback calls another for
        ever. Open connections stay."""
        queues: Any = self
        for _ in range(3):
            for timer in queues._scheduled:
                timer.cancel()
            left = asyncio.all_tasks(self)
            if not left and not queues._ready:
                return True
            for task in left:
                task.cancel()
            self.call_soon(self.stop)
            self.run_forever()
        for task in asyncio.all_tasks(self):
            # asyncio would print that it was destroyed
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        return False


class Loops:
    """Lends an event loop to each run: the same one as long as what the runs leave behind can be stopped. What an
    environment keeps, such as locks and open connections, belongs to the loop that it was first used on."""

    def __init__(self):
        self._kept: EpisodeLoop | None = None

    @contextlib.contextmanager
    def lend(
        self, look: Look, step_seconds: float, on_long_step: Callable[[asyncio.Task | None, float], None], keep: bool
    ) -> Iterator[EpisodeLoop]:
        """A loop for this thread, which may be running another one (as notebooks do). Tasks that are left at the end
        are cancelled, and forgotten with the loop if they don't end. `keep`: whether another run may have this loop.

        look                        see EpisodeLoop
        step_seconds, on_long_step  see Watch
        """
        loop, self._kept = self._kept or EpisodeLoop(), None
        outer, watch = asyncio._get_running_loop(), Watch(step_seconds, on_long_step)
        asyncio._set_running_loop(None)
        factory: Any = watch.task
        loop.look, loop.watch = look, watch
        loop.set_task_factory(factory)
        stopped = False
        try:
            with interrupting(watch.late, min(1.0, step_seconds / 4)):
                try:
                    yield loop
                finally:
                    # Steps are limited here, too: a task may block when it is cancelled.
                    stopped = loop.stopped()
        finally:
            asyncio._set_running_loop(outer)
            loop.look, loop.watch = _unchanged, None
            loop.set_task_factory(None)
            if keep and stopped and self._kept is None:
                self._kept = loop
            else:
                loop.close()

    def close(self) -> None:
        loop, self._kept = self._kept, None
        if loop is not None:
            loop.close()


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


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: EpisodeLoop):
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None):
        return super().select(self._loop.look(timeout))


def _unchanged(timeout: float | None) -> float | None:
    return timeout
