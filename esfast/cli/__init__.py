"""The command line: esfast train | eval | report | replay | export | info | bench.

Each command is a module of this package with `run(args)`. It is imported when the command runs, so that `--help` need
not wait for torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator

from ..utils.errors import is_mendable
from ..utils.interrupts import signal_of
from .parser import parser_of_all
from .run_options import in_flags

_A_BUG = (
    "this is a bug, of esfast or of code that it was given (a task, a model): please report it as an issue of esfast's "
    "repository, with the lines above and the output of `esfast info`"
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 unusable arguments, 128 + N ended by signal N.

    An error that the user can mend becomes one line on stderr. Any other error is a bug, and its traceback is shown.
    """
    for stream in (sys.stdout, sys.stderr):
        # Characters that the locale can't encode are printed as escapes, instead of ending the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _show_log()
    try:
        try:
            with _as_it_was():
                return _run(sys.argv[1:] if argv is None else argv)
        finally:
            # Flush here, where an error of the output is caught, and not when Python ends.
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        # stdout can't be written: the disk is full, or the reader of a pipe closed it, as `head` does. Drop the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        print(f"esfast: error: stdout: {error}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Adds the current folder to sys.path for the time of a command, as `python -m` does; reward workers get this path.
    Afterwards everything that a command changes in the process is undone, since a program may call `main`."""
    before = list(sys.path)
    # The current folder may have been deleted.
    with contextlib.suppress(FileNotFoundError):
        sys.path += [here] if (here := os.getcwd()) not in sys.path else []
    try:
        yield
    finally:
        sys.path[:] = [p for p in sys.path if p in before]
        if models := sys.modules.get(f"{__name__}.models"):
            models.AFTERWARDS.close()


def _run(argv: list[str]) -> int:
    args = None
    try:
        # benchmarks have parsers of their own
        if argv[:1] == ["bench"]:
            from ..bench import main as bench

            return bench(argv[1:])
        args = parser_of_all().parse_args(argv)
        return args.run(args) or 0
    except KeyboardInterrupt as interrupt:
        signum = signal_of(interrupt)
        print(f"esfast: interrupted by {signum.name}", file=sys.stderr)
        return 128 + signum
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            raise
        mendable, said = is_mendable(error), str(error) or type(error).__name__
        if not mendable or args is not None and args.debug:
            traceback.print_exception(error)
        said = said if args is None else in_flags(said)
        print(f"esfast: error: {said}" if mendable else f"esfast: {_A_BUG}", file=sys.stderr)
        return 1


def _has_no_reader(stream) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return bool(poll.poll(0))


class _Line(logging.Formatter):
    """Puts `esfast:` before each line, and the level before a warning or an error."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"esfast: {level}{super().format(record)}"


def _show_log() -> None:
    """Shows what esfast logs, from INFO on, and the warnings of other libraries, as lines on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Line())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("esfast").setLevel(logging.INFO)
