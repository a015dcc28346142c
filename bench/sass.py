"""`esfast bench sass`: what the GPU kernels cost, read from their machine code; no GPU is needed.

Triton and nvcc compile offline for each architecture, and the disassembly is cut into basic blocks. A perturbation is
the shortest path through the kernel that uses its 128-bit loads and stores and passes once through the member loop;
the update's figure is one turn of that loop. Both are divided by the weights that a thread holds, NOPs left out. At the
bandwidth of an H200 there are 28 to 31 issue slots per bf16 weight: a kernel above that is bound by arithmetic.
"""

from __future__ import annotations

import argparse
import heapq
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from . import BenchmarkError

# SASS instructions per weight (update: per weight and member) that a kernel may take on sm_90.
BUDGETS = {
    ("perturb", "gaussian"): 31,
    ("perturb", "rademacher"): 12,
    ("update", "gaussian"): 28,
    ("update", "rademacher"): 6,
}
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
KINDS = {"gaussian": 0, "rademacher": 1}

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
# On sm_80 a jump may be written as a call that never returns.
_JUMP = re.compile(r"\b(?:BRA|EXIT)\b|\bCALL\.REL\.NOINC `\(\.L_x")
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
        for noise, kind in KINDS.items():
            for dtype in args.dtypes:
                rows += _rows(noise, kind, dtype, arch)
        if not cuda_missing:
            rows += sass_cuda.rows(arch, args.dtypes)
    return {"triton": triton.__version__, "cuda": cuda_missing or "built", "rows": rows}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = ["backend", "kernel", "noise", "dtype", "arch", "SASS per weight", "budget", "registers", "spilled bytes",
               "widest load", "widest store"]  # fmt: skip
    return headers, [
        [r["backend"], r["kernel"], r["noise"], r["dtype"], f"sm_{r['arch']}", f"{r['sass_per_weight']:.1f}",
         str(r["budget"] or "-"), str(r["registers"]), str(r["spill_bytes"]), f"{r['load_bits']} bits",
         f"{r['store_bits']} bits"]
        for r in result["rows"]
    ]  # fmt: skip


def compile_kernel(
    kind: int, formats: tuple[int, int], target=None, tile: int | None = None, stochastic=False, decay=0, adam=False
):
    """The compiled Triton kernel, for a GPUTarget (default sm_90). Needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..kernels import add_noise as k

    names = k.add_noise_kernel.arg_names
    types = ["*i64", "*i64", "*i64", "*fp32", "i32", *["i64"] * 3, *["fp32"] * 5, *["constexpr"] * 7]
    constants = {"KIND": kind, "SRC": formats[0], "DST": formats[1], "TILE": tile or k.TILE,
                 "STOCHASTIC": stochastic, "DECAY": decay, "ADAM": adam}  # fmt: skip
    source = ASTSource(
        fn=k.add_noise_kernel,
        signature=dict(zip(names, types, strict=True)),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, 3, 5, 6, 7)},  # torch allocates at multiples of 512
    )
    return triton.compile(source, target=target or GPUTarget("cuda", 90, 32), options=k.OPTIONS)


def _rows(noise: str, kind: int, dtype: str, arch: int) -> list[dict]:
    from triton.backends.compiler import GPUTarget

    from ..kernels.add_noise import NUM_WARPS, TILE

    compiled = compile_kernel(kind, (DTYPES[dtype],) * 2, GPUTarget("cuda", arch, 32))
    code = disassemble(compiled.asm["cubin"])
    per_thread = TILE // (32 * NUM_WARPS)
    figures = measure(code)
    return [
        row("triton", kernel, noise, dtype, arch, count / per_thread, per_thread, figures, BUDGETS)
        | {"shared_bytes": compiled.metadata.shared}
        for kernel, count in (("perturb", figures.path), ("update", figures.loop))
    ]


def row(backend, kernel, noise, dtype, arch, per_weight, per_thread, figures: Figures, budgets: dict) -> dict:
    budget = budgets[kernel, noise] if arch == 90 else None
    found = {
        "backend": backend, "kernel": kernel, "noise": noise, "dtype": dtype, "arch": arch,
        "sass_per_weight": round(per_weight, 2), "budget": budget, "weights_per_thread": per_thread,
        "spill_bytes": figures.spill_bytes, "registers": figures.registers, "load_bits": figures.load_bits,
        "store_bits": figures.store_bits, "memory_instructions": figures.memory,
    }  # fmt: skip
    if budget:
        found["pass"] = (
            per_weight <= budget and not figures.spill_bytes and figures.load_bits == figures.store_bits == 128
        )
    return found


@dataclass
class Disassembly:
    sass: str
    resources: str


def disassemble(cubin: bytes) -> Disassembly:
    """Machine code and resource usage by nvdisasm and cuobjdump, which come with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return Disassembly(
            tool(folder, "nvdisasm", "-c", path), tool(folder, "cuobjdump", "--dump-resource-usage", path)
        )


def tool(folder: str, name: str, *arguments) -> str:
    import triton

    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not found.exists():
        raise BenchmarkError(f"{name} is not where Triton keeps it ({found}); this Triton comes without NVIDIA's tools")
    tool = Path(folder) / name
    if not tool.exists():  # in the package it may lack the permission to run
        shutil.copy(found, tool)
        tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ.get('PATH', '')}"}
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise BenchmarkError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass
class Block:
    """Instructions without a jump into or out of their midst."""

    label: str | None
    instructions: list[str] = field(default_factory=list)
    following: list[int] = field(default_factory=list)

    @property
    def cost(self) -> int:
        return sum(not re.match(r"(@!?U?P\d\s+)?NOP", i) for i in self.instructions)

    def uses(self, *what: str) -> bool:
        return any(w in i for i in self.instructions for w in what)


