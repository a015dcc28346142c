"""The CUDA kernels' rows of `esfast bench sass`, read from the machine code inside the extension module esfast._cuda.

A perturbation is the shortest path through a kernel for one member that uses its 128-bit loads and stores; an update's
figure is one turn of the loop over members in a kernel for any number.
"""

from __future__ import annotations

import importlib
import re
import struct
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from . import BenchmarkError, sass
from .disassembly import WHOLE, Disassembly, Whole, tool

# SASS instructions per weight (update: per weight and member) that a kernel may take on sm_90.
BUDGETS = {
    ("perturb", "gaussian"): 28.5,
    ("perturb", "rademacher"): 9,
    ("update", "gaussian"): 26,
    ("update", "rademacher"): 4,
    ("perturb", "low_rank"): 12,
    ("update", "low_rank"): 1.7,
}
# In a whole tile a thread stores four factors at once. Threads without weights, and slots without a factor, do less.
LOW_RANK_TILE = Whole((".U16", "STS ["), ("STS.128", "LDS.128"), ("STG.E.128",))
# Factors that one turn of the kernel's loop adds: `Factors` of csrc/cuda_low_rank.cuh.
SLOTS = 4
# Formats and rule in a kernel's mangled name: csrc/cuda_kernel.cu's add_noise_kernel<Src, Src, KIND, RULE>.
_KERNEL = re.compile(r"add_noise_kernelINS_\d+(Float32|BFloat16|Float16)ES2_Lj([016])ELNS_4RuleE([01])E")
_KINDS = {"0": "gaussian", "1": "rademacher", "6": "low_rank"}
_RULES = {"0": "perturb", "1": "update"}


def missing() -> str | None:
    """Why there is no machine code of CUDA kernels to read, or None."""
    try:
        extension = importlib.import_module("esfast._cuda")
    except ImportError as error:
        return f"esfast._cuda is not built ({error})"
    return extension.ABSENT or None


def machine_code(arch: int, wanted: Callable[[str], object] = lambda name: True) -> dict[str, Disassembly]:
    """The functions that the build has for one compute capability, of those whose name is `wanted`: as text all of them
    are 120 MB."""
    extension = Path(importlib.import_module("esfast._cuda").__file__)
    with tempfile.TemporaryDirectory() as folder:
        tool(folder, "cuobjdump", "--extract-elf", f"sm_{arch}", extension)
        cubins = sorted(Path(folder).glob(f"*sm_{arch}*.cubin"))
        if not cubins:
            raise BenchmarkError(f"esfast._cuda has no machine code for sm_{arch}")
        chosen = {c: [str(i) for i, name in _functions(c.read_bytes()).items() if wanted(name)] for c in cubins}
        code = "".join(
            tool(folder, "nvdisasm", "-c", "-hex", "--cuda-function-index", ",".join(numbers), cubin)
            for cubin, numbers in chosen.items()
            if numbers
        )
        usage = "".join(tool(folder, "cuobjdump", "--dump-resource-usage", cubin) for cubin in cubins)
    parts = re.split(r"^\s*\.section\s+\.text\.([^,\s]+),.*$", code, flags=re.MULTILINE)
    return {
        name: Disassembly(text, re.search(rf"{re.escape(name)}:\s*(.*)", usage)[1])
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def _functions(cubin: bytes) -> dict[int, str]:
    """Functions of an ELF file, by their numbers in its table of symbols."""
    start, size, count = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HH", cubin, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, size of an entry
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + size * i) for i in range(count)]
    (symbols,) = (s for s in sections if s[1] == 2)
    names = sections[symbols[6]][4]
    found = {}
    for number in range(symbols[5] // symbols[9]):
        name, kind = struct.unpack_from("<IB", cubin, symbols[4] + symbols[9] * number)
        if kind & 15 == 2:
            found[number] = cubin[names + name : cubin.index(0, names + name)].decode()
    return found


def weights_per_thread(noise: str, kernel: str) -> int:
    """Weights a thread, as Layout in csrc has them."""
    if noise == "low_rank":
        return 128 if kernel == "update" else 64
    return 128 if (noise, kernel) == ("rademacher", "update") else 32


def threads(noise: str, kernel: str) -> int:
    """Threads of a block."""
    extension = importlib.import_module("esfast._cuda")
    tile = extension.MATRIX_TILE**2 if noise == "low_rank" else extension.TILE
    return tile // weights_per_thread(noise, kernel)


def kernels(arch: int, dtypes: Collection[str] = tuple(sass.DTYPES)) -> list[tuple[str, str, str, Disassembly]]:
    """Kernel ("perturb", "update"), noise, dtype and code of the kernels that read and write the same dtype."""
    found = []
    for function, code in machine_code(arch, lambda name: _dtype_of(name) in dtypes).items():
        name = _KERNEL.search(function)
        found.append((_RULES[name[3]], _KINDS[name[2]], _dtype_of(function), code))
    return sorted(found, key=lambda k: (k[1], list(sass.DTYPES).index(k[2]), k[0]))


def _dtype_of(function: str) -> str | None:
    """What a kernel reads and writes, None for a function that is no such kernel."""
    name = _KERNEL.search(function)
    return name[1].lower() if name else None


def rows(arch: int, dtypes: Collection[str] = tuple(sass.DTYPES)) -> list[dict]:
    """Rows like those of sass.run."""
    found = []
    for kernel, noise, dtype, code in kernels(arch, dtypes):
        figures = sass.measure(code, kernel == "update", LOW_RANK_TILE if noise == "low_rank" else WHOLE)
        per_thread = weights_per_thread(noise, kernel)
        turn = SLOTS if noise == "low_rank" else 1
        count = figures.loop / turn if kernel == "update" else figures.path
        found.append(sass.row("cuda", kernel, noise, dtype, arch, count / per_thread, per_thread, figures, BUDGETS))
    return found
