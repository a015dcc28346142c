"""A model of one of the four schedulers of a streaming multiprocessor (SM) of an H100 or H200, from machine code.

Each cycle the scheduler issues at most one instruction of one of its warps. A warp's next instruction can issue when

- the stall count of the one before has passed, and the barriers that it waits for are free. Both are in the machine
  code, in a control code that the compiler gives each instruction;
- its pipe is free. A warp has 32 lanes. The float pipe is two halves of 16 lanes, each busy for 2 cycles with an
  instruction. Float add, mul and fma go to either half, integer multiplies to one of them alone (2 cycles, of 64-bit
  products 4). The integer pipe has 16 lanes (2 cycles): logic, shifts, adds, comparisons, selections, packing, and
  I2FP, by which integers become floats. Other conversions have 4 lanes (8 cycles). Loads and stores take 4 cycles;
- for memory, fewer than QUEUE cycles of transfers are waiting. A scheduler has 1 / (4 SMs) of the memory's bandwidth,
  and a load's value comes LATENCY cycles after it is asked for.

The scheduler stays with a warp as long as that can issue and its code does not say to yield, and then takes the oldest
that can. Where a block of threads ends, the next one begins LAUNCH cycles later.

Left out: fetching instructions, waiting for other warps at a barrier (of which low-rank noise has one or more a turn),
conflicts of register and memory banks, caches other than a fixed latency of what all lanes share, and that schedulers,
SMs and memory channels are not equally busy. Each of these makes a GPU slower than the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from . import BenchmarkError

# Schedulers of an SM.
SCHEDULERS = 4
SMS = 132
# Registers of an SM. A warp gets them in units of 256.
REGISTERS = 65536
MAX_THREADS = 2048
# Cycles of a load from memory.
LATENCY = 700
# Cycles of a load whose line is in a cache, as for seeds, coefficients and constants.
CACHED = 40
# Cycles until an access has read its operands.
READ = 20
CONVERSION = 24
LAUNCH = 200
QUEUE = 2000
# Bytes that a 128-bit access of a whole warp moves.
LANES_BYTES = 32 * 16

_GUARD = re.compile(r"^@!?U?P\w+\s+")
_PIPES = {
    "fma": "FFMA FMUL FADD HFMA2",
    "multiply": "IMAD",
    "alu": "LOP3 IADD3 SHF ISETP SEL LEA PRMT FSETP FSEL FMNMX I2FP F2FP R2P P2R MOV VIADD PLOP3 IABS BMSK SGXT FLO",
    "conversion": "I2F F2I F2F MUFU",
    "memory": "LDG STG LDC LDS STS LDSM STSM SHFL",
    "uniform": "ULDC ULOP3 UIADD3 UMOV USHF UISETP ULEA UIMAD USEL UPRMT R2UR S2R S2UR CS2R UIADD3X ULOP UPLOP3",
    "control": "BRA EXIT BSSY BSYNC NOP BAR WARPSYNC DEPBAR RET CALL BREAK YIELD",
}
PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
BUSY = {"fma": 2, "multiply": 2, "alu": 2, "conversion": 8, "memory": 4, "uniform": 2, "control": 0}
LATENCIES = {"LDC": CACHED, "ULDC": CACHED, "S2R": 30, "S2UR": 30, "CS2R": 30, "R2UR": 15}
NO_BARRIER = 7


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp. `latency`: cycles until its barrier is free; `transfer`: bytes of weights that it
    moves."""

    name: str
    pipe: str
    busy: int
    stall: int
    yields: bool
    # the barrier that is freed when its result is there
    sets: int
    # the barrier that is freed when its operands are read
    reads: int
    waits: tuple[int, ...]
    latency: int
    loads: bool
    transfer: int = 0


def instruction(text: str, code: int) -> Instruction:
    """Reads a line of machine code and its control code."""
    name = _GUARD.sub("", text).split()[0]
    kind = name.partition(".")[0]
    if kind not in PIPE_OF:
        raise BenchmarkError(f"the model of the scheduler does not know the instruction {name}")
    pipe = PIPE_OF[kind]
    return Instruction(
        name,
        pipe,
        4 if name.startswith("IMAD.WIDE") else BUSY[pipe],
        stall=max(1, code & 15),
        yields=not code >> 4 & 1,
        sets=code >> 5 & 7,
        reads=code >> 8 & 7,
        waits=tuple(b for b in range(6) if code >> 11 >> b & 1),
        latency=CONVERSION if pipe == "conversion" else LATENCIES.get(kind, CACHED),
        loads=kind == "LDG",
    )


