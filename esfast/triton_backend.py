"""Launches the Triton kernels of esfast.kernels over a plan: device tables once, one launch per dtype and call."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch
import triton

from .kernels.add_noise import INTERPRETED, OPTIONS, TILE, add_noise_kernel
from .noise import DOMAINS
from .plan import FIELDS, Plan


@dataclass(frozen=True)
class Group:
    """The segments of one dtype, on the device."""

    dtype: int
    segments: torch.Tensor  # int64 [segments, FIELDS]
    first_tile: torch.Tensor  # int64 [segments]
    tiles: torch.Tensor  # int64 [tiles]: segment + row * 2^32


# By plan: the table that the groups were made from, in place and from a base.
_groups: weakref.WeakKeyDictionary[Plan, dict[int, tuple[np.ndarray, list[Group]]]] = weakref.WeakKeyDictionary()


def run(plan: Plan, seeds, coeffs, base: Plan | None, kind: str, tile: int = TILE) -> None:
    """See ops.add_noise_. `tile` is for tests: small tiles make a small tensor many."""
    table = plan.table(base)
    if len(seeds) == 0:  # round(src) is src, whatever a NaN's payload: a copy
        if base is not None and base is not plan:
            torch._foreach_copy_([t.detach() for t in plan.tensors], [t.detach() for t in base.tensors])
        return
    # Small pageable copies are staged by the driver: the host does not wait for the stream.
    seeds = torch.from_numpy(seeds.view(np.int64)).to(plan.device, non_blocking=True)
    coeffs = torch.from_numpy(coeffs).to(plan.device, non_blocking=True)
    with torch.cuda.device(plan.device if plan.device.type == "cuda" else -1):
        for group in _groups_of(plan, table, tile):
            add_noise_kernel[(len(group.tiles),)](
                group.segments, group.first_tile, group.tiles, seeds, coeffs, len(seeds),
                KIND=DOMAINS[kind], DTYPE=group.dtype, TILE=tile, **({} if INTERPRETED.value else OPTIONS),
            )  # fmt: skip


def _groups_of(plan: Plan, table: np.ndarray, tile: int) -> list[Group]:
    cached = _groups.setdefault(plan, {})
    slot = cached.get(tile)
    if slot is None or slot[0] is not table:
        slot = (table, [_group(table[table[:, -1] == d], int(d), tile, plan.device) for d in np.unique(table[:, -1])])
        cached[tile] = slot
    return slot[1]


def _group(table: np.ndarray, dtype: int, tile: int, device: torch.device) -> Group:
    rows, cols = table[:, FIELDS.index("rows")], table[:, FIELDS.index("cols")]
    per_row = (cols + tile - 2) // tile + 1  # as csrc/cpu.h's tiles_per_row
    tiles = rows * per_row
    if tiles.sum() >= 2**31:
        raise ValueError(f"Plan: {tiles.sum()} tiles are more than one launch can have (2**31 - 1)")
    first_tile = np.cumsum(tiles) - tiles
    segment = np.repeat(np.arange(len(table)), tiles)
    row = (np.arange(tiles.sum()) - first_tile[segment]) // per_row[segment]
    return Group(
        dtype,
        torch.from_numpy(np.ascontiguousarray(table)).to(device),
        torch.from_numpy(first_tile).to(device),
        torch.from_numpy(segment | row << 32).to(device),
    )


def missing(device: torch.device) -> str | None:
    """Why Triton kernels can't run on tensors of this device, or None."""
    if INTERPRETED.value:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets kernels on CPU tensors only"
    if device.type != "cuda":
        return (
            f"it needs tensors on a GPU, and these are on {device}; TRITON_INTERPRET=1 interprets it on the CPU, slowly"
        )
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever the driver's own loading raises
        return f"Triton finds no usable GPU driver ({error})"
    return None
