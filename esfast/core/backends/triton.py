"""Launches the Triton kernel of esfast.kernels over a plan: tables made once, a launch per pair of formats and call."""

from __future__ import annotations

import contextlib
import functools
import time

import numpy as np
import torch
import triton
import triton.language as tl

from ...kernels import low_rank
from ...kernels.add_noise import ADAM_TILE, NUM_WARPS, OPTIONS, TILE, add_noise_kernel
from ...kernels.copy import copy_tiles_kernel
from ...kernels.low_rank import add_low_rank_kernel
from ...kernels.memory import INTERPRETED
from ...utils.errors import BadValue
from ..noise import DOMAINS, low_rank_scale
from ..segments import SPLIT
from .tiles import copy_base, matrix_tiles_of, members_on, tiles_of

NO_DECAY, TO_ZERO, TO_ANCHOR = range(3)

# Configurations that autotune tries: elements of a tile, warps, registers of a thread. The default comes first.
CONFIGS = ((TILE, 4, 144), (TILE, 4, 128), (2048, 4, 96), (4096, 8, 96), (8192, 8, 144), (8192, 16, 96))
# Registers of a thread in calls with one member. That number is compiled in, which removes the loop over members, so
# ptxas needs only 128 registers. Four blocks then fit a multiprocessor instead of three: 33.8 cycles per bf16 weight
# instead of 35.4 (`esfast bench cycles`). Stochastic rounding needs more registers, and would spill some.
ONE_MEMBER_REGISTERS = 128
# Keys: device, noise, and whether there is one member.
_tuned: dict[tuple, tuple[int, int, int]] = {}


def run(call, tile: int | None = None) -> None:
    """Runs `call`, an ops.Call; see ops.add_noise_. Seeds and coefficients that are tensors on the device are not
    copied, so that the call can be captured in a CUDA graph. Tests set `tile`, the elements of a tile (its rows, with
    low-rank noise), to get many tiles of a small tensor."""
    plan, adam = call.plan, call.adam
    if call.is_copy:
        tile, _ = _configuration(call, tile)
        return copy_base(call, tile, functools.partial(_copy_tiles, tile))
    seeds, coeffs = members_on(plan.device, call.seeds, call.coeffs)
    m, v = (b.data_ptr() for b in adam.moments) if adam is not None else (0, 0)
    low = call.low.data_ptr() if call.low is not None else 0
    numbers = m, v, float(call.decay), *(adam.numbers if adam is not None else (0.0,) * 4)
    constants = {
        "STOCHASTIC": call.stochastic and len(seeds) > 0,
        "DECAY": NO_DECAY if not call.decay else TO_ZERO if call.anchor is None else TO_ANCHOR,
        "ADAM": adam is not None,
    }
    with _on(plan.device):
        if call.kind == "low_rank" and len(seeds):
            _add_low_rank(call, tile, seeds, coeffs, low, numbers, constants)
        else:
            _add_noise(call, tile, seeds, coeffs, low, numbers, constants)


def _add_noise(call, tile: int | None, seeds, coeffs, low: int, numbers: tuple, constants: dict) -> None:
    tile, options = _configuration(call, tile)
    for t in tiles_of(call.table, tile, call.plan.device, call.needs_extras):
        add_noise_kernel[(len(t.records),)](
            t.records,
            t.records if t.extras is None else t.extras,
            seeds,
            coeffs,
            len(seeds),
            low if SPLIT in (t.src_format, t.dst_format) else 0,
            *numbers,
            KIND=DOMAINS[call.kind] if len(seeds) else 0,
            SRC=t.src_format,
            DST=t.dst_format,
            TILE=tile,
            **constants,
            **options,
        )


