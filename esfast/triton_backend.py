"""Launches the Triton kernel of esfast.kernels over a plan: a table of tiles made once, a launch per dtype and call."""

from __future__ import annotations

import contextlib
import weakref

import numpy as np
import torch
import triton

from .kernels.add_noise import INTERPRETED, OPTIONS, TILE, add_noise_kernel, pack_span
from .noise import DOMAINS
from .plan import DTYPES, FIELDS, Plan

_SIZES = {code: dtype.itemsize for dtype, code in DTYPES.items()}

# By plan and tile size: the segments (in place, or from the base last used) and their tiles on the device, by dtype.
_cache: weakref.WeakKeyDictionary[Plan, dict[int, tuple[np.ndarray, dict[int, torch.Tensor]]]]
_cache = weakref.WeakKeyDictionary()


def run(plan: Plan, seeds, coeffs, base: Plan | None, kind: str, tile: int = TILE) -> None:
    """See ops.add_noise_. Seeds and coefficients: NumPy arrays, or tensors on the device, which are not copied, so that
    the call can be captured in a CUDA graph. `tile` is for tests: small tiles make many of a small tensor."""
    segments = plan.table(base)
    if len(seeds) == 0:  # round(src) is src, whatever a NaN's payload: a copy
        if base is not None and base is not plan:
            torch._foreach_copy_([t.detach() for t in plan.tensors], [t.detach() for t in base.tensors])
        return
    if isinstance(seeds, np.ndarray):
        # the driver stages small pageable copies, so the host does not wait for the stream
        seeds = torch.from_numpy(seeds.view(np.int64)).to(plan.device, non_blocking=True)
        coeffs = torch.from_numpy(coeffs).to(plan.device, non_blocking=True)
    with torch.cuda.device(plan.device) if plan.device.type == "cuda" else contextlib.nullcontext():
        for dtype, tiles in _tiles_of(plan, segments, tile).items():
            add_noise_kernel[(len(tiles),)](
                tiles, seeds, coeffs, len(seeds), KIND=DOMAINS[kind], DTYPE=dtype, TILE=tile,
                **({} if INTERPRETED.value else OPTIONS),
            )  # fmt: skip


def _tiles_of(plan: Plan, segments: np.ndarray, tile: int) -> dict[int, torch.Tensor]:
    cached = _cache.setdefault(plan, {})
    if tile not in cached or cached[tile][0] is not segments:
        groups = {int(d): segments[segments[:, -1] == d] for d in np.unique(segments[:, -1])}
        cached[tile] = (segments, {d: torch.from_numpy(tile_table(g, tile)).to(plan.device) for d, g in groups.items()})
    return cached[tile][1]


def tile_table(segments: np.ndarray, tile: int) -> np.ndarray:
    """The tiles of segments of one dtype, as add_noise_kernel reads them: int64 array (tiles, 4).

    32 bytes for every 8 KiB of 16-bit weights, or 0.4 %. ValueError if they are more than one launch can have.
    """
    column = {name: segments[:, i] for i, name in enumerate(FIELDS)}
    size = _SIZES[int(column["dtype"][0])]
    per_row = (column["cols"] + tile - 2) // tile + 1  # at most, over all rows: csrc/cpu.h's tiles_per_row
    counts = column["rows"] * per_row
    if counts.sum() >= 2**31:
        raise ValueError(f"Plan: its {counts.sum()} tiles are more than one launch can have, 2**31 - 1")
    of = np.repeat(np.arange(len(segments)), counts)  # the segment of each tile
    local = np.arange(counts.sum()) - (np.cumsum(counts) - counts)[of]
    row, place = np.divmod(local, per_row[of])
    start = column["first"][of] + row * column["index_stride"][of]  # number of the row's first element
    tile_start = (start // tile + place) * tile
    skipped = tile_start - start
    begin, end = np.maximum(-skipped, 0), np.minimum(column["cols"][of] - skipped, tile)
    dst = column["dst"][of] + (row * column["dst_stride"][of] + skipped) * size
    src = column["src"][of] + (row * column["src_stride"][of] + skipped) * size
    whole = ((begin == 0) & (end == tile) & ((dst | src) % 16 == 0)).astype(np.int64)
    table = np.stack([dst, src, tile_start, pack_span(column["tensor_id"][of], begin, end, whole)], axis=1)
    return np.ascontiguousarray(table[end > begin])


def missing(device: torch.device) -> str | None:
    """Why Triton kernels can't run on tensors of this device, or None."""
    if INTERPRETED.value:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets kernels on CPU tensors only"
    if device.type != "cuda":
        return f"it needs tensors on a GPU, and these are on {device} (TRITON_INTERPRET=1 interprets it there, slowly)"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever the loading of the driver raises
        return f"Triton finds no usable GPU driver ({error})"
    return None
