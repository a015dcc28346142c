"""Sharded weights: the part of a DTensor on this rank, as slices of the whole tensor, and what ranks exchange.

`Plan` takes DTensors like any tensor (tensor parallelism by transformers' `tp_plan`, FSDP2's `fully_shard`, any mesh).
Every shard gets the noise that its elements have in the whole tensor, so ranks perturb, restore and update without
communication. Ranks that hold a model together must evaluate the same member at the same time.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..utils.errors import BadState, BadType, BadValue
from .segments import Entry, Slice


def is_dtensor(tensor: torch.Tensor) -> bool:
    # Importing torch.distributed.tensor takes 0.5 s. If a DTensor exists, it is imported already.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _dtensor(tensor: torch.Tensor) -> Any:
    """The DTensor `tensor`, for the type checker: torch.Tensor does not declare a DTensor's attributes."""
    return tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor. `to_local()` gives the same, but autograd makes it take 10 us."""
    return _dtensor(tensor)._local_tensor


def local_entries(e: Entry) -> list[Entry]:
    """The part of a DTensor on this rank, as a list of slices, mostly one. An empty shard counts as a slice.

    If the whole DTensor is a part of a larger, fused tensor, `e.window` says which part.

    Raises:
        TypeError: a placement that is neither Shard nor Replicate, such as Partial.
        ValueError: this rank isn't in the DTensor's mesh, or its local tensor hasn't the size that the placements
            imply.
    """
    spans = _spans(e)
    local = local_tensor(e.tensor).detach()
    found = tuple(local.shape)
    expected = tuple(sum(length for _, length in dimension) for dimension in spans)
    if found != expected:
        raise BadValue(
            f"Plan: {e.name!r} {tuple(e.tensor.shape)}, placed as {_dtensor(e.tensor).placements}, should have "
            f"{expected} here, but its local tensor has {found}"
        )
    if not local.numel():
        return [Entry(e.name, local, Slice(e.window.shape, e.window.offset))]
    entries = []
    for place in itertools.product(*(_with_local_starts(dimension) for dimension in spans)):
        part = local
        for d, (at, _, length) in enumerate(place):
            part = part.narrow(d, at, length)
        offset = tuple(o + start for o, (_, start, _) in zip(e.window.offset, place, strict=True))
        entries.append(Entry(e.name, part, Slice(e.window.shape, offset)))
    return entries


def _spans(e: Entry) -> list[list[tuple[int, int]]]:
    """For each dimension of a DTensor: (start, length) of the pieces on this rank, in the order of local memory.

    Placements apply from left to right. Shard(d) takes one of torch.chunk's chunks of dimension d. _StridedShard(d,
    split_factor=k) first divides the dimension into k equal parts and takes a chunk of each: so FSDP2 cuts what tensor
    parallelism has cut already, and so the halves of a fused gate_up matrix are cut.
    """
    tensor = _dtensor(e.tensor)
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise BadValue(f"Plan: {e.name!r} lies on {mesh}, which this rank is not part of")
    spans = [[(0, n)] for n in e.tensor.shape]
    for placement, parts, index in zip(tensor.placements, mesh.shape, coordinate, strict=True):
        kind = type(
            placement
            # By name: _StridedShard is not public, and whether is_shard() is true of it depends on the version.
        ).__name__
        if kind == "Shard":
            spans[placement.dim] = _chunk(spans[placement.dim], parts, index)
        elif kind == "_StridedShard":
            factor, pieces = placement.split_factor, spans[placement.dim]
            if sum(length for _, length in pieces) % factor:
                raise BadValue(
                    f"Plan: {e.name!r} {tuple(e.tensor.shape)} is placed as {tensor.placements}, but its dimension "
                    f"{placement.dim} can't be split into {factor} equal parts"
                )
            spans[placement.dim] = [
                span for k in range(factor) for span in _chunk(_chunk(pieces, factor, k), parts, index)
            ]
        elif kind != "Replicate":
            raise BadType(
                f"Plan: {e.name!r} is a DTensor placed as {tensor.placements}; only Shard and Replicate hold weights "
                "that can be perturbed. Redistribute it, or leave it out with exclude="
            )
    return spans


def _chunk(spans: Iterable[tuple[int, int]], parts: int, index: int) -> list[tuple[int, int]]:
    """The index-th of torch.chunk's chunks of the elements in `spans`: (start, length) pairs."""
    spans = list(spans)
    size = -(-sum(length for _, length in spans) // parts)
    low, high, at, taken = index * size, (index + 1) * size, 0, []
    for start, length in spans:
        a, b = max(low - at, 0), min(high - at, length)
        if a < b:
            taken.append((start + a, b - a))
        at += length
    return taken


def _with_local_starts(spans: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(start here, start in the whole, length), with neighbours merged."""
    merged: list[tuple[int, int, int]] = []
    at = 0
    for start, length in spans:
        if merged and merged[-1][1] + merged[-1][2] == start:
            merged[-1] = (*merged[-1][:2], merged[-1][2] + length)
        else:
            merged.append((at, start, length))
        at += length
    return merged


def fsdp_modules(source) -> list[torch.nn.Module]:
    """The modules under FSDP2. Weights that they gathered for a forward pass are stale once a shard has changed. FSDP2
    keeps the root module's until a backward pass, which never comes here, so Plan tells them to `reshard`."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not isinstance(source, torch.nn.Module):
        return []
    return [m for m in source.modules() if isinstance(m, module.FSDPModule)]


def reshard(modules: Iterable[Any]) -> None:
    """Frees the weights that `fsdp_modules` gathered for a forward pass."""
    for module in modules:
        module.reshard()


def in_shards(model) -> bool:
    """Whether other ranks hold parts of this module."""
    if not isinstance(model, torch.nn.Module):
        return False
    return bool(fsdp_modules(model)) or any(map(is_dtensor, model.parameters()))


def whole_state_dict(model: torch.nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The state dict of a sharded model, as whole tensors in host memory, with tied tensors once; {} without `keep`.
    A collective call of the ranks that hold the model."""
    wholes: dict[int, torch.Tensor] = {}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in wholes:
            whole = tensor.detach()
            whole = whole.full_tensor() if is_dtensor(whole) else whole
            wholes[id(tensor)] = whole.cpu() if keep else torch.empty(0)
        if keep:
            found[name] = wholes[id(tensor)]
    return found


def gather(dtensors: Sequence[torch.Tensor], mine: dict) -> dict:
    """The union of all ranks' dicts over the meshes of the DTensors. A collective call.

    Raises RuntimeError on all ranks if two have different values under one key.
    """
    groups = dict.fromkeys(group for t in dtensors for group in _dtensor(t).device_mesh.get_all_groups())
    conflict = None
    # Merge along one dimension of the mesh after another. After the last one, every rank has the values of all.
    for group in groups:
        told: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(told, (mine, conflict), group=group)
        mine = {}
        for theirs, theirs_conflict in told:
            conflict = conflict or theirs_conflict
            for key, value in theirs.items():
                if mine.setdefault(key, value) != value:
                    conflict = conflict or key
    if conflict is not None:
        raise BadState(f"ranks hold different bits of {conflict[0]!r}, offset {conflict[1]} in its whole")
    return mine
