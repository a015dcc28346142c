"""`esfast bench modes`: time and memory of the weight modes, and whether the memory is what they state (`cost`).

In one process, each round runs every mode in turn: members one after another, a restore, an update. Memory is the
growth of the peak resident set (on a GPU, of the peak of allocated memory) from a plan of weights to two generations of
ES on them, in a process of its own. A row fails if it differs from the statement by more than 2 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from statistics import median

import torch

from ..core.kinds import ELEMENTWISE
from ..core.plan import Plan
from ..es.weights import MODES, Cost
from ..update.updater import Rule, UpdateRecord
from . import add_choices, count, memory
from .noise import milliseconds, note, threads
from .workload import SIGMA, make_plan, population

OPS = ("member", "restore", "update")
# Largest difference from the stated memory, as a fraction of it, or of the weights if the stated memory is 0.
TOLERANCE = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the weights are (default: cpu)")
    parser.add_argument("--numel", type=count, default=100_000_000, help="weights in all, about (default: 1e8)")
    parser.add_argument("--tensors", type=count, default=30, help="tensors they are in (default: 30)")
    parser.add_argument("--members", type=count, default=30, help="members of the update (default: 30)")
    add_choices(parser, "--dtypes", ("bfloat16", "float16", "float32"), "of the weights (default: all)")
    add_choices(parser, "--noise", ELEMENTWISE, "kinds of noise (default: both)")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads(), help="of all modes")
    parser.add_argument("--repeats", type=count, default=5, help="rounds (default: 5)")


def run(args: argparse.Namespace) -> dict:
    rows = []
    for dtype in args.dtypes:
        note(f"{dtype}: memory")
        found = {mode: measure(mode, dtype, args) for mode in MODES}
        with threads(args.threads):
            rows += _times(dtype, found, args)
    return {"rows": rows}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = [
        "weights=",
        "dtype",
        "noise",
        *(f"{op}, {what}" for op in OPS for what in ("bytes", "ms")),
        "update / base's",
        "extra memory stated",
        "measured",
        "",
    ]
    lines = []
    for r in result["rows"]:
        cells = [x for op in OPS for x in (str(r["stated"][op]), _ms(r["ms"][op]))]
        lines.append(
            [
                r["mode"],
                r["dtype"],
                r["noise"],
                *cells,
                f"{r['update_ratio_to_base']:.2f}",
                *_memory(r),
                {None: "", True: "pass", False: "FAIL"}[r["pass"]],
            ]
        )
    return headers, lines


def memory_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """The stated and the measured memory: one line for each mode and dtype."""
    headers = [
        "weights=",
        "dtype",
        "extra memory on the device",
        "in host memory",
        "both, measured on a CPU",
        "a member, bytes a weight",
        "restoring",
        "an update",
    ]
    lines = []
    for r in result["rows"]:
        if r["pass"] is not None:
            size = getattr(torch, r["dtype"]).itemsize
            stated = Cost(**r["stated"])
            lines.append(
                [
                    r["mode"],
                    r["dtype"],
                    *(f"{n / size:.3g}x" if n else "none" for n in (stated.device, stated.host)),
                    _memory(r)[1],
                    *(str(n) for n in (stated.member, stated.restore, stated.update)),
                ]
            )
    return headers, lines


def time_table(result: dict) -> tuple[list[str], list[list[str]]]:
    members = result["rows"][0]["members"]
    headers = [
        "weights=",
        "dtype",
        "noise",
        "a member, ms",
        "restoring, ms",
        f"update of {members} members, ms",
        "update / base's",
        "bytes / base's",
    ]
    lines = []
    for r in result["rows"]:
        ratio = r["stated"]["update"] / MODES["base"].cost(getattr(torch, r["dtype"])).update
        lines.append(
            [
                r["mode"],
                r["dtype"],
                r["noise"],
                *(_ms(r["ms"][op]) for op in OPS),
                f"{r['update_ratio_to_base']:.2f}",
                f"{ratio:.2f}",
            ]
        )
    return headers, lines


def _memory(row: dict) -> tuple[str, str]:
    size = row["weights_bytes"]
    stated, found = row["extra_stated_bytes"], row["extra_bytes"]
    return f"{stated / size:.2f}x", "" if found is None else f"{found / size:.3f}x"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def measure(mode: str, dtype: str, args: argparse.Namespace) -> int | None:
    """Extra bytes of a mode; None if they can't be measured."""
    if args.device == "cpu" and not memory.STATUS.exists():
        return None
    sizes = args.numel, args.tensors, args.members, args.threads
    return memory.in_child(__name__, mode, dtype, args.device, *sizes)["extra_bytes"]


