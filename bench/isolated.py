"""Runs work in a process of its own, which reports its events. A failure there (no memory, a CUDA error, a signal) ends
that process and not the benchmark, whose other rows are kept.

The module that does the work has `events(job)`, which yields dicts for JSON. After a CUDA error a process can't use the
GPU any more, so the work continues in a new one.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from ..utils.child import child

# Seconds that a process has to end after its last event.
END_SECONDS = 60


def isolated(module: str, job: dict) -> Iterator[dict]:
    """Yields what `events(job)` of `module` in esfast.bench yields in a new process. If the process fails, a last
    {"died": reason} follows. Leaving the iteration early ends the process."""
    reading, writing = os.pipe()
    code = f"from esfast.bench.isolated import serve; serve({module!r}, {writing})"
    with subprocess.Popen(child(code), stdin=subprocess.PIPE, pass_fds=[writing]) as process:
        os.close(writing)
        over = False
        try:
            with open(reading, encoding="utf-8") as lines:
                try:
                    process.stdin.write(json.dumps(job).encode())
                    process.stdin.close()
                except BrokenPipeError:
                    # The process died before it read the job; its exit status says why.
                    pass
                for line in lines:
                    if not line.endswith("\n"):
                        # The process was killed while it wrote this line.
                        break
                    event = json.loads(line)
                    over = "over" in event
                    if over:
                        # Don't wait for the pipe to close: processes that it started may hold it open.
                        break
                    yield event
            status = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        except BaseException:
            process.kill()
            raise
    if status and not over:
        yield {
            "died": f"its process was ended by {signal.Signals(-status).name}"
            if status < 0
            else f"its process ended with status {status}"
        }


def serve(module: str, descriptor: int) -> None:
    """Runs in the process: reads the job from stdin, and writes a line of JSON for each event."""
    with open(descriptor, "w", encoding="utf-8") as out:

        def tell(event: dict) -> None:
            out.write(json.dumps(event) + "\n")
            out.flush()

        try:
            for event in importlib.import_module(f".{module}", __package__).events(json.load(sys.stdin)):
                tell(event)
        except Exception as error:
            tell({"died": reason_of(error)})
        tell({"over": True})


def reason_of(error: BaseException) -> str:
    """One line: the type of the error (unless its message is meant to stand alone) and the first line of its
    message."""
    from . import BenchmarkError

    text = next(iter(str(error).strip().splitlines()), "")
    known = isinstance(error, BenchmarkError) or "out of memory" in text or not text
    return text or type(error).__name__ if known else f"{type(error).__name__}: {text}"
