"""Machine code as NVIDIA's tools print it: instructions in blocks, and the paths that a launch takes through them."""

from __future__ import annotations

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

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
# The upper 64 bits of an instruction, on a line of their own.
_UPPER = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"^(\.L_x_\d+):")
# On sm_80 a jump may be written as a call that never returns.
_JUMP = re.compile(r"\b(?:BRA|EXIT)\b|\bCALL\.REL\.NOINC `\(\.L_x")


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
            tool(folder, "nvdisasm", "-c", "-hex", path), tool(folder, "cuobjdump", "--dump-resource-usage", path)
        )


def tool(folder: str, name: str, *arguments) -> str:
    import triton

    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not found.exists():
        raise BenchmarkError(f"{name} is not where Triton keeps it ({found}); this Triton comes without NVIDIA's tools")
    tool = Path(folder) / name
    # The file in Triton's package may lack the permission to be executed, so a copy is run.
    if not tool.exists():
        shutil.copy(found, tool)
        tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ.get('PATH', '')}"}
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode:
        raise BenchmarkError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass
class Block:
    """A basic block: instructions without a jump into or out of the middle. `codes`: the control code of each, 21 bits
    that tell the scheduler when to issue it (bench/scheduler.py)."""

    label: str | None
    instructions: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    following: list[int] = field(default_factory=list)

    @property
    def cost(self) -> int:
        return sum(not re.match(r"(@!?U?P\d\s+)?NOP", i) for i in self.instructions)

    def uses(self, *what: str) -> bool:
        return any(w in i for i in self.instructions for w in what)


def control_flow(sass: str) -> list[Block]:
    blocks = [Block(None)]
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            blocks.append(Block(label[1]))
        elif found := _INSTRUCTION.match(line):
            if blocks[-1].instructions and _JUMP.search(blocks[-1].instructions[-1]):
                blocks.append(Block(None))
            blocks[-1].instructions.append(found[2])
        elif upper := _UPPER.match(line):
            blocks[-1].codes.append(int(upper[1], 16) >> 41)
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


@dataclass(frozen=True)
class Whole:
    """Marks of the path that a whole, aligned tile takes through a kernel.

    slow: instructions that are not on it, since they access single elements. turn: those that one turn of the loop
    uses, in order. end: those behind the loop."""

    slow: tuple[str, ...] = (".U16", "STS", "LDS")
    turn: tuple[str, ...] = ()
    end: tuple[str, ...] = ()


WHOLE = Whole()


def way_through(blocks: list[Block], loop: bool = True, whole: Whole = WHOLE) -> tuple[list[int], list[int]]:
    """Blocks of a perturbation and of one turn of the loop over members. Without `loop`: blocks of a kernel for one
    member."""
    prices = [_price(b, whole.slow) for b in blocks]
    _, path, turn = min(_passes(blocks, prices, whole)) if loop else (*_straight(blocks, prices, whole), [])
    return path, turn


def _passes(blocks: list[Block], prices: list[int], whole: Whole) -> list[tuple[int, list[int], list[int]]]:
    """For each loop: price and blocks of the cheapest path through the kernel with one turn of the loop, and the
    turn."""
    found = []
    loops = [(to, i) for i, b in enumerate(blocks) for to in b.following if to <= i]
    for head, tail in loops:
        if sum(b.cost for b in blocks[head : tail + 1]) < 10:
            # An endless jump to itself, which the compiler puts behind the end of a kernel.
            continue
        turn = _through(blocks, prices, [head], tail, set(), whole.turn)
        behind = [n for b in turn for n in blocks[b].following if n not in turn]
        rest = _through(blocks, prices, behind, None, set(turn), whole.end)
        ways = [_cheapest(blocks, prices, [0], head), turn, rest]
        if all(ways):
            path = ways[0][:-1] + ways[1] + ways[2]
            found.append((sum(prices[b] for b in path), path, ways[1]))
    if not found:
        raise BenchmarkError("the machine code has no loop over members that this reader understands")
    return found


def _straight(blocks: list[Block], prices: list[int], whole: Whole) -> tuple[int, list[int]]:
    """Price and blocks of the cheapest path through a kernel without a loop that stores 128 bits at once."""
    path = _through(blocks, prices, [0], None, set(), (*whole.turn, "STG.E.128"))
    if not path:
        raise BenchmarkError("the machine code has no 128-bit store that this reader finds a way to")
    return sum(prices[b] for b in path), path


def _through(
    blocks: list[Block], prices: list[int], starts: list[int], goal: int | None, avoid: Set[int], marks: tuple[str, ...]
) -> list[int]:
    """_cheapest, of the paths that use the instructions `marks` in this order."""
    if not marks:
        return _cheapest(blocks, prices, starts, goal, avoid)
    found = []
    for i, block in enumerate(blocks):
        if i not in avoid and block.uses(marks[0]):
            ways = _cheapest(blocks, prices, starts, i, avoid), _through(blocks, prices, [i], goal, avoid, marks[1:])
            if all(ways):
                found.append(ways[0][:-1] + ways[1])
    return min(found, key=lambda path: sum(prices[b] for b in path), default=[])


def _cheapest(
    blocks: list[Block], prices: list[int], starts: list[int], goal: int | None, avoid: Set[int] = frozenset()
) -> list[int]:
    """Blocks of the cheapest path to `goal` (None: to the kernel's end); empty if there is none."""
    queue = [(prices[s], s, (s,)) for s in starts if s not in avoid]
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
                heapq.heappush(queue, (price + prices[n], n, (*path, n)))
    return []


def _price(block: Block, slow: tuple[str, ...]) -> int:
    """The price of a block: its number of instructions, and a penalty for those of the slow path."""
    return block.cost + 1_000_000 * (block.uses(*slow) or _single_float(block))


def _single_float(block: Block) -> bool:
    loads, stores = (sum(f"{kind}.E " in i for i in block.instructions) for kind in ("LDG", "STG"))
    return loads > 3 or stores > 0