def with_transfers(trace: list[Instruction], loads: int) -> list[Instruction]:
    """Marks the instructions that move weights: the last `loads` 128-bit loads of a warp and all of its 128-bit
    stores. Loads before them read the tile's record, which all lanes share and which arrives with the next records."""
    wide = [i for i, op in enumerate(trace) if ".128" in op.name and op.name.startswith("LDG")]
    found = list(trace)
    for i in wide[len(wide) - loads :]:
        found[i] = replace(found[i], transfer=LANES_BYTES, latency=LATENCY)
    for i in wide[: len(wide) - loads]:
        found[i] = replace(found[i], latency=LATENCY)
    for i, op in enumerate(trace):
        if op.name.startswith("STG") and ".128" in op.name:
            found[i] = replace(op, transfer=LANES_BYTES)
    return found


def resident_blocks(registers: int, threads: int, shared: int = 0) -> int:
    """Blocks that an SM has room for."""
    per_warp = -(-registers * 32 // 256) * 256
    found = min(REGISTERS // per_warp // (threads // 32), MAX_THREADS // threads)
    return min(found, 227 * 1024 // (shared + 1024)) if shared else found


class _Warp:
    __slots__ = ("at", "ready", "free", "block")

    def __init__(self, ready: int, block: int):
        self.at, self.ready, self.free, self.block = 0, ready, [0] * 6, block


def simulate(trace: list[Instruction], warps: int, resident: int, bytes_per_cycle: float, rounds: int = 6) -> dict:
    """Runs `rounds * resident` blocks through one scheduler, `resident` of them at a time, with `warps` warps a block.

    Returns the cycles per block in the steady state, and the fractions of these cycles in which each pipe is busy and
    in which an instruction is issued.
    """
    total, begun, ended, now, issued = resident * rounds, 0, 0, 0, 0
    free = dict.fromkeys((*BUSY, "heavy", "light"), 0)
    busy = dict.fromkeys((*BUSY, "heavy", "light"), 0)
    memory, marks, left, active = 0.0, [], {}, []

    def begin(when: int) -> None:
        nonlocal begun
        active.extend(_Warp(when, begun) for _ in range(warps))
        left[begun] = warps
        begun += 1

    for i in range(resident):
        # The blocks of a grid do not begin all at once.
        begin(i * 300)
    last = None
    while active:
        chosen, soonest = None, None
        for warp in [last, *active] if last else active:
            op, at = trace[warp.at], warp.ready
            for barrier in op.waits:
                at = max(at, warp.free[barrier])
            pipe = op.pipe
            if pipe == "fma":
                pipe = "light" if free["light"] <= free["heavy"] else "heavy"
            elif pipe == "multiply":
                pipe = "heavy"
            at = max(at, free[pipe])
            if op.transfer:
                at = max(at, int(memory) - QUEUE)
            if at <= now:
                chosen = warp
                break
            soonest = at if soonest is None else min(soonest, at)
        if chosen is None:
            now = soonest
            continue
        free[pipe] = now + op.busy
        busy[pipe] += op.busy
        issued += 1
        done = now + op.latency
        if op.transfer:
            memory = max(memory, now) + op.transfer / bytes_per_cycle
            done = max(done, int(memory))
        if op.sets != NO_BARRIER:
            chosen.free[op.sets] = max(chosen.free[op.sets], done)
        if op.reads != NO_BARRIER:
            chosen.free[op.reads] = max(chosen.free[op.reads], now + READ)
        chosen.at, chosen.ready = chosen.at + 1, now + op.stall
        last = None if op.yields else chosen
        if chosen.at == len(trace):
            active.remove(chosen)
            last = None
            left[chosen.block] -= 1
            if not left[chosen.block]:
                ended += 1
                if ended in (resident, total - resident) and len(marks) < 2:
                    marks.append((now, issued, dict(busy)))
                if begun < total:
                    begin(now + LAUNCH)
        now += 1
    (start, before, idle), (end, after, full) = marks
    cycles = end - start
    per_block = cycles * len(trace) * warps / (after - before)
    transfers = sum(op.transfer for op in trace) * warps / bytes_per_cycle
    spent = {name: (full[name] - idle[name]) / cycles for name in full}
    return {
        # `transfers` is a lower bound: both ends of the measured window may lie in a burst of transfers.
        "cycles_per_block": max(per_block, transfers),
        "issue": (after - before) / cycles,
        "alu": spent["alu"],
        "fma": (spent["heavy"] + spent["light"]) / 2,
        "conversion": spent["conversion"],
        "memory_pipe": spent["memory"],
    }
