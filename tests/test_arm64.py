"""arm64 gives the bits of x86-64: the baseline kernels compiled for it, run by an emulator, against the same here.

Needs a cross compiler and QEMU (Debian: g++-aarch64-linux-gnu qemu-user). That the baseline equals the reference on the
processor at hand is in test_cpu_backend.py.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FLAGS = [
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-DESFAST_ISA=baseline",
    f"-I{TESTS.parent / 'csrc'}",
]
TOOLS = ("g++", "aarch64-linux-gnu-g++", "qemu-aarch64")


def output_of(compiler, runner, folder):
    program = folder / compiler
    sources = [TESTS / "baseline_kernels.cpp", *(TESTS.parent / "csrc").glob("cpu_*.cpp")]
    # As setup.py compiles for arm64. What is compared with is the same whatever a compiler makes of it, and quicker to make.
    more = ["-O3", "-static"] if runner else ["-O1"]
    subprocess.run([compiler, *FLAGS, *more, *sources, "-o", program], check=True)
    return subprocess.run([*runner, program], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares arm64 with x86-64")
@pytest.mark.skipif(any(shutil.which(t) is None for t in TOOLS), reason=f"needs {', '.join(TOOLS)}")
def test_arm64_gives_the_same_bits(tmp_path):
    here, there = output_of("g++", [], tmp_path), output_of("aarch64-linux-gnu-g++", ["qemu-aarch64"], tmp_path)
    assert len(set(here.splitlines())) == 48
    assert here == there
