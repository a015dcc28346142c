"""The machine of tests/ptx_machine itself: what it computes, and that it refuses what it does not know and what no GPU allows."""

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx_machine.instructions import OPERATIONS
from ptx_machine.machine import UnknownInstruction, compile_kernel, run
from ptx_machine.memory import GlobalMemory, MemoryFault
from ptx_machine.program import PtxError, parse

KERNEL = """
.visible .entry k(.param .u64 k_param_0, .param .u32 k_param_1)
.maxntid 64, 1, 1
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %rd<9>;
    .shared .align 16 .b8 scratch[256];
    ld.param.u64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2; // this thread's word
    {body}
    ret;
}}
"""


def launch(body, words=64, grid=1, threads=64, readable_only=False):
    """Runs a body over zeros, one word a thread at %rd3, and returns them."""
    memory = np.zeros(words + 4, dtype=np.uint32)
    first = -(memory.ctypes.data // 4) % 4
    memory = memory[first : first + words]
    extent = [(memory.ctypes.data, memory.ctypes.data + memory.nbytes)]
    run(
        compile_kernel(parse(KERNEL.format(body=body))),
        grid,
        threads,
        struct.pack("<QI4x", memory.ctypes.data, 7),
        GlobalMemory(extent if readable_only else [], [] if readable_only else extent),
    )
    return memory


def test_lanes_that_part_meet_again():
    found = launch("""
        setp.lt.u32 %p1, %r1, 10; @%p1 bra $small; add.s32 %r2, %r1, 100; bra.uni $join;
        $small: mov.u32 %r2, 1; mov.u32 %r3, 0;
        $loop: add.s32 %r3, %r3, 1; shl.b32 %r2, %r2, 1; setp.lt.u32 %p2, %r3, %r1; @%p2 bra $loop;
        $join: ld.param.u32 %r4, [k_param_1]; add.s32 %r2, %r2, %r4; @!%p1 add.s32 %r2, %r2, 1000;
        st.global.u32 [%rd3], %r2;""")
    expected = [2 ** max(i, 1) + 7 if i < 10 else i + 1107 for i in range(64)]
    assert found.tolist() == expected


def test_names_of_inner_scopes_hide_outer_ones():
    found = launch("""
        .reg .u32 x; mov.u32 x, 5;
        {.reg .u32 x; mov.u32 x, 6; mov.b64 %rd4, {x, x};}
        {.reg .u64 x; mov.u64 x, 1; add.s64 %rd4, %rd4, x;}
        mov.b64 {%r2, %r3}, %rd4; mul.lo.s32 %r2, %r2, x; st.global.u32 [%rd3], %r2;""")
    assert set(found.tolist()) == {35}


def test_shared_memory_goes_round_a_barrier():
    found = launch("""
        shl.b32 %r2, %r1, 2; st.shared.u32 [%r2], %r1; bar.sync 0;
        xor.b32 %r3, %r2, 252; ld.shared.u32 %r4, [%r3]; st.global.u32 [%rd3], %r4;""")
    assert found.tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("fma.rn.ftz.f32 %f1, %f1, %f1, %f1;", UnknownInstruction, "'fma.rn.ftz.f32'"),
        ("mul.f32 %f1, %f1, %f1;", UnknownInstruction, "'mul.f32'"),
        ("shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", UnknownInstruction, "'shfl.sync.bfly.b32'"),
        ("ld.global.nc.L1::no_allocate.b32 %r2, [%rd3];", UnknownInstruction, "'ld.global.nc.L1::no_allocate.b32'"),
        ("add.s32 %rd4, %r1, %r1;", PtxError, "%rd4 has 64 bits, expected 32"),
        ("add.s32 %r2, %r1;", PtxError, "2 operands"),
        ("add.s32 %r2, %r1, nobody;", PtxError, "operand 'nobody'"),
        ("add.s32 %r2, %r1, %r3;", PtxError, "%r3 is read before anything was written"),
        ("st.global.v4.u32 [%rd3], {%r1, %r1, %r1, %r1};", MemoryFault, "not aligned to 16 bytes"),
        ("st.global.u32 [%rd3+2], %r1;", MemoryFault, "not aligned to 4 bytes"),
        ("st.global.u32 [%rd3+4], %r1;", MemoryFault, "out of bounds"),
        ("ld.global.u32 %r2, [%rd3+-4];", MemoryFault, "out of bounds"),
        ("$loop: bra.uni $loop;", PtxError, "did not end"),
        (
            "shl.b32 %r2, %r1, 2; st.shared.u32 [%r2], %r1; xor.b32 %r2, %r2, 128; ld.shared.u32 %r3, [%r2];",
            MemoryFault,
            "race",
        ),
        (
            "shl.b32 %r2, %r1, 2; ld.shared.u32 %r3, [%r2]; xor.b32 %r2, %r2, 128; st.shared.u32 [%r2], %r1;",
            MemoryFault,
            "race",
        ),
        ("mov.u32 %r2, 0; st.shared.u32 [%r2], %r1;", MemoryFault, "race"),
        ("mov.u32 %r2, 256; st.shared.u32 [%r2], %r1;", MemoryFault, "past the 256 bytes"),
        ("setp.lt.u32 %p1, %r1, 10; @%p1 bra $over; bar.sync 0; $over:", PtxError, "do not come to its barrier"),
    ],
)
def test_refuses(body, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(").replace("+", r"\+")):
        launch(body)


def test_what_is_only_read_is_not_written():
    assert launch("ld.global.u32 %r2, [%rd3];", readable_only=True).tolist() == [0] * 64
    with pytest.raises(MemoryFault, match="out of bounds"):
        launch("st.global.u32 [%rd3], %r1;", readable_only=True)


def test_matrices_pass_through_shared_memory():
    """Stored as rows and loaded as columns is a transposition: of words of two elements, lane by lane, by hand."""
    threads = 32
    found = launch(
        """
        shl.b32 %r2, %r1, 16; or.b32 %r2, %r2, %r1; add.s32 %r2, %r2, 65536000;
        and.b32 %r3, %r1, 7; shl.b32 %r3, %r3, 4;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r2}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r4}, [%r3]; st.global.u32 [%rd3], %r4;""",
        threads,
        threads=threads,
    )
    matrix = np.zeros((8, 8), dtype=np.int64)
    for lane in range(threads):
        matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2] = lane, lane + 1000
    for lane in range(threads):
        column = matrix[lane % 4 * 2 : lane % 4 * 2 + 2, lane // 4]
        assert found[lane] == column[0] | column[1] << 16


# ---- arithmetic, against exact rationals and against torch ----------------------------------------------------------


def floats(count, seed):
    rng = np.random.default_rng(seed)
    random = rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
    near = (rng.standard_normal(count) * 2.0 ** rng.integers(-30, 30, count)).astype(np.float32)
    return np.concatenate([random[np.isfinite(random)], near])


def test_fma_rounds_once():
    a, b, c = (floats(3000, seed)[:5000] for seed in (1, 2, 3))
    with np.errstate(over="ignore"):
        c[::2] = (-a.astype(np.float64) * b)[::2].astype(np.float32)  # cancellation
    c[~np.isfinite(c)] = 1
    with np.errstate(all="ignore"):
        found = OPERATIONS["fma.rn.f32"].compute(a, b, c)
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        neighbours = [np.nextafter(got, np.float32(s)) for s in (-np.inf, np.inf)]
        if np.isfinite(got):
            error = abs(Fraction(float(got)) - exact)
            assert all(error <= abs(Fraction(float(n)) - exact) for n in neighbours if np.isfinite(n))
        else:
            assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_are_those_of_torch(name, dtype):
    halves = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    upper = torch.from_numpy(halves.view(np.int16)).view(dtype).float().numpy()
    between = np.concatenate(
        [upper, *((upper.view(np.uint32) + np.uint32(d)).view(np.float32) for d in (1, 0x7FFF, 0x8000, 0xFFF, 0x1000))]
    )
    x = np.concatenate([between, floats(20_000, 4)])
    x = x[~np.isnan(x)]
    with np.errstate(all="ignore"):
        found = OPERATIONS[f"cvt.rn.{name}.f32"].compute(x)
        pair = OPERATIONS[f"cvt.rn.{name}x2.f32"].compute(x, x[::-1])
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(found, expected)
    assert np.array_equal(pair, expected.astype(np.uint32) << 16 | expected[::-1])


def test_integers():
    def compute(opcode, *operands):
        arrays = [np.array([o], dtype=np.int64).astype(np.uint32) for o in operands]
        return int(OPERATIONS[opcode].compute(*arrays)[0])

    x, y = 0xDEADBEEF, 0x12345678
    assert compute("shl.b32", x, 32) == compute("shr.u32", x, 99) == 0
    assert int(OPERATIONS["shr.s32"].compute(np.array([-5], np.int32), np.array([40], np.uint32))[0]) == -1
    assert compute("mul.wide.u32", x, y) == x * y and compute("mul.hi.u32", x, y) == x * y >> 32
    assert compute("bfe.u32", x, 4, 8) == 0xEE and compute("bfe.u32", x, 0, 32) == x
    for start, length, expected in ((4, 1, 0), (5, 1, -1), (4, 8, -18), (0, 32, -559038737), (28, 8, -3), (3, 0, 0)):
        arrays = [
            np.array([n], dtype) for n, dtype in ((-559038737, np.int32), (start, np.uint32), (length, np.uint32))
        ]
        assert int(OPERATIONS["bfe.s32"].compute(*arrays)[0]) == expected, (start, length)
    assert compute("prmt.b32", x, y, 0x7610) == 0x1234BEEF and compute("prmt.b32", x, y, 0x4444) == 0x78787878
    assert compute("prmt.b32", x, y, 0x000B) == 0xEFEFEFFF
    assert compute("lop3.b32", x, 0x7FFFFF, y, 0xEA) == x & 0x7FFFFF | y
    assert compute("lop3.b32", x, y, 0xFF00FF, 0x96) == x ^ y ^ 0xFF00FF
    for value, expected in ((2.9, 2), (-2.9, -2), (3e9, 2**31 - 1), (-3e9, -(2**31)), (np.nan, 0)):
        assert int(OPERATIONS["cvt.rzi.s32.f32"].compute(np.array([value], np.float32))[0]) == expected
