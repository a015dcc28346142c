"""Runs of a benchmark that trains: several run at a time, each in a folder of its own, from which it can be resumed.

Folders of runs are kept with `--keep`; without it they go when the benchmark ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from ..utils.files import write_whole
from . import BenchmarkError, count
from .provenance import git_state

# Settings of a run, with "way" (a dict with its "name") and "seed", and an empty folder, to its row.
Train = Callable[[dict, Path], dict]

# What becomes of kept runs when the benchmark is called again
TAKEN_UP = "keep finished runs there, and take those up"


def add_keep(parser: argparse.ArgumentParser, help: str = TAKEN_UP) -> None:
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help=help)


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=count, default=2, help="runs at a time, a thread each (default: 2)")


@contextlib.contextmanager
def run_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of `--keep`, or one that is removed at the end of the block."""
    if args.keep is not None:
        yield args.keep
        return
    with tempfile.TemporaryDirectory(prefix=f"esfast-{args.name}-") as scratch:
        yield Path(scratch)


def run_all(train: Train, settings: list[dict], folder: Path, workers: int, shown: Callable[[dict], str]) -> list[dict]:
    """The rows of all runs, in order, by `workers` processes; `shown` says of a row what the progress bar shows.

    Runs that were finished before are read from `folder`. `train` must be picklable.
    """
    from tqdm import tqdm

    commit = git_state()[0]
    rows: dict[int, dict] = {}
    # torch's threads don't survive a fork
    context = multiprocessing.get_context("spawn")
    with tqdm(total=len(settings), unit="run", file=sys.stderr, dynamic_ncols=True) as bar:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            waiting = {pool.submit(kept, train, s, folder, commit): i for i, s in enumerate(settings)}
            try:
                for future in as_completed(waiting):
                    row = rows[waiting[future]] = future.result()
                    bar.set_postfix_str(f"{row['way']['name']}, seed {row['seed']}: {shown(row)}")
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [rows[i] for i in range(len(settings))]


def kept(train: Train, settings: dict, runs: Path, commit: str | None) -> dict:
    """The row of a run, from its folder if it was finished before. BenchmarkError if that one had other settings."""
    folder = runs / f"{settings['way']['name'].replace(', ', '-').replace(' ', '')}-seed{settings['seed']}"
    path = folder / "row.json"
    asked = {**settings, "commit": commit}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["asked"] != asked:
            raise BenchmarkError(f"{folder} holds a run with other settings or of another commit; move it away")
        return found["row"]
    row = train(settings, folder)
    write_whole(path, json.dumps({"asked": asked, "row": row}))
    return row
