"""Runs esfast's own launch code on the machine: `run(call)` of a backend here does what that of esfast does on a
GPU."""

from __future__ import annotations

import ast
import ctypes
import filecmp
import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from esfast.bench import disassembly
from esfast.core.backends import cuda as cuda_backend
from esfast.core.ops import Call
from esfast.core.segments import BFLOAT16, FLOAT16

from .machine import Compiled, compile_kernel, run
from .memory import GlobalMemory
from .program import kernels_of, parse

ROOT = Path(__file__).parents[2]
Ranges = list[tuple[int, int]]
ONE, ADD, ADAM = range(3)  # csrc/cuda_job.h's Rule
STRUCTS = {0: "Float32", 1: "BFloat16", 2: "Float16", 3: "Split"}  # csrc/dtypes.h, by format


class Job(ctypes.Structure):
    """csrc/cuda_job.h's CudaJob."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("tiles", "extras", "segments", "seeds", "coeffs", "low", "m", "v")),
        *((name, ctypes.c_int32) for name in ("members", "stochastic", "rank")),
        *((name, ctypes.c_float) for name in ("scale", "decay", "one_minus_beta1", "one_minus_beta2", "step", "eps")),
    ]


# ---- what a call may touch ------------------------------------------------------------------------------------------


def bytes_of(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _rows(call: Call, side: str) -> Iterator[tuple[int, int]]:
    """The memory of each row of each segment. What lies between the rows belongs to other tensors."""
    sizes = np.array([4, 2, 2, 2])
    formats = call.table.column("dst_format" if side == "anchor" else f"{side}_format")
    columns = (call.table.column(name) for name in (side, "rows", "cols", f"{side}_stride"))
    for address, rows, cols, stride, size in zip(*columns, sizes[formats], strict=True):
        for row in range(rows if address else 0):
            begin = int(address + row * stride * size)
            yield begin, begin + int(cols * size)


def memory_of(call: Call, launch: Iterable[tuple[int, int]]) -> GlobalMemory:
    """The tensors of a call and, read only, what the launch brings with it."""
    writable = list(_rows(call, "dst"))
    if call.adam is not None:
        writable.append(bytes_of(call.adam.moments))
    readable = [*_rows(call, "src"), *_rows(call, "anchor"), *launch]
    if call.low is not None:
        (writable if call.plan.low is not None else readable).append(bytes_of(call.low))
    return GlobalMemory(readable, writable)


# ---- CUDA: csrc/cuda_kernel.cu by nvcc ------------------------------------------------------------------------------


def nvcc_to_ptx(source: Path, target: Path, includes: Path = ROOT / "csrc") -> str:
    """PTX for an H100, compiled as setup.py compiles."""
    settings = {
        node.targets[0].id: node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign)
    }
    flags = ast.literal_eval(settings["NVCC_FLAGS"])
    command = [
        "nvcc",
        *flags,
        "-arch=sm_90",
        "-ptx",
        f"-I{includes}",
        '-DESFAST_ARCHITECTURES=""',
        source,
        "-o",
        target,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target.read_text()


# Prints what the module esfast._cuda would be made of, as setup.py notes it beside the module that it keeps.
MADE_OF = """
import setuptools
setuptools.setup = lambda ext_modules, **rest: print(made_of_what(ext_modules[1], None))
exec(open("setup.py").read())
"""


def built_ptx() -> str | None:
    """The PTX of all kernels that lies in esfast._cuda, or None where that is not PTX for an H100 that setup.py made of
    the sources as they are now, or where Triton, which brings the tool that reads it, is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    module = Path(importlib.import_module("esfast._cuda").__file__)
    kept = ROOT / "build" / "kept" / module.name
    noted = kept.with_name(f"{kept.name}.made_of")
    if not (noted.exists() and kept.exists() and filecmp.cmp(module, kept, shallow=False)):
        return None
    now = subprocess.run([sys.executable, "-c", MADE_OF], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    # The rest of the note is about compilers and settings, of which the PTX itself tells.
    if ast.literal_eval(now)[0] != ast.literal_eval(noted.read_text())[0]:
        return None
    with tempfile.TemporaryDirectory() as folder:
        text = disassembly.tool(folder, "cuobjdump", "--dump-ptx", module)
    return text if ".target sm_90" in text else None


class CudaPtx:
    """The kernels of a PTX module. `edit` changes the text of each before it is read; `launched`: their names."""

    def __init__(self, text: str, edit: Callable[[str], str] = lambda text: text):
        self.texts, self.edit, self.launched = kernels_of(text), edit, set()
        self.compile = functools.cache(self._compile)
        self.tile = importlib.import_module("esfast._cuda").TILE

    def _compile(self, name: str) -> Compiled:
        return compile_kernel(parse(self.edit(self.texts[name])))

    def find(self, src: int, dst: int, kind: int, rule: int) -> str:
        """The mangled name of add_noise_kernel<Src, Dst, KIND, RULE>."""
        first, second = (f"{len(STRUCTS[f])}{STRUCTS[f]}E" for f in (src, dst))
        second = r"S\d_" if src == dst else rf"NS\d*_{second}"
        pattern = rf"add_noise_kernelINS\d*_{first}{second}Lj{kind}ELNS\d*_4RuleE{rule}E"
        (found,) = (name for name in self.texts if re.search(pattern, name))
        return found

    def run(self, call: Call) -> None:
        launch, copy = functools.partial(self._launch, call), functools.partial(self._copy, call)
        cuda_backend.run_with(call, launch, self.tile, copy)

    def _copy(self, call: Call, *, tiles: int, tile_count: int, size: int) -> None:
        (name,) = (name for name in self.texts if f"copy_tiles_kernelILi{size}E" in name)
        kernel = self.compile(name)
        self.launched.add(name)
        memory = memory_of(call, [(tiles, tiles + 32 * tile_count)])
        run(kernel, tile_count, kernel.kernel.threads, struct.pack("<Q", tiles), memory)

    def _launch(
        self,
        call,
        *,
        tiles,
        extras,
        segments,
        tile_count,
        src_format,
        dst_format,
        seeds,
        coeffs,
        members,
        kind,
        rank,
        scale,
        stochastic,
        decay,
        low,
        moments,
        adam,
    ):
        rounds_stochastically = stochastic and members > 0 and dst_format in (BFLOAT16, FLOAT16)
        rule = ADAM if moments[0] else ONE if members * rank == 1 and not decay and not rounds_stochastically else ADD
        name = self.find(src_format, dst_format, kind, rule)
        kernel = self.compile(name)
        rounding = stochastic and members > 0
        job = Job(tiles, extras, segments, seeds, coeffs, low, *moments, members, rounding, rank, scale, decay, *adam)
        launch = [(tiles, tiles + 32 * tile_count), (seeds, seeds + 8 * members), (coeffs, coeffs + 4 * members)]
        if extras:
            launch.append((extras, extras + 16 * tile_count))
        if segments:
            launch.append((segments, segments + call.table.rows.nbytes))
        self.launched.add(name)
        run(kernel, tile_count, kernel.kernel.threads, bytes(job), memory_of(call, launch))


# ---- Triton: kernels/add_noise.py by Triton, in a process of its own ------------------------------------------------


class TritonCompiler:
    """The process of triton_child.py."""

    def __init__(self):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), *sys.path]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ptx_machine.triton_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def compile(self, folder: Path | None, kernel: str, arguments: list, options: dict) -> dict:
        request = {"folder": folder and str(folder), "kernel": kernel, "arguments": arguments, "options": options}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "Triton could not compile the kernel: see its message in stderr"
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