def main() -> None:
    """Runs in the process that is measured: prints one line of JSON."""
    mode, dtype, device, *numbers = sys.argv[1:]
    numel, tensors, members, used = map(int, numbers)
    torch.set_num_threads(used)
    small, plan = (make_plan(n, tensors, getattr(torch, dtype), device) for n in (10_000, numel))
    # A first run on few weights starts threads and loads code, which are no memory of the mode.
    _two_generations(mode, small, members)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _two_generations(mode, plan, members)
        extra = torch.cuda.max_memory_allocated() - before
    else:
        extra = memory.growth(lambda: _two_generations(mode, plan, members))
    print(json.dumps({"extra_bytes": extra}))


def _two_generations(mode: str, plan: Plan, members: int) -> None:
    weights, record = MODES[mode](plan, Rule()), _generation(members)
    for _ in range(2):
        for seed in record.seeds[:3]:
            weights.perturb(seed, SIGMA)
        weights.restore()
        weights.update(record)


def _generation(members: int) -> UpdateRecord:
    seeds, coeffs = population(members)
    return UpdateRecord(0, seeds, coeffs, [], SIGMA, lr=5e-4)


def _times(dtype: str, extra: dict[str, int | None], args: argparse.Namespace) -> Iterator[dict]:
    plan = make_plan(args.numel, args.tensors, getattr(torch, dtype), args.device)
    record = _generation(args.members)
    for kind in args.noise:
        note(f"{dtype}, {kind}: time")
        modes = {name: mode(plan, Rule(kind)) for name, mode in MODES.items()}
        times: dict = {name: {op: [] for op in OPS} for name in MODES}
        for _ in range(args.repeats):
            for name, mode in modes.items():
                mode.restore()
                # Put a first member in place: all others are reached from the one before.
                mode.perturb(record.seeds[0], SIGMA)
                times[name]["member"].append(milliseconds(lambda mode=mode: mode.perturb(record.seeds[-1], SIGMA)))
                times[name]["restore"].append(milliseconds(mode.restore))
                times[name]["update"].append(milliseconds(lambda mode=mode: mode.update(record)))
        for name, mode in modes.items():
            stated = mode.cost(getattr(torch, dtype))
            ratios = [a / b for a, b in zip(times[name]["update"], times["base"]["update"], strict=True)]
            # On a CPU host memory is the device's, so the measurement includes it.
            elsewhere = 0 if args.device == "cuda" else stated.host
            wanted = (stated.device + elsewhere) * plan.numel
            found = extra[name] if kind == args.noise[0] else None
            yield {
                "mode": name,
                "dtype": dtype,
                "noise": kind,
                "device": args.device,
                "threads": args.threads,
                "numel": plan.numel,
                "tensors": len(plan),
                "members": args.members,
                "repeats": args.repeats,
                "stated": stated._asdict(),
                "ms": {op: median(t) for op, t in times[name].items()},
                "gbytes_per_s": {
                    op: getattr(stated, op) * plan.numel / median(t) / 1e6 for op, t in times[name].items()
                },
                "update_ratio_to_base": median(ratios),
                "weights_bytes": plan.nbytes,
                "extra_stated_bytes": wanted,
                "extra_bytes": found,
                "pass": None if found is None else abs(found - wanted) <= TOLERANCE * (wanted or plan.nbytes),
            }
        del modes, mode
