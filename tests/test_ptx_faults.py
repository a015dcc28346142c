"""The tests of test_ptx.py would notice: faults planted in the source of the kernels, in their PTX or in the tile table, one at
a time. Each must change a bit, or be refused by the machine; without a fault the same calls agree."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from ptx_machine import backends
from ptx_machine.backends import ADAM, ADD, ONE
from ptx_machine.cases import (
    PAIRS,
    cuda_text,
    hold,
    needs_nvcc,
    needs_triton,
    one_call,
    triton_compiler,
)
from ptx_machine.memory import MemoryFault
from ptx_machine.program import PtxError

from esfast.core.backends import tiles
from esfast.core.noise import _Q, _S

BACKENDS = [pytest.param("cuda", marks=needs_nvcc), pytest.param("triton", marks=needs_triton)]
PERTURB = ("float32", "gaussian", ONE, one_call())
HALVES = ("bfloat16", "gaussian", ONE, one_call())
FACTORS = ("float32", "low_rank", ADD, one_call(5))
SIGNS = ("bfloat16", "rademacher", ADD, one_call(3, stochastic=True))
ADAMS = ("split", "rademacher", ADAM, one_call(2, decay=1))
NOTICED = (AssertionError, PtxError)


@dataclass(frozen=True)
class Fault:
    """`edits`: by file of csrc/ or kernels/, what is replaced by what. `ptx`: a pattern and what replaces it everywhere.
    `case`: the arguments of `hold`; `noticed`: how it shows."""

    case: tuple
    edits: tuple[str, str, str] | None = None
    ptx: tuple | None = None
    noticed: type | tuple = NOTICED


def constant(value: np.float32) -> str:
    return f"0f{int(np.float32(value).view(np.uint32)):08X}"


def one_ulp_up(m: re.Match) -> str:
    return f"0f{int(m[0][2:], 16) + 1:08X}"


def eight_bytes_on(m: re.Match) -> str:
    return f"{m[1]}+{int(m[2] or 0) + 8}]"


TWICE_ROUNDED = r"{ .reg .f32 product; mul.rn.f32 product, \2, \3; add.rn.f32 \1, product, \4; }"
# What the compilers make of the same thing is written in the same way: a fault of both backends' PTX.
PTX_FAULTS = {
    "a constant off by one ulp": Fault(PERTURB, ptx=(constant(_S[1]), one_ulp_up)),
    "another constant off by one ulp": Fault(PERTURB, ptx=(constant(_Q[2]), one_ulp_up)),
    "another multiplier of Philox": Fault(PERTURB, ptx=(r"-766435501|3528531795", "-766435503")),
    "another key schedule of Philox": Fault(SIGNS, ptx=(r"-1640531527", "-1640531526")),
    "an fma that rounds twice": Fault(
        PERTURB, ptx=(r"fma\.rn\.f32\s+(%\w+), (\S+), (\S+), ([^;]+);", TWICE_ROUNDED), noticed=AssertionError
    ),
    "a product that may be contracted": Fault(PERTURB, ptx=(r"mul\.rn\.f32", "mul.f32"), noticed=PtxError),
    "subnormals flushed to zero": Fault(PERTURB, ptx=(r"fma\.rn\.f32", "fma.rn.ftz.f32"), noticed=PtxError),
    "neighbours that change places": Fault(
        HALVES,
        ptx=(r"cvt\.rn\.bf16x2\.f32\s+(%\w+), (%\w+), (%\w+);", r"cvt.rn.bf16x2.f32 \1, \3, \2;"),
        noticed=AssertionError,
    ),
    "128 bits stored 8 bytes on": Fault(
        PERTURB,
        ptx=(r"(st\.global\.v4\.\w+\s+\[\s*%\w+)(?:\s*\+\s*(\d+))?\s*\]", eight_bytes_on),
        noticed=MemoryFault,
    ),
}
SOURCE_FAULTS = {
    "cuda": {
        "products in another order": Fault(
            PERTURB, ("noise.h", "mul_(mul_(r, h), s)", "mul_(r, mul_(h, s))"), noticed=AssertionError
        ),
        "six rounds of Philox": Fault(SIGNS, ("noise.h", "PHILOX_ROUNDS = 7", "PHILOX_ROUNDS = 6")),
        "a tail one element too long": Fault(
            PERTURB,
            ("cuda_layout.cuh", "e >= begin && e < end", "e >= begin && e <= end"),
            noticed=MemoryFault,
        ),
        "the upper half of a block's number lost": Fault(
            PERTURB, ("cuda_tile.cuh", "uint32_t(block >> 32), this", "0u, this"), noticed=AssertionError
        ),
        "one member too few": Fault(
            SIGNS, ("cuda_kernel.cuh", "1 : job.members);", "1 : job.members - 1);"), noticed=AssertionError
        ),
        "the noise's numbers to round with": Fault(
            SIGNS, ("noise.h", "STOCHASTIC_ROUNDING = 2", "STOCHASTIC_ROUNDING = 1"), noticed=AssertionError
        ),
        "a row's factor of the next row": Fault(
            FACTORS, ("cuda_low_rank.cuh", "down * TALL + i * 4", "down * TALL + (i * 4 ^ 4)"), noticed=AssertionError
        ),
        "a number drawn twice": Fault(
            FACTORS,
            ("cuda_low_rank.cuh", "put(a + first, mul_(c, y.z0)", "put(a + first, mul_(c, y.z1)"),
            noticed=AssertionError,
        ),
        "slots that are not there add a zero": Fault(
            FACTORS, ("cuda_low_rank.cuh", "a[i] = -0.0f, b[i] = 0", "a[i] = 1, b[i] = 1"), noticed=AssertionError
        ),
        "one buffer of factors for all turns": Fault(
            FACTORS, ("cuda_kernel.cu", "factors[turn % 2]", "factors[0]"), noticed=MemoryFault
        ),
        "factors that are used before all are drawn": Fault(
            FACTORS, ("cuda_kernel.cu", "__syncthreads();", ""), noticed=MemoryFault
        ),
        "low halves without their sign": Fault(
            ADAMS, ("dtypes.h", "uint32_t(int32_t(int16_t(low)))", "uint32_t(low)"), noticed=AssertionError
        ),
    },
    "triton": {
        "products in another order": Fault(PERTURB, ("noise.py", "(r * h) * s", "r * (h * s)"), noticed=AssertionError),
        "six rounds of Philox": Fault(SIGNS, ("noise.py", "static_range(7)", "static_range(6)")),
        "a tail one element too long": Fault(
            PERTURB, ("add_noise.py", "(element < end)", "(element <= end)"), noticed=MemoryFault
        ),
        "the upper half of a block's number lost": Fault(
            PERTURB,
            ("add_noise.py", "(block >> 32).to(tl.uint32)", "(block >> 62).to(tl.uint32)"),
            noticed=AssertionError,
        ),
        "one member too few": Fault(
            SIGNS, ("add_noise.py", "in range(members)", "in range(members - 1)"), noticed=AssertionError
        ),
        "factors in another order": Fault(
            FACTORS,
            (
                "low_rank.py",
                "_accumulate(_accumulate(x, a0, b0, ROWS, HALF), a1, b1, ROWS, HALF)",
                "_accumulate(_accumulate(x, a1, b1, ROWS, HALF), a0, b0, ROWS, HALF)",
            ),
            noticed=AssertionError,
        ),
        "slots that are not there add something": Fault(
            FACTORS,
            ("low_rank.py", "b, 0.0), tl.where(there[None, :], a, -0.0)", "b, 1.0), tl.where(there[None, :], a, 1.0)"),
            noticed=AssertionError,
        ),
        "low halves without their sign": Fault(
            ADAMS, ("memory.py", "WHOLE, tl.int16)", "WHOLE, tl.uint16)"), noticed=AssertionError
        ),
    },
}
TRITON_PTX_FAULTS = {"a barrier left out": Fault(ADAMS, ptx=(r"bar\.sync\s+0;", ""), noticed=MemoryFault)}
ALL = [
    *(
        pytest.param(b.values[0], f, id=f"{b.values[0]}: {n}", marks=b.marks)
        for b in BACKENDS
        for n, f in PTX_FAULTS.items()
    ),
    *(
        pytest.param(b.values[0], f, id=f"{b.values[0]}: {n}", marks=b.marks)
        for b in BACKENDS
        for n, f in SOURCE_FAULTS[b.values[0]].items()
    ),
    *(pytest.param("triton", f, id=f"triton: {n}", marks=needs_triton) for n, f in TRITON_PTX_FAULTS.items()),
]


def edited(folder, target, file, old, new):
    """A copy of a folder with another text in one file."""
    shutil.copytree(folder, target)
    text = (target / file).read_text()
    assert old in text, f"{file} has no {old!r}: the fault is out of date"
    (target / file).write_text(text.replace(old, new))
    return target


def one_kernel(csrc: Path, pair: str, kind: str, rule: int) -> str:
    """PTX of one kernel of cuda_kernel.cu, which takes a second; that of all takes ten."""
    text = (csrc / "cuda_kernel.cu").read_text()
    template = text[: text.index("using Function")]
    arguments = ", ".join([*(backends.STRUCTS[f] for f in PAIRS[pair]), kind.upper(), ["ONE", "ADD", "ADAM"][rule]])
    wanted = f"template __global__ void add_noise_kernel<{arguments}>(const __grid_constant__ CudaJob);\n}}\n}}\n"
    (csrc / "one.cu").write_text(template + wanted)
    return backends.nvcc_to_ptx(csrc / "one.cu", csrc / "one.ptx", csrc)


def backend_of(name, fault, tmp_path):
    """The backend with a fault, or for None without one."""
    count = []

    def edit(text):
        pattern, replacement = fault.ptx
        text, found = re.subn(pattern, replacement, text)
        count.append(found)
        return text

    edit = edit if fault and fault.ptx else lambda text: text
    if name == "cuda":
        text = cuda_text()
        if fault and fault.edits:
            text = one_kernel(edited(backends.ROOT / "csrc", tmp_path / "csrc", *fault.edits), *fault.case[:3])
        return backends.CudaPtx(text, edit), count
    folder = None
    if fault and fault.edits:
        folder = edited(backends.ROOT / "kernels", tmp_path / "kernels", *fault.edits)
    return backends.TritonPtx(triton_compiler(), folder, edit), count


def holds(backend, case):
    pair, kind, rule, call = case
    hold(backend, pair, kind, rule, [call, call], few=True)  # twice: what a first call changed, a second one reads


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", [PERTURB, HALVES, SIGNS, ADAMS, FACTORS])
def test_without_a_fault_the_calls_agree(name, case, tmp_path):
    holds(backend_of(name, None, tmp_path)[0], case)


@pytest.mark.parametrize(("name", "fault"), ALL)
def test_a_fault_is_noticed(name, fault, tmp_path):
    backend, count = backend_of(name, fault, tmp_path)
    with pytest.raises(fault.noticed):
        holds(backend, fault.case)
    assert not fault.ptx or count[0] > 0, "the fault is out of date: its pattern is nowhere in the PTX"


@pytest.mark.parametrize("name", BACKENDS)
def test_vectors_at_odd_addresses_are_noticed(name, tmp_path):
    """A tile table that calls every full tile whole, wherever it lies."""
    original = tiles.tile_table

    def careless(segments, tile, extras=False):
        records, more = original(segments, tile, extras)
        full = (records[:, 3] & 0x7FFFFFFF) == tile << 15
        records[full, 3] |= 1 << 31
        return records, more

    backend, _ = backend_of(name, None, tmp_path)
    with mock.patch.object(tiles, "tile_table", careless), pytest.raises(MemoryFault, match="not aligned to 16 bytes"):
        holds(backend, PERTURB)
