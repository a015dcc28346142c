"""esfast info: versions, devices, backends."""

from __future__ import annotations

import argparse
import platform

import torch
import transformers

from .. import NOISE_VERSION, __version__
from ..core.backends import cuda as cuda_backend
from ..core.ops import auto_backend, backend_report, instruction_set


def run(args: argparse.Namespace) -> None:
    print(f"esfast {__version__}, noise version {NOISE_VERSION}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    try:
        from .. import _cpu

        openmp = "OpenMP" if _cpu.OPENMP else "no OpenMP: one thread"
        sets = _cpu.instruction_sets()
        uses = f"uses {instruction_set(sets)} (has {', '.join(sets)}), {torch.get_num_threads()} threads"
        print(f"cpu extension: {uses}, {openmp}")
    except ImportError:
        print("cpu extension: not built")
    print(f"cuda extension: {cuda_backend.build()}")
    print(
        "on GPUs auto takes cuda before triton: on an H200 updates were faster and the rest alike (docs/how-to/gpus.md)"
    )
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device != "cpu" else platform.processor() or platform.machine()
        print(f'{device} ({name}): backend="auto" takes {auto_backend(torch.device(device))!r}')
        for backend, state in backend_report(device).items():
            print(f"  {backend:<10} {state}")
