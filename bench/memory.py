"""Extra memory of add_noise_: growth of the peak resident set, in a process of its own that did nothing before.

It also measures a whole generation, by esfast's modes and by today's way. Linux only, since it reads /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

from ..utils.child import child
from . import BenchmarkError, models, today
from .workload import SIGMA, make_plan, population

STATUS = Path("/proc/self/status")


def measure(
    numel: int, tensors: int, members: int, threads: int, dtype: str, backend: str, kinds: list[str]
) -> dict | None:
    """The largest extra memory, in bytes, of perturbing (from a base and in place) and updating with each kind of
    noise, and the same for today's way; None if it can't be measured."""
    if not STATUS.exists():
        return None
    return in_child(__name__, numel, tensors, members, threads, dtype, backend, *kinds)


def generation_table(modes_result: dict) -> tuple[list[str], list[list[str]]]:
    """Memory of a generation besides bfloat16 weights: for esfast's modes as `esfast bench modes` measured it; for
    today's way computed from the shapes of real models, since it depends on their largest tensor."""
    headers = ["way", "on the device", "in host memory", "measured on a CPU"]
    lines = []
    for r in modes_result["rows"]:
        if r["dtype"] == "bfloat16" and r["pass"] is not None:
            parts = (r["stated"][where] / 2 for where in ("device", "host"))
            measured = r["extra_bytes"] / r["weights_bytes"]
            lines.append([f'weights="{r["mode"]}"', *map(_percent, (*parts, measured))])
    for name in ("Qwen2.5-0.5B", "Qwen2.5-7B"):
        shapes = models.parameters(models.MODELS[name])
        gpu, cpu = (_percent(todays_share(shapes, 2, device)) for device in ("cuda", "cpu"))
        lines.append([f"today's way, {name}", gpu, "none", f"{cpu} (computed)"])
    return headers, lines


def todays_share(shapes: models.Parameters, itemsize: int, device: str) -> float:
    """Memory of today's way besides weights of these shapes, as a fraction of them, while it updates the largest
    tensor: the sum in float32, a member's noise in the weights' dtype, and on a CPU the float32 copy of that noise that
    PyTorch makes before it adds."""
    converted = 4 if device == "cpu" and itemsize < 4 else 0
    return (4 + itemsize + converted) / itemsize * max(map(math.prod, shapes.values())) / models.numel(shapes)


def _percent(share: float) -> str:
    return f"{share:.0%}" if round(100 * share) else "none"


def in_child(module: str, *arguments) -> dict:
    """The JSON that `main` of a module prints in a new process."""
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
    """Runs in the process: prints one line of JSON."""
    import torch

    from ..core.ops import add_noise_, get_backend

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
    # Load the extension first, so that its code does not count as memory of the operation.
    get_backend(a.backend, plan.device)
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
