"""Builds esfast._cpu: cpu_kernel.cpp once per instruction set, chosen among at run time by what the processor has.

Only the toolchain is asked what it can do, never the machine: a wheel built here runs on any processor of the
architecture. torch is not imported.
"""

import os
import platform
import tempfile

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# -ffp-contract=off keeps mul and add apart: the noise is defined to the bit (csrc/noise.h).
# -Wno-maybe-uninitialized: g++ 12 warns of its own AVX-512 header.
COMMON = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
          "-Wno-maybe-uninitialized"]  # fmt: skip
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
HEADERS = [os.path.join("csrc", name) for name in ("noise.h", "lanes.h", "dtypes.h", "cpu.h")]


class Build(build_ext):
    def accepts(self, *flags):
        """Whether the compiler takes the flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cpp")
            with open(source, "w") as file:
                file.write("int main() { return 0; }\n")
            try:
                self.compiler.compile([source], output_dir=folder, extra_postargs=list(flags))
            except Exception:
                return False
        return True

    def build_extension(self, ext):
        sets = {}
        if platform.machine().lower() in ("x86_64", "amd64"):
            sets = {name: flags for name, flags in INSTRUCTION_SETS.items() if self.accepts(*flags)}
        openmp = ["-fopenmp"] if self.accepts("-fopenmp") else []
        for name, flags in {"baseline": [], **sets}.items():
            ext.extra_objects += self.compiler.compile(
                ["csrc/cpu_kernel.cpp"],
                output_dir=os.path.join(self.build_temp, name),
                extra_postargs=[*COMMON, *flags, "-fopenmp-simd" if openmp else "-O3", f"-DESFAST_ISA={name}"],
                depends=HEADERS,
            )
        ext.define_macros += [(f"ESFAST_HAS_{name.upper()}", "1") for name in sets]
        ext.extra_compile_args += COMMON + openmp
        ext.extra_link_args += openmp
        super().build_extension(ext)


setup(
    ext_modules=[Pybind11Extension("esfast._cpu", ["csrc/module.cpp"], depends=["csrc/cpu_kernel.cpp", *HEADERS])],
    cmdclass={"build_ext": Build},
)