class TritonPtx:
    """The kernels of esfast.kernels, or of a changed copy in `folder`; `edit` as in CudaPtx, `tile` as in the backend."""

    def __init__(
        self,
        compiler: TritonCompiler,
        folder: Path | None = None,
        edit: Callable[[str], str] = lambda text: text,
        tile: int | None = None,
    ):
        self.compiler, self.folder, self.edit, self.tile = compiler, folder, edit, tile
        self.compile = functools.cache(lambda text: compile_kernel(parse(next(iter(kernels_of(text).values())))))

    def run(self, call: Call) -> None:
        from esfast.core.backends import triton as triton_backend

        self.call = call
        compiled = SimpleNamespace(value=False)  # the launch code asks whether kernels are interpreted
        kernels = {name: _Launcher(self, name) for name in ("add_noise_kernel", "add_low_rank_kernel")}
        with mock.patch.multiple(triton_backend, INTERPRETED=compiled, **kernels):
            triton_backend.run(call, self.tile)

    def launch(self, name: str, grid: int, *arguments, **options) -> None:
        described = [
            [str(a.dtype).removeprefix("torch."), a.data_ptr() % 16 == 0] if isinstance(a, torch.Tensor) else a
            for a in arguments
        ]
        found = self.compiler.compile(self.folder, name, described, options)
        kernel = self.compile(self.edit(found["ptx"]))
        values = [_packed(t, a) for (_, t), a in zip(found["types"], arguments, strict=False) if t != "constexpr"]
        # Triton adds pointers to scratch memory that our kernels do not use: null, and so nothing that could be read.
        values += [bytes(8)] * (len(kernel.kernel.parameters) - len(values))
        packed = bytearray()
        for value, parameter in zip(values, kernel.kernel.parameters, strict=True):
            assert len(value) == parameter.size, f"{parameter.name} has {parameter.size} bytes, not {len(value)}"
            packed += bytes(-len(packed) % parameter.align) + value
        launch = [bytes_of(a) for a in arguments if isinstance(a, torch.Tensor)]
        run(kernel, grid, found["threads"], bytes(packed), memory_of(self.call, launch), found["shared"])


class _Launcher:
    """Stands in for a Triton kernel of esfast.kernels: `kernel[grid](arguments)` interprets the kernel's PTX."""

    def __init__(self, backend: TritonPtx, name: str):
        self.backend, self.name = backend, name

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self.backend.launch, self.name, grid[0])


def _packed(kind: str, value) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr())
    return struct.pack({"fp32": "<f", "i32": "<i", "i64": "<q", "u64": "<Q"}[kind], value)


# ---- what is missing ------------------------------------------------------------------------------------------------


def why_no_nvcc() -> str | None:
    return None if shutil.which("nvcc") else "nvcc is not on the PATH: there is no PTX of the CUDA kernels"
