"""The command line: esfast train | eval | report | replay | export | info | bench.

Each command is a module of this package with `run(args)`. It is imported when the command runs, so that a help need not
wait for torch.
"""

from __future__ import annotations

import logging
import sys

from ..utils.interrupts import signal_of
from .parser import parser_of_all
from .run_options import in_flags


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 unusable arguments, 128 + N ended by signal N."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        # a name that the locale has no letters for is shown by its numbers, and ends no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="esfast: %(message)s", level=logging.WARNING)
    if argv[:1] == ["bench"]:  # benchmarks have parsers of their own
        from ..bench import main as bench

        return bench(argv[1:])
    args = parser_of_all().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt as interrupt:
        signum = signal_of(interrupt)
        print(f"esfast: interrupted by {signum.name}", file=sys.stderr)
        return 128 + signum
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if args.debug:
            raise
        print(f"esfast: error: {in_flags(str(error))}", file=sys.stderr)
        return 1
