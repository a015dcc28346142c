"""Runs a kernel: all threads of the grid are lanes of NumPy arrays, and each instruction is done for all of them at once.

Lanes that stand at different blocks of the code take turns, those furthest behind first, so that they meet again where the
branches do. A register holds one unsigned number a lane, or a single one where all lanes agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .instructions import DTYPES, OPERATIONS
from .memory import GlobalMemory, SharedMemory, check_alignment
from .program import WIDTHS, Instruction, Kernel, PtxError

WARP = 32
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SPECIAL = {"%tid.x": 32, "%ctaid.x": 32, "%ntid.x": 32, "%nctaid.x": 32}
# The value of a register that was never written, so that reading it gives a wrong result.
POISON = 0xA5A5A5A5A5A5A5A5
EXITED = np.iinfo(np.int64).max
# Blocks of code that one run may execute; more mean a loop that never ends.
MAX_BLOCKS = 200_000

Step = Callable[["Run", "np.ndarray | None"], None]


class UnknownInstruction(PtxError):
    """An instruction that this machine does not implement."""


@dataclass
class Compiled:
    """A kernel whose instructions are functions. `exits`: how each block ends, as (guard, goal) or None."""

    kernel: Kernel
    steps: list[list[Step]]
    exits: list[tuple[Callable | None, int] | None]


class Run:
    """Registers, memory and mask of one launch."""

    def __init__(self, grid: int, threads: int, arguments: bytes, memory: GlobalMemory, shared_size: int):
        self.lanes = grid * threads
        lane = np.arange(self.lanes)
        self.block = lane // threads
        self.warp = lane // WARP
        self.registers = {
            "%tid.x": (lane % threads).astype(np.uint32),
            "%ctaid.x": self.block.astype(np.uint32),
            "%ntid.x": np.full(1, threads, dtype=np.uint32),
            "%nctaid.x": np.full(1, grid, dtype=np.uint32),
        }
        self.live = np.ones(self.lanes, dtype=bool)
        self.arguments, self.memory = arguments, memory
        self.shared = SharedMemory(grid, shared_size)

    def put(self, register: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        if mask is not None:
            old = self.registers.get(register)
            if old is None:
                old = np.full(1, POISON, dtype=np.uint64).astype(value.dtype)
            value = np.where(mask, value, old)
        self.registers[register] = value

    def all_lanes(self, value: np.ndarray) -> np.ndarray:
        return np.broadcast_to(value, self.lanes)


def run(
    kernel: Compiled, grid: int, threads: int, arguments: bytes, memory: GlobalMemory, shared_size: int = 0
) -> None:
    """Launches `grid` blocks of `threads`. `arguments`: the bytes of the parameters, laid out as the kernel declares them."""
    state = Run(grid, threads, arguments, memory, shared_size + sum(kernel.kernel.shared.values()))
    at = np.zeros(state.lanes, dtype=np.int64)  # the block of code where each lane stands
    with np.errstate(all="ignore"):
        for _ in range(MAX_BLOCKS):
            here = int(at.min())
            if here == EXITED:
                return
            mask = at == here
            everyone = bool(mask.all())
            for step in kernel.steps[here]:
                step(state, None if everyone else mask)
            at[mask] = here + 1
            if kernel.exits[here]:
                guard, goal = kernel.exits[here]
                leaving = mask if guard is None else mask & guard(state)
                at[leaving] = goal
                if goal == EXITED:
                    state.live &= ~leaving
    raise PtxError(f"{kernel.kernel.name}: ran {MAX_BLOCKS} blocks of code and did not end")


def layout(kernel: Kernel) -> dict[str, int]:
    """Where each parameter begins."""
    places, end = {}, 0
    for p in kernel.parameters:
        places[p.name] = (end + p.align - 1) // p.align * p.align
        end = places[p.name] + p.size
    return places


def compile_kernel(kernel: Kernel) -> Compiled:
    compiler = _Compiler(kernel)
    steps: list[list[Step]] = []
    exits: list[tuple[Callable | None, int] | None] = []
    for block in kernel.blocks:
        steps.append([])
        exits.append(None)
        for instruction in block:
            if goal := compiler.goal(instruction):
                exits[-1] = (compiler.guard(instruction), goal[0])
            else:
                steps[-1].append(compiler.guarded(instruction))
    return Compiled(kernel, steps, exits)


class _Compiler:
    """Instructions of one kernel into functions of a Run and a mask of its lanes (None: all)."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        shared, self.symbols = 0, layout(kernel)
        for name, size in kernel.shared.items():
            self.symbols[name], shared = shared, shared + size
        self.symbols.setdefault("global_smem", 0)  # Triton's: its size comes with the launch

    def goal(self, i: Instruction) -> tuple[int] | None:
        """The block that a jump goes to."""
        if i.opcode in ("bra", "bra.uni"):
            return (self.kernel.labels[i.operands[0]],)
        return (EXITED,) if i.opcode in ("ret", "exit") else None

    def guard(self, i: Instruction) -> Callable | None:
        if i.guard is None:
            return None
        read = self.read(i.guard, "pred")
        return (lambda state: ~read(state)) if i.negated else read

    def guarded(self, i: Instruction) -> Step:
        step, guard = self.step(i), self.guard(i)
        if guard is None:
            return step

        def when(state: Run, mask: np.ndarray | None) -> None:
            allowed = state.all_lanes(guard(state)) if mask is None else guard(state) & mask
            if allowed.any():
                step(state, allowed)

        return when

    def step(self, i: Instruction) -> Step:
        kind = i.opcode.split(".")[0]
        if i.opcode in OPERATIONS and not any(o.startswith("{") for o in i.operands):
            return self.operation(i)
        maker = {
            "mov": self.move,
            "ld": self.load,
            "st": self.store,
            "bar": self.barrier,
            "ldmatrix": self.matrix,
            "stmatrix": self.matrix,
            "shfl": self.shuffle,
        }.get(kind)
        if maker is None:
            raise UnknownInstruction(f"unknown instruction {i.opcode!r} in `{i}`")
        return maker(i)

    # ---- operands ---------------------------------------------------------------------------------------------------

    def read(self, text: str, kind: str, narrow: bool = False) -> Callable[[Run], np.ndarray]:
        """An operand as an array of the type. `narrow`: of the low bits of a register that may be wider."""
        width, dtype = WIDTHS[kind], DTYPES[kind]
        if text.startswith("!"):
            inverted = self.read(text[1:], kind)
            return lambda state: ~inverted(state)
        register = SPECIAL.get(text) or self.kernel.width(text)
        if register is None:
            constant = np.full(1, self.constant(text), dtype=np.uint64).astype(UNSIGNED[width]).view(dtype)
            return lambda state: constant
        if register != width and not (narrow and register > width):
            raise PtxError(f"{self.kernel.name}: operand {text} has {register} bits, expected {width}")

        def value(state: Run) -> np.ndarray:
            found = state.registers.get(text)
            if found is None:
                raise PtxError(f"{self.kernel.name}: {text} is read before anything was written there")
            return found.view(dtype) if register == width else found.astype(UNSIGNED[width]).view(dtype)

        return value

    def constant(self, text: str) -> int:
        """The bits of an immediate, or the address of a symbol."""
        if text in self.symbols:
            return self.symbols[text]
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
            return int(m[1] or m[2], 16)
        if m := re.fullmatch(r"(-?)(0x[0-9a-fA-F]+|\d+)U?", text):
            return int(m[1] + m[2], 0) & (2**64 - 1)
        raise PtxError(f"{self.kernel.name}: what is the operand {text!r}?")

    def write(self, text: str, kind: str, wide: bool = False) -> Callable[[Run, np.ndarray, np.ndarray | None], None]:
        """Stores values of the type. `wide`: in a register that may have more bits, which copies of the sign then fill."""
        width, register = WIDTHS[kind], self.kernel.width(text)
        if text == "_":
            return lambda state, value, mask: None
        if register != width and not (wide and register and register > width):
            raise PtxError(f"{self.kernel.name}: result {text} has {register} bits, expected {width}")
        extended = DTYPES[f"{'s' if kind[0] == 's' else 'u'}{register}"] if register != width else None

        def put(state: Run, value: np.ndarray, mask: np.ndarray | None) -> None:
            value = np.ascontiguousarray(value)
            if extended is not None:
                value = value.view(DTYPES[f"{kind[0] if kind[0] == 's' else 'u'}{width}"]).astype(extended)
            state.put(text, value.view(UNSIGNED[register]), mask)

        return put

    def address(self, text: str) -> Callable[[Run], np.ndarray]:
        """Returns a function that computes the addresses of an operand `[register + offset]`: uint64, one a thread."""
        m = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        offset = np.uint64(int(m[2] or 0) % 2**64)
        base = self.read(m[1], "u32" if self.kernel.width(m[1]) == 32 else "u64")
        return lambda state: base(state).astype(np.uint64) + offset

    # ---- instructions -----------------------------------------------------------------------------------------------

    def operation(self, i: Instruction) -> Step:
        op = OPERATIONS[i.opcode]
        if len(i.operands) != len(op.operands) + 1:
            raise PtxError(f"{self.kernel.name}: {len(i.operands)} operands in `{i}`, expected {len(op.operands) + 1}")
        write = self.write(i.operands[0], op.result, op.widens)
        reads = [self.read(o, t, op.widens) for o, t in zip(i.operands[1:], op.operands, strict=True)]
        return lambda state, mask: write(state, op.compute(*(r(state) for r in reads)), mask)

    def move(self, i: Instruction) -> Step:
        """mov.b32 and mov.b64 that take a register apart, or put one together."""
        if i.opcode not in ("mov.b32", "mov.b64"):
            raise UnknownInstruction(f"unknown instruction {i.opcode!r} in `{i}`")
        target, source = i.operands
        apart = target.startswith("{")
        parts = _list(target if apart else source)
        total = int(i.opcode[5:])
        kind, whole = f"b{total // len(parts)}", f"b{total}"
        if apart:
            read, writes = self.read(source, whole), [self.write(p, kind) for p in parts]

            def split(state: Run, mask: np.ndarray | None) -> None:
                words = np.ascontiguousarray(read(state)).view(DTYPES[kind]).reshape(-1, len(parts))
                for k, write in enumerate(writes):
                    write(state, words[:, k], mask)

            return split
        reads, write = [self.read(p, kind) for p in parts], self.write(target, whole)

        def join(state: Run, mask: np.ndarray | None) -> None:
            words = np.stack(np.broadcast_arrays(*(r(state) for r in reads)), axis=1)
            write(state, np.ascontiguousarray(words).view(DTYPES[whole])[:, 0], mask)

        return join

    def access(self, i: Instruction) -> tuple[str, str, int]:
        """Space, type and count of a load or store."""
        m = re.fullmatch(r"(?:ld|st)\.(param|global|shared)(?:\.v([24]))?\.(\w+)", i.opcode)
        if m is None or m[3] not in DTYPES:
            raise UnknownInstruction(f"unknown instruction {i.opcode!r} in `{i}`")
        return m[1], m[3], int(m[2] or 1)

    def load(self, i: Instruction) -> Step:
        space, kind, count = self.access(i)
        writes = [self.write(t, kind, wide=True) for t in _list(i.operands[0])]
        address, size, what = self.address(i.operands[1]), WIDTHS[kind] // 8, f"{self.kernel.name}: `{i}`"

        def parameter(state: Run, mask: np.ndarray | None) -> None:
            where = address(state)
            start = int(where[0] if mask is None else state.all_lanes(where)[mask][0])  # the same for all
            for k, write in enumerate(writes):
                raw = state.arguments[start + k * size :][:size]
                write(state, np.frombuffer(raw, dtype=UNSIGNED[8 * size]), mask)

        def memory(state: Run, mask: np.ndarray | None) -> None:
            where = state.all_lanes(address(state))
            where = where if mask is None else where[mask]
            if space == "global":
                words = state.memory.load(what, where, size, count)
            else:
                words = state.shared.load(what, where, _lanes(state, mask), size, count)
            for word, write in zip(words, writes, strict=True):
                write(state, word if mask is None else _spread(word, mask), mask)

        return parameter if space == "param" else memory

    def store(self, i: Instruction) -> Step:
        space, kind, _ = self.access(i)
        reads = [self.read(t, kind, narrow=True) for t in _list(i.operands[1])]
        address, what = self.address(i.operands[0]), f"{self.kernel.name}: `{i}`"

        def memory(state: Run, mask: np.ndarray | None) -> None:
            where = state.all_lanes(address(state))
            words = np.stack([state.all_lanes(r(state)).view(UNSIGNED[WIDTHS[kind]]) for r in reads])
            if mask is not None:
                where, words = where[mask], words[:, mask]
            if space == "global":
                state.memory.store(what, where, words)
            else:
                state.shared.store(what, where, _lanes(state, mask), words)

        return memory

    def barrier(self, i: Instruction) -> Step:
        if i.opcode != "bar.sync" or i.operands != ["0"]:
            raise UnknownInstruction(f"unknown instruction `{i}`")

        def wait(state: Run, mask: np.ndarray | None) -> None:
            blocks = np.unique(state.block if mask is None else state.block[mask])
            if mask is not None and (state.live & ~mask & np.isin(state.block, blocks)).any():
                raise PtxError(f"{self.kernel.name}: some threads of a block do not come to its barrier")
            state.shared.barrier(blocks)

        return wait

    def shuffle(self, i: Instruction) -> Step:
        """Each lane takes the value of the lane of its warp that it names."""
        if i.opcode != "shfl.sync.idx.b32" or i.operands[3:] != ["31", "-1"]:
            raise UnknownInstruction(f"unknown instruction {i.opcode!r} in `{i}`")
        write, value, source = self.write(i.operands[0], "b32"), *(self.read(o, "b32") for o in i.operands[1:3])

        def take(state: Run, mask: np.ndarray | None) -> None:
            if mask is not None and (mask.reshape(-1, WARP).any(1) != mask.reshape(-1, WARP).all(1)).any():
                raise PtxError(f"{self.kernel.name}: `{i}` by a part of a warp")
            lanes = state.warp * WARP + (state.all_lanes(source(state)) % WARP).astype(np.int64)
            write(state, state.all_lanes(value(state))[lanes], mask)

        return take

    def matrix(self, i: Instruction) -> Step:
        """8 x 8 matrices of 16-bit elements, whose rows lie where lanes 8 j to 8 j + 7 say, to and from a warp's registers."""
        m = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", i.opcode)
        if m is None:
            raise UnknownInstruction(f"unknown instruction {i.opcode!r} in `{i}`")
        loads, count, transposed, what = m[1] == "ld", int(m[2]), bool(m[3]), f"{self.kernel.name}: `{i}`"
        where, values = i.operands[::-1] if loads else i.operands
        address = self.address(where)
        ports = [self.write(r, "b32") if loads else self.read(r, "b32") for r in _list(values)]
        if len(ports) != count:
            raise PtxError(f"{what}: expected {count} registers")
        lane = np.arange(WARP)
        row, column = lane // 4, lane % 4 * 2  # of a lane's two elements, which lie side by side in a row ...
        rows, columns = (np.stack([row, row]), np.stack([column, column + 1]))
        if transposed:  # ... or in a column
            rows, columns = columns, rows

        def move(state: Run, mask: np.ndarray | None) -> None:
            if mask is not None and (mask.reshape(-1, WARP).any(1) != mask.reshape(-1, WARP).all(1)).any():
                raise PtxError(f"{what}: a part of a warp")
            starts = state.all_lanes(address(state))
            check_alignment(what, starts if mask is None else starts[mask], 16)
            starts = starts.reshape(-1, WARP)
            lanes = _lanes(state, mask)
            for j, port in enumerate(ports):
                own = starts[:, 8 * j : 8 * j + 8]
                places = own[:, rows].transpose(1, 0, 2) + (2 * columns[:, None, :]).astype(np.uint64)
                places = [p.reshape(-1) if mask is None else p.reshape(-1)[mask] for p in places]
                if loads:
                    low, high = (state.shared.load(what, p, lanes, 2, 1)[0].astype(np.uint32) for p in places)
                    word = low | (high << np.uint32(16))
                    port(state, word if mask is None else _spread(word, mask), mask)
                else:
                    words = state.all_lanes(port(state))
                    words = words if mask is None else words[mask]
                    for shift, place in enumerate(places):
                        state.shared.store(what, place, lanes, (words >> np.uint32(16 * shift)).astype(np.uint16)[None])

        return move


def _list(operand: str) -> list[str]:
    return [o.strip() for o in operand.strip("{} ").split(",")]


def _lanes(state: Run, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    return (state.block, state.warp) if mask is None else (state.block[mask], state.warp[mask])


def _spread(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Values of the lanes of a mask, at their places among all."""
    found = np.zeros(len(mask), dtype=values.dtype)
    found[mask] = values
    return found
