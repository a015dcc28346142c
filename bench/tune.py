"""`esfast bench tune`: sigma and lr found by the run, against those of the recipes and against wrong ones.

The embedded model learns its tasks. Each run is one `esfast train` in a process of its own. Ways differ in sigma and lr
alone: the recipe's, which were tuned by hand; "auto"; ten times, and a tenth of the recipe's. The search is part of the
budget: "auto" trains 5 % fewer generations, the most that a search may take. With `--keep` a benchmark that was cut
short continues where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..tasks import MODULES
from ..trainer.config import AUTO
from ..trainer.tuning import BUDGET
from . import add_choices
from .countdown import call, train_command
from .kept_runs import add_keep, kept, run_folder
from .provenance import git_state

# Factors of the recipe's sigma and lr; None for what the run finds.
WAYS: dict[str, float | None] = {"by hand": 1.0, "auto": None, "ten times": 10.0, "a tenth": 0.1}
TASKS = tuple(MODULES)
# Settings of a run that are options of `esfast train`
OPTIONS = ("task", "generations", "sigma", "lr", "eval_prompts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choices(parser, "--tasks", TASKS, "that are learned (default: all)")
    add_choices(parser, "--ways", tuple(WAYS), "of choosing sigma and lr (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each (default: 0 1 2)")
    parser.add_argument("--share", type=float, default=1.0, help="of the recipe's generations (default: 1)")
    parser.add_argument("--eval-prompts", type=int, default=500, help="held-out problems (default: 500)")
    add_keep(parser)


def run(args: argparse.Namespace) -> dict:
    commit = git_state()[0]
    rows: list[dict] = []
    with run_folder(args) as runs:
        for settings in jobs(args):
            rows.append(kept(train, settings, runs, commit))
            args.save({"rows": rows})
    return {"rows": rows}


def jobs(args: argparse.Namespace) -> list[dict]:
    """Settings of every run, seed by seed."""
    from ..tasks import embedded

    return [
        {
            "way": {"name": f"{task}, {way}"},
            "seed": seed,
            "task": task,
            "chosen": way,
            "eval_prompts": args.eval_prompts,
            **_numbers(embedded.settings(task), WAYS[way], args.share),
        }
        for seed in args.seeds
        for task in args.tasks
        for way in args.ways
    ]


def _numbers(recipe: dict[str, Any], factor: float | None, share: float) -> dict[str, Any]:
    generations = max(2, round(recipe["generations"] * share))
    if factor is None:
        return {"generations": math.floor(generations * (1 - BUDGET)), "sigma": AUTO, "lr": AUTO}
    return {"generations": generations, "sigma": recipe["sigma"] * factor, "lr": recipe["lr"] * factor}


def train(settings: dict, folder: Path) -> dict:
    """One run, by `esfast train`: its row."""
    if folder.exists():
        # Of a run that was cut short.
        shutil.rmtree(folder)
    options = [word for name in OPTIONS for word in (f"--{name.replace('_', '-')}", str(settings[name]))]
    options += ["--eval-every", "0", "--no-save-best", "--checkpoint-every", "0", "--no-progress"]
    call(f"`esfast train` of {folder.name}", train_command(settings["seed"], folder, options), dict(os.environ))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    tuning = folder / "tuning.json"
    found = json.loads(tuning.read_text(encoding="utf-8")) if tuning.exists() else {}
    return {
        **settings,
        **found.get("settings", {}),
        "searched": found.get("responses", 0) / found.get("run", 1),
        "why": found.get("why", []),
        "reward_before": summary["before"]["eval_reward"],
        "reward_after": summary["after"]["eval_reward"],
        "accuracy_after": summary["after"].get("eval_accuracy"),
        "seconds": summary["seconds"]["total"],
    }


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = [
        "task",
        "sigma, lr",
        "runs",
        "generations",
        "sigma",
        "lr",
        "reward before",
        "reward after",
        "gain",
        "of the gain by hand",
        "search, of all responses",
    ]
    lines = []
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        by_hand = _gain(_of(result, task, "by hand"))
        for way in WAYS:
            rows = _of(result, task, way)
            if not rows:
                continue
            after = [row["reward_after"] for row in rows]
            spread = f" ± {stdev(after):.3f}" if len(after) > 1 else ""
            lines.append(
                [
                    task,
                    way,
                    str(len(rows)),
                    str(rows[0]["generations"]),
                    _range([row["sigma"] for row in rows]),
                    _range([row["lr"] for row in rows]),
                    f"{mean(row['reward_before'] for row in rows):.3f}",
                    f"{mean(after):.3f}{spread}",
                    f"{_gain(rows):+.3f}",
                    f"{_gain(rows) / by_hand:.0%}" if by_hand else "",
                    f"{mean(row['searched'] for row in rows):.1%}" if way == "auto" else "",
                ]
            )
    return headers, lines


def _of(result: dict, task: str, way: str) -> list[dict]:
    return [row for row in result["rows"] if (row["task"], row["chosen"]) == (task, way)]


def _gain(rows: list[dict]) -> float:
    return mean(row["reward_after"] - row["reward_before"] for row in rows) if rows else 0.0


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"
