"""`esfast bench ranks`: what low-rank noise costs in learning, on the embedded model, beside noise of full rank.

First each kind of noise learns each task with several sigmas, all with the same seed. Then it learns with the sigma
that gave the highest reward on held-out problems, with other seeds, and with independent and with mirrored members.
Everything else is equal: a seed determines the prompts of every generation, and the number of members, prompts and
generations is the same. Weights are float32, and all members answer in one batch. Each run is evaluated before and at
the end. With `--keep` a benchmark that was cut short continues where it was.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from ..tasks import MODULES
from . import count
from .kept_runs import add_jobs, add_keep, run_all, run_folder

FULL = 0  # in place of a rank: gaussian noise, of full rank
FACTORS = (0.5, 1.0, 2.0)  # of a task's own sigma


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=tuple(MODULES),
        default=["countdown", "math"],
        help="that are learned (default: countdown math)",
    )
    parser.add_argument(
        "--ranks", type=count, nargs="+", default=[1, 4, 16], help="of low-rank noise (default: 1 4 16)"
    )
    parser.add_argument(
        "--repeats", type=count, default=3, help="seeds 1, 2, ...; sigmas are tried with 0 (default: 3)"
    )
    parser.add_argument("--generations", type=count, default=40, help="of a run (default: 40)")
    parser.add_argument("--members", type=count, default=30, help="of a generation, an even number (default: 30)")
    parser.add_argument("--prompts", type=count, default=16, help="of a generation (default: 16)")
    parser.add_argument("--eval-prompts", type=count, default=500, help="held-out problems (default: 500)")
    add_jobs(parser)
    add_keep(parser)


def run(args: argparse.Namespace) -> dict:
    from ..tasks import embedded

    learn = partial(train, models={task: str(embedded.cached(task=task)) for task in args.tasks})
    with run_folder(args) as runs:
        scan = run_all(learn, scan_jobs(args), runs, args.jobs, _shown)
        args.save({"rows": scan})
        rows = run_all(learn, jobs(args, best_sigmas(scan)), runs, args.jobs, _shown)
    return {"rows": scan + rows}


def scan_jobs(args: argparse.Namespace) -> list[dict]:
    """Settings of the runs that look for each kind's sigma."""
    from ..tasks import embedded

    return [
        _job(args, _way(task, rank, factor * embedded.settings(task)["sigma"]), seed=0, scan=True)
        for factor in FACTORS
        for task in args.tasks
        for rank in [*args.ranks, FULL]
    ]


def best_sigmas(scan: list[dict]) -> dict[tuple[str, int], float]:
    """For each task and rank the sigma with the highest reward on held-out problems after training."""
    best: dict[tuple[str, int], dict] = {}
    for row in scan:
        way = row["way"]
        key = way["task"], way["rank"]
        if key not in best or row["reward_after"] > best[key]["reward_after"]:
            best[key] = row
    return {key: row["way"]["sigma"] for key, row in best.items()}


def jobs(args: argparse.Namespace, sigmas: dict[tuple[str, int], float]) -> list[dict]:
    """Settings of the runs that are compared, seed by seed."""
    return [
        _job(args, _way(task, rank, sigma, mirrored), seed, scan=False)
        for seed in range(1, args.repeats + 1)
        for mirrored in (False, True)
        for (task, rank), sigma in sigmas.items()
    ]


def _way(task: str, rank: int, sigma: float, mirrored: bool = False) -> dict:
    name = f"{task}, {_noise(rank)}, sigma {sigma:g}" + (", mirrored" if mirrored else "")
    return {"name": name, "task": task, "rank": rank, "sigma": sigma, "mirrored": mirrored}


def _job(args: argparse.Namespace, way: dict, seed: int, scan: bool) -> dict:
    return {
        "way": way,
        "seed": seed,
        "scan": scan,
        "generations": args.generations,
        "population_size": args.members,
        "prompts_per_generation": args.prompts,
        "eval_prompts": args.eval_prompts,
    }


def _noise(rank: int) -> str:
    return "full rank" if rank == FULL else f"rank {rank}"


def _shown(row: dict) -> str:
    return f"{row['accuracy_after']:.3f}"


