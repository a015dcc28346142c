"""esfast report."""

from __future__ import annotations

import argparse

from ..files import write_whole
from ..report import load, page


def run(args: argparse.Namespace) -> None:
    write_whole(args.out, page([load(folder) for folder in args.runs], args.samples))
    print(f"report: {args.out}")
