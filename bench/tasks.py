"""`esfast bench tasks`: the embedded model learns each task, from nothing to the tuned model.

Each task is one `esfast train --task NAME` with its own settings, in a process and a run folder of its own, after its
base model was made afresh. A row passes if the reward on held-out problems rose by more than two standard errors of the
difference within five minutes in all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

from ..tasks import MODULES
from ..utils.child import child
from .countdown import call, train_command

# Seconds that a task may take in all.
LIMIT = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks", nargs="+", choices=tuple(MODULES), default=list(MODULES), help="that are learned (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the runs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run folders, as FOLDER/TASK, ...")


def run(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory(prefix="esfast-tasks-") as scratch:
        environment = os.environ | {"ESFAST_CACHE": str(Path(scratch) / "cache")}
        runs = args.keep if args.keep is not None else Path(scratch)
        return {"rows": [_one(task, args.seed, runs / task, environment) for task in args.tasks]}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = [
        "task",
        "held-out problems",
        "reward before",
        "reward after",
        "rose by, standard errors",
        "accuracy before",
        "accuracy after",
        "generations",
        "seconds, all",
        "making the base model",
    ]
    lines = [
        [
            r["task"],
            str(r["problems"]),
            f"{r['reward_before']:.3f} ± {r['error_before']:.3f}",
            f"{r['reward_after']:.3f} ± {r['error_after']:.3f}",
            "any" if r["rose"] is None else f"{r['rose']:.0f}",
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
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["before"], summary["after"]
    error = math.hypot(before["eval_reward_se"], after["eval_reward_se"])
    gain = after["eval_reward"] - before["eval_reward"]
    return {
        "task": task,
        "seed": seed,
        "problems": summary["eval_prompts"],
        "generations": summary["generations"],
        "reward_before": before["eval_reward"],
        "error_before": before["eval_reward_se"],
        "reward_after": after["eval_reward"],
        "error_after": after["eval_reward_se"],
        "rose": gain / error if error else None,
        "accuracy_before": before["eval_accuracy"],
        "accuracy_after": after["eval_accuracy"],
        "seconds": seconds,
        "seconds_pretraining": pretraining,
        "pass": gain > 2 * error and seconds <= LIMIT,
    }
