"""Extra memory of add_noise_: growth of the peak resident set, in a process of its own that did nothing before.

Linux only, since it reads /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from ..child import child
from . import BenchmarkError, today
from .workload import SIGMA, make_plan, population

STATUS = Path("/proc/self/status")


def measure(
    numel: int, tensors: int, members: int, threads: int, dtype: str, backend: str, kinds: list[str]
) -> dict | None:
    """Extra bytes of perturbing (from a base and in place) and updating with each kind of noise, the most that any
    takes, and the same of today's way; None where it can't be known."""
    if not STATUS.exists():
        return None
    return in_child(__name__, numel, tensors, members, threads, dtype, backend, *kinds)


def in_child(module: str, *arguments) -> dict:
    """What `main` of a module prints as JSON in a process of its own, which has done nothing before."""
    command = child(f"from {module} import main; main()", *map(str, arguments))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"measuring memory failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def growth(work: Callable[[], None]) -> int:
    """Bytes by which the peak resident set during `work` exceeds the resident set before it.

    Where the peak can't be reset, an earlier one may count: never too little.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """The process: prints one line of JSON."""
    import torch

    from ..ops import add_noise_, get_backend

    parser = argparse.ArgumentParser()
    for name in ("numel", "tensors", "members", "threads"):
        parser.add_argument(name, type=int)
    parser.add_argument("dtype")
    parser.add_argument("backend")
    parser.add_argument("kinds", nargs="+")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    plan = make_plan(a.numel, a.tensors, getattr(torch, a.dtype))
    base = plan.clone()
    get_backend(a.backend, plan.device)  # loads the extension: its code is no memory of the operation
    seeds, coeffs = population(a.members)

    def ours() -> None:
        for kind in a.kinds:
            add_noise_(plan, seeds[:1], [SIGMA], base=base, noise=kind, backend=a.backend)
            add_noise_(plan, seeds[:1], [-SIGMA], noise=kind, backend=a.backend)
            add_noise_(plan, seeds, coeffs, noise=kind, backend=a.backend)

    def todays() -> None:
        for kind in a.kinds:
            today.perturb_(plan.tensors, seeds[0], SIGMA, kind)
            today.update_(plan.tensors, seeds[:2], coeffs[:2], kind)  # more members take no more memory

    print(json.dumps({"weights_bytes": plan.nbytes, "extra_bytes": growth(ours), "today_extra_bytes": growth(todays)}))
