"""Builds esfast._cpu: its kernels once per instruction set, chosen among at run time by what the processor has; and
esfast._cuda: the CUDA kernels if there is an nvcc, else a module that says why they are not there.

Only the toolchain is asked what it can do, never the machine: a wheel built here runs on any processor of the
architecture, and CUDA kernels are compiled without looking for a GPU. torch is not imported.

ESFAST_CUDA_ARCHS, for example "90" or "80 90", names the GPU architectures that are compiled for, where not all are
wanted: sm_90 alone takes a quarter of the time. What was built of the same sources in the same way is not built again.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile

import pybind11
from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError

# -ffp-contract=off keeps mul and add apart: the noise is defined to the bit (csrc/noise.h).
# -Wno-maybe-uninitialized: g++ 12 warns of its own AVX-512 header.
COMMON = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-maybe-uninitialized",
]
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}
# GPUs that get machine code, if this nvcc knows them. The last of them also gets PTX, for what comes after.
# ESFAST_CUDA_ARCHS takes the place of these.
ARCHITECTURES = ("80", "89", "90", "100")
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fmad=false",
    "-Xfatbin",
    "-compress-all",
    "-cudart",
    "static",
    "--threads",
    "0",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
]
CUDA_SOURCES = [os.path.join("csrc", name) for name in ("cuda_module.cpp", "cuda_kernel.cu", "cuda_copy.cu")]
CUDA_HEADERS = [
    os.path.join("csrc", name)
    for name in (
        "noise.h",
        "dtypes.h",
        "cpu.h",
        "cuda_job.h",
        "cuda_device.h",
        "cuda_memory.cuh",
        "cuda_layout.cuh",
        "cuda_tile.cuh",
        "cuda_noise.cuh",
        "cuda_low_rank.cuh",
        "cuda_kernel.cuh",
        "cuda_copy.cuh",
    )
]
HEADERS = [
    os.path.join("csrc", name) for name in ("noise.h", "lanes.h", "dtypes.h", "cpu.h", "cpu_rows.h", "products.h")
]
CPU_KERNELS = [os.path.join("csrc", name) for name in ("cpu_kernel.cpp", "cpu_low_rank.cpp", "cpu_products.cpp")]
NO_COMPILER = """
esfast: the C++ extension could not be built: {error}

It needs a C++17 compiler, and Python's headers:
  Debian, Ubuntu   apt-get install g++ python3-dev
  Fedora, RHEL     dnf install gcc-c++ python3-devel
  macOS            xcode-select --install
  conda            conda install -c conda-forge cxx-compiler
A compiler under another name is given in the environment: CXX=clang++ CC=clang
"""


class Build(build_ext):
    def run(self):
        with alone():
            super().run()

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
        """Builds unless build/kept has the module, made of the same sources in the same way: pip builds in folders that
        it removes. Times of files are not looked at: where a tree is copied they change and the contents don't."""
        target = self.get_ext_fullpath(ext.name)
        kept = os.path.join("build", "kept", os.path.basename(target))
        made_of, wanted = f"{kept}.made_of", made_of_what(ext, self.debug)
        if not self.force and os.path.exists(kept) and read(made_of) == wanted:
            replace(target, kept)
            return
        for old in (made_of, target):
            if os.path.exists(old):
                os.remove(old)
        try:
            complete = self.build_cuda(ext) if ext.name == "esfast._cuda" else self.build_cpu(ext)
        except (CompileError, LinkError, ExecError, OSError) as error:
            raise SystemExit(NO_COMPILER.format(error=error)) from error
        if complete:
            replace(kept, target)
            with open(made_of, "w") as file:
                file.write(wanted)

    def build_cuda(self, ext):
        """Whether another build could not make more of it."""
        absent = build_with_nvcc(self.get_ext_fullpath(ext.name))
        if absent is None:
            return True
        print(f"esfast: the CUDA kernels are not built: {absent}")
        ext.define_macros += [("ESFAST_CUDA_ABSENT", '"' + absent.replace("\\", "/").replace('"', "'") + '"')]
        ext.sources = CUDA_SOURCES[:1]
        ext.extra_compile_args += ["-std=c++17", "-fvisibility=hidden"]
        super().build_extension(ext)
        return find_nvcc() is None

    def build_cpu(self, ext):
        sets = {}
        if platform.machine().lower() in ("x86_64", "amd64"):
            sets = {name: flags for name, flags in INSTRUCTION_SETS.items() if self.accepts(*flags)}
        openmp = ["-fopenmp"] if self.accepts("-fopenmp") else []
        for name, flags in {"baseline": [], **sets}.items():
            ext.extra_objects += self.compiler.compile(
                CPU_KERNELS,
                output_dir=os.path.join(self.build_temp, name),
                extra_postargs=[*COMMON, *flags, "-fopenmp-simd" if openmp else "-O3", f"-DESFAST_ISA={name}"],
                depends=HEADERS,
            )
        ext.define_macros += [(f"ESFAST_HAS_{name.upper()}", "1") for name in sets]
        ext.extra_compile_args += COMMON + openmp
        ext.extra_link_args += openmp
        super().build_extension(ext)
        return True


