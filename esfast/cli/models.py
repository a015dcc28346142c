"""Shared by the commands: the task, the device and the model that options name."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING

from ..utils.errors import BadValue

if TYPE_CHECKING:
    from ..distributed.team import Team
    from .run_options import RunOptions

# Undoes what a command changed in the process; `main` closes it after the command.
AFTERWARDS = contextlib.ExitStack()


def task_of(run: RunOptions):
    """The task. If the options leave task and style of prompts open, the model's own are filled in."""
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


def probes_of(run: RunOptions) -> dict:
    """The tasks of --probe, by their names in metrics. ValueError for two of one name."""
    from .. import tasks
    from ..trainer.probes import name_of

    found = {name_of(name): tasks.get(name, run.style) for name in run.probe or ()}
    if len(found) < len(run.probe or ()):
        raise BadValue(f"probe: expected different tasks, got {', '.join(run.probe or ())}")
    return found


def device_of(args: argparse.Namespace | RunOptions) -> str:
    import torch

    from ..core.ops import auto_backend

    if args.device != "auto":
        _check_device(args.device)
        return args.device
    ready = torch.cuda.is_available() and auto_backend(torch.device("cuda")) != "reference"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if ready else "cpu"


def _check_device(name: str) -> None:
    """BadValue unless PyTorch has the device."""
    import torch

    try:
        device = torch.device(name)
        # Don't initialize CUDA for this question; that is left to the process that computes on the GPU.
        if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count():
            return
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadValue(
            f"device: expected one that PyTorch has here, such as cpu, got {name!r} ({error!s:.60})"
        ) from None


def load(args: argparse.Namespace | RunOptions, team: Team | None = None):
    """Loads the model onto the device, and its tokenizer. If processes hold the model together, loads this one's
    shard."""
    import torch
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    from ..rollout.models import load_model, load_tokenizer
    from ..tasks import embedded

    # Transformers' progress bars, for loading and saving, would break up the one of the training.
    if is_progress_bar_enabled():
        AFTERWARDS.callback(enable_progress_bar)
    disable_progress_bar()
    device = device_of(args)
    path = args.model if args.model is not None else embedded.cached(task=args.task)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = load_model(path, dtype=dtype)
    if team is not None and team.shards > 1:
        from ..distributed.tensor_parallel import shard

        shard(model, team.mesh(device), device)
    else:
        model.to(device)
    return model, load_tokenizer(path)
