"""`esfast bench noise`: add_noise_ against what ES code does today (today.py), against the strongest that anyone writes
in an afternoon (afternoon.py), and a plain memory copy, side by side.

First the backend is compared with the reference; if a bit differs, nothing is timed. Then, in one process, each round
runs all contenders one after the other, so that a busy machine slows all. The strongest is chosen for each row: the one
with the smallest median. The environment variable ATEN_CPU_CAPABILITY=avx2 keeps all of them from AVX-512: our backend,
PyTorch's kernels, and the vectors of torch.compile (but not the rest of its code, which g++ compiles).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

from ..core.kinds import KINDS
from ..core.ops import add_noise_, auto_backend
from ..core.plan import Plan
from . import BenchmarkError, add_choices, add_dtypes, afternoon, count, memory, today
from .rivals import copy_each
from .workload import SIGMA, make_plan, population, verify, verify_ends

Table = tuple[list[str], list[list[str]]]

LABELS = {
    "perturb_base": "perturb from a base",  # one pass, dst = round(base + sigma noise); today's: one pass in place
    "perturb_restore_base": "perturb + restore from a base",  # and a copy; today's: + and - sigma noise, in place; the
    # strongest: + sigma noise in place, and a copy
    "perturb_restore": "perturb + restore in place",  # + and - sigma noise, two passes, neither of them exact
    "update": "update",  # one pass with all members, in place
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the weights are (default: cpu)")
    parser.add_argument("--backend", default="auto", help="backend that is measured (default: what auto takes there)")
    parser.add_argument("--numel", type=count, default=50_000_000, help="weights in all, about (default: 5e7)")
    parser.add_argument("--tensors", type=count, default=30, help="tensors they are in (default: 30)")
    parser.add_argument("--members", type=count, default=30, help="members of the update (default: 30)")
    add_dtypes(parser)
    add_choices(parser, "--noise", KINDS, "kinds of noise (default: all; low_rank is of rank 1)")
    parser.add_argument(
        "--threads",
        type=count,
        default=torch.get_num_threads(),
        help="threads of all contenders (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=count, default=7, help="rounds of each row (default: 7)")
    parser.add_argument(
        "--today-seconds",
        type=float,
        default=20.0,
        help="today's way, and each of an afternoon's, is left out of later rounds of a row once it "
        "took so long (default: 20); each row says how often it ran",
    )


def run(args: argparse.Namespace) -> dict:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: PyTorch finds no CUDA device here")
    if args.backend == "auto":
        args.backend = auto_backend(torch.device(args.device))
    with threads(args.threads):
        for dtype in args.dtypes:
            for kind in args.noise:
                note(f"checking to the bit: {dtype}, {kind}")
                verify(args.backend, getattr(torch, dtype), kind, args.members, args.device)
        rows = [row for dtype in args.dtypes for row in _rows_of_dtype(args, dtype)]
    return {"rows": rows}


def table(result: dict) -> Table:
    headers = [
        "operation",
        "noise",
        "dtype",
        "esfast, ms",
        "today, ms",
        "times as fast as today",
        "strongest, ms",
        "which",
        "times as fast as the strongest",
        "of copy's speed",
    ]
    lines = []
    for r in result["rows"]:
        if r["op"] == "memory":
            cells = (
                ["?", "?"]
                if r["extra_bytes"] is None
                else [f"{r['share_of_weights']:.2%}", f"{r['today_share_of_weights']:.2%}"]
            )
            lines.append(["extra memory of a call, of the weights", r["noise"], r["dtype"], *cells, *[""] * 5])
            continue
        strongest = (
            ["", "", ""]
            if r["strongest"] is None
            else [
                _ms(r["strongest_ms_median"]) + _fewer(r, "strongest"),
                r["strongest"],
                f"{r['ratio_to_strongest']:.1f}",
            ]
        )
        lines.append(
            [
                _label(r),
                r["noise"],
                r["dtype"],
                _ms(r["ms_median"]),
                _ms(r["today_ms_median"]) + _fewer(r, "today"),
                f"{r['ratio_to_today']:.1f}",
                *strongest,
                f"{r['share_of_copy']:.1%}",
            ]
        )
    return headers, lines


def summary(*results: dict) -> Table:
    """The short table: bfloat16 weights, from a base; the instruction sets side by side."""
    kept = ("perturb_base", "perturb_restore_base", "update")
    headers, lines = ["operation", "noise"], []
    for number, result in enumerate(results):
        used = result["provenance"]["versions"]["instruction_set"]
        headers += [f"{used}: esfast, ms", "times as fast as today", "as the strongest"]
        rows = [r for r in result["rows"] if r["dtype"] == "bfloat16" and r["op"] in kept]
        lines = lines if number else [[_label(r), r["noise"]] for r in rows]
        for line, r in zip(lines, rows, strict=True):
            line += [_ms(r["ms_median"]), f"{r['ratio_to_today']:.1f}", f"{r['ratio_to_strongest']:.1f}"]
    return headers, lines


def kinds_table(result: dict) -> Table:
    """The kinds of noise side by side, for bfloat16 weights: a member from a base, and an update."""
    rows = [r for r in result["rows"] if r["dtype"] == "bfloat16" and r["op"] in ("perturb_base", "update")]
    found = {(r["op"], r["noise"]): r for r in rows}
    kinds = [r["noise"] for r in rows if r["op"] == "update"]
    members = found["update", kinds[0]]["members"]
    headers = ["noise", "perturb, ms", "of copy's speed", f"update, {members} members, ms"]
    headers += ["times as fast as gaussian", "times as fast as today", "as the strongest"]
    lines = []
    for kind in kinds:
        perturb, update = (found[op, kind] for op in ("perturb_base", "update"))
        lines.append(
            [
                kind,
                _ms(perturb["ms_median"]),
                f"{perturb['share_of_copy']:.1%}",
                _ms(update["ms_median"]),
                f"{found['update', 'gaussian']['ms_median'] / update['ms_median']:.1f}",
                f"{update['ratio_to_today']:.1f}",
                f"{update['ratio_to_strongest']:.1f}",
            ]
        )
    return headers, lines


def _label(row: dict) -> str:
    return LABELS[row["op"]] + (f", {row['members']} members" if row["op"] == "update" else "")


def _fewer(row: dict, whose: str) -> str:
    """The number of rounds, if a contender ran fewer than ours."""
    return f" ({row[f'{whose}_repeats']}x)" if row[f"{whose}_repeats"] < row["repeats"] else ""


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Case:
    """One row: what is run, and how it is counted."""

    op: str
    members: int
    # random numbers that esfast draws for each weight
    draws: int
    # how often esfast reads and writes each weight
    passes: int
    ours: Callable[[], None]
    todays: Callable[[], None]
    afternoons: Callable[[afternoon.Way], None]


def _rows_of_dtype(args: argparse.Namespace, dtype: str) -> Iterator[dict]:
    plan = make_plan(args.numel, args.tensors, getattr(torch, dtype), args.device)
    base = plan.clone()
    for kind in args.noise:
        note(f"{dtype}, {kind}: compiling")
        ways = afternoon.ways(kind) if args.device == "cpu" else {}
        for way in ways.values():
            _warm(way, plan, base)
        for case in _cases(plan, base, kind, args):
            note(f"{dtype}, {kind}: {LABELS[case.op]}")
            verify_ends(plan, base, 12345, kind, args.backend)
            yield {
                "op": case.op,
                "noise": kind,
                "dtype": dtype,
                "backend": args.backend,
                "device": args.device,
                "threads": args.threads,
                "numel": plan.numel,
                "tensors": len(plan),
                "members": case.members,
                "draws": case.draws,
                "passes": case.passes,
                **_time(case, plan, base, ways, args),
            }
    note(f"{dtype}: memory")
    yield _memory_row(args, dtype)


def _cases(plan: Plan, base: Plan, kind: str, args: argparse.Namespace) -> list[Case]:
    tensors, k, (seeds, coeffs) = plan.tensors, args.members, population(args.members)

    def ours(seeds: list[int], coeffs: list[float], base: Plan | None = None) -> None:
        add_noise_(plan, seeds, coeffs, base=base, noise=kind, backend=args.backend)

    def pair_from_base() -> None:
        ours([1], [SIGMA], base)
        ours([], [], base)

    def pair_in_place() -> None:
        ours([1], [SIGMA])
        ours([1], [-SIGMA])

    def todays_pair() -> None:
        today.perturb_(tensors, 1, SIGMA, kind)
        today.perturb_(tensors, 1, -SIGMA, kind)

    def afternoons_pair(way: afternoon.Way) -> None:
        way.perturb_(tensors, 1, SIGMA)
        copy_each(tensors, base.tensors)

    def afternoons_pair_in_place(way: afternoon.Way) -> None:
        way.perturb_(tensors, 1, SIGMA)
        way.perturb_(tensors, 1, -SIGMA)

    return [
        Case(
            "perturb_base",
            1,
            1,
            1,
            lambda: ours([1], [SIGMA], base),
            lambda: today.perturb_(tensors, 1, SIGMA, kind),
            lambda way: way.perturb_(tensors, 1, SIGMA, base.tensors),
        ),
        Case("perturb_restore_base", 1, 1, 2, pair_from_base, todays_pair, afternoons_pair),
        Case("perturb_restore", 1, 2, 2, pair_in_place, todays_pair, afternoons_pair_in_place),
        Case(
            "update",
            k,
            k,
            1,
            lambda: ours(seeds, coeffs),
            lambda: today.update_(tensors, seeds, coeffs, kind),
            lambda way: way.update_(tensors, seeds, coeffs),
        ),
    ]


def _warm(way: afternoon.Way, plan: Plan, base: Plan) -> None:
    """Compiles by running on the largest tensor and on the last, which is small."""
    for i in (max(range(len(plan)), key=lambda i: plan.tensors[i].numel()), -1):
        tensors, source = [plan.tensors[i]], [base.tensors[i]]
        way.perturb_(tensors, 1, SIGMA, source)
        way.perturb_(tensors, 1, SIGMA)
        way.update_(tensors, [1, 2], [SIGMA, SIGMA])


def _time(case: Case, plan: Plan, base: Plan, ways: dict[str, afternoon.Way], args: argparse.Namespace) -> dict:
    def copy() -> None:
        copy_each(plan.tensors, base.tensors)

    copy()
    # Start PyTorch's threads before anything is timed.
    today.perturb_(plan.tensors[-1:], 1, SIGMA, "gaussian")
    copied, our, todays = [], [], []
    afternoons: dict[str, list[float]] = {name: [] for name in ways}
    budget = 1000 * args.today_seconds
    for _ in range(args.repeats):
        # The copy also undoes what the round before did to the weights.
        copied.append(milliseconds(copy))
        our.append(milliseconds(case.ours))
        if _has_time(todays, budget):
            todays.append(milliseconds(case.todays))
        for name, way in ways.items():
            if _has_time(afternoons[name], budget) and not _is_beaten(name, afternoons):
                afternoons[name].append(milliseconds(lambda way=way: case.afternoons(way)))
    ms = median(our)
    strongest = min(afternoons, key=lambda name: median(afternoons[name]), default=None)
    moved = 2 * plan.nbytes * case.passes  # each pass reads and writes every weight once
    return {
        "ms_median": ms,
        "ms_min": min(our),
        "repeats": len(our),
        "weights_per_s": plan.numel * case.draws / ms * 1e3,
        "bytes": moved,
        "gbytes_per_s": moved / ms / 1e6,
        "copy_ms_median": median(copied),
        "copy_ms_min": min(copied),
        "share_of_copy": median(copied) * case.passes / ms,
        "today_ms_median": median(todays),
        "today_ms_min": min(todays),
        "today_repeats": len(todays),
        "ratio_to_today": median(todays) / ms,
        "ratio_to_today_min": min(todays) / min(our),
        "afternoon_ms_median": {name: median(times) for name, times in afternoons.items()},
        "strongest": strongest,
        "strongest_repeats": strongest and len(afternoons[strongest]),
        "strongest_ms_median": strongest and median(afternoons[strongest]),
        "ratio_to_strongest": strongest and median(afternoons[strongest]) / ms,
    }


def _has_time(times: list[float], budget: float) -> bool:
    return not times or sum(times) + median(times) <= budget


def _is_beaten(name: str, times: dict[str, list[float]]) -> bool:
    """Whether another took less than half of the time, so that this one can't be the strongest."""
    return bool(times[name]) and median(times[name]) > 2 * min(median(t) for t in times.values() if t)


def _memory_row(args: argparse.Namespace, dtype: str) -> dict:
    sizes = args.numel, args.tensors, args.members, args.threads
    found = memory.measure(*sizes, dtype, args.backend, args.noise) if args.device == "cpu" else None
    row = {
        "op": "memory",
        "noise": " or ".join(args.noise),
        "dtype": dtype,
        "backend": args.backend,
        "threads": args.threads,
        "numel": args.numel,
        "tensors": args.tensors,
        "members": args.members,
    }
    if found is None:
        return row | dict.fromkeys(("extra_bytes", "share_of_weights", "today_extra_bytes", "today_share_of_weights"))
    for whose in ("", "today_"):
        found[f"{whose}share_of_weights"] = found[f"{whose}extra_bytes"] / found["weights_bytes"]
    return row | found


def milliseconds(work: Callable[[], None]) -> float:
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return 1e3 * (time.perf_counter() - began)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
