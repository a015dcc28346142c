"""`esfast bench training`: the embedded model learns Countdown by every weight mode, and by the usual code's numerics.

The weights are bfloat16; one way has float32 weights, for comparison. Ways differ in how weights are perturbed,
restored and updated, in the kind of noise, or in the number of members. A seed determines the prompts of every
generation and the members' seeds. A run is one way with one seed, by ESTrainer in one thread. With `--keep` a benchmark
that was cut short continues where it was. What low-rank noise costs has a benchmark of its own, ranks.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from . import count, greedy
from .kept_runs import add_jobs, add_keep, run_all, run_folder


@dataclass(frozen=True)
class Way:
    """One way to train. `weights` is a mode of ES, or "usual" or "summed" for the usual code's (usual.UsualWeights)."""

    name: str
    weights: str = "base"
    rounding: str = "nearest"
    dtype: str = "bfloat16"
    noise: str = "gaussian"
    population_size: int = 30


BASE = Way("base")
MODES = (
    Way("usual code", "usual"),
    Way("usual code, summed", "summed"),
    BASE,
    Way("base, stochastic", rounding="stochastic"),
    Way("master", "master"),
    Way("host", "host"),
    Way("inplace", "inplace"),
    Way("float32 model", dtype="float32"),
    Way("usual code, float32 model", "usual", dtype="float32"),
)
SWEEP = tuple(
    Way(f"{noise}, N = {n}", noise=noise, population_size=n)
    for noise in ("gaussian", "rademacher")
    for n in (10, 30, 100)
)
SAME = {Way("gaussian, N = 30").name: BASE.name}  # what the sweep needs and the modes have


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=count, default=5, help="seeds 0, 1, ... of each mode (default: 5)")
    parser.add_argument(
        "--sweep-repeats", type=count, default=3, help="seeds of each kind of noise and number of members (default: 3)"
    )
    parser.add_argument("--generations", type=count, default=60, help="of a run (default: 60)")
    parser.add_argument("--prompts", type=count, default=32, help="of a generation (default: 32)")
    parser.add_argument("--eval-every", type=count, default=5, help="generations between evaluations (default: 5)")
    parser.add_argument("--eval-prompts", type=count, default=500, help="held-out problems (default: 500)")
    add_jobs(parser)
    add_keep(parser)


def run(args: argparse.Namespace) -> dict:
    with run_folder(args) as runs:
        settings = jobs(args)
        learn = partial(train, model=_model(args.eval_prompts))
        rows = run_all(learn, settings, runs, args.jobs, lambda row: f"{row['accuracy'][-1]:.3f}")
    return {"rows": rows}


def jobs(args: argparse.Namespace) -> list[dict]:
    """Settings of every run, seed by seed, so that a benchmark that is cut short has rows of all ways."""
    settings = {
        "generations": args.generations,
        "prompts_per_generation": args.prompts,
        "eval_every": args.eval_every,
        "eval_prompts": args.eval_prompts,
    }
    ways = [(w, args.repeats) for w in MODES] + [(w, args.sweep_repeats) for w in SWEEP if w.name not in SAME]
    return [
        {"way": asdict(w), "seed": seed, **settings}
        for seed in range(max(args.repeats, args.sweep_repeats))
        for w, n in ways
        if seed < n
    ]


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    return _table(result, [w.name for w in MODES])


def sweep_table(result: dict) -> tuple[list[str], list[list[str]]]:
    return _table(result, [w.name for w in SWEEP])


def _table(result: dict, names: Iterable[str]) -> tuple[list[str], list[list[str]]]:
    headers = [
        "way",
        "runs",
        "generations",
        "rollouts a run",
        "accuracy before",
        "accuracy after",
        "reward, first generations",
        "reward, last generations",
    ]
    lines = []
    for name in names:
        rows = of(result, name)
        if not rows:
            continue
        last = max(1, len(rows[0]["reward"]) // 6)
        spread = [
            [r["accuracy"][-1] for r in rows],
            *([mean(r["reward"][part]) for r in rows] for part in (slice(last), slice(-last, None))),
        ]
        after, first, final = (f"{mean(x):.3f} ± {stdev(x) if len(x) > 1 else math.nan:.3f}" for x in spread)
        lines.append(
            [
                name,
                str(len(rows)),
                str(len(rows[0]["reward"])),
                f"{rows[0]['rollouts']:,}",
                f"{mean(r['accuracy'][0] for r in rows):.3f}",
                after,
                first,
                final,
            ]
        )
    return headers, lines


def of(result: dict, name: str) -> list[dict]:
    """The rows of a way, one a seed."""
    return [r for r in result["rows"] if r["way"]["name"] == SAME.get(name, name)]


def _model(prompts: int) -> str:
    """Folder of the embedded model; checks the engine against TransformersEngine first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .. import tasks
    from ..tasks import embedded

    path, task = str(embedded.cached()), tasks.get("countdown", style=embedded.STYLE)
    loaded = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    greedy.check(*loaded, task.max_new_tokens, [row["prompt"] for row in task.eval_rows(prompts)])
    return path


def train(settings: dict, folder: Path, model: str) -> dict:
    """One run, by ESTrainer, in one thread: its row."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from .. import ESConfig, ESTrainer, tasks
    from ..tasks import embedded
    from .usual import UsualWeights

    torch.set_num_threads(1)
    disable_progress_bar()
    way, seed = Way(**settings["way"]), settings["seed"]
    usual = way.weights in ("usual", "summed")
    task = tasks.get("countdown", style=embedded.STYLE)
    if folder.exists():  # of a run that was cut short
        shutil.rmtree(folder)
    config = ESConfig(
        **{
            **embedded.settings("countdown"),
            **{k: v for k, v in settings.items() if k != "way"},
            "output_dir": str(folder),
            "population_size": way.population_size,
            "noise": way.noise,
            "weights": "inplace" if usual else way.weights,
            "rounding": way.rounding,
            "max_completion_length": task.max_new_tokens,
            "progress": False,
            "checkpoint_every": 0,
        }
    )
    net, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    net = net.to(getattr(torch, way.dtype))
    trainer = ESTrainer(
        net,
        list(task.reward_funcs),
        config,
        train_dataset=lambda generation, size: task.train_rows(generation, size, seed),
        eval_dataset=task.eval_rows(config.eval_prompts),
        processing_class=tokenizer,
        metrics={"accuracy": task.accuracy},
        engine=greedy.Greedy(net, tokenizer, task.max_new_tokens),
    )
    if usual:
        trainer.es.store = UsualWeights(trainer.es.plan, way.noise, summed=way.weights == "summed")
    summary = trainer.train()
    metrics = trainer.folder.read_metrics()
    evaluated = [m for m in metrics if "eval_accuracy" in m]
    return {
        **settings,
        "sigma": config.sigma,
        "lr": config.lr,
        "rollouts": config.generations * way.population_size * config.prompts_per_generation,
        "reward": [round(m["reward_mean"], 4) for m in metrics if "reward_mean" in m],
        "evaluated": [m["generation"] for m in evaluated],
        "accuracy": [round(m["eval_accuracy"], 4) for m in evaluated],
        "drift": next((m["drift"] for m in reversed(metrics) if "drift" in m), None),
        "seconds": summary["seconds"]["total"],
    }
