"""Processes that begin as forks of one that has imported esfast already, since importing takes seconds of CPU.

They are like processes that were started by hand, without torchrun: real ones, which may be killed, and share no memory.
"""

import multiprocessing
import os
import subprocess
import sys

import torch
from job import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["esfast.trainer.trainer", "esfast.cli", "matplotlib.figure", "transformers.models.qwen2.modeling_qwen2"]
)


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


class Fork:
    """Runs function(*arguments), whose value is the exit status; to be used as subprocess.Popen is.

    folder: an existing one, where what it writes to its standard streams is kept until `communicate` reads it.
    path: folders to import from, before others.
    """

    def __init__(self, function, *arguments, folder, environment, path=()):
        self._streams = [folder / f"{len(list(folder.glob('*.out')))}.{stream}" for stream in ("out", "err")]
        for stream in self._streams:
            stream.touch()
        texts = [str(a) for a in arguments]
        args = (function, texts, environment, [str(p) for p in path], *map(str, self._streams))
        self._process = _CONTEXT.Process(target=_run, args=args)
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def poll(self):
        return self._process.exitcode

    returncode = property(poll)

    def communicate(self, timeout=None):
        """(standard output, standard error) of the whole process, once it has ended."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a fork", timeout)
        return tuple(stream.read_text() for stream in self._streams)


def _run(function, arguments, environment, path, *streams):
    for descriptor, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = path
    sys.argv[1:] = arguments
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


def esfast(*words):
    """The command line."""
    from esfast.cli import main

    return main(list(words))


def impatient_esfast(*words):
    """The command line; a process is lost after 12 s of silence."""
    from esfast.distributed import team

    team.SILENCE = 12
    return esfast(*words)


def team(processes, function, *arguments, folder, path=(), **more):
    """Forks that know of each other what torchrun would tell them."""
    shared = environment(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), **more)
    return [
        Fork(
            function, *arguments, folder=folder, path=path, environment=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(processes)
    ]


def ended(forks, timeout=120):
    """What came of them, in the terms of subprocess.run: the highest status, and all that they wrote."""
    try:
        written = [fork.communicate(timeout) for fork in forks]
    finally:
        for fork in forks:
            fork.kill()
    status = max((fork.returncode for fork in forks), key=abs)
    return subprocess.CompletedProcess("forks", status, *map("".join, zip(*written, strict=True)))


def alone(function, *arguments, folder, path=(), timeout=120):
    """One process, which is told of no others."""
    return ended([Fork(function, *arguments, folder=folder, path=path, environment=environment())], timeout)
