"""Compiles the Triton kernels for an H100 where there is none: `python -m ptx_machine.triton_child [FOLDER ...]`.

Each line of stdin is a launch as JSON: the kernel's name, its arguments, its keyword options, and the folder of kernels (null: esfast.kernels).
Triton specialises the kernel for them just as it does for a GPU, under a driver that has none; nothing is launched. The line
of stdout is the kernel as JSON: PTX, types by argument, threads, and bytes of shared memory.

A process of its own, since elsewhere in the tests kernels are interpreted, and that is decided when Triton is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402


class Driver:
    """What Triton's launch code asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def kernel_of(folder: str | None, kernel: str):
    """A kernel of esfast.kernels, or of a changed copy of it."""
    module = {"add_noise_kernel": "add_noise", "add_low_rank_kernel": "low_rank"}[kernel]
    if folder is None:
        return getattr(importlib.import_module(f"esfast.kernels.{module}"), kernel)
    name = f"kernels_{abs(hash(folder))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, Path(folder) / "__init__.py", submodule_search_locations=[folder]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
    return getattr(importlib.import_module(f"{name}.{module}"), kernel)


def stand_in(argument):
    """A tensor of the dtype and alignment that a list [dtype, aligned] names; numbers as they are."""
    if not isinstance(argument, list):
        return argument
    dtype, aligned = argument
    memory = torch.zeros(4, dtype=getattr(torch, dtype))
    return memory if aligned else memory[1:]


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    for line in sys.stdin:
        request = json.loads(line)
        kernel = kernel_of(request["folder"], request["kernel"])
        arguments = [stand_in(a) for a in request["arguments"]]
        compiled = kernel.run(*arguments, grid=(1,), warmup=True, **request["options"])
        answer = {
            "ptx": compiled.asm["ptx"],
            "types": list(compiled.src.signature.items()),
            "threads": 32 * compiled.metadata.num_warps,
            "shared": compiled.metadata.shared,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
