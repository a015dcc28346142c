"""The PTX that nvcc and Triton emit for an H100, run on the CPU by tests/ptx_machine and held to the cpu backend to the bit.

What the GPU tests would launch is launched here: every CUDA kernel, and of the variants that Triton makes of its kernel some,
since it takes more than a second for each. ESFAST_LONG_TESTS=1 runs all of them, and each with every rounding and decay.
"""

import os

import pytest
from ptx_machine import backends
from ptx_machine.backends import ADAM, ADD, ONE
from ptx_machine.cases import (
    KINDS,
    PAIRS,
    calls_of,
    cuda_text,
    hold,
    needs_nvcc,
    needs_triton,
    one_call,
    triton_compiler,
)

from esfast.core.noise import DOMAINS

RULES = {"one": ONE, "add": ADD, "adam": ADAM}
# Adam works in place, so there are no kernels with another source
KERNELS = [(p, k, r) for p in PAIRS for k in KINDS for r in RULES if r != "adam" or len(set(PAIRS[p])) == 1]
LONG = os.environ.get("ESFAST_LONG_TESTS") == "1"
long_test = pytest.mark.skipif(not LONG, reason="ESFAST_LONG_TESTS=1 runs every variant, for some minutes")


# ---- CUDA -----------------------------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize(("pair", "kind", "rule"), KERNELS)
def test_every_cuda_kernel(pair, kind, rule):
    cuda = backends.CudaPtx(cuda_text())
    hold(cuda, pair, kind, RULES[rule], calls_of(*PAIRS[pair], kind, RULES[rule], LONG))
    # without members no noise is drawn, and all kinds have one kernel
    without = {"gaussian"} if rule == "add" else set()
    assert cuda.launched == {cuda.find(*PAIRS[pair], DOMAINS[k], RULES[rule]) for k in {kind} | without}


@needs_nvcc
def test_there_are_no_other_cuda_kernels():
    cuda = backends.CudaPtx(cuda_text())
    tested = [cuda.find(*PAIRS[pair], DOMAINS[kind], RULES[rule]) for pair, kind, rule in KERNELS]
    copies = [name for name in cuda.texts if "copy_tiles_kernel" in name]
    assert sorted(tested + copies) == sorted(cuda.texts) and (len(tested), len(copies)) == (54, 2)


@needs_nvcc
@pytest.mark.parametrize("pair", ["float32", "bfloat16"])
def test_cuda_copies_a_base(pair):
    cuda = backends.CudaPtx(cuda_text())
    # a perturbation changes every weight, and no member brings the base back
    hold(cuda, pair, "rademacher", ONE, [one_call(), one_call(0, in_place=False)])
    assert len(cuda.launched) == 2


@needs_nvcc
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_with_many_members(kind):
    hold(backends.CudaPtx(cuda_text()), "bfloat16", kind, ADD, [one_call(64), one_call(30)], few=True)


# ---- Triton ---------------------------------------------------------------------------------------------------------

CHOSEN = [
    ("bfloat16", "gaussian", "one", one_call()),
    ("float32", "rademacher", "one", one_call(in_place=False)),
    ("float16", "gaussian", "add", one_call(2, stochastic=True, decay=2)),
    ("bfloat16", "rademacher", "add", one_call(3, stochastic=True)),
    ("bfloat16", "gaussian", "add", one_call(64)),
    ("split", "gaussian", "add", one_call(2, decay=2)),
    ("split to bfloat16", "rademacher", "one", one_call(in_place=False)),
    ("float32 to bfloat16", "gaussian", "add", one_call(2, in_place=False, stochastic=True)),
    ("float32 to float16", "rademacher", "add", one_call(7, in_place=False, decay=1)),
    ("bfloat16", "gaussian", "adam", one_call(3, stochastic=True, decay=2)),
    ("split", "rademacher", "adam", one_call(2, decay=1)),
    ("bfloat16", "low_rank", "one", one_call()),
    ("float32", "low_rank", "add", one_call(5, in_place=False)),
    ("bfloat16", "low_rank", "add", one_call(3, stochastic=True, decay=2)),
    ("split", "low_rank", "add", one_call(2, decay=2)),
    ("float16", "low_rank", "adam", one_call(2, stochastic=True)),
]


@needs_triton
@pytest.mark.parametrize(("pair", "kind", "rule", "call"), CHOSEN)
def test_chosen_triton_kernels(pair, kind, rule, call):
    hold(backends.TritonPtx(triton_compiler()), pair, kind, RULES[rule], [call])


@needs_triton
@long_test
@pytest.mark.parametrize(("pair", "kind", "rule"), KERNELS)
def test_every_triton_kernel(pair, kind, rule):
    hold(
        backends.TritonPtx(triton_compiler()), pair, kind, RULES[rule], calls_of(*PAIRS[pair], kind, RULES[rule], LONG)
    )


@needs_triton
@long_test
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [512, 1024, 8192])
def test_other_tiles_of_triton(tile, kind):
    hold(backends.TritonPtx(triton_compiler(), tile=tile), "bfloat16", kind, ONE, [one_call()])
