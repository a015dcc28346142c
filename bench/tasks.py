"""`esfast bench tasks`: the embedded model learns each task, from nothing to the tuned model.

Each task is one `esfast train --task NAME` with its own settings, in a process and a run folder of its own, after its
base model was made afresh. A row passes if the reward on held-out problems rose by more than two standard errors of the
difference within five minutes in all.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from ..tasks import MODULES
from ..utils.child import child
from .countdown import call, train_command
from .kept_runs import add_keep, run_folder
from .outcomes import HEADERS, REWARD, cells, outcome, rose_by

# Seconds that a task may take in all.
LIMIT = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks", nargs="+", choices=tuple(MODULES), default=list(MODULES), help="that are learned (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the runs")
    add_keep(parser, "keep the run folders, as FOLDER/TASK, ...")


def run(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(prefix="esfast-cache-") as cache, run_folder(args) as runs:
        environment = os.environ | {"ESFAST_CACHE": cache}
        return {"rows": [_one(task, args.seed, runs / task, environment) for task in args.tasks]}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = [
        "task",
        *HEADERS,
        "accuracy before",
        "accuracy after",
        "generations",
        "seconds, all",
        "making the base model",
    ]
    lines = [
        [
            r["task"],
            *cells(r),
            f"{r['accuracy_before']:.1%}",
            f"{r['accuracy_after']:.1%}",
            str(r["generations"]),
            f"{r['seconds']:.0f}",
            f"{r['seconds_pretraining']:.0f}",
        ]
        for r in result["rows"]
    ]
    return headers, lines


def _one(task: str, seed: int, folder: Path, environment: dict) -> dict:
    began = time.perf_counter()
    code = f"from esfast.tasks.embedded import cached; cached(task={task!r})"
    call(f"making the embedded model for {task}", child(code), environment)
    pretraining = time.perf_counter() - began
    call(f"`esfast train --task {task}`", train_command(seed, folder, ["--task", task]), environment)
    seconds = time.perf_counter() - began
    found = outcome(folder, REWARD | {"accuracy": "eval_accuracy"})
    return {
        "task": task,
        "seed": seed,
        **found,
        "seconds": seconds,
        "seconds_pretraining": pretraining,
        "pass": rose_by(found, 2) and seconds <= LIMIT,
    }
