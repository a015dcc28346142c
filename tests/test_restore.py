"""Restoring on a GPU: one launch of a kernel of our own. What nvcc and Triton make of it for an H100 copies every bit of
every tensor and nothing else, by 128-bit accesses where it can, run on the CPU by tests/ptx_machine."""

import os
import re
import subprocess
import sys

import pytest
import torch
from ptx_machine import backends
from ptx_machine.cases import any_bits, needs_nvcc, needs_triton
from ptx_machine.machine import compile_kernel, run
from ptx_machine.memory import MemoryFault
from ptx_machine.program import kernels_of, parse

import esfast
from esfast.core.backends import cuda as cuda_backend
from esfast.core.backends.tiles import copy_base
from esfast.core.ops import Call, check_members

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def entries(dtype):
    """Whole tiles, tails, odd starts, rows that are aligned and not, a scalar, and gaps that belong to no tensor."""
    generator = torch.Generator().manual_seed(1)
    matrix, flat = any_bits(dtype, 4 * 8400, generator).view(4, 8400), any_bits(dtype, 26_000, generator)
    return [
        ("whole", flat[:16384]),
        ("odd start", flat[16391:25_000]),
        ("slice", matrix[:2, 30:243], esfast.Slice((1000, 50_000), (3, 700))),
        ("shard", matrix[2:4, 104:4200], esfast.Slice((2, 16384), (0, 4096))),
        ("scalar", flat[25_500]),
    ]


def restored(dtype, text, tile, edit=lambda text: text, shift=0):
    """A plan written from a base by the kernel that PTX `text` holds for this dtype, the base, and the launches."""
    launches = []
    base = esfast.Plan(entries(dtype))
    memory = torch.zeros(80_000, dtype=dtype)
    held, at = [], shift
    for i, e in enumerate(base.entries):
        held.append((e.name, memory[at : at + e.tensor.numel()].view(e.tensor.shape), e.window))
        at += e.tensor.numel() + (3 if i % 2 else -(at + e.tensor.numel()) % 8)
    plan = esfast.Plan(held)
    call = Call(plan, *check_members([], []), base)

    def copy_tiles(records, size):
        launches.append(size)
        named = rf"copy_tiles_kernel(ILi{size}E|_{size})"  # by nvcc, and by Triton above
        (body,) = (body for name, body in kernels_of(text).items() if re.search(named, name))
        kernel = compile_kernel(parse(edit(body)))
        # and the scratch memory that Triton's kernels do not use
        parameters = records.data_ptr().to_bytes(8, "little") + bytes(8 * (len(kernel.kernel.parameters) - 1))
        memory = backends.memory_of(call, [backends.bytes_of(records)])
        run(kernel, len(records), kernel.kernel.threads, parameters, memory, 8192)

    copy_base(call, tile, copy_tiles)
    return plan, base, launches, memory, held


@pytest.fixture(scope="module")
def cuda_text(tmp_path_factory):
    target = tmp_path_factory.mktemp("ptx") / "copy.ptx"
    return backends.nvcc_to_ptx(backends.ROOT / "csrc" / "cuda_copy.cu", target)


TRITON = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from esfast.kernels.add_noise import NUM_WARPS, TILE
from esfast.kernels.copy import copy_tiles_kernel as kernel
for size in (2, 4):
    source = ASTSource(
        fn=kernel, signature=dict(zip(kernel.arg_names, ["*i64", "constexpr", "constexpr"])),
        constexprs={"SIZE": size, "TILE": TILE}, attrs={(0,): [["tt.divisibility", 16]]},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS})
    ptx = compiled.asm["ptx"]
    print(ptx.replace("copy_tiles_kernel", f"copy_tiles_kernel_{size}"))
    assert compiled.metadata.shared <= 8192  # what is not there whole passes through it
"""


@pytest.fixture(scope="module")
def triton_text():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(dtype, text, tile, same_bits):
    for shift in (0, 3):
        plan, base, launches, memory, held = restored(dtype, text, tile, shift=shift)
        assert launches == [dtype.itemsize], "one launch"
        assert same_bits(plan.tensors, [t.contiguous() for t in base.tensors])
        for _, t, _ in held:
            t.zero_()
        assert not memory.any(), "nothing beside the weights is written"


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cuda_kernel_copies_every_bit(dtype, cuda_text, same_bits):
    check(dtype, cuda_text, 8192, same_bits)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_tritons_kernel_copies_every_bit(dtype, triton_text, same_bits):
    from esfast.kernels.add_noise import TILE

    check(dtype, triton_text, TILE, same_bits)


@needs_nvcc
def test_both_read_and_write_128_bits_at_once(cuda_text, triton_text):
    for text in (cuda_text, triton_text):
        for name, body in kernels_of(text).items():
            assert "copy_tiles" in name
            assert re.search(r"ld\.global(\.\w+)*\.v4", body) and re.search(r"st\.global\.v4", body), name


@needs_nvcc
def test_a_fault_in_the_machine_code_is_noticed(cuda_text):
    """What the tests above rest on: an access of 16 bytes too many, and one that is not aligned."""
    stores = re.compile(r"(st\.global\.v4\.u32 )\[(%rd\d+)\]")
    for offset in ("+16384", "+4"):
        with pytest.raises(MemoryFault):
            restored(torch.bfloat16, cuda_text, 8192, lambda text, o=offset: stores.sub(rf"\1[\2{o}]", text))


def test_in_place_there_is_nothing_to_restore():
    plan = esfast.Plan(entries(torch.float32))
    for base in (None, plan):
        cuda_backend.run_with(Call(plan, *check_members([], []), base), None, 8192, lambda **_: pytest.fail("launched"))
