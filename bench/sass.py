"""`esfast bench sass`: instructions of the GPU kernels, counted in their machine code; no GPU is needed.

Triton and nvcc compile offline for each architecture, and the disassembly is divided into basic blocks. A perturbation
is the shortest path through the kernel that uses its 128-bit loads and stores and passes once through the member loop;
an update's figure is one turn of that loop. Both are divided by the weights that a thread holds, without NOPs. At the
bandwidth of an H200 there are 28 to 31 issue slots per bf16 weight; a kernel above that is bound by arithmetic.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from . import BenchmarkError
from .disassembly import WHOLE, Disassembly, Whole, control_flow, disassemble, way_through

# SASS instructions per weight (update: per weight and member) that a kernel may take on sm_90.
BUDGETS = {
    ("perturb", "gaussian"): 31,
    ("perturb", "rademacher"): 12,
    ("update", "gaussian"): 28,
    ("update", "rademacher"): 6,
    ("perturb", "low_rank"): 12,
    ("update", "low_rank"): 2,
}
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
# Noise by its number in esfast/core/noise.py.
KINDS = {"gaussian": 0, "rademacher": 1, "low_rank": 6}
# Factors of low-rank noise go through shared memory in all tiles.
LOW_RANK_TILE = Whole(slow=(".U16",))

_MEMORY = re.compile(r"\b(LDG|STG|LDS|LDSM|STS|LDL|STL)\b[.\w]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities, as 80 90 100")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the weights")


def run(args: argparse.Namespace) -> dict:
    try:
        import triton
    except ImportError as error:
        raise BenchmarkError(f"Triton is not installed ({error}): pip install triton") from error
    from . import sass_cuda

    rows, cuda_missing = [], sass_cuda.missing()
    for arch in args.arch:
        for noise in KINDS:
            for dtype in args.dtypes:
                rows += _rows(noise, dtype, arch)
        if not cuda_missing:
            rows += sass_cuda.rows(arch, args.dtypes)
    return {"triton": triton.__version__, "cuda": cuda_missing or "built", "rows": rows}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = [
        "backend",
        "kernel",
        "noise",
        "dtype",
        "arch",
        "SASS per weight",
        "budget",
        "registers",
        "spilled bytes",
        "widest load",
        "widest store",
    ]
    return headers, [
        [
            r["backend"],
            r["kernel"],
            r["noise"],
            r["dtype"],
            f"sm_{r['arch']}",
            f"{r['sass_per_weight']:.1f}",
            str(r["budget"] or "-"),
            str(r["registers"]),
            str(r["spill_bytes"]),
            f"{r['load_bits']} bits",
            f"{r['store_bits']} bits",
        ]
        for r in result["rows"]
    ]


def compile_kernel(
    kind: int,
    formats: tuple[int, int],
    target=None,
    tile: int | None = None,
    stochastic=False,
    decay=0,
    adam=False,
    members: int | None = None,
    options: dict | None = None,
):
    """Compiles the Triton kernel for a GPUTarget (default sm_90); needs no GPU. `members` is compiled in as a constant,
    as Triton does with an argument of 1. `options` are compiler options besides those that ship."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..kernels import add_noise as k

    names = k.add_noise_kernel.arg_names
    types = ["*i64", "*i64", "*i64", "*fp32", "i32", *["i64"] * 3, *["fp32"] * 5, *["constexpr"] * 7]
    constants = {
        "KIND": kind,
        "SRC": formats[0],
        "DST": formats[1],
        "TILE": tile or k.TILE,
        "STOCHASTIC": stochastic,
        "DECAY": decay,
        "ADAM": adam,
    }
    if members is not None:
        types[names.index("members")], constants["members"] = "constexpr", members
    source = ASTSource(
        fn=k.add_noise_kernel,
        signature=dict(zip(names, types, strict=True)),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5, 6, 7)},  # torch allocates at multiples of 512
    )
    return triton.compile(source, target=target or GPUTarget("cuda", 90, 32), options=k.OPTIONS | (options or {}))


