"""Unwraps models. Noise is a function of names, and the names are those of the plain model. So a compiled or parallel
model gets the same members, journals and files as the model inside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

# For each class of wrappers, the attribute that holds the module. Classes are known by name, so that none is imported.
_HOLDERS = {
    "OptimizedModule": "_orig_mod",  # of torch.compile
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}


def unwrap(model):
    """The module inside all wrappers; anything else unchanged."""
    while (attribute := _holder(model)) is not None:
        model = getattr(model, attribute)
    return model


def named_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """`module.named_parameters()` under the plain model's names, also where parts of it are wrapped."""
    wrapped = set()
    for path, part in module.named_modules():
        if (attribute := _holder(part)) is not None:
            wrapped.add(f"{path}.{attribute}" if path else attribute)
    for name, parameter in module.named_parameters():
        words = name.split(".")
        yield ".".join(w for i, w in enumerate(words) if ".".join(words[: i + 1]) not in wrapped), parameter


@contextlib.contextmanager
def unwrapped(model) -> Iterator:
    """In the block, the plain model without any wrapped parts, for saving; after it the wrappers are back."""
    parts = [
        (parent, name, part)
        for parent in (model.modules() if isinstance(model, torch.nn.Module) else ())
        for name, part in parent._modules.items()
        if _holder(part) is not None
    ]
    try:
        for parent, name, part in parts:
            parent._modules[name] = unwrap(part)
        yield unwrap(model)
    finally:
        for parent, name, part in parts:
            parent._modules[name] = part


def save_unwrapped(model, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Saves the plain model in a folder for from_pretrained. `weights` is the state dict of a sharded model."""
    with unwrapped(model) as plain:
        plain.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    settings = getattr(model, "generation_config", None)
    # PEFT doesn't save it.
    if settings is not None and not (folder / "generation_config.json").exists():
        settings.save_pretrained(folder)


def _holder(module) -> str | None:
    return next((_HOLDERS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _HOLDERS), None)