@contextlib.contextmanager
def alone():
    """One build of this tree at a time. What two environments build side by side is compiled once, and the second takes
    what the first has kept."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    os.makedirs("build", exist_ok=True)
    with open(os.path.join("build", "lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made_of_what(ext, debug):
    """A text that changes with the sources, the compilers and the settings."""
    sources = sorted({*ext.sources, *ext.depends, "setup.py"})
    digest = hashlib.sha256()
    for source in sources:
        with open(source, "rb") as file:
            digest.update(file.read())
    asked = {name: os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")}
    nvcc = find_nvcc() if ext.name == "esfast._cuda" else None
    return repr((digest.hexdigest(), asked, debug, nvcc, architectures() if nvcc else None, pybind11.__version__))


def replace(path, other):
    """Makes the file a copy of the other one. A process that has loaded it keeps the old one. The copy is of now, since
    setuptools installs it beside the sources only where it is newer than what stands there."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.exists(path):
        os.remove(path)
    shutil.copy(other, path)


def read(path):
    """The file's text, None where there is no such file."""
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def find_nvcc():
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders.append("/usr/local/cuda")  # where the toolkit's installer puts it, on no PATH
    return shutil.which("nvcc") or next(filter(None, (shutil.which("nvcc", path=f"{f}/bin") for f in folders)), None)


def architectures():
    """Those that kernels are compiled for."""
    asked = re.split(r"[\s,;]+", os.environ.get("ESFAST_CUDA_ARCHS", "").strip())
    if asked == [""]:
        return ARCHITECTURES
    for name in asked:
        if not re.fullmatch(r"\d{2,3}", name):
            raise SystemExit(
                f"ESFAST_CUDA_ARCHS: expected architectures such as '90' or '80 90', got {' '.join(asked)!r}"
            )
    return tuple(asked)


def build_with_nvcc(target):
    """Compiles and links esfast._cuda. None, or why that was not possible."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc was found when esfast was built"
    try:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        wanted = architectures()
        archs = [a for a in wanted if f"compute_{a}" in known]
        if not archs or (wanted is not ARCHITECTURES and archs != list(wanted)):
            return f"{nvcc} does not know sm_{', sm_'.join(a for a in wanted if a not in archs)}"
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        names = " ".join(f"sm_{a}" for a in archs) + f" and PTX of compute_{archs[-1]}"
        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        command = [
            nvcc,
            *NVCC_FLAGS,
            *codes,
            f'-DESFAST_ARCHITECTURES="{names}"',
            *includes,
            "-shared",
            "-o",
            target,
            *CUDA_SOURCES,
        ]
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
        Pybind11Extension("esfast._cpu", ["csrc/module.cpp"], depends=[*CPU_KERNELS, *HEADERS]),
        Pybind11Extension("esfast._cuda", CUDA_SOURCES, depends=CUDA_HEADERS),
    ],
    cmdclass={"build_ext": Build},
)
