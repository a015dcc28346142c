"""`esfast bench cycles`: how long the GPU kernels should take, simulated from their machine code, without a GPU.

bench/scheduler.py says what is modelled and what is left out. The clocks are those that these GPUs hold under load
(1.755 GHz) and their highest (1.98 GHz). The bandwidths were measured with copies on the device. A perturbation is in
place; an update has 30 members. `--measured` puts the results of `esfast bench gpu` beside the predictions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from . import BenchmarkError, sass, scheduler
from .disassembly import WHOLE, Disassembly, Whole, control_flow, disassemble, way_through
from .models import MODELS, numel, parameters
from .scheduler import SCHEDULERS, SMS, Instruction

MODEL = "Qwen2.5-7B"
MEMBERS = 30
# Clocks of the GPU in Hz: under load, and the highest.
CLOCKS = (1.755e9, 1.98e9)
# Bytes per second that a copy on the device reads and writes.
COPY = {"H100": 3.0e12, "H200": 4.3e12}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
NOT_YET = "not yet measured"


@dataclass(frozen=True)
class Launch:
    """Instructions of a warp with `weights` weights in each of its lanes, and the number of warps of a scheduler."""

    backend: str
    kernel: str
    noise: str
    dtype: str
    # of the whole kernel
    trace: list[Instruction]
    # of one turn of the loop over members, if the kernel has one
    turn: list[Instruction]
    weights: int
    # warps that a block brings to a scheduler
    warps: int
    # number of blocks whose warps a scheduler has at the same time
    resident: int
    # members that one turn of the loop adds
    slots: int = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=sass.DTYPES, default=["bfloat16"], help="of the weights")
    parser.add_argument(
        "--measured", type=Path, nargs="+", default=[], metavar="FILE", help="results of `bench gpu` on these GPUs"
    )


def run(args: argparse.Namespace) -> dict:
    try:
        import triton
    except ImportError as error:
        raise BenchmarkError(f"Triton, which brings the disassembler, is not installed ({error})") from error
    from . import sass_cuda

    cuda_missing = sass_cuda.missing()
    launches = [] if cuda_missing else cuda_launches(args.dtypes)
    launches += [launch for noise in sass.KINDS for dtype in args.dtypes for launch in triton_launches(noise, dtype)]
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in args.measured]
    rows = [predict(launch, gpu, clock) for launch in launches for gpu in COPY for clock in CLOCKS]
    for row in rows:
        row["measured_ms"] = find_measured(row, measured)
    versions = {"triton": triton.__version__, "cuda": cuda_missing or "built"}
    return {"predicted": True, **versions, "model": MODEL, "rows": rows}


# ---- what is launched -----------------------------------------------------------------------------------------------


def traces_of(
    code: Disassembly, loop: bool, data_loads: int, whole: Whole = WHOLE, turns: int = MEMBERS
) -> tuple[list[Instruction], list[Instruction]]:
    """Instructions of a warp that holds a whole tile; with `loop`, of one of the `turns` of the loop. Of low-rank noise
    of one member they are those of a warp that draws factors, as two of eight do."""
    blocks = control_flow(code.sass)
    path, turn = way_through(blocks, loop, whole)
    if turn:
        begin = path.index(turn[0])
        path = path[:begin] + turn * turns + path[begin + len(turn) :]

    def instructions(numbers: list[int]) -> list[Instruction]:
        lines = [line for b in numbers for line in zip(blocks[b].instructions, blocks[b].codes, strict=True)]
        return [op for op in (scheduler.instruction(*line) for line in lines) if op.name != "NOP"]

    return scheduler.with_transfers(instructions(path), data_loads), instructions(turn)


def cuda_launches(dtypes: list[str]) -> list[Launch]:
    from . import sass_cuda

    found = []
    for kernel, noise, dtype, code in sass_cuda.kernels(90, dtypes):
        weights, threads = sass_cuda.weights_per_thread(noise, kernel), sass_cuda.threads(noise, kernel)
        low_rank = noise == "low_rank"
        whole, slots = (sass_cuda.LOW_RANK_TILE, sass_cuda.SLOTS) if low_rank else (WHOLE, 1)
        loop = kernel == "update"
        found.append(_launch("cuda", kernel, noise, dtype, code, weights, threads, loop, whole, slots))
    return found


def triton_launches(noise: str, dtype: str) -> list[Launch]:
    """Compiles as a launch does, which makes a single member a constant and gives it fewer registers."""
    from ..core.backends.triton import CONFIGS, ONE_MEMBER_REGISTERS

    found, (tile, warps, many), formats = [], CONFIGS[0], (sass.DTYPES[dtype],) * 2
    for kernel, members, registers in (("perturb", 1, ONE_MEMBER_REGISTERS), ("update", None, many)):
        if noise == "low_rank":
            compiled, weights, slots = sass.compile_low_rank(formats, slots=members)
            whole = sass.LOW_RANK_TILE
        else:
            options = {"num_warps": warps, "maxnreg": registers}
            compiled = sass.compile_kernel(sass.KINDS[noise], formats, tile=tile, members=members, options=options)
            weights, slots, whole = tile // (32 * warps), 1, WHOLE
        code, threads, loop = disassemble(compiled.asm["cubin"]), 32 * warps, kernel == "update"
        found.append(_launch("triton", kernel, noise, dtype, code, weights, threads, loop, whole, slots))
    return found


def _launch(
    backend, kernel, noise, dtype, code: Disassembly, weights: int, threads: int, loop: bool,
    whole: Whole = WHOLE, slots: int = 1,
) -> Launch:  # fmt: skip
    trace, turn = traces_of(code, loop, weights * ITEMSIZE[dtype] // 16, whole, -(-MEMBERS // slots))
    resident = scheduler.resident_blocks(sass.resources(code)["REG"], threads)
    # A block of two warps gives a warp to only two of the four schedulers.
    warps = max(1, threads // 32 // SCHEDULERS)
    held = resident * threads // 32 // SCHEDULERS // warps
    return Launch(backend, kernel, noise, dtype, trace, turn, weights, warps, held, slots)


# ---- predictions ----------------------------------------------------------------------------------------------------


def predict(launch: Launch, gpu: str, clock: float) -> dict:
    """A row: the time for all weights of MODEL, and the scheduler's cycles for a weight in each of 32 lanes. For a
    perturbation these are of the whole kernel, for an update of one turn of the loop, that is of one member."""
    per_cycle = COPY[gpu] / (SMS * SCHEDULERS) / clock
    whole = scheduler.simulate(launch.trace, launch.warps, launch.resident, per_cycle, 3 if launch.turn else 12)
    count, held = numel(parameters(MODELS[MODEL])), launch.warps * launch.weights
    seconds = count / (32 * SMS * SCHEDULERS) * whole["cycles_per_block"] / held / clock
    found, turns = whole, 1
    if launch.turn:
        turns = 15
        found = scheduler.simulate(launch.turn * turns, launch.warps, launch.resident, per_cycle, 4)
    roof = 2 * ITEMSIZE[launch.dtype] * count / COPY[gpu]
    return {
        "backend": launch.backend,
        "kernel": launch.kernel,
        "noise": launch.noise,
        "dtype": launch.dtype,
        "gpu": gpu,
        "clock_ghz": clock / 1e9,
        "warps_per_scheduler": launch.warps * launch.resident,
        "cycles": round(found["cycles_per_block"] / held / turns / (launch.slots if launch.turn else 1), 3),
        **{f"{name}_share": round(share, 3) for name, share in found.items() if name != "cycles_per_block"},
        "ms": round(1e3 * seconds, 3),
        "roof_ms": round(1e3 * roof, 3),
        "of_copy": round(roof / seconds, 3),
    }


def find_measured(row: dict, results: list[dict]) -> float | None:
    """Milliseconds that `bench gpu` measured on that GPU."""
    wanted = {"model": MODEL, "op": row["kernel"], **{k: row[k] for k in ("backend", "noise", "dtype")}}
    for result in results:
        if row["gpu"] not in (result["provenance"]["hardware"]["gpu"] or ""):
            continue
        for r in result["rows"]:
            if all(r.get(k) == v for k, v in wanted.items()) and r.get("members", 1) in (1, MEMBERS):
                return r["ms_median"]
    return None


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    """A line for each kernel and GPU: both clocks side by side."""
    headers = [
        "backend",
        "kernel",
        "noise",
        "dtype",
        "GPU",
        "warps a scheduler",
        "cycles per weight",
        "issue",
        "ALU",
        "FMA",
        "load/store",
        "predicted at 1.755 GHz, ms",
        "at 1.98 GHz, ms",
        "of copy's speed",
        "a copy, ms",
        "measured, ms",
    ]
    lines, rows = [], result["rows"]
    for slow, fast in zip(rows[::2], rows[1::2], strict=True):
        shares = ("issue", "alu", "fma", "memory_pipe")
        measured = NOT_YET if slow["measured_ms"] is None else f"{slow['measured_ms']:.2f}"
        lines.append(
            [
                slow["backend"],
                slow["kernel"],
                slow["noise"],
                slow["dtype"],
                slow["gpu"],
                str(slow["warps_per_scheduler"]),
                f"{slow['cycles']:.1f}",
                *(f"{slow[f'{s}_share']:.0%}" for s in shares),
                f"{slow['ms']:.2f}",
                f"{fast['ms']:.2f}",
                f"{slow['of_copy']:.0%} to {fast['of_copy']:.0%}",
                f"{slow['roof_ms']:.2f}",
                measured,
            ]
        )
    return headers, lines
