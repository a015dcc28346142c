"""csrc/noise.h is host and device code in one: nvcc compiles it for GPUs, and into separate mul, add and fma."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
KERNEL = """
#include "noise.h"
using namespace esfast;
extern "C" __global__ void fill(float* to, uint64_t seed, uint32_t tensor_id) {
    const uint64_t block = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x;
    const Words<uint32_t> w = philox(seed, block, tensor_id, GAUSSIAN);
    const Pair p = gaussian_pair(w.x0, w.x1), q = gaussian_pair(w.x2, w.x3);
    reinterpret_cast<float4*>(to)[block] = make_float4(p.z0, p.z1, q.z0, q.z1);
}
"""
FMA, MUL, ADD = 8 + 6, 7, 2  # of radius and of gaussian_pair, as they are written


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_nvcc_compiles_the_definition_as_written(arch, tmp_path):
    source = tmp_path / "fill.cu"
    source.write_text(KERNEL)
    done = subprocess.run(
        ["nvcc", "-std=c++17", f"-arch={arch}", "-ptx", f"-I{CSRC}", source, "-o", tmp_path / "fill.ptx"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "fill.ptx").read_text()
    counts = {op: len(re.findall(rf"\b{op}\.rn\.f32", ptx)) for op in ("fma", "mul", "add")}
    assert counts == {"fma": 2 * FMA, "mul": 2 * MUL, "add": 2 * ADD}
