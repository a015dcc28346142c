"""esfast eval --members: the best members of a run's last generation, beside its tuned model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.plan import Plan
from ..rollout import adapters
from ..tasks import Task
from ..trainer.ensemble import LastGeneration, vote
from ..trainer.evaluation import judged
from ..trainer.run_folder import RunFolder
from ..utils.rows import Rows
from .models import load
from .run_options import read_yaml, run_options


def ask_members(
    run: Path,
    args: argparse.Namespace,
    task: Task,
    rows: Rows,
    length: int,
    respond: Callable[..., list[dict]],
    settings: Mapping[str, Any],
) -> Iterator[tuple[str, list[dict]]]:
    """Yields names and responses: of the best member, and of the vote of the best K."""
    folder = RunFolder(run)
    config = read_yaml(folder.config)
    launch = {name: settings[name] for name in ("dtype", "device") if name in settings}
    options = run_options({**config, "device": "auto", **launch})
    model, tokenizer = load(options)
    if folder.adapter.is_dir():
        model = adapters.attach(model, folder.adapter)
    plan = Plan(model, config.get("include") or adapters.patterns(model), config.get("exclude"))
    last = LastGeneration(plan, folder.journal, bool(config.get("mirrored")), config.get("perturb_rounding", "nearest"))
    found = last.ask(args.members, lambda: respond(model, tokenizer, task, rows, length, args.batch_size))
    yield f"best member of generation {last.generation}", found[0]
    if len(found) > 1:
        prompts = [r["prompt"] for r in found[0]]
        voted = vote([[r["completion"] for r in responses] for responses in found])
        yield f"vote of its best {len(found)}", judged(task, rows, prompts, voted, settings.get("reward_weights"))
