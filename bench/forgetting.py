"""`esfast bench forgetting`: what the embedded model forgets of one task while it learns another, and what decay to the
initial weights keeps.

Both tasks are reasoning-gym's. The base model knows both: of the task it has to learn it shows the answers in the
rewarded form only at times, of the other, the probe, always. Each row is one `esfast train` with `--probe`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..tasks import base, embedded, gym, tags
from ..trainer.probes import PREFIX, name_of
from .countdown import call, train_command
from .kept_runs import add_keep, run_folder
from .outcomes import HEADERS, cells, outcome

TASK = "gym:spell_backward?min_word_len=3&max_word_len=4"
PROBE = (
    "gym:basic_arithmetic?min_terms=2&max_terms=2&max_digits=2&operators=%2B,-&allow_parentheses=no&allow_negation=no"
)
DECAYS = (0.0, 5.0)
SETTINGS = {
    "generations": 40,
    "population_size": 30,
    "sigma": 0.03,
    "lr": 0.03,
    "prompts_per_generation": 16,
    "eval_prompts": 200,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each for every decay")
    parser.add_argument(
        "--decays", type=float, nargs="+", default=list(DECAYS), help="--weight-decay to the initial weights"
    )
    parser.add_argument("--steps", type=int, default=embedded.STEPS, help="of the base model's pre-training")
    add_keep(parser, "keep the base model and the run folders in it, and use those that are there")
    parser.add_argument("train", nargs="*", metavar="-- OPTION", help="options of `esfast train`, after --")


def run(args: argparse.Namespace) -> dict:
    with run_folder(args) as runs:
        model = runs / "base"
        if not model.exists():
            embedded.build(model, steps=args.steps, task=TASK, recipe=base.Recipe(examples, SETTINGS))
        rows = [_one(decay, seed, runs, model, args.train) for seed in args.seeds for decay in args.decays]
    return {"task": TASK, "probe": PROBE, "rows": rows}


def examples(seed: int, thousands: int) -> list[tuple[str, str]]:
    """Pairs to pre-train on, as many of the one task as of the other."""
    learned = gym.recipe(TASK.removeprefix(gym.PREFIX)).examples(seed, thousands // 2)
    known = [
        (prompt, f"{tags.THINK_END}\n{tags.ANSWER}{_bare(completion)}{tags.ANSWER_END}")
        for prompt, completion in gym.recipe(PROBE.removeprefix(gym.PREFIX)).examples(seed, thousands // 2)
    ]
    return learned + known


def _bare(completion: str) -> str:
    answer = tags.last_answer(completion)
    return completion.removeprefix(f"{tags.THINK_END}\n") if answer is None else answer


_METRICS = {
    f"{what}_{metric}": prefix + metric
    for what, prefix in (("task", "eval_"), ("probe", f"{PREFIX}{name_of(PROBE)}/"))
    for metric in ("reward", "reward_se", "accuracy")
}


def _one(decay: float, seed: int, runs: Path, model: Path, further: Sequence[str]) -> dict[str, Any]:
    folder = runs / f"decay{decay:g}-seed{seed}"
    options = ["--model", str(model), "--task", TASK, "--probe", PROBE, "--eval-every", "0", "--decay-to", "initial"]
    options += ["--weight-decay", str(decay), "--no-save-best"]
    for name, value in SETTINGS.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    # A run that is there was kept by an earlier call.
    if not (folder / "summary.json").exists():
        command = train_command(seed, folder, [*options, *further])
        call(f"`esfast train --weight-decay {decay:g}`", command, dict(os.environ))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"decay": decay, "seed": seed, **outcome(folder, _METRICS), "distance": metrics[-1]["distance"]}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    """A line a decay: means over the seeds, with the lowest and the highest."""
    headers = [
        "`--weight-decay`, `--decay-to initial`",
        "seeds",
        "task: accuracy before",
        "task: accuracy after",
        "probe: accuracy before",
        "probe: accuracy after",
        "distance from the initial weights",
    ]
    lines = []
    for decay in dict.fromkeys(r["decay"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["decay"] == decay]
        shares = [_spread([r[f"{what}_accuracy_{when}"] for r in rows], "{:.1%}") for what, when in _COLUMNS]
        lines.append([f"{decay:g}", str(len(rows)), *shares, _spread([r["distance"] for r in rows], "{:.2f}")])
    return headers, lines


_COLUMNS = (("task", "before"), ("task", "after"), ("probe", "before"), ("probe", "after"))


def learned_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """A line a seed of the runs without decay: what was learned of the task."""
    headers = [
        "seed",
        *HEADERS,
        "accuracy before",
        "accuracy after",
        "generations",
        "seconds",
    ]
    lines = [
        [
            str(r["seed"]),
            *cells(r, "task_reward", "task_reward_se"),
            f"{r['task_accuracy_before']:.1%}",
            f"{r['task_accuracy_after']:.1%}",
            str(r["generations"]),
            f"{r['seconds']:.0f}",
        ]
        for r in result["rows"]
        if r["decay"] == 0
    ]
    return headers, lines


def _spread(values: Sequence[float], form: str) -> str:
    shown = form.format(fmean(values))
    return shown if len(values) == 1 else f"{shown} ({form.format(min(values))} to {form.format(max(values))})"
