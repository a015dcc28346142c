"""setup.py: which architectures it asks nvcc for, and when it does not build again."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-arch ]; then printf 'compute_%s\\n' 80 89 90 100; exit; fi
echo "$@" >>LOG
sleep ${NVCC_SECONDS:-0}
while [ "$1" != -o ]; do shift; done
echo made >"$2"
"""
# setup.py without the C++ extension, which takes a minute
CODE = """
import setuptools, sys
sys.argv = ['setup.py', 'build_ext', '--build-lib', 'lib', '--parallel', '2']
original = setuptools.setup
setuptools.setup = lambda ext_modules, **rest: original(ext_modules=ext_modules[1:], **rest)
exec(open('setup.py').read())
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(archs): the commands that nvcc was given in one more build in the same folder, and what was printed."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    log, nvcc = tmp_path / "log", tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.replace("LOG", str(log)))
    nvcc.chmod(0o755)
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists())

    def start(archs=None, seconds=0):
        # Where nvcc is of no use, a module in C++ takes its place; compiling that is left to test_cuda.py.
        compilers = {"CC": "true", "CXX": "true"}
        environment = {**os.environ, "PATH": path, "CUDA_HOME": str(tmp_path / "cuda"), **compilers}
        environment.pop("ESFAST_CUDA_ARCHS", None)
        environment |= {"NVCC_SECONDS": str(seconds)} | ({} if archs is None else {"ESFAST_CUDA_ARCHS": archs})
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, "-c", CODE], cwd=tmp_path, env=environment, **pipes)

    def run(archs=None, status=0):
        log.write_text("")
        process = start(archs)
        said, _ = process.communicate()
        assert (process.returncode == 0) == (status == 0), said
        return log.read_text().splitlines(), said

    run.folder, run.start, run.log = tmp_path, start, log
    return run


def codes(command):
    return re.findall(r",code=(\w+)", command)


def test_architectures_by_environment_and_nothing_built_twice(build):
    (command,), _ = build("90")
    assert codes(command) == ["sm_90", "compute_90"] and "sm_90 and PTX of compute_90" in command
    for source in (build.folder / "csrc").iterdir():  # as where a tree is copied
        os.utime(source)
    assert build("90")[0] == []
    # as pip does, which builds in a folder of its own
    shutil.rmtree(build.folder / "lib")
    (kept,) = (build.folder / "build" / "kept").glob("*.so")
    os.utime(kept, (0, 0))
    assert build("90")[0] == []
    (module,) = (build.folder / "lib" / "esfast").iterdir()
    # an old copy would not replace a module of other sources that was installed since
    assert module.read_text() == "made\n" and module.stat().st_mtime > 0
    (build.folder / "csrc" / "noise.h").write_text("// other\n")
    assert len(build("90")[0]) == 1
    (command,), _ = build("80, 90")
    assert codes(command) == ["sm_80", "sm_90", "compute_90"]
    (command,), _ = build()
    assert codes(command) == ["sm_80", "sm_89", "sm_90", "sm_100", "compute_100"]


@pytest.mark.skipif(sys.platform == "win32", reason="builds wait for each other with flock, which Windows lacks")
def test_two_builds_side_by_side_compile_once(build):
    processes = [build.start("90", seconds=3) for _ in range(2)]
    assert [process.communicate() and process.returncode for process in processes] == [0, 0]
    assert len(build.log.read_text().splitlines()) == 1
    assert [module.read_text() for module in (build.folder / "lib" / "esfast").iterdir()] == ["made\n"]


def test_architectures_that_are_none(build):
    commands, said = build("sm_90", status=1)
    assert commands == [] and "ESFAST_CUDA_ARCHS: expected architectures such as '90'" in said
    commands, said = build("90 777")
    assert commands == [] and "does not know sm_777" in said


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ for x86_64")
def test_kernels_for_several_instruction_sets_are_linked_where_all_are_compiled_for_this_processor(tmp_path):
    """As with CFLAGS=-march=native."""
    native, objects = ["-O0", "-std=c++17", "-fPIC", "-mavx512f"], []
    for name in ("baseline", "avx2", "avx512"):
        objects.append(tmp_path / f"{name}.o")
        source = ROOT / "csrc" / "cpu_products.cpp"
        subprocess.run(["g++", *native, f"-DESFAST_ISA={name}", "-c", source, "-o", objects[-1]], check=True)
    subprocess.run(["g++", "-shared", *objects, "-o", tmp_path / "kernels.so"], check=True)
    assert "products_avx512" in subprocess.run(["nm", objects[-1]], check=True, capture_output=True, text=True).stdout