def _add_low_rank(call, rows: int | None, seeds, coeffs, low: int, numbers: tuple, constants: dict) -> None:
    found = low_rank.configuration(len(seeds) * call.rank, **constants)
    rows = rows or found.rows
    options = {} if INTERPRETED.value else low_rank.OPTIONS | {"maxnreg": found.registers}
    for t in matrix_tiles_of(call, rows, min(rows, low_rank.PART_ROWS.value)):
        add_low_rank_kernel[(len(t.records),)](
            t.records,
            t.segments,
            seeds,
            coeffs,
            len(seeds),
            call.rank,
            float(low_rank_scale(call.rank)),
            low if SPLIT in (t.src_format, t.dst_format) else 0,
            *numbers,
            SRC=t.src_format,
            DST=t.dst_format,
            ROWS=rows,
            SLOTS=found.slots,
            **constants,
            **options,
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _copy_tiles(tile: int, records: torch.Tensor, size: int) -> None:
    options = {} if INTERPRETED.value else {"num_warps": NUM_WARPS}
    with _on(records.device):
        copy_tiles_kernel[(len(records),)](records, SIZE=size, TILE=tile, **options)


def _configuration(call, tile: int | None) -> tuple[int, dict]:
    """Tile and compiler options of a call."""
    options = dict(OPTIONS)
    if call.adam is not None:
        tile = tile or ADAM_TILE
    elif tile is None:
        default = CONFIGS[0]
        if len(call.seeds) == 1 and not call.stochastic:
            default = (*default[:2], ONE_MEMBER_REGISTERS)
        tile, options["num_warps"], options["maxnreg"] = _tuned.get(_key(call), default)
    return tile, {} if INTERPRETED.value else options


def _key(call) -> tuple:
    return call.plan.device, call.kind, len(call.seeds) == 1


def autotune(plan, noise: str = "gaussian", members: int = 1, repeats: int = 10) -> dict[tuple[int, int, int], float]:
    """Times the configurations on this plan's device and returns the milliseconds of each: {(tile, warps, registers):
    ms}. Later calls on this device with this noise use the fastest; calls with one member and with several are tuned
    apart.

    Autotuning is opt-in: the default should be good everywhere, and the measurement needs a copy of the weights. Each
    configuration writes into the copy and only reads the plan, so nothing is applied twice.
    """
    from ..ops import Call, check_members

    if noise == "low_rank":
        raise BadValue("autotune: low-rank noise has one configuration a use, so there is nothing to choose")
    scratch = plan.clone()
    call = Call(scratch, *check_members(range(members), [1e-3] * members), plan, noise)
    before, times = _tuned.get(_key(call)), {}
    try:
        for config in CONFIGS:
            _tuned[_key(call)] = config
            # The first call compiles and makes the tables.
            run(call)
            times[config] = min(_milliseconds(call) for _ in range(repeats))
    except BaseException:
        _tuned.pop(_key(call))
        if before is not None:
            _tuned[_key(call)] = before
        raise
    _tuned[_key(call)] = min(times, key=times.get)
    return times


def _milliseconds(call) -> float:
    if call.plan.device.type == "cuda":
        torch.cuda.synchronize(call.plan.device)
    began = time.perf_counter()
    run(call)
    if call.plan.device.type == "cuda":
        torch.cuda.synchronize(call.plan.device)
    return 1e3 * (time.perf_counter() - began)


def missing(device: torch.device) -> str | None:
    """Why Triton kernels can't run on tensors of this device, or None."""
    if INTERPRETED.value:
        return (
            _interpreter_fails()
            if device.type == "cpu"
            else "TRITON_INTERPRET=1 interprets kernels on CPU tensors only"
        )
    if device.type != "cuda":
        return f"it needs tensors on a GPU, and these are on {device} (TRITON_INTERPRET=1 interprets it there, slowly)"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        # Loading the driver may raise anything.
        return f"Triton finds no usable GPU driver ({error})"
    return None


@triton.jit
def _count(out, number):
    for i in range(number):
        tl.store(out + i, i)


@functools.cache
def _interpreter_fails() -> str | None:
    """Why the interpreter can't run a loop here, or None. Before Triton 3.9 it calls int() on an array of one element,
    which NumPy 2.5 refuses."""
    out = torch.zeros(2, dtype=torch.int32)
    try:
        _count[(1,)](out, 2)
    except Exception as error:
        return (
            f"the interpreter of Triton {triton.__version__} does not work with NumPy {np.__version__} "
            f"({error}); take Triton 3.9 or newer, or NumPy below 2.5"
        )
    return None if out.tolist() == [0, 1] else f"the interpreter of Triton {triton.__version__} can't count here"
