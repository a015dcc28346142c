"""esfast report."""

from __future__ import annotations

import argparse

from ..report import load, page
from ..run_folder import write_whole


def run(args: argparse.Namespace) -> None:
    write_whole(args.out, page([load(folder) for folder in args.runs], args.samples))
    print(f"report: {args.out}")
