"""What the commands share: the task, the device and the model that their options name."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..distributed.team import Team
    from .run_options import RunOptions


def task_of(run: RunOptions):
    """The task; fills in what the options leave to the model: its task, and the style of its prompts."""
    from .. import tasks
    from ..tasks import embedded

    if run.model is None:
        run.task, run.style = run.task or "countdown", run.style or embedded.STYLE
    elif run.task is None or run.style is None:
        from ..rollout.models import load_config

        made = load_config(run.model)
        run.task = run.task or getattr(made, "prompt_task", "countdown")
        run.style = run.style or getattr(made, "prompt_style", "paper")
    return tasks.get(run.task, run.style, run.data, run.train_prompts, run.reward or ())


def device_of(args: argparse.Namespace) -> str:
    import torch

    from ..core.ops import auto_backend

    if args.device != "auto":
        return args.device
    ready = torch.cuda.is_available() and auto_backend(torch.device("cuda")) != "reference"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if ready else "cpu"


def load(args: argparse.Namespace | RunOptions, team: Team | None = None):
    """Model and tokenizer, on the device; of a model that processes of the team hold together, this one's part."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from ..rollout.engine import is_small
    from ..rollout.models import load_model, load_tokenizer
    from ..tasks import embedded

    disable_progress_bar()  # the bars of loading and saving would tear that of the training
    path = args.model if args.model is not None else embedded.cached(task=args.task)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = load_model(path, dtype=dtype)
    if team is not None and team.shards > 1:
        from ..distributed.tensor_parallel import shard

        shard(model, team.mesh(device_of(args)), device_of(args))
    else:
        model.to(device_of(args))
    if is_small(model):
        torch.set_num_threads(1)  # for perturbing it, too
    return model, load_tokenizer(path)
