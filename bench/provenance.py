"""Where a figure comes from: hardware, versions, commit, date and command."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from .. import NOISE_VERSION, __version__
from ..core.ops import instruction_set
from . import BenchmarkError

# The files that decide a figure; only changes of these make a commit "changed". Results and README are written after
# measuring, so they do not count.
SOURCES = ("esfast", "csrc", "kernels", "bench/*.py", "setup.py", "pyproject.toml")


def provenance(name: str, argv: list[str]) -> dict:
    """Provenance of a run of `esfast bench NAME ARGV...`; None for what can't be known here."""
    commit, dirty = git_state()
    return {
        "hardware": {
            "cpu": cpu_model(),
            "cores": usable_cores(),
            "memory_gib": memory_gib(),
            **_gpu(),
        },
        "versions": {
            "esfast": __version__,
            "noise": NOISE_VERSION,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            **_extension(),
        },
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*_environment(), "esfast", "bench", name, *_without_files(argv)]),
    }


def caption(result: dict) -> str:
    """One line of Markdown that says where a result comes from."""
    p = result["provenance"]
    h, v = p["hardware"], p["versions"]
    cores = f"{h['cores']} core" + "s" * (h["cores"] != 1)
    machine = [h["cpu"], cores, f"{h['memory_gib']} GiB" if h["memory_gib"] else None, v["instruction_set"]]
    versions = [f"esfast {v['esfast']}", f"PyTorch {v['torch']}", f"Python {v['python']}"]
    if h["gpu"]:
        machine = [h["gpu"], f"{h['gpu_memory_gib']} GiB", *machine]
        named = {"Triton": v["triton"], "CUDA": v["cuda"], "driver": v["driver"]}
        versions += [f"{name} {version}" for name, version in named.items() if version]
    versions += [v["compiler"]] * bool(v["compiler"])
    commit = f"commit {p['commit'][:10]}{' with changes' * bool(p['dirty'])}" if p["commit"] else "commit unknown"
    if result.get("unfinished"):
        commit += ", stopped before its end"
    parts = [", ".join(filter(None, machine)), ", ".join(versions), commit, p["date"][:10], f"`{p['command']}`"]
    return "; ".join(parts) + "."


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, ValueError, OSError):
        return None


def _gpu() -> dict:
    """The GPU that torch uses unless told otherwise."""
    if not torch.cuda.is_available():
        return {"gpu": None, "gpu_memory_gib": None}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"gpu": found.name, "gpu_memory_gib": round(found.total_memory / 2**30)}


def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this code runs from, and whether its sources were changed since. If the checkout was
    copied without its history, ESFAST_COMMIT names the commit, with "+" behind it if there are changes."""
    told = os.environ.get("ESFAST_COMMIT", "").strip()
    if told:
        if not re.fullmatch(r"[0-9a-f]{7,40}\+?", told):
            raise BenchmarkError(
                f"ESFAST_COMMIT: expected a commit's hex digits, and + if there are changes, got {told!r}"
            )
        return told.rstrip("+"), told.endswith("+")
    here = Path(__file__).resolve()
    try:
        if here.parent.name != "bench" or not _git(here.parent, "ls-files", here.name):
            # This is an installed copy, possibly inside somebody else's repository.
            return None, None
        top = _git(here.parent, "rev-parse", "--show-toplevel")
        return _git(top, "rev-parse", "HEAD"), bool(_git(top, "status", "--porcelain", "--", *SOURCES))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(folder: str | Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def _extension() -> dict:
    try:
        from .. import _cpu
    except ImportError:
        return {"compiler": None, "instruction_set": None}
    name = _cpu.COMPILER if not _cpu.COMPILER[:1].isdigit() else f"GCC {_cpu.COMPILER}"  # Clang names itself
    return {"compiler": name, "instruction_set": instruction_set(_cpu.instruction_sets())}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _environment() -> list[str]:
    """Environment variables that keep PyTorch, its compiler and the CPU backend from the best instruction set."""
    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    return [f"ATEN_CPU_CAPABILITY={limit}"] if limit else []


def _without_files(argv: list[str]) -> list[str]:
    """The arguments without those that say where to write, which affect no figure."""
    kept, writes = [], False
    for argument in argv:
        if argument.startswith("--"):
            writes = argument.partition("=")[0] in ("--json", "--keep", "--plots")
        if not writes:
            kept.append(argument)
    return kept
