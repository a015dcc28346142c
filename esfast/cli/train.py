"""esfast train."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

from ..distributed.team import Team
from ..tasks import embedded
from ..trainer.door import open_rewards
from ..trainer.loggers import require
from ..trainer.probes import Probe
from ..trainer.run_folder import RunFolder
from ..trainer.trainer import ESTrainer
from ..utils.errors import BadValue
from ..utils.files import check_writable
from ..utils.interrupts import stoppable
from .earlier_run import resumed
from .models import device_of, load, probes_of, task_of
from .run_options import TRAIN_DEFAULTS, RunOptions, dump, es_config, given, run_options

log = logging.getLogger(__name__)


@stoppable()
def run(args: argparse.Namespace) -> None:
    settings = given(args)
    if settings.get("resume"):
        settings = resumed(settings)
    options = run_options(settings)
    check_engines(options)
    if args.print_config:
        print(dump(options, es_config(_defaults(options, task_of(options), probes_of(options)) | settings)), end="")
        return
    team = join(options)
    if team.size > 1 and "output_dir" not in settings:
        raise BadValue("--out: give the run folder: with several processes a restart must find it again")
    # Claim the folder first: loading may take minutes.
    if team.rank == 0:
        with team.telling():
            check_writable("--out", settings.get("output_dir", "runs"), folder=True)
            if "output_dir" in settings:
                RunFolder.claim(settings["output_dir"], settings.get("resume", False) or team.restarted)
    trainer, pretraining = trainer_of(options, settings, team)
    if team.rank:
        trainer.train()
        return
    model, folder = options.model or "embedded model", trainer.folder.path
    log.info("%r, %s on %s -> %s", trainer.es.store, model, options.task, folder)
    try:
        trainer.train()
    finally:
        if trainer.summary:
            print(_summary(trainer, pretraining))


def check_engines(options: RunOptions) -> None:
    if options.engine != "vllm" and options.num_engines != 1:
        raise BadValue("--num-engines is of --engine vllm; without it, use torchrun")


def join(options: RunOptions) -> Team:
    """The processes that torchrun started, or this one alone. ValueError if the engine can't use several."""
    check_engines(options)
    team = Team.join(device_of(options), 1 if options.engine == "vllm" else options.tensor_parallel_size)
    if options.engine == "vllm" and team.size > 1:
        raise BadValue("--engine vllm: one process trains, without torchrun; --num-engines says how many engines")
    return team


def trainer_of(options: RunOptions, settings: dict[str, Any], team: Team) -> tuple[ESTrainer, float]:
    """The trainer of a run, and the seconds that making the embedded model took."""
    task, probes = task_of(options), probes_of(options)
    config = es_config(_defaults(options, task, probes) | settings)
    # Refuse now what the trainer would refuse after minutes of loading.
    if task.environment is None:
        open_rewards(list(task.reward_funcs), {}, config.reward_weights)
    require(config.report_to)
    eval_rows = task.eval_rows(config.eval_prompts)
    if not eval_rows:
        log.warning("no problems of %s are held out, so nothing is evaluated", options.data or options.task)
    began = time.perf_counter()
    # One process makes the embedded model, the others find it.
    if options.model is None:
        team.broadcast_from_rank0("embedded model", lambda: str(embedded.cached(task=options.task)).encode())
    data: dict[str, Any] = {
        "train_dataset": task.train_dataset(config.seed),
        "eval_dataset": eval_rows or None,
        "metrics": {} if task.accuracy is None else {"accuracy": task.accuracy},
        "probes": {name: Probe.of_task(probe, config.eval_prompts) for name, probe in probes.items()},
        "environment": task.environment,
    }
    reward_funcs = list(task.reward_funcs) or None
    if options.engine == "vllm":
        from ..integrations.fleet import FleetTrainer

        pretraining = 0.0
        path = options.model if options.model is not None else str(embedded.cached(task=options.task))
        trainer: ESTrainer = FleetTrainer(
            path,
            reward_funcs,
            config,
            options.num_engines,
            options.tensor_parallel_size,
            options.dtype,
            engine_timeout=options.engine_timeout,
            **data,
        )
    else:
        model, tokenizer = load(options, team)
        pretraining = time.perf_counter() - began if options.model is None else 0.0
        trainer = ESTrainer(model, reward_funcs, config, processing_class=tokenizer, team=team, **data)
    trainer.described = dataclasses.asdict(options)
    return trainer, pretraining


def _defaults(options: RunOptions, task, probes: Mapping[str, Any] | None = None) -> dict:
    """Defaults that the command, the task and the embedded model set in place of ESConfig's."""
    return TRAIN_DEFAULTS | {
        # The random digits keep apart two runs that start in the same second.
        "output_dir": f"runs/{task.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}",
        "max_completion_length": max(t.max_new_tokens for t in (task, *(probes or {}).values())),
        **task.settings,
        **(embedded.settings(options.task or task.name) if options.model is None else {}),
    }


def _summary(trainer, pretraining: float) -> str:
    s, seconds = trainer.summary, dict(trainer.summary["seconds"])
    total = seconds.pop("total")
    lines = [f"after {s['generations']} generations, on {s['eval_prompts']} held-out prompts:"]
    for name in s["before"] | s["after"]:
        if not name.endswith("_se"):
            before, after = (f"{s[when][name]:.4f}" if name in s[when] else "?" for when in ("before", "after"))
            lines.append(f"  {name.removeprefix('eval_'):<10} {before:>8} -> {after}")
    if s["after"] and s["after_generation"] != s["generations"]:
        lines.append(f"  (the last evaluation was after generation {s['after_generation']})")
    shares = ", ".join(f"{phase} {t:.1f}" for phase, t in sorted(seconds.items(), key=lambda x: -x[1]) if t >= 0.05)
    lines.append(
        f"seconds: {total:.1f} ({shares})" + (f"; making the base model {pretraining:.1f}" * bool(pretraining))
    )
    lines.append(f"tuned model: {trainer.folder.model}; curves: {trainer.folder.path / 'curves.png'}")
    return "\n".join(lines)
