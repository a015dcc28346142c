"""A limit on the time of a call that the called code can't switch off."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Result = TypeVar("Result")
now = time.monotonic

# What interrupts a call in the main thread. Not SIGALRM: graders set, and switch off, alarms of their own. SIGURG is
# ignored by default, so one that arrives late does no harm.
INTERRUPT = getattr(signal, "SIGURG", None)
# Seconds until a call that caught TooSlow is interrupted again.
AGAIN = 1.0
# Seconds; a longer limit means no limit.
LONGEST = 1e9


class TooSlow(BaseException):
    """Raised inside a call that takes too long, where `except Exception` does not catch it."""


def limited(seconds: float, call: Callable[[], Result]) -> Result:
    """Returns `call()`. Raises TooSlow inside it after `seconds`, and then every second until it ends.

    In the main thread of a POSIX process a signal interrupts everything that checks for signals: Python code, a sleep,
    a read, a regular expression. In other threads, and on Windows, TooSlow is raised when the thread next runs Python
    code. C code that does neither can't be interrupted. SIGALRM's handler and timer are restored afterwards; if an
    alarm became due meanwhile and `call` had switched it off, it goes off at once.
    """
    if not 0 <= seconds < LONGEST:
        with _alarm_kept():
            return call()
    stop = _interrupt_after(seconds)
    try:
        try:
            with _alarm_kept():
                result = call()
        finally:
            stop()
    finally:
        # TooSlow may have been raised inside the first stop(); the next one is a second away.
        late = stop()
    # The call caught TooSlow, so its result is not to be trusted.
    if late:
        raise TooSlow
    return result


@contextlib.contextmanager
def interrupting(late: Callable[[], bool], every: float) -> Iterator[None]:
    """In the block, raises TooSlow in this thread while `late()` is true. It is asked every so many seconds, wherever
    the code is; see `limited` for what can't be interrupted."""
    if _takes_signals():

        def look(*received) -> None:
            if late():
                raise TooSlow

        before = signal.signal(INTERRUPT, look)
        thread = threading.get_ident()
        cancel = _kernel_timer(every, every) or _timer_thread(
            every, lambda: signal.pthread_kill(thread, INTERRUPT), every
        )
        try:
            yield
        finally:
            cancel()
            signal.signal(INTERRUPT, before)
        return
    here = ctypes.c_ulong(threading.get_ident())

    def strike() -> None:
        if late():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(here, ctypes.py_object(TooSlow))

    cancel = _timer_thread(every, strike, every)
    try:
        yield
    finally:
        cancel()


def _takes_signals() -> bool:
    """Whether a signal can interrupt this thread."""
    main = threading.current_thread() is threading.main_thread()
    return main and hasattr(signal, "pthread_kill") and signal.getsignal(INTERRUPT) is not None


def _interrupt_after(seconds: float) -> Callable[[], bool]:
    """Schedules TooSlow in this thread. Returns a function that cancels it and says whether it was raised; that
    function may be called twice."""
    return _by_signal(seconds) if _takes_signals() else _by_exception(seconds)


def _by_signal(seconds: float) -> Callable[[], bool]:
    running, struck = True, False

    def late(*received) -> None:
        nonlocal struck
        if running:
            struck = True
            raise TooSlow

    before = signal.signal(INTERRUPT, late)
    thread = threading.get_ident()
    cancel = _kernel_timer(seconds) or _timer_thread(seconds, lambda: signal.pthread_kill(thread, INTERRUPT))

    def stop() -> bool:
        nonlocal running
        running = False
        cancel()
        signal.signal(INTERRUPT, before)
        return struck

    return stop


def _by_exception(seconds: float) -> Callable[[], bool]:
    thread = ctypes.c_ulong(threading.get_ident())
    struck = False

    def strike() -> None:
        nonlocal struck
        struck = True
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TooSlow))

    cancel = _timer_thread(seconds, strike)

    def stop() -> bool:
        cancel()
        # TooSlow was raised, but may not have arrived yet.
        if struck:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
        return struck

    return stop


def _timer_thread(seconds: float, strike: Callable[[], object], again: float = AGAIN) -> Callable[[], None]:
    """Calls `strike` from a thread, after `seconds` and then every `again` seconds, until the returned function is
    called; never after that."""
    over, lock = threading.Event(), threading.RLock()

    def watch() -> None:
        wait = seconds
        while not over.wait(wait):
            with lock:
                if not over.is_set():
                    strike()
            wait = again

    def cancel() -> None:
        with lock:
            over.set()

    threading.Thread(target=watch, name="esfast time limit", daemon=True).start()
    return cancel


class _Sigevent(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("rest", ctypes.c_byte * 44),
    ]


class _Timerspec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("again", "again_ns", "first", "first_ns")]


def _kernel_timer(seconds: float, again: float = AGAIN) -> Callable[[], None] | None:
    """The same with a timer of the Linux kernel; None on other systems. A regular expression holds the interpreter's
    lock as long as it runs; a thread would have to wait for the lock, a kernel timer need not."""
    libc = _libc()
    if libc is None:
        return None
    monotonic, to_thread, timer = 1, 4, ctypes.c_void_p()
    event = _Sigevent(None, INTERRUPT, to_thread, threading.get_native_id())
    if libc.timer_create(monotonic, ctypes.byref(event), ctypes.byref(timer)):
        return None
    # 0 would switch the timer off.
    first, then = (max(1, int(s * 1e9)) for s in (seconds, again))
    spec = _Timerspec(*divmod(then, 10**9), *divmod(first, 10**9))
    libc.timer_settime(timer, 0, ctypes.byref(spec), None)
    left = [timer]

    def cancel() -> None:
        while left:
            libc.timer_delete(left.pop())

    return cancel


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library with Linux's timers; None where there is none, or where the structures above differ from its."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_long) != 8:
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "timer_create") else None


@contextlib.contextmanager
def _alarm_kept() -> Iterator[None]:
    """Restores SIGALRM's handler and timer after the block, less the time that has passed."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    handler, began = signal.getsignal(signal.SIGALRM), now()
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        # None is a handler that Python did not install, and can't restore.
        if handler is not None:
            signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, left - (now() - began)), interval)