def train(settings: dict, folder: Path, models: dict[str, str]) -> dict:
    """One run, by ESTrainer, in one thread: its row. `models` has the folder of each task's embedded model."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from .. import ESConfig, ESTrainer, tasks
    from ..tasks import embedded

    torch.set_num_threads(1)
    disable_progress_bar()
    way, seed = settings["way"], settings["seed"]
    task, path = tasks.get(way["task"], style=embedded.STYLE), models[way["task"]]
    # of a run that was cut short
    if folder.exists():
        shutil.rmtree(folder)
    asked = {k: v for k, v in settings.items() if k not in ("way", "scan")}
    noise = {"noise": "gaussian"} if way["rank"] == FULL else {"noise": "low_rank", "rank": way["rank"]}
    config = ESConfig(
        **{
            **embedded.settings(way["task"]),
            **asked,
            **noise,
            "sigma": way["sigma"],
            "mirrored": way["mirrored"],
            "output_dir": str(folder),
            "max_completion_length": task.max_new_tokens,
            # all: an error, rather than a run of another kind, if they can't share the model
            "members_at_once": str(settings["population_size"]),
            "eval_every": settings["generations"],
            "checkpoint_every": 0,
            "progress": False,
        }
    )
    trainer = ESTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        list(task.reward_funcs),
        config,
        train_dataset=lambda generation, size: task.train_rows(generation, size, seed),
        eval_dataset=task.eval_rows(config.eval_prompts),
        processing_class=AutoTokenizer.from_pretrained(path),
        metrics={"accuracy": task.accuracy},
    )
    summary = trainer.train()
    metrics = trainer.folder.read_metrics()
    return {
        **settings,
        "lr": config.lr,
        "rollouts": config.generations * config.population_size * config.prompts_per_generation,
        "reward": [round(m["reward_mean"], 4) for m in metrics if "reward_mean" in m],
        "reward_after": summary["after"]["eval_reward"],
        "accuracy_before": summary["before"]["eval_accuracy"],
        "accuracy_after": summary["after"]["eval_accuracy"],
        "seconds": summary["seconds"]["total"],
    }


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Accuracy on held-out problems: a line for each task and kind of noise."""
    headers = ["task", "noise", *(f"sigma × {factor:g}" for factor in FACTORS), "sigma", "accuracy before"]
    headers += ["after, members independent", "after, mirrored", "from full rank (standard errors)"]
    scan, rows = ([r for r in result["rows"] if r["scan"] is which] for which in (True, False))
    sigmas, lines = best_sigmas(scan), []
    for task, rank in sorted(sigmas, key=lambda key: (key[0], key[1] == FULL, key[1])):
        tried = sorted(_of(scan, task, rank), key=lambda r: r["way"]["sigma"])
        found, full = (_of(rows, task, r) for r in (rank, FULL))
        lines.append(
            [
                task,
                _noise(rank),
                *(f"{r['accuracy_after']:.3f}" for r in tried),
                f"{sigmas[task, rank]:g}",
                f"{tried[0]['accuracy_before']:.3f}",
                *(_spread([r["accuracy_after"] for r in found if r["way"]["mirrored"] is m]) for m in (False, True)),
                _from_full(found, full) if rank != FULL else "",
            ]
        )
    return headers, lines


def _of(rows: list[dict], task: str, rank: int) -> list[dict]:
    return [r for r in rows if (r["way"]["task"], r["way"]["rank"]) == (task, rank)]


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else math.nan:.3f}"


def _from_full(found: list[dict], full: list[dict]) -> str:
    """How far the mean of all runs is from full rank's, in standard errors of the difference; pairs of one seed and one
    way to draw members are compared, since they see the same prompts."""
    theirs = {(r["seed"], r["way"]["mirrored"]): r["accuracy_after"] for r in full}
    both = [(r, (r["seed"], r["way"]["mirrored"])) for r in found]
    differences = [r["accuracy_after"] - theirs[key] for r, key in both if key in theirs]
    if len(differences) < 2:
        return ""
    error = stdev(differences) / math.sqrt(len(differences))
    return f"{mean(differences):+.3f} ({mean(differences) / error:+.1f})" if error else f"{mean(differences):+.3f}"
