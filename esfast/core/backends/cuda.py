"""Launches the CUDA kernels of csrc/cuda_kernel.cu over a plan: tables made once, one launch per pair of formats."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from ..noise import DOMAINS, low_rank_scale
from .tiles import MATRIX_COLS, copy_base, matrix_tiles_of, members_on, tiles_of


def run(call) -> None:
    """Runs `call`, an ops.Call; see ops.add_noise_. Seeds and coefficients that are tensors on the device are not
    copied. So a call can be captured in a CUDA graph, after a first call that makes the table and loads the code."""
    extension, device = importlib.import_module("esfast._cuda"), call.plan.device
    where = {"device": device.index or 0, "stream": torch.cuda.current_stream(device).cuda_stream}
    add_noise, copy_tiles = (
        functools.partial(launch, **where) for launch in (extension.add_noise, extension.copy_tiles)
    )
    run_with(call, add_noise, extension.TILE, copy_tiles)


def run_with(call, add_noise: Callable[..., None], tile: int, copy_tiles: Callable[..., None] | None = None) -> None:
    """`run` with the functions that launch kernels as arguments, so that tests can replace them. They are called as
    _cuda.add_noise and _cuda.copy_tiles are; `copy_tiles` is needed only to restore."""
    plan, adam = call.plan, call.adam
    if call.is_copy:
        return copy_base(
            call, tile, lambda records, size: copy_tiles(tiles=records.data_ptr(), tile_count=len(records), size=size)
        )
    seeds, coeffs = members_on(plan.device, call.seeds, call.coeffs)
    # Without members the kind of noise does not matter, and the table is not cut for low-rank noise.
    kind = call.kind if len(seeds) else "gaussian"
    if kind == "low_rank":
        tables: list[tuple] = [(t, t.segments.data_ptr(), 0) for t in matrix_tiles_of(call, MATRIX_COLS, MATRIX_COLS)]
    else:
        found = tiles_of(call.table, tile, plan.device, call.needs_extras)
        tables = [(t, 0, t.extras.data_ptr() if t.extras is not None else 0) for t in found]
    for t, segments, extras in tables:
        add_noise(
            tiles=t.records.data_ptr(),
            extras=extras,
            segments=segments,
            tile_count=len(t.records),
            src_format=t.src_format,
            dst_format=t.dst_format,
            seeds=seeds.data_ptr(),
            coeffs=coeffs.data_ptr(),
            members=len(seeds),
            kind=DOMAINS[kind],
            rank=call.rank,
            scale=float(low_rank_scale(call.rank)),
            stochastic=call.stochastic,
            decay=float(call.decay),
            low=call.low.data_ptr() if call.low is not None else 0,
            moments=[m.data_ptr() for m in adam.moments] if adam is not None else (0, 0),
            adam=adam.numbers if adam is not None else (0.0,) * 4,
        )


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why CUDA kernels can't run on tensors of this device, or None."""
    try:
        extension = importlib.import_module("esfast._cuda")
    except ImportError as error:
        return f"its extension is not built ({error}); run `pip install .` with nvcc on the PATH"
    if extension.ABSENT:
        return f"not built: {extension.ABSENT}; install the CUDA toolkit, then esfast again"
    reason = extension.unusable(-1 if device.type != "cuda" else device.index or 0)
    if reason:
        return reason
    return None if device.type == "cuda" else f"it needs tensors on a GPU, and these are on {device}"


def build() -> str:
    """What this build has: `esfast info` shows it."""
    try:
        extension = importlib.import_module("esfast._cuda")
    except ImportError as error:
        return f"not built ({error})"
    return f"not built: {extension.ABSENT}" if extension.ABSENT else f"built for {extension.ARCHITECTURES}"