def compile_low_rank(
    formats: tuple[int, int],
    target=None,
    slots: int | None = None,
    stochastic=False,
    decay=0,
    adam=False,
    options: dict | None = None,
):
    """The kernel of low-rank noise of rank 1, weights a thread, and factors a turn of its loop, by the configuration
    that kernels/low_rank.py chooses for so many factors of all members (None: several). A single one is compiled in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..kernels import low_rank as k

    chosen = k.configuration(slots or 2, stochastic, decay, adam)
    names = k.add_low_rank_kernel.arg_names
    types = ["*i64", "*i64", "*i64", "*fp32", "i32", "constexpr", "fp32", *["i64"] * 3, *["fp32"] * 5]
    types += ["constexpr"] * 7
    constants = {
        "rank": 1,
        "SRC": formats[0],
        "DST": formats[1],
        "ROWS": chosen.rows,
        "SLOTS": chosen.slots,
        "STOCHASTIC": stochastic,
        "DECAY": decay,
        "ADAM": adam,
    }
    if slots == 1:
        types[names.index("members")], constants["members"] = "constexpr", 1
    source = ASTSource(
        fn=k.add_low_rank_kernel,
        signature=dict(zip(names, types, strict=True)),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 7, 8, 9)},
    )
    registers = {"maxnreg": chosen.registers}
    compiled = triton.compile(
        source, target=target or GPUTarget("cuda", 90, 32), options=k.OPTIONS | registers | (options or {})
    )
    return compiled, chosen.rows * k.COLS.value // (32 * k.OPTIONS["num_warps"]), chosen.slots


def _rows(noise: str, dtype: str, arch: int) -> list[dict]:
    from triton.backends.compiler import GPUTarget

    from ..kernels.add_noise import NUM_WARPS, TILE

    target, formats = GPUTarget("cuda", arch, 32), (DTYPES[dtype],) * 2
    if noise == "low_rank":
        one, many = compile_low_rank(formats, target, 1), compile_low_rank(formats, target)
        compiled = [("perturb", *one), ("update", *many)]
    else:
        both = compile_kernel(KINDS[noise], formats, target), TILE // (32 * NUM_WARPS), 1
        compiled = [("perturb", *both), ("update", *both)]
    found = []
    for kernel, result, per_thread, slots in compiled:
        loop = noise != "low_rank" or kernel == "update"
        figures = measure(disassemble(result.asm["cubin"]), loop, LOW_RANK_TILE if noise == "low_rank" else WHOLE)
        count = figures.path if kernel == "perturb" else figures.loop / slots
        shared = {"shared_bytes": result.metadata.shared}
        found.append(
            row("triton", kernel, noise, dtype, arch, count / per_thread, per_thread, figures, BUDGETS) | shared
        )
    return found


def row(backend, kernel, noise, dtype, arch, per_weight, per_thread, figures: Figures, budgets: dict) -> dict:
    budget = budgets[kernel, noise] if arch == 90 else None
    found = {
        "backend": backend,
        "kernel": kernel,
        "noise": noise,
        "dtype": dtype,
        "arch": arch,
        "sass_per_weight": round(per_weight, 2),
        "budget": budget,
        "weights_per_thread": per_thread,
        "spill_bytes": figures.spill_bytes,
        "registers": figures.registers,
        "load_bits": figures.load_bits,
        "store_bits": figures.store_bits,
        "memory_instructions": figures.memory,
    }
    if budget:
        found["pass"] = (
            per_weight <= budget and not figures.spill_bytes and figures.load_bits == figures.store_bits == 128
        )
    return found


@dataclass
class Figures:
    # instructions of a perturbation
    path: int
    # instructions of one turn of the loop over members
    loop: int
    spill_bytes: int
    registers: int
    load_bits: int
    store_bits: int
    memory: dict[str, int]


def measure(code: Disassembly, loop: bool = True, whole: Whole = WHOLE) -> Figures:
    """The costs of a kernel; without `loop`, of a kernel for one member. `whole`: see disassembly."""
    blocks = control_flow(code.sass)
    path, turn = way_through(blocks, loop, whole)
    used = [i for b in dict.fromkeys(path) for i in blocks[b].instructions]
    used_resources = resources(code)
    return Figures(
        path=sum(blocks[b].cost for b in path),
        loop=sum(blocks[b].cost for b in turn),
        spill_bytes=used_resources["STACK"],
        registers=used_resources["REG"],
        load_bits=_widest(used, "LDG"),
        store_bits=_widest(used, "STG"),
        memory=_memory(used),
    )


def resources(code: Disassembly) -> dict[str, int]:
    """Registers (REG) of a thread, and bytes of spilled registers (STACK)."""
    return {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", code.resources)}


def _widest(instructions: list[str], kind: str) -> int:
    widths = [int(m[1] or 32) for i in instructions if (m := re.search(rf"\b{kind}\.E(?:\.(\d+))?\b", i))]
    return max(widths, default=0)


def _memory(instructions: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for i in instructions:
        if found := _MEMORY.search(i):
            counts[found[0]] = counts.get(found[0], 0) + 1
    return dict(sorted(counts.items()))
