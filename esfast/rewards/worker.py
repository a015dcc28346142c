"""A process for reward functions. It can be killed when a function hangs, and it scores while the model generates.

The process is a fresh Python that imports the functions by name: it copies nothing of this process, neither threads nor
CUDA, and does not run the user's script again. The parent pickles its requests, and the worker trusts the parent. The
worker answers in JSON, since a function that scores a model's text may run that text and is not trusted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from ..utils.child import child
from ..utils.interrupts import blocked, outlive

# Long, since a reward function's module may import much.
START_SECONDS = 120

now = time.monotonic


def importable(function: Callable) -> str | None:
    """The name `module:qualname` under which a worker can import this function. None if it can't: for closures,
    lambdas, methods of objects, and functions that are defined in a script or a notebook."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    # Workers need POSIX's process groups.
    if module in (None, "__main__") or not hasattr(os, "killpg"):
        return None
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is function else None


@dataclass
class Job:
    """Work for a worker: call the functions numbered in `jobs` with the pickled keyword arguments."""

    jobs: Sequence[int]
    pickled: bytes
    # for each job that is done, the values that its function returned, as read from JSON
    answers: list[list] = field(default_factory=list)
    # why the job after the last answer failed, without the function's name; later jobs are then not run
    error: str | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.answers) == len(self.jobs)


class Worker:
    """One process for `functions`, given as `module:qualname`, and its present task, if any.

    The owner's thread drives it: it calls `take` when `connection` has an answer, and `expire` after `deadline`. (A
    thread for each worker would take turns with the thread that generates, which costs about 0.7 ms a member.)
    """

    def __init__(self, functions: Sequence[str], timeout: float):
        self.task: Job | None = None
        self.timeout, self.deadline = timeout, now() + START_SECONDS
        mine, theirs = socket.socketpair()
        with mine, theirs:
            code = "from esfast.rewards.worker import serve; serve(int(sys.argv[1]), sys.argv[2:])"
            # The worker starts with signals blocked; `serve` sets them to be ignored, and then unblocks them.
            with blocked():
                self._process = subprocess.Popen(
                    child(code, str(theirs.fileno()), *functions),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    # Its own session: Ctrl-C goes to the parent only, and killing the group also kills what the
                    # functions start.
                    start_new_session=True,
                )
            self.connection = Connection(mine.detach())
        # Becomes True when the worker has imported the functions.
        self._ready = False

    def give(self, task: Job) -> None:
        self.task = task
        if self._ready:
            self._send()

    def take(self) -> None:
        """Reads one answer, waiting for it if need be."""
        try:
            answer = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._died()
            return
        if "error" in answer and not self._ready:
            self.stop(f"could not be called: importing it in a process {answer['error']}")
        elif "error" in answer:
            self._fail(answer["error"])
        elif not self._ready:
            self._ready = True
            if self.task is not None:
                self._send()
        else:
            self.task.answers.append(answer["value"])
            self.deadline = now() + self.timeout
            if self.task.done:
                self.task = None

    def expire(self) -> None:
        self.stop(f"gave no rewards in {self.timeout if self._ready else START_SECONDS:g} s and was killed")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self, error: str) -> None:
        """Ends the process and all that it started; its task fails with the error."""
        self._kill()
        self._fail(error)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self) -> None:
        self.deadline = now() + self.timeout
        try:
            self.connection.send_bytes(json.dumps(list(self.task.jobs)).encode())
            self.connection.send_bytes(self.task.pickled)
        except OSError:
            self._died()

    def _died(self) -> None:
        self._kill()
        self._fail(f"ended its process with status {self._process.returncode}{_reason(self._process.returncode)}")

    def _fail(self, error: str) -> None:
        if self.task is not None:
            self.task.error = error
        self.task = None


def serve(descriptor: int, names: Sequence[str]) -> None:
    """The worker's side: answers until the parent closes the connection or dies."""
    outlive()
    connection = Connection(descriptor)
    # Processes that the functions start must not keep it open.
    os.set_inheritable(descriptor, False)

    def answer(work: Callable[[], object]) -> bool:
        try:
            message = json.dumps({"value": work()})
        except NotRewards as error:
            message = json.dumps({"error": str(error)})
        except BaseException as error:
            # sys.exit in a function counts as an error of the function.
            frames = "".join(traceback.format_tb(error.__traceback__)[-1:])
            message = json.dumps({"error": f"{raised(error)}\n{frames}".rstrip()})
        connection.send_bytes(message.encode())
        return message.startswith('{"value"')

    functions: list[Callable] = []
    if not answer(lambda: functions.extend(map(_import, names))):
        return
    while True:
        try:
            jobs, pickled = json.loads(connection.recv_bytes()), connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        # Each function gets its own copy of the arguments.
        for job in jobs:
            if not answer(functools.partial(_called, functions[job], pickled)):
                break


def _called(function: Callable, pickled: bytes) -> list[float | str | None]:
    arguments = pickle.loads(pickled)
    # Read it before the function can change it.
    count = len(arguments["completions"])
    return numbers(function(**arguments), count)


class NotRewards(TypeError):
    """A function did not return a sequence of numbers. The message follows the function's name."""


def numbers(values, count: int) -> list[float | str | None]:
    """Converts the return value of a reward function for JSON: numbers of any kind (NumPy's, PyTorch's, bools) to
    floats, None to None, and other elements to a text for an error message.

    Reads at most `count` + 1 values, since an iterator may be endless. Raises NotRewards for a value that is not a
    sequence (a number, None), has no order (a set), or has other elements (a dict, a text).
    """
    if isinstance(values, (str, bytes, bytearray, Mapping, Set)) or not isinstance(values, Iterable):
        raise NotRewards(f"returned {_shown(values)} ({type(values).__name__}): expected a list of {count} numbers")
    try:
        return list(map(_number, itertools.islice(values, count + 1)))
    except TypeError as error:
        # A NumPy array without dimensions raises here.
        if getattr(values, "shape", None) != ():
            raise
        raise NotRewards(f"returned a single number: expected a list of {count}") from error


def _number(value) -> float | str | None:
    # An array of two elements is not a number, for example.
    with contextlib.suppress(Exception):
        value = value.item()
    if value is None or isinstance(value, (str, bytes, bytearray)):
        return None if value is None else _shown(value)
    try:
        return float(value)
    except OverflowError:
        return "a whole number too large for a float"
    except Exception:
        # A conversion may raise anything.
        return _shown(value)


def _shown(value) -> str:
    try:
        return f"{value!r:.60}"
    except Exception:
        # A repr may raise anything.
        return f"a {type(value).__name__}"


def raised(error: BaseException) -> str:
    try:
        words = str(error)
    except Exception:
        # The exception's own str may raise.
        words = "(its message can't be made)"
    return f"raised {type(error).__name__}: {words:.1000}"


def _reason(status: int) -> str:
    """The signal that ended a process, in parentheses, for a message; empty if none did."""
    if status >= 0:
        return ""
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
        return f" ({name}{': out of memory?' if name == 'SIGKILL' else ''})"
    return ""


def _import(name: str) -> Callable:
    module, _, qualname = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
