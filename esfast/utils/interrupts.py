"""Ctrl-C, SIGTERM and SIGHUP: how they stop a run, and how critical blocks defer them."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

# Terminals, Slurm and torchrun may send a signal twice. Within this many seconds it counts once.
REPEATED = 1.0
_STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop. `signum` is the signal; a command that it ends exits with 128 + signum."""

    def __init__(self, signum: int, text: str = ""):
        super().__init__(text or signal.Signals(signum).name)
        self.signum = signum


def signal_of(interrupt: BaseException) -> signal.Signals:
    """The signal that caused a KeyboardInterrupt."""
    return signal.Signals(getattr(interrupt, "signum", signal.SIGINT))


class Stops:
    """The signals that stop a block, as `stoppable` handles them."""

    current: Stops | None = None

    def __init__(self):
        self.signum: int | None = None
        self._since = 0.0

    def check(self) -> None:
        """Raises Interrupted if a signal came and its exception was swallowed, for example by a bare `except` in a
        reward function."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def wait_for_signal(self, seconds: float = 0.2) -> None:
        """Call this on an error: it waits for a moment, and raises Interrupted if a signal arrives. A scheduler's
        signal may reach a worker process first; without this it would look like a failure of the worker."""
        self.check()
        time.sleep(seconds)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._since = signum, now
            raise Interrupted(signum)
        if now - self._since < REPEATED:
            return
        if signum == signal.SIGINT:
            raise Interrupted(signum)
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)

    def _pass_on(self, handler: Callable, signum: int, frame: FrameType | None) -> None:
        """Calls the handler that the caller had installed; it stops the block if it raises."""
        try:
            handler(signum, frame)
        except BaseException:
            self.signum = signum if self.signum is None else self.signum
            raise


@contextlib.contextmanager
def stoppable() -> Iterator[Stops]:
    """A block that SIGTERM and SIGHUP interrupt like Ctrl-C: with an exception, at any point. A second signal, a moment
    later, ends the process at once.

    Handlers that the caller had installed are still called, and ignored signals stay ignored (nohup). Outside the main
    thread, where Python handles no signals, nothing changes. A block inside such a block shares the outer one.
    """
    if Stops.current is not None:
        yield Stops.current
        return
    stops = Stops()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {signum: signal.getsignal(signum) for signum in _STOPS}
        Stops.current = stops
    for signum, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(signum, stops._stop)
        elif callable(handler):
            signal.signal(signum, functools.partial(stops._pass_on, handler))
    try:
        yield stops
    finally:
        if Stops.current is stops:
            Stops.current = None
        for signum, handler in before.items():
            # None is a handler that Python did not install, and can't restore.
            if handler is not None:
                signal.signal(signum, handler)


@contextlib.contextmanager
def defer_sigint() -> Iterator[None]:
    """Defers Ctrl-C, SIGTERM and SIGHUP until the block ends. Does nothing outside the main thread, nor for signals
    that Python does not handle."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {s: handler for s in _STOPS if callable(handler := signal.getsignal(s))}
    waiting: list[tuple] = []
    for signum in handlers:
        signal.signal(signum, lambda *received: waiting.append(received))
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if waiting:
            handlers[waiting[0][0]](*waiting[0])


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Blocks these signals in the block, and in the processes started in it until these call `outlive`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive() -> None:
    """Ignores these signals in a worker process, which ends with its parent. A scheduler sends them to all processes,
    and the parent decides. Processes that the worker starts do not ignore them."""
    for signum in _STOPS:
        signal.signal(signum, lambda *received: None)
    os.register_at_fork(after_in_child=lambda: [signal.signal(signum, signal.SIG_DFL) for signum in _STOPS])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Restores the signal handlers after the block, for libraries that install their own."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: handler for s in _STOPS if (handler := signal.getsignal(s)) is not None}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def came_by_signal(interrupt: KeyboardInterrupt) -> bool:
    """Whether a signal raised this exception, and not the code that was running. This is certain in a `stoppable` block
    and outside the main thread. No is the answer where SIGINT is ignored, yes if something else handles it."""
    if isinstance(interrupt, Interrupted) or Stops.current is not None and Stops.current.signum is not None:
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    handler = signal.getsignal(signal.SIGINT)
    return callable(handler) and not isinstance(getattr(handler, "__self__", None), Stops)