@dataclass
class Figures:
    path: int  # instructions of a perturbation
    loop: int  # instructions of one turn of the loop over members
    spill_bytes: int
    registers: int
    load_bits: int
    store_bits: int
    memory: dict[str, int]


def measure(code: Disassembly, loop: bool = True) -> Figures:
    """What a kernel costs; without `loop`, one that is made for one member."""
    blocks = control_flow(code.sass)
    _, path, turn = min(_passes(blocks)) if loop else (*_straight(blocks), [])
    used = [i for b in dict.fromkeys(path) for i in blocks[b].instructions]
    resources = {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", code.resources)}
    return Figures(
        path=sum(blocks[b].cost for b in path),
        loop=sum(blocks[b].cost for b in turn),
        spill_bytes=resources["STACK"],
        registers=resources["REG"],
        load_bits=_widest(used, "LDG"),
        store_bits=_widest(used, "STG"),
        memory=_memory(used),
    )


def control_flow(sass: str) -> list[Block]:
    blocks = [Block(None)]
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            blocks.append(Block(label[1]))
        elif found := _INSTRUCTION.match(line):
            blocks[-1].instructions.append(found[2])
            if _JUMP.search(found[2]):
                blocks.append(Block(None))
    places = {b.label: i for i, b in enumerate(blocks) if b.label}
    for i, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else ""
        target = re.search(r"\b(?:BRA|CALL\.REL\.NOINC)\b.*`\((\.L_x_\d+)\)", last)
        if target:
            block.following.append(places[target[1]])
        unconditional = re.match(r"(BRA(?!\.U )|EXIT)\b", last) is not None
        if not unconditional and i + 1 < len(blocks):
            block.following.append(i + 1)
    return blocks


def _passes(blocks: list[Block]) -> list[tuple[int, list[int], list[int]]]:
    """For each loop: price and blocks of the cheapest path through the kernel that turns in it once, and the turn."""
    found = []
    loops = [(to, i) for i, b in enumerate(blocks) for to in b.following if to <= i]
    for head, tail in loops:
        if sum(b.cost for b in blocks[head : tail + 1]) < 10:
            continue  # the endless BRA behind a kernel's end
        turn = _cheapest(blocks, [head], tail)
        behind = [n for b in turn for n in blocks[b].following if n not in turn]
        ways = [_cheapest(blocks, [0], head), turn, _cheapest(blocks, behind, None, set(turn))]
        if all(ways):
            path = ways[0][:-1] + ways[1] + ways[2]
            found.append((sum(_price(blocks[b]) for b in path), path, ways[1]))
    if not found:
        raise BenchmarkError("the machine code has no loop over members that this reader understands")
    return found


def _straight(blocks: list[Block]) -> tuple[int, list[int]]:
    """Price and blocks of the cheapest path through a kernel without a loop that stores 128 bits at once."""
    found = []
    for i, block in enumerate(blocks):
        ways = _cheapest(blocks, [0], i), _cheapest(blocks, [i], None)
        if block.uses("STG.E.128") and all(ways):
            path = ways[0][:-1] + ways[1]
            found.append((sum(_price(blocks[b]) for b in path), path))
    if not found:
        raise BenchmarkError("the machine code has no 128-bit store that this reader finds a way to")
    return min(found)


def _cheapest(blocks: list[Block], starts: list[int], goal: int | None, avoid: Set[int] = frozenset()) -> list[int]:
    """Blocks of the cheapest path to `goal` (None: to the kernel's end); empty if there is none."""
    queue = [(_price(blocks[s]), s, (s,)) for s in starts if s not in avoid]
    heapq.heapify(queue)
    seen = set(avoid)
    while queue:
        price, i, path = heapq.heappop(queue)
        if i in seen:
            continue
        seen.add(i)
        ends = bool(blocks[i].instructions) and re.match(r"(@!?U?P\d\s+)?EXIT", blocks[i].instructions[-1])
        if i == goal or (goal is None and ends):
            return list(path)
        for n in blocks[i].following:
            if n not in seen:
                heapq.heappush(queue, (price + _price(blocks[n]), n, (*path, n)))
    return []


def _price(block: Block) -> int:
    """Instructions, and a fine for access to single elements, which serves tiles that are not whole or not aligned."""
    return block.cost + 1_000_000 * (block.uses(".U16", "STS", "LDS") or _single_float(block))


def _single_float(block: Block) -> bool:
    loads, stores = (sum(f"{kind}.E " in i for i in block.instructions) for kind in ("LDG", "STG"))
    return loads > 3 or stores > 0


def _widest(instructions: list[str], kind: str) -> int:
    widths = [int(m[1] or 32) for i in instructions if (m := re.search(rf"\b{kind}\.E(?:\.(\d+))?\b", i))]
    return max(widths, default=0)


def _memory(instructions: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for i in instructions:
        if found := _MEMORY.search(i):
            counts[found[0]] = counts.get(found[0], 0) + 1
    return dict(sorted(counts.items()))
