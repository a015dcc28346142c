"""Restoring on a GPU: one launch, of kernels that read and write 128 bits at once."""

import os
import subprocess
import sys

import pytest

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from esfast.kernels.add_noise import NUM_WARPS, TILE
from esfast.kernels.copy import copy_tiles_kernel as kernel
for size in (2, 4):
    source = ASTSource(
        fn=kernel, signature=dict(zip(kernel.arg_names, ["*i64", "constexpr", "constexpr"])),
        constexprs={"SIZE": size, "TILE": TILE}, attrs={(0,): [["tt.divisibility", 16]]},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": NUM_WARPS}).asm["ptx"]
    print(ptx.count("ld.global.v4.b32") >= TILE * size // 16 // 128, "st.global.v4.b32" in ptx)
"""


def test_tritons_kernel_is_vectorised():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 4, done.stdout
