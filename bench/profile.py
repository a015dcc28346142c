"""`esfast bench profile`: the GPU's own counters for each kernel, read by Nsight Compute (ncu).

Besides the time they give the fractions of the memory's and the schedulers' peak, and instructions and cycles per
weight, which `esfast bench sass` and `cycles` predict from the machine code. ncu runs a kernel several times, each time
from the same memory, at the clocks of a GPU that does nothing else. For speeds use `esfast bench gpu`.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ..core.kinds import ELEMENTWISE
from ..core.ops import add_noise_, backend_report
from ..utils.child import child
from . import BenchmarkError, add_choices, add_dtypes, count
from .clocks import Clocks
from .noise import note
from .workload import SIGMA, make_plan, population

Table = tuple[list[str], list[list[str]]]
LAUNCHES = ("restore", "perturb", "update")
MEMBERS = 30
# key of a row: ncu's name
METRICS = {
    "ns": "gpu__time_duration.sum",
    "memory_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "cycles": "smsp__cycles_active.avg",
    "bytes_read": "dram__bytes_read.sum",
    "bytes_written": "dram__bytes_write.sum",
    "registers": "launch__registers_per_thread",
}
SCHEDULERS_PER_SM = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="where the weights are; on a cpu the kernels run and nothing is read (default: cuda)",
    )
    parser.add_argument("--numel", type=count, default=2**28, help="weights of each launch (default: 2**28)")
    add_dtypes(parser)
    add_choices(parser, "--noise", ELEMENTWISE, "kinds of noise (default: both)")
    parser.add_argument("--seconds", type=float, default=240.0, help="for each backend, at most (default: 240)")


def run(args: argparse.Namespace) -> dict:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: PyTorch finds no CUDA device here")
    rows, left_out = [], []
    backends = ("cuda", "triton") if args.device == "cuda" else ("cpu",)
    report, deadline = backend_report(args.device), time.monotonic() + args.seconds
    with Clocks(args.device) as clocks:
        for i, backend in enumerate(backends):
            began = time.time()
            seconds = (deadline - time.monotonic()) / (len(backends) - i)
            try:
                if report[backend] != "ready":
                    raise BenchmarkError(f"not ready: {report[backend]}")
                note(f"{backend}: {len(cases(args.dtypes, args.noise))} launches")
                found = _profiled(backend, args, seconds)
            except (BenchmarkError, OSError, subprocess.SubprocessError) as error:
                left_out.append({"backend": backend, "reason": str(error)[:500], "failed": args.device == "cuda"})
                found = []
            rows += [row | clocks.between(began, time.time()) for row in found]
            args.save({"rows": rows, "left_out": left_out})
    return {"rows": rows, "left_out": left_out}


def table(result: dict) -> Table:
    headers = [
        "backend",
        "kernel",
        "noise",
        "dtype",
        "us",
        "of the memory's peak",
        "issue slots used",
        "warps",
        "instructions per weight",
        "cycles per weight",
        "bytes per weight",
        "registers",
    ]
    lines = [
        [
            r["backend"],
            r["kernel"],
            r["noise"],
            r["dtype"],
            _number(r["ns"], 1e-3, "{:.0f}"),
            *(_number(r[k], 1, "{:.0f}%") for k in ("memory_percent", "issue_percent", "warps_percent")),
            *(_number(r[k], 1, "{:.2f}") for k in ("instructions_per_weight", "cycles_per_weight", "bytes_per_weight")),
            _number(r["registers"], 1, "{:.0f}"),
        ]
        for r in result["rows"]
    ]
    for r in result["left_out"]:
        lines.append([r["backend"], f"left out: {r['reason']}", *[""] * 10])
    return headers, lines


def _number(value: float | None, factor: float, form: str) -> str:
    return "?" if value is None else form.format(value * factor)


def cases(dtypes: list[str], kinds: list[str]) -> list[tuple[str, str, str]]:
    """(dtype, kind, launch), in the order in which they are launched; restoring draws no noise."""
    return [
        (dtype, kind, launch)
        for dtype in dtypes
        for kind in kinds
        for launch in LAUNCHES
        if launch != "restore" or kind == kinds[0]
    ]


def launch(backend: str, device: str, numel: int, dtypes: list[str], kinds: list[str]) -> None:
    """Runs in the process that ncu profiles: launches each kernel once."""
    for dtype in dtypes:
        plan = make_plan(numel, 2, getattr(torch, dtype), device)
        base = plan.clone()
        for _, kind, what in cases([dtype], kinds):
            members = {"restore": ([], []), "perturb": ([7], [SIGMA]), "update": population(MEMBERS)}[what]
            add_noise_(plan, *members, base=None if what == "update" else base, noise=kind, backend=backend)
    if device == "cuda":
        torch.cuda.synchronize()


def _profiled(backend: str, args: argparse.Namespace, seconds: float) -> list[dict]:
    code = (
        f"from esfast.bench.profile import launch; launch({backend!r}, {args.device!r}, {args.numel}, "
        f"{args.dtypes!r}, {args.noise!r})"
    )
    ncu = shutil.which("ncu", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    if args.device == "cpu":
        subprocess.run(child(code), check=True, timeout=seconds)
        raise BenchmarkError("a CPU has no counters that ncu reads")
    if ncu is None:
        raise BenchmarkError("there is no ncu")
    with tempfile.TemporaryDirectory(prefix="esfast-profile-") as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            ncu,
            "--csv",
            "--page",
            "raw",
            "--log-file",
            str(log),
            "--clock-control",
            "none",
            "--kernel-name",
            r"regex:add_noise_kernel|copy_tiles",
            "--metrics",
            ",".join(METRICS.values()),
            *child(code),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 10))
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if done.returncode:
            raise BenchmarkError(f"ncu ended with status {done.returncode}: {(done.stderr + text).strip()[-400:]}")
    return rows_of(text, backend, args)


def rows_of(text: str, backend: str, args: argparse.Namespace) -> list[dict]:
    """Rows from ncu's CSV: a line of names, one of units, one for each kernel."""
    launches = list(_launches(text))
    wanted = cases(args.dtypes, args.noise)
    if len(launches) != len(wanted):
        raise BenchmarkError(f"ncu saw {len(launches)} launches of our kernels, and not {len(wanted)}")
    rows = []
    for (dtype, kind, what), found in zip(wanted, launches, strict=True):
        row = {
            "backend": backend,
            "kernel": what,
            "noise": "none" if what == "restore" else kind,
            "dtype": dtype,
            "numel": args.numel,
            "members": {"restore": 0, "perturb": 1}.get(what, MEMBERS),
            **found,
        }
        weights = args.numel * max(1, row["members"])
        moved = [row["bytes_read"], row["bytes_written"]]
        row["instructions_per_weight"] = row["instructions"] and row["instructions"] * 32 / weights
        # Cycles of a scheduler, times the number of schedulers of the GPU. In a cycle each issues one instruction for a
        # warp, which is 32 weights.
        schedulers = SCHEDULERS_PER_SM * _multiprocessors()
        row["cycles_per_weight"] = row["cycles"] and row["cycles"] * schedulers * 32 / weights
        row["bytes_per_weight"] = None if None in moved else sum(moved) / args.numel
        rows.append(row)
    return rows


def _multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132


def _launches(text: str) -> Iterator[dict[str, float | None]]:
    lines = [line for line in text.splitlines() if line.startswith('"')]
    units: dict | None = None
    for line in csv.DictReader(lines):
        # The first line has the units.
        if not line.get("ID"):
            units = line
            continue
        yield {key: _metric(line.get(name), (units or {}).get(name)) for key, name in METRICS.items()}


_SCALE = {
    "usecond": 1e3,
    "us": 1e3,
    "msecond": 1e6,
    "ms": 1e6,
    "second": 1e9,
    "s": 1e9,
    "Kbyte": 1e3,
    "Mbyte": 1e6,
    "Gbyte": 1e9,
}


def _metric(value: str | None, unit: str | None) -> float | None:
    """A number, in ns or bytes if it has such a unit; None if ncu could not read it."""
    try:
        return float((value or "").replace(",", "")) * _SCALE.get((unit or "").strip(), 1.0)
    except ValueError:
        return None
