"""`esfast bench tune`: sigma and lr found by the run, against those of the recipes and against wrong ones.

The embedded model learns its tasks, and two of reasoning-gym's. Each run is one `esfast train` in a process of its own,
with fewer generations than the recipe's where the gain is clear without them. Ways differ in sigma, lr and groups
alone: the recipe's, which were tuned by hand; "auto", which makes groups by the tensors' scale; "auto" with the same
sigma for all weights; ten times, and a tenth of the recipe's. The search is part of the budget: "auto" trains 5 % fewer
generations, the most that a search may take.

Searches alone, which train nothing, say how much what is found depends on the seed.

Of each run by hand the best members of the last generation are asked too, alone and by vote, beside the tuned model.
With `--keep` a benchmark that was cut short continues where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from ..tasks import MODULES
from ..trainer.config import AUTO
from ..trainer.tuning import BUDGET
from ..utils.child import child
from . import BenchmarkError, add_choices, count
from .countdown import call, train_command
from .forgetting import TASK as SPELL_BACKWARD
from .kept_runs import add_jobs, add_keep, run_all, run_folder

# Factors of the recipe's sigma and lr; None for what the run finds.
WAYS: dict[str, float | None] = {
    "by hand": 1.0,
    "auto": None,
    "auto, one sigma": None,
    "ten times": 10.0,
    "a tenth": 0.1,
}
# By their short names.
TASKS = {name: name for name in MODULES} | {
    "spell_backward": SPELL_BACKWARD,
    "chain_sum": "gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1",
}
# Where the gain is clear after fewer generations than the recipe's.
SHORTER = {"countdown": {"generations": 60}, "sudoku": {"generations": 15}, "math": {"generations": 50}}
# Settings of a run that are options of `esfast train`
OPTIONS = ("task", "generations", "sigma", "lr", "groups", "eval_prompts")
# All weights
ONE_GROUP = "*:sigma=1"
# Members of the last generation that vote.
VOTERS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_choices(parser, "--tasks", tuple(TASKS), "that are learned (default: all)")
    add_choices(parser, "--ways", tuple(WAYS), "of choosing sigma and lr (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each (default: 0 1 2)")
    parser.add_argument("--share", type=float, default=1.0, help="of the generations (default: 1)")
    parser.add_argument("--eval-prompts", type=count, default=300, help="held-out problems (default: 300)")
    parser.add_argument("--searches", type=int, default=8, help="seeds of searches that train nothing (default: 8)")
    add_jobs(parser)
    add_keep(parser)


def run(args: argparse.Namespace) -> dict:
    from ..tasks import embedded

    for task in args.tasks:
        embedded.cached(task=TASKS[task])
    with run_folder(args) as runs:
        return {
            "rows": run_all(train, jobs(args), runs, args.jobs, lambda row: f"{row['reward_after']:.3f}"),
            "searches": run_all(find, searches(args), runs, args.jobs, lambda row: f"sigma {row['sigma']}"),
        }


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
            **_numbers(embedded.settings(TASKS[task]) | SHORTER.get(task, {}), way, args.share),
        }
        for seed in args.seeds
        for task in args.tasks
        for way in args.ways
    ]


def _numbers(recipe: dict[str, Any], way: str, share: float) -> dict[str, Any]:
    generations, factor = max(2, round(recipe["generations"] * share)), WAYS[way]
    if factor is None:
        groups = {"groups": ONE_GROUP} if "one sigma" in way else {}
        return {"generations": math.floor(generations * (1 - BUDGET)), "sigma": AUTO, "lr": AUTO, **groups}
    return {"generations": generations, "sigma": recipe["sigma"] * factor, "lr": recipe["lr"] * factor}


def searches(args: argparse.Namespace) -> list[dict]:
    """The searches of the runs with "auto", for further seeds."""
    many = argparse.Namespace(**vars(args) | {"seeds": range(args.searches)})
    return [
        {**job, "way": {"name": f"search, {job['way']['name']}"}} for job in jobs(many) if WAYS[job["chosen"]] is None
    ]


def find(settings: dict, folder: Path) -> dict:
    """What `esfast tune` finds, in one thread and in this process, where importing takes no time."""
    import torch

    from ..cli import main

    folder.mkdir(parents=True, exist_ok=True)
    said = io.StringIO()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(said):
        failed = main(["tune", *_options(settings), "--seed", str(settings["seed"]), "--no-progress", "--json"])
    if failed:
        raise BenchmarkError(f"`esfast tune` of {folder.name} failed with exit status {failed}, see above")
    found = json.loads(said.getvalue())
    return {**settings, **found["settings"], "learns": found["learns"], "why": found["why"]}


def _options(settings: dict) -> list[str]:
    given = {name: settings[name] for name in OPTIONS if name in settings} | {"task": TASKS[settings["task"]]}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def train(settings: dict, folder: Path) -> dict:
    """One run, by `esfast train`, in one thread: its row."""
    if folder.exists():
        # Of a run that was cut short.
        shutil.rmtree(folder)
    options = _options(settings)
    options += ["--eval-every", "0", "--no-save-best", "--checkpoint-every", "0", "--no-progress"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    call(f"`esfast train` of {folder.name}", train_command(settings["seed"], folder, options), environment)
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
        **({"members": _members(folder, settings["eval_prompts"])} if settings["chosen"] == "by hand" else {}),
    }


def _members(folder: Path, prompts: int) -> list[dict]:
    """What `esfast eval --members` says of the run: the tuned model, the best member, the vote of the best."""
    code = "from esfast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = child(code, "eval", str(folder), "--members", str(VOTERS), "--samples", str(prompts), "--json")
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise BenchmarkError(f"`esfast eval` of {folder.name} failed with exit status {done.returncode}, see above")
    names = ("reward", "accuracy", "samples")
    return [{name: row.get(name) for name in names} for row in json.loads(done.stdout)]


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
        "seconds",
    ]
    lines = []
    for task in _tasks(result):
        by_hand = _gain(_of(result, task, "by hand"))
        # With those of a result whose ways had other names.
        for way in dict.fromkeys([*WAYS, *(row["chosen"] for row in result["rows"])]):
            rows = _of(result, task, way)
            if not rows:
                continue
            after = [row["reward_after"] for row in rows]
            lines.append(
                [
                    task,
                    way,
                    str(len(rows)),
                    str(rows[0]["generations"]),
                    _range([row["sigma"] for row in rows]),
                    _range([row["lr"] for row in rows]),
                    f"{mean(row['reward_before'] for row in rows):.3f}",
                    _spread(after),
                    f"{_gain(rows):+.3f}",
                    f"{_gain(rows) / by_hand:.0%}" if by_hand > 0 else "",
                    f"{mean(row['searched'] for row in rows):.1%}" if any(row["searched"] for row in rows) else "",
                    f"{median(row['seconds'] for row in rows):.0f}",
                ]
            )
    return headers, lines


def searches_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """How much what is found depends on the seed."""
    headers = ["task", "sigma, lr", "seeds", "sigma", "lr", "guesses"]
    lines = []
    # Older results have none.
    found = {"rows": result.get("searches", [])}
    for task in _tasks(found):
        for way in WAYS:
            if not (rows := _of(found, task, way)):
                continue
            numbers = [_range([row[name] for row in rows]) for name in ("sigma", "lr")]
            lines.append([task, way, str(len(rows)), *numbers, str(sum(not row["learns"] for row in rows))])
    return headers, lines


def members_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """The tuned models of the runs by hand beside the best members of their last generations."""
    headers = ["task", "runs", "measure", "before", "tuned model", "best member", f"vote of the best {VOTERS}"]
    lines = []
    for task in _tasks(result):
        rows = [row for row in _of(result, task, "by hand") if row.get("members")]
        for measure in ("reward", "accuracy") if rows else ():
            columns = list(zip(*([each[measure] for each in row["members"]] for row in rows), strict=True))
            if any(value is None for column in columns for value in column):
                continue
            before = f"{mean(row['reward_before'] for row in rows):.3f}" if measure == "reward" else ""
            lines.append([task, str(len(rows)), measure, before, *map(_spread, columns)])
    return headers, lines


def _tasks(result: dict) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in result["rows"]))


def _of(result: dict, task: str, way: str) -> list[dict]:
    return [row for row in result["rows"] if (row["task"], row["chosen"]) == (task, way)]


def _gain(rows: list[dict]) -> float:
    return mean(row["reward_after"] - row["reward_before"] for row in rows) if rows else 0.0


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"
