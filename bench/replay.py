"""`esfast bench replay`: trains the embedded model on Countdown, exports the run, and replays it from the base model.
Measures size and time, and checks the bits."""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

from ..utils.child import child
from . import BenchmarkError, countdown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the run (default: 0)")
    parser.add_argument("train", nargs="*", metavar="-- OPTION", help="options of `esfast train`, after --")


def run(args: argparse.Namespace) -> dict:
    from ..journal.journal import read

    with tempfile.TemporaryDirectory(prefix="esfast-replay-") as scratch:
        folder, packed, again = (Path(scratch) / name for name in ("run", "run.safetensors", "again"))
        _call(countdown.train_command(args.seed, folder, args.train))
        _call(_command("export", str(folder), "--out", str(packed)))
        began = time.perf_counter()
        _call(_command("replay", str(packed), "--out", str(again)))
        seconds = time.perf_counter() - began
        header, records, checks = read(folder / "journal.jsonl")
        tuned = [(f / "model.safetensors").read_bytes() for f in (folder / "model", again)]
        sizes = (folder / "journal.jsonl").stat().st_size, packed.stat().st_size
    return {
        "rows": [
            {
                "seed": args.seed,
                "generations": len(records),
                "members": len(records[0].rewards),
                "numel": header["numel"],
                "journal_bytes": sizes[0],
                "exported_bytes": sizes[1],
                "model_bytes": len(tuned[0]),
                "replay_seconds": seconds,
                "fingerprints": len(checks),
                "pass": tuned[0] == tuned[1],
            }
        ]
    }


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = [
        "generations",
        "members",
        "weights",
        "journal, bytes a generation",
        "exported, bytes a generation",
        "exported, kB",
        "the tuned model, kB",
        "replay, s",
        "the same bits",
    ]
    return headers, [
        [
            str(r["generations"]),
            str(r["members"]),
            f"{r['numel']:,}",
            f"{r['journal_bytes'] / r['generations']:.0f}",
            f"{r['exported_bytes'] / r['generations']:.0f}",
            f"{r['exported_bytes'] / 1e3:.1f}",
            f"{r['model_bytes'] / 1e3:.1f}",
            f"{r['replay_seconds']:.1f}",
            "pass" if r["pass"] else "FAIL",
        ]
        for r in result["rows"]
    ]


def _command(*arguments: str) -> list[str]:
    return child("from esfast.cli import main; sys.exit(main(sys.argv[1:]))", *arguments)


def _call(command: list[str]) -> None:
    status = subprocess.run(command, env=os.environ, stdout=2).returncode
    if status:
        raise BenchmarkError(f"esfast {command[3]} failed with exit status {status}, see above")
