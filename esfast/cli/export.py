"""esfast export."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..journal.export import pack
from ..journal.journal import read
from ..utils.errors import BadValue
from ..utils.files import check_writable


def run(args: argparse.Namespace) -> None:
    if not args.out.endswith(".safetensors"):
        raise BadValue(f"--out: expected a name that ends in .safetensors, got {args.out}")
    check_writable("--out", args.out)
    journal = Path(args.source) / "journal.jsonl" if Path(args.source).is_dir() else Path(args.source)
    size, generations = pack(journal, args.out), len(read(journal).records)
    print(f"{args.out}: {size / 1e3:.1f} kB, {generations} generations, {size / max(generations, 1):.0f} bytes each")
