"""Builds esfast._cpu: cpu_kernel.cpp once per instruction set, chosen among at run time by what the processor has; and
esfast._cuda: the CUDA kernels if there is an nvcc, else a module that says why they are not there.

Only the toolchain is asked what it can do, never the machine: a wheel built here runs on any processor of the
architecture, and CUDA kernels are compiled without looking for a GPU. torch is not imported.
"""

import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

# -ffp-contract=off keeps mul and add apart: the noise is defined to the bit (csrc/noise.h).
# -Wno-maybe-uninitialized: g++ 12 warns of its own AVX-512 header.
COMMON = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
          "-Wno-maybe-uninitialized"]  # fmt: skip
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
# GPUs that get machine code, if this nvcc knows them. The last of them also gets PTX, for what comes after.
ARCHITECTURES = ("80", "89", "90", "100")
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xfatbin", "-compress-all", "-cudart", "static", "--threads", "2",
              "-Xcompiler", "-fPIC,-fvisibility=hidden"]  # fmt: skip
CUDA_SOURCES = [os.path.join("csrc", name) for name in ("cuda_module.cpp", "cuda_kernel.cu")]
CUDA_HEADERS = [
    os.path.join("csrc", name) for name in ("noise.h", "dtypes.h", "cuda_job.h", "cuda_memory.cuh", "cuda_kernel.cuh")
]
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
        if ext.name == "esfast._cuda":
            self.build_cuda(ext)
        else:
            self.build_cpu(ext)

    def build_cuda(self, ext):
        target = self.get_ext_fullpath(ext.name)
        made_by = os.path.join(self.build_temp, "made_by_nvcc")  # as new as the module, if it has kernels
        if (
            not self.force
            and os.path.exists(made_by)
            and not newer_group([*CUDA_SOURCES, *CUDA_HEADERS, "setup.py"], target)
        ):
            return
        absent = build_with_nvcc(target)
        if absent is None:
            os.makedirs(self.build_temp, exist_ok=True)
            open(made_by, "w").close()
            return
        print(f"esfast: the CUDA kernels are not built: {absent}")
        ext.define_macros += [("ESFAST_CUDA_ABSENT", '"' + absent.replace("\\", "/").replace('"', "'") + '"')]
        ext.sources = CUDA_SOURCES[:1]
        ext.extra_compile_args += ["-std=c++17", "-fvisibility=hidden"]
        super().build_extension(ext)

    def build_cpu(self, ext):
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


def find_nvcc():
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return shutil.which("nvcc") or next(filter(None, (shutil.which("nvcc", path=f"{f}/bin") for f in folders)), None)


def build_with_nvcc(target):
    """Compiles and links esfast._cuda. None, or why that was not possible."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc was found when esfast was built"
    try:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        archs = [a for a in ARCHITECTURES if f"compute_{a}" in known]
        if not archs:
            return f"{nvcc} knows none of sm_{', sm_'.join(ARCHITECTURES)}"
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        names = " ".join(f"sm_{a}" for a in archs) + f" and PTX of compute_{archs[-1]}"
        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        command = [nvcc, *NVCC_FLAGS, *codes, f'-DESFAST_ARCHITECTURES="{names}"', *includes, "-shared", "-o", target,
                   *CUDA_SOURCES]  # fmt: skip
        print(" ".join(command))
        done = subprocess.run(command, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvcc can't be used ({error})"
    if done.returncode:
        print(done.stdout + done.stderr)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
        return f"nvcc failed when esfast was built ({(lines or ['no message'])[0].strip():.200})"
    return None


setup(
    ext_modules=[
        Pybind11Extension("esfast._cpu", ["csrc/module.cpp"], depends=["csrc/cpu_kernel.cpp", *HEADERS]),
        Pybind11Extension("esfast._cuda", CUDA_SOURCES, depends=CUDA_HEADERS),
    ],
    cmdclass={"build_ext": Build},
)
