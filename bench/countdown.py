"""`esfast bench countdown`: the embedded model learns Countdown, from nothing to the tuned model, once a seed.

Each seed is one `esfast train`, in a process and a run folder of its own. The embedded model is made afresh first, so
that its pre-training is timed too, and shared by all seeds. With `--noise` each kind runs with every seed, and
`noise_table` compares them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

from ..core.kinds import KINDS
from ..utils.child import child
from ..utils.errors import BadValue
from . import BenchmarkError
from .kept_runs import add_keep, run_folder

# Phases that have a column in the table; all others are "other".
PHASES = ("perturb", "generate", "score", "update", "evaluate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument(
        "--noise",
        nargs="+",
        choices=KINDS,
        help="kinds of noise to compare, low_rank with rank 1 (default: only that of esfast train)",
    )
    add_keep(parser, "keep the run folders, as FOLDER/seed0, ...")
    parser.add_argument("train", nargs="*", metavar="-- OPTION", help="options of `esfast train`, after --")


def run(args: argparse.Namespace) -> dict:
    if len(set(args.seeds)) < len(args.seeds):
        raise BadValue(f"--seeds: each once, got {args.seeds}")
    if args.noise and "--noise" in args.train:
        raise BadValue("--noise: give it to the benchmark or, after --, to esfast train, not to both")
    with tempfile.TemporaryDirectory(prefix="esfast-cache-") as cache, run_folder(args) as runs:
        environment = os.environ | {"ESFAST_CACHE": cache}
        began = time.perf_counter()
        call("making the embedded model", child("from esfast.tasks.embedded import cached; cached()"), environment)
        pretraining = time.perf_counter() - began
        rows = []
        for kind in dict.fromkeys(args.noise or [None]):
            for seed in args.seeds:
                folder = runs / (f"seed{seed}" if kind is None else f"{kind}-seed{seed}")
                options = args.train if kind is None else ["--noise", kind, *args.train]
                named = {} if kind is None else {"noise": kind}
                rows.append({**named, **_one(seed, folder, options, environment, pretraining)})
    return {"rows": rows}


def train_command(seed: int, folder: Path, options: list[str]) -> list[str]:
    code = "from esfast.cli import main; sys.exit(main(sys.argv[1:]))"
    return child(code, "train", "--seed", str(seed), "--out", str(folder), *options)


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    kinds = dict.fromkeys(r.get("noise") for r in result["rows"])
    if len(kinds) > 1:
        return noise_table(result)
    headers = [
        "seed",
        "accuracy before",
        "accuracy after",
        "held-out problems",
        "generations",
        "seconds, all",
        "making the base model",
        *PHASES,
        "other",
    ]
    rows, lines = result["rows"], []
    for r in rows:
        share = [f"{r['seconds'].get(phase, 0.0) / r['seconds_training']:.1%}" for phase in PHASES]
        other = 1 - sum(r["seconds"].get(phase, 0.0) for phase in PHASES) / r["seconds_training"]
        lines.append(
            [
                str(r["seed"]),
                _accuracy(r["accuracy_before"], r["eval_problems"]),
                _accuracy(r["accuracy_after"], r["eval_problems"]),
                str(r["eval_problems"]),
                str(r["generations"]),
                f"{r['seconds_total']:.0f}",
                f"{r['seconds_pretraining']:.0f}",
                *share,
                f"{other:.1%}",
            ]
        )
    if len(rows) > 1:
        keys = ("accuracy_before", "accuracy_after", "seconds_total")
        before, after, seconds = (sum(r[key] for r in rows) / len(rows) for key in keys)
        averages = ["mean", f"{before:.1%}", f"{after:.1%}", "", "", f"{seconds:.0f}"]
        lines.append(averages + [""] * (len(headers) - len(averages)))
    return headers, lines


def noise_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """The kinds of noise side by side, and how far each mean is from the first kind's, in its standard errors."""
    kinds: dict[str, list[dict]] = {}
    for row in result["rows"]:
        kinds.setdefault(row["noise"], []).append(row)
    first = next(iter(kinds))
    headers = ["noise", "accuracy before", *(f"after, seed {r['seed']}" for r in kinds[first])]
    headers += ["mean", f"from {first}, standard errors"]
    lines = []
    for kind, rows in kinds.items():
        after, error = _mean_after(rows)
        theirs, their_error = _mean_after(kinds[first])
        lines.append(
            [
                kind,
                f"{rows[0]['accuracy_before']:.1%}",
                *(_accuracy(r["accuracy_after"], r["eval_problems"]) for r in rows),
                f"{after:.1%} ± {error:.1%}",
                "" if kind == first else f"{(after - theirs) / math.hypot(error, their_error):+.1f}",
            ]
        )
    return headers, lines


def _mean_after(rows: list[dict]) -> tuple[float, float]:
    """Mean accuracy of the seeds and its standard error, as if every answer to a held-out problem were independent."""
    share = mean(r["accuracy_after"] for r in rows)
    return share, math.sqrt(share * (1 - share) / sum(r["eval_problems"] for r in rows))


def _one(seed: int, folder: Path, options: list[str], environment: dict, pretraining: float) -> dict:
    began = time.perf_counter()
    call(f"`esfast train` with seed {seed}", train_command(seed, folder, options), environment)
    wall = time.perf_counter() - began
    path = folder / "summary.json"
    try:
        s = json.loads(path.read_text(encoding="utf-8"))
        seconds = dict(s["seconds"])
        return {
            "seed": seed,
            "generations": s["generations"],
            "eval_problems": s["eval_prompts"],
            "accuracy_before": s["before"]["eval_accuracy"],
            "accuracy_after": s["after"]["eval_accuracy"],
            # The wall-clock time of both commands, with the start of Python.
            "seconds_total": pretraining + wall,
            "seconds_pretraining": pretraining,
            "seconds_training": seconds.pop("total"),
            "seconds": seconds,
        }
    except (OSError, ValueError, KeyError) as error:
        raise BenchmarkError(f"`esfast train` with seed {seed} left no usable summary.json: {error!r}") from None


def call(what: str, command: list[str], environment: dict) -> None:
    """Runs a command with its output on our stderr, since stdout may be a JSON file."""
    sys.stderr.flush()
    status = subprocess.run(command, env=environment, stdout=2).returncode
    if status:
        raise BenchmarkError(f"{what} failed with exit status {status}, see above")


def _accuracy(share: float, problems: int) -> str:
    return f"{share:.1%} ± {math.sqrt(share * (1 - share) / problems):.1%}"
