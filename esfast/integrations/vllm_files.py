"""Saves the weights of vLLM workers to Hugging Face folders and loads them, at any tensor-parallel size."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from ..core.plan import Plan
from ..core.segments import Entry
from ..utils.errors import BadValue, FileTaken
from ..utils.files import whole_folder
from .vllm_layout import Shape


def gather_wholes(
    plan: Plan,
    wholes: Mapping[str, Shape],
    places: list[list[tuple[str, Shape, Shape]]],
    first: list[list[bool]],
    group,
) -> dict[str, torch.Tensor]:
    """Gathers the pieces of all ranks to whole tensors, in host memory of the group's first rank; empty on the others.

    places, first: of all ranks, as in `vllm_layout.check_covered`. group: vLLM's tensor-parallel group.
    """
    rank, result = group.rank_in_group, {}
    mine = {(e.name, tuple(e.window.offset)): e.tensor.detach() for e in plan.entries}
    dtypes = {e.name: e.tensor.dtype for e in plan.entries}
    for name, whole in wholes.items():
        target = torch.empty(whole, dtype=dtypes[name]) if rank == 0 else None
        for r, held in enumerate(places):
            for (n, shape, offset), taken in zip(held, first[r], strict=True):
                if n != name or not taken or rank not in (0, r):
                    continue
                if rank == r:
                    piece = mine[name, tuple(offset)].cpu().contiguous()
                    if r > 0:
                        dist.send(piece.view(-1).view(torch.uint8), group.ranks[0], group=group.cpu_group)
                        continue
                else:
                    piece = torch.empty(shape, dtype=dtypes[name])
                    dist.recv(piece.view(-1).view(torch.uint8), group.ranks[r], group=group.cpu_group)
                target[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))] = piece
        if target is not None:
            result[name] = target
    return result


def save_folder(folder: Path, tensors: dict[str, torch.Tensor], source: str, extras: Mapping[str, str]) -> None:
    """Writes a Hugging Face folder with the tensors, and with config and tokenizer of `source`, a model's name or
    folder.

    extras: further text files by name. The folder is written whole or not at all, and replaces an earlier one."""
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").exists())):
        raise FileTaken(f"{folder} exists and is no model's folder: choose another name, or move it away")
    with whole_folder(folder) as unfinished:
        save_torch_state_dict(tensors, unfinished, metadata={"format": "pt"})
        config = AutoConfig.from_pretrained(source)
        config.dtype = next(iter(tensors.values())).dtype
        config.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(source).save_pretrained(unfinished)
        try:
            GenerationConfig.from_pretrained(source).save_pretrained(unfinished)
        except OSError:
            pass  # not every model has one
        for name, text in extras.items():
            (unfinished / name).write_text(text, encoding="utf-8")


def folder_pieces(plan: Plan, folder: str | Path) -> Iterator[tuple[Entry, torch.Tensor]]:
    """Yields for each tensor of the plan its part of a Hugging Face folder's safetensors files, in the plan's dtype.

    Raises ValueError or OSError, before the first tensor, if the folder has no such files, lacks a tensor or has it in
    another shape; the message names it."""
    from safetensors import safe_open

    folder = Path(folder)
    if not folder.is_dir():
        raise BadValue(
            f"{folder}: expected a Hugging Face folder with safetensors files"
            + ("; a file of pickled weights is not loaded" if folder.is_file() else "")
        )
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(folder / name, "pt")) for name in files]
        holder = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  it is no dict
        for e in plan.entries:
            found = tuple(holder[e.name].get_slice(e.name).get_shape()) if e.name in holder else None
            if found != tuple(e.window.shape):
                raise BadValue(f"{folder}: expected {e.name!r} of shape {tuple(e.window.shape)}, found {found}")
        for e in plan.entries:
            window = tuple(slice(o, o + n) for o, n in zip(e.window.offset, e.tensor.shape, strict=True))
            yield e, holder[e.name].get_slice(e.name)[window].to(e.tensor.dtype)
