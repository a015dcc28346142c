"""esfast report."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..report import load, page
from ..utils.files import check_writable, write_whole
from ..utils.settings import check_int


def run(args: argparse.Namespace) -> None:
    check_int("--samples", args.samples, 0, 2**31)
    if args.diagnose:
        for run in map(load, args.runs):
            print("\n  ".join([f"{run.name}: {run.verdict}", *map(str, run.findings)]))
        return
    out = check_writable("--out", args.out if args.out is not None else _place(args.runs))
    write_whole(out, page([load(folder) for folder in args.runs], args.samples))
    print(f"report: {out}")


def _place(runs: list[str]) -> Path:
    """report.html in the current folder. If the current folder is one of the runs, a file beside it, since run folders
    are not written to."""
    here = Path.cwd()
    if any(Path(run).resolve() == here for run in runs):
        return here.parent / f"{here.name}-report.html"
    return Path("report.html")
