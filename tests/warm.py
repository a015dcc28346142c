"""A Python that starts at once: an executable that has its work done by a fork of a process with torch, transformers and
esfast in memory, since importing these takes seconds of CPU and most commands that tests run take less.

A test asks for the fixture `warm_python`, and sys.executable is this one until it ends. It takes `-u`, `-c`, `-m` and scripts.
The fork has the arguments, environment, folder and open files that the executable was given, and it gets its signals; its
exit status becomes the executable's. What Python, torch or Triton read of the environment while they start is read already,
so it is not for tests of that, nor of what is imported.
"""

import array
import atexit
import contextlib
import fcntl
import functools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

import forks
import torch

# Run by a Python that imports next to nothing. What it sends: a number for the length, with the files, then the request.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
files = []
for number in map(int, os.listdir("/proc/self/fd")):
    if number != connection.fileno() and os.path.exists(f"/proc/self/fd/{{number}}"):
        files.append(number)
request = dict(arguments=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd(), files=files)
request = json.dumps(request).encode()
socket.send_fds(connection, [len(request).to_bytes(8, "big")], files)
connection.sendall(request)
answers = connection.makefile("rb")
fork = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(fork, number))
connection.sendall(b"go")
status = int(answers.readline())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
# Seconds after which the process that forks looks whether the tests are still there
LOOK = 5


@contextlib.contextmanager
def python() -> Iterator[None]:
    """In the block sys.executable is the executable, where this is possible."""
    cold = sys.executable
    if possible():
        sys.executable = executable()
    try:
        yield
    finally:
        sys.executable = cold


def possible() -> bool:
    """On Linux; and without a GPU, since a fork of a process that has looked for one can't use it."""
    return Path("/proc/self/fd").exists() and hasattr(os, "pidfd_open") and not torch.cuda.is_available()


@functools.cache
def executable() -> str:
    """The executable's path. It works until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    address = folder / "socket"
    client = folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    client.chmod(0o755)
    # -E: the executable adds what PYTHONPATH says then
    told = subprocess.check_output([sys.executable, "-E", "-c", "import json, sys; print(json.dumps(sys.path[1:]))"])
    server = forks.Fork(
        serve, address, client, told.decode(), folder=folder, environment=forks.environment(), path=sys.path
    )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    while not address.exists():
        assert server.poll() is None, server.communicate()
        threading.Event().wait(0.01)
    return str(client)


# ---- in the process that forks --------------------------------------------------------------------------------------


def serve(address: str, client: str, folders: str) -> None:
    """`folders`: those that a Python that was just started imports from, as JSON."""
    sys.executable = client
    # The tests' own modules are not there for what users run.
    sys.path[:] = json.loads(folders)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == Path(__file__).parent:
            del sys.modules[name]
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener:
        # Under another name until it listens
        listener.bind(f"{address}.new")
        listener.listen()
        listener.settimeout(LOOK)
        os.rename(f"{address}.new", address)
        while os.getppid() == parent:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            finally:
                _reap()
            if os.fork() == 0:
                listener.close()
                _attend(connection)
            connection.close()


class Gone(Exception):
    """The executable has ended."""


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _attend(connection: socket.socket) -> None:
    """Runs what one executable asks for in one more fork, and tells it the status. Ends the fork if the executable goes."""
    try:
        connection.setblocking(True)
        length, files, _, _ = socket.recv_fds(connection, 8, 64)
        request = json.loads(_read(connection, int.from_bytes(length, "big")))
        wait, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            connection.close()
            os.close(go)
            # Until signals come through; at the end of the file the executable is gone.
            if os.read(wait, 1):
                _work(files, **request)
            os._exit(1)
        os.close(wait)
        for file in files:
            os.close(file)
        connection.sendall(f"{pid}\n".encode())
        os.write(go, _read(connection, 2)[:1])
        ended = os.pidfd_open(pid)
        if ended not in select.select([connection, ended], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        connection.sendall(f"{status}\n".encode())
    except (BrokenPipeError, Gone):
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _read(connection: socket.socket, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        part = connection.recv(length - len(found))
        if not part:
            raise Gone
        found += part
    return bytes(found)


# ---- in the fork ----------------------------------------------------------------------------------------------------


def _work(received: array.array, arguments: list[str], environment: dict, folder: str, files: list[int]) -> None:
    """Never returns."""
    status = 1
    try:
        high = [fcntl.fcntl(file, fcntl.F_DUPFD, 300) for file in received]
        for file in received:
            os.close(file)
        for file, number in zip(high, files, strict=True):
            os.dup2(file, number)
            os.close(file)
        # New ones, since a stream remembers what kind of file it had, and multiprocessing closes the first.
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
        status = _status_of(arguments)
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status_of(arguments: list[str]) -> int:
    try:
        _run(*arguments)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 255
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        sys.stderr.flush()
        # As Python ends
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(kind: str, *arguments: str) -> None:
    # As torchrun asks
    if kind == "-u":
        sys.stdout.reconfigure(line_buffering=True)
        return _run(*arguments)
    folders = [f for f in os.environ.get("PYTHONPATH", "").split(os.pathsep) if f]
    sys.path[:0] = [{"-c": "", "-m": os.getcwd()}.get(kind, str(Path(kind).parent)), *folders]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-c":
        code, *sys.argv[1:] = arguments
        sys.argv[0] = kind
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv[:] = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        assert kind[:1] != "-", f"this Python takes -u, -c, -m and scripts, not {kind}"
        sys.argv[:] = kind, *arguments
        runpy.run_path(kind, run_name="__main__")
