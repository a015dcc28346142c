"""A process for reward functions: it can be killed when one hangs, and computes while the model generates.

It is a fresh Python that imports the functions by name: nothing of this process is copied, neither threads nor CUDA,
and no user's script runs a second time. Requests are pickled by the parent, which the worker trusts; answers are JSON,
since what scores a model's text may run it and is not trusted.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

from .child import child

START_SECONDS = 120  # a reward function's module may import a great deal


def importable(function: Callable) -> str | None:
    """`module:qualname` if that is where the very function is found, None for closures, lambdas, methods of objects,
    and what is defined in a script or a notebook."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not hasattr(os, "killpg"):  # without POSIX: no worker
        return None
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is function else None


class WorkerError(Exception):
    """A function in the worker failed; the message says how, without the function's name."""


class Worker:
    """One process for `functions`, given as `module:qualname`; it imports them while `__init__` returns already."""

    def __init__(self, functions: Sequence[str]):
        mine, theirs = socket.socketpair()
        with mine, theirs:
            code = "from esfast.reward_worker import serve; serve(int(sys.argv[1]), sys.argv[2:])"
            self._process = subprocess.Popen(
                child(code, str(theirs.fileno()), *functions),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the parent's, and what the functions start is killed with them
            )
            self._connection = Connection(mine.detach())
        self._ready = False

    def ask(self, jobs: Sequence[int], pickled: bytes, timeout: float) -> Iterator[list]:
        """Yields what each of the functions numbered in `jobs` gives for the pickled keyword arguments.

        Raises WorkerError, after which the rest of the jobs are not done; `alive` says whether the process can do more.
        """
        if not self._ready:
            self._receive(START_SECONDS)
            self._ready = True
        self._connection.send_bytes(json.dumps(list(jobs)).encode())
        self._connection.send_bytes(pickled)
        for _ in jobs:
            yield self._receive(timeout)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process and what it started; a thread that waits for an answer gets an error."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _receive(self, timeout: float):
        try:
            if not self._connection.poll(None if timeout == math.inf else timeout):
                self.kill()
                raise WorkerError(f"gave no rewards in {timeout:g} s and was killed")
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            self.kill()
            raise WorkerError(f"ended its process with status {self._process.returncode}") from None
        if "error" in answer:
            if not self._ready:
                self.kill()
                raise WorkerError(f"could not be called: importing it in a process {answer['error']}")
            raise WorkerError(answer["error"])
        return answer["value"]


def serve(descriptor: int, names: Sequence[str]) -> None:
    """The worker's side: answers until the parent closes the connection or dies."""
    connection = Connection(descriptor)
    os.set_inheritable(descriptor, False)  # what the functions start must not keep it open

    def answer(work: Callable[[], object]) -> bool:
        try:
            message = json.dumps({"value": work()})
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__)[-1:])
            message = json.dumps({"error": f"raised {type(error).__name__}: {error}\n{frames}".rstrip()})
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
        for job in jobs:  # each gets arguments of its own, should one of them change its
            if not answer(lambda job=job: plain(functions[job](**pickle.loads(pickled)))):  # noqa: B023
                break


def plain(values) -> list[float | str | None]:
    """Numbers as JSON has them (NumPy's and PyTorch's too) and None; of anything else the text that a message shows."""
    plain = []
    for value in values:
        value = value.item() if hasattr(value, "item") else value
        plain.append(value if value is None or isinstance(value, (int, float)) else repr(value))
    return plain


def _import(name: str) -> Callable:
    module, _, qualname = name.partition(":")
    found = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
