"""`esfast bench gpu`: add_noise_ over the parameters of real models, against ES code of today, a fused kernel on
Triton's generator and a plain copy.

First the backends are held to the reference, and over a bit that differs nothing is timed. Then, in one process, each
round runs every contender once, so that clocks that fall slow all of them. A contender is queued behind a copy and
timed by CUDA events: the device is busy while the host launches, as it is between the forward passes of a run, so a
contender pays for its launches only where they take longer than its work, as today's do. The host's own time, from the
call to its return, is a column of its own. Models are many times larger than the L2 cache, which needs no flushing.

With --device cpu the same code runs on a machine without a GPU, by the wall clock; its rows say so.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from ..noise import KINDS
from ..ops import add_noise_, backend_report
from ..plan import Plan
from . import BenchmarkError, count
from .models import MODELS, Parameters, numel, parameters
from .noise import note
from .rivals import Today, copy_each, copy_flat
from .workload import SIGMA, population, verify, verify_ends

Table = tuple[list[str], list[list[str]]]

LABELS = {
    "perturb_base": "perturb from a base",
    "perturb": "perturb in place",
    "perturb_restore_base": "perturb + restore from a base",
    "perturb_restore": "perturb + restore in place",
    "update": "update",
}
MIN_ROUNDS = 3  # of all contenders but today's, however short the time
ALIGNMENT = 512  # bytes, that of torch's allocator

now = time.perf_counter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where the weights are; cpu is for "
                        "trying the benchmark, its figures say nothing of a GPU (default: cuda)")  # fmt: skip
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL",
                        help=f"of {', '.join(MODELS)} (default: all but tiny; on a CPU, tiny)")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32", "float16"],
                        default=["bfloat16", "float32"], help="of the weights (default: bfloat16 float32)")  # fmt: skip
    parser.add_argument("--noise", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of noise (default: both)")
    parser.add_argument("--backends", nargs="+", help="that are measured (default: all that are ready there)")
    parser.add_argument("--members", type=count, default=30, help="members of the update (default: 30)")
    parser.add_argument("--repeats", type=count, default=20, help="rounds of each row, at most (default: 20)")
    parser.add_argument("--seconds", type=float, default=240.0,
                        help="for all, about: where it is short there are fewer rounds, and today's update runs with "
                        "fewer members, which the row says (default: 240)")  # fmt: skip


def run(args: argparse.Namespace) -> dict:
    began = now()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: PyTorch finds no CUDA device here")
    models = args.models or [m for m in MODELS if (m == "tiny") == (args.device == "cpu")]
    backends = args.backends or ready_backends(args.device)
    for backend in backends:
        for dtype in args.dtypes:
            for kind in args.noise:
                note(f"checking to the bit: {backend}, {dtype}, {kind}")
                verify(backend, getattr(torch, dtype), kind, args.members, args.device)
    todo, left_out = [], []

    def leave_out(model: str, dtype: str, reason: str) -> None:
        note(f"{model}, {dtype}: left out, {reason}")
        left_out.append({"model": model, "dtype": dtype, "reason": reason})

    for model, dtype in itertools.product(models, args.dtypes):
        if reason := _too_large(parameters(MODELS[model]), dtype, args.device):
            leave_out(model, dtype, reason)
        else:
            todo.append((model, dtype))
    costs = [_cost(model, dtype, op, args.members) for model, dtype in todo for op in LABELS for _ in args.noise]
    budget, rows = Budget(began + args.seconds, sum(costs)), []
    for model, dtype in todo:
        note(f"{model}, {dtype}")
        try:
            rows += _rows(model, dtype, backends, budget, args)
        except torch.OutOfMemoryError as error:
            leave_out(model, dtype, str(error).partition("\n")[0])
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows, "left_out": left_out, "seconds": round(now() - began, 1)}


def ready_backends(device: str) -> list[str]:
    """The backends that run there, without the reference, which is not made to be fast."""
    report = backend_report(device)
    ready = [name for name, state in report.items() if state == "ready" and name != "reference"]
    if not ready:
        reasons = "; ".join(f"{name}: {state}" for name, state in report.items() if name != "reference")
        raise BenchmarkError(f"no backend can run on {device}: {reasons}")
    return ready


# ---- the tables ------------------------------------------------------------------------------------------------------


def table(result: dict) -> Table:
    headers = ["model", "operation", "noise", "dtype", "backend", "esfast, ms", "of copy's speed", "GB/s",
               "10^9 weights/s", "host, us", "today, ms", "times as fast", "today, cache kept, ms", "times as fast",
               "tl.randn4x, ms", "times as fast"]  # fmt: skip
    lines = []
    for r in result["rows"]:
        where = r["backend"] if r["device"] == "cuda" else f"{r['backend']}, on a {r['device'].upper()}"
        if r["op"] == "memory":
            ours, theirs = ("?" if r[f"{whose}share_of_weights"] is None else f"{r[f'{whose}share_of_weights']:.2%}"
                            for whose in ("", "today_"))  # fmt: skip
            what = [r["model"], "extra memory, of the weights", r["noise"], r["dtype"], where]
            lines.append([*what, ours, *[""] * 4, theirs, *[""] * 5])
            continue
        members = f", {r['members']} members" if r["op"] == "update" else ""
        scaled = f" ({r['today_members']} of {r['members']} members, scaled)" if r["today_scaled"] else ""
        lines.append([
            r["model"], LABELS[r["op"]] + members, r["noise"], r["dtype"], where, _ms(r["ms_median"]),
            f"{r['share_of_copy']:.1%}", f"{r['gbytes_per_s']:.0f}", f"{r['weights_per_s'] / 1e9:.0f}",
            f"{r['host_us_median']:.0f}",
            _ms(r["today_ms_median"]) + scaled, _ratio(r["ratio_to_today"]),
            _ms(r["today_kept_ms_median"]) + scaled, _ratio(r["ratio_to_today_kept"]),
            _ms(r["randn4x_ms_median"]), _ratio(r["ratio_to_randn4x"]),
        ])  # fmt: skip
    for r in result["left_out"]:
        lines.append([r["model"], f"left out: {r['reason']}", "", r["dtype"], *[""] * 12])
    return headers, lines


def readme_table(result: dict) -> Table:
    """What stands on a page that says GPU: ValueError for figures of anything else."""
    devices = {r["device"] for r in result["rows"]} or {"nothing"}
    if devices != {"cuda"}:
        raise ValueError(f"noise_gpu.json was measured on {' and '.join(sorted(devices))}, which is no GPU")
    return table(result)


def summary(result: dict) -> Table:
    """The rows of a first look: bfloat16 weights of one model, and every row where a rival is faster."""
    models = [r["model"] for r in result["rows"]]
    model = "Qwen2.5-7B" if "Qwen2.5-7B" in models else models[-1] if models else None

    def shown(r: dict) -> bool:
        ratios = [r.get(f"ratio_to_{rival}") for rival in ("today", "today_kept", "randn4x")]
        return (r["model"], r["dtype"]) == (model, "bfloat16") or any(x is not None and x < 1 for x in ratios)

    headers, lines = readme_table({"rows": [r for r in result["rows"] if shown(r)], "left_out": []})
    columns = [0, 1, 2, 3, 4, 5, 6, 10, 11, 13, 15]
    headers = [*headers[:13], f"{headers[13]}, cache kept", headers[14], f"{headers[15]} as tl.randn4x"]
    return [headers[c] for c in columns], [[line[c] for c in columns] for line in lines]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


# ---- the weights -----------------------------------------------------------------------------------------------------


@dataclass
class Workload:
    """A model's weights, which lie in one allocation so that they can be copied at once, and a base copy of them."""

    flat: torch.Tensor
    plan: Plan
    base: Plan

    @classmethod
    def make(cls, shapes: Parameters, dtype: torch.dtype, device: str) -> Workload:
        step = ALIGNMENT // dtype.itemsize
        sizes = [-(-math.prod(shape) // step) * step for shape in shapes.values()]
        flat = torch.zeros(-(-sum(sizes) // (2 * step)) * 2 * step, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(0)
        tensors = [
            part[: math.prod(shape)].view(shape).normal_(0, 0.02, generator=generator)
            for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes.values(), strict=True)
        ]
        plan = Plan(zip(shapes, tensors, strict=True))
        return cls(flat, plan, plan.clone())

    def occupy(self) -> None:
        """Keeps the device busy while the host launches what is timed next, and leaves a small block in the allocator's
        cache, which a rival may have emptied."""
        copy_flat(self.flat)
        torch.empty(1, device=self.flat.device)


def _too_large(shapes: Parameters, dtype: str, device: str) -> str | None:
    """Why the weights, their base and the temporaries of today's way don't fit the GPU, or None."""
    if device != "cuda":
        return None
    largest = max(map(math.prod, shapes.values()))
    needed = 1.03 * getattr(torch, dtype).itemsize * (2 * numel(shapes) + 2 * largest)  # 3 %: tables and rounding up
    free = torch.cuda.mem_get_info()[0]
    return None if needed <= free else f"needs {needed / 2**30:.1f} GiB of GPU memory, and {free / 2**30:.1f} are free"


# ---- the contenders --------------------------------------------------------------------------------------------------

Pass = tuple[list[int], list[float], bool]  # seeds, coefficients, whether from the base


def passes(op: str, members: int) -> list[Pass]:
    """The passes over the weights that an operation is made of."""
    seed = [12345]
    return {
        "perturb_base": [(seed, [SIGMA], True)],
        "perturb": [(seed, [SIGMA], False)],
        "perturb_restore_base": [(seed, [SIGMA], True), ([], [], True)],
        "perturb_restore": [(seed, [SIGMA], False), (seed, [-SIGMA], False)],
        "update": [(*population(members), False)],
    }[op]


def run_ours(w: Workload, todo: list[Pass], kind: str, backend: str) -> None:
    for seeds, coeffs, from_base in todo:
        add_noise_(w.plan, seeds, coeffs, base=w.base if from_base else None, noise=kind, backend=backend)


def run_today(today: Today, op: str, members: int) -> None:
    """From a base or in place, today's is the same: in place."""
    if op == "update":
        seeds, coeffs = population(members)
        today.update_weights_from_seeds(seeds, coeffs, alpha=1.0, population_size=1)
    else:
        today.perturb_self_weights(12345, SIGMA)
        if "restore" in op:
            today.restore_self_weights(12345, SIGMA)


def randn4x_contenders(w: Workload, device: str) -> dict[str, Callable]:
    """The rival's launches (todo, kind), by what they are compiled with; none where Triton can't run."""
    try:
        from . import randn4x
    except ImportError as error:
        note(f"without tl.randn4x: {error}")
        return {}
    if device == "cpu" and not randn4x.INTERPRETED:
        note("without tl.randn4x: on a CPU it needs TRITON_INTERPRET=1")
        return {}
    rival = randn4x.Randn4x(w.plan, w.base)

    def launch(options: dict, todo: list[Pass], kind: str) -> None:
        for seeds, coeffs, from_base in todo:
            rival.run(seeds, coeffs, from_base, kind, options)

    return {f"randn4x:{name}": partial(launch, options) for name, options in randn4x.OPTIONS.items()}


# ---- the clock -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lap:
    ms: float  # of the device; on a CPU, of the wall clock
    host_us: float  # until the call returned
    seconds: float  # that measuring took


@dataclass(frozen=True)
class Contender:
    work: Callable[[], None]
    prepare: Callable[[], None]  # untimed, queued before
    rounds: int = MIN_ROUNDS  # that it gets however short the time


def lap(contender: Contender, on_gpu: bool) -> Lap:
    began = now()
    contender.prepare()
    if on_gpu:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
    called = now()
    contender.work()
    host = now() - called
    ms = 1e3 * host
    if on_gpu:
        end.record()
        end.synchronize()
        ms = start.elapsed_time(end)
    return Lap(ms, 1e6 * host, now() - began)


def race(contenders: dict[str, Contender], repeats: int, seconds: float, on_gpu: bool) -> dict[str, list[Lap]]:
    """Laps of each contender, by turns. Each gets its least number of rounds, and further ones while they fit in."""
    end = now() + seconds
    laps: dict[str, list[Lap]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            mine = laps[name]
            if len(mine) < min(contender.rounds, repeats) or now() + mine[-1].seconds <= end:
                mine.append(lap(contender, on_gpu))
    return laps


class Budget:
    """Shares of the time that is left, by cost: what one row saves, the later ones have."""

    def __init__(self, deadline: float, cost: float):
        self.deadline, self.cost = deadline, cost

    def share(self, cost: float) -> float:
        seconds = max(0.0, self.deadline - now()) * cost / self.cost
        self.cost -= cost
        return seconds


def _cost(model: str, dtype: str, op: str, members: int) -> float:
    """Of a row, in bytes: what the slowest contender passes over, and as much for what does not depend on the size."""
    weight = {"update": max(1.0, members / 3), "perturb_restore": 2.0, "perturb_restore_base": 2.0}.get(op, 1.0)
    return weight * (numel(parameters(MODELS[model])) * getattr(torch, dtype).itemsize + 2**30)


# ---- the rows --------------------------------------------------------------------------------------------------------


def _rows(model: str, dtype: str, backends: list[str], budget: Budget, args: argparse.Namespace) -> Iterator[dict]:
    w = Workload.make(parameters(MODELS[model]), getattr(torch, dtype), args.device)
    what = {"model": model, "dtype": dtype, "device": args.device, "numel": w.plan.numel, "tensors": len(w.plan)}
    memory = [_memory_row(w, backend, args) for backend in backends]  # first: tables are part of it
    for backend in backends:
        for kind in args.noise:
            verify_ends(w.plan, w.base, 12345, kind, backend)
    fused = randn4x_contenders(w, args.device)
    for kind in args.noise:
        for op in LABELS:
            for row in _race_row(
                w, op, kind, backends, fused, budget.share(_cost(model, dtype, op, args.members)), args
            ):
                yield {"op": op, "noise": kind, **what, **row}
    for row in memory:
        yield {"op": "memory", "noise": " or ".join(args.noise), **what, **row}


def _race_row(
    w: Workload, op: str, kind: str, backends: list[str], fused: dict[str, Callable], seconds: float,
    args: argparse.Namespace,
) -> Iterator[dict]:  # fmt: skip
    """One operation: a row for each backend, the rivals' laps being shared."""
    began, on_gpu = now(), args.device == "cuda"
    todo = passes(op, args.members)
    kept, emptied = (Today(w.plan.tensors, kind, empties_cache) for empties_cache in (False, True))

    def before_kept() -> None:
        kept.fill_cache()
        w.occupy()

    members = len(todo[0][0])
    today_members = members
    if op == "update":  # as many as fit two runs, with and without the cache, into six tenths of the time
        one = lap(Contender(partial(run_today, kept, op, 1), before_kept), on_gpu).seconds
        today_members = min(members, max(1, int(0.3 * seconds / max(one, 1e-9))))
    contenders = {
        "copy:flat": Contender(partial(copy_flat, w.flat), w.occupy),
        "copy:each": Contender(partial(copy_each, w.plan.tensors, w.base.tensors), w.occupy),
        **{f"ours:{b}": Contender(partial(run_ours, w, todo, kind, b), w.occupy) for b in backends},
        **{name: Contender(partial(launch, todo, kind), w.occupy) for name, launch in fused.items()},
        "today_kept:": Contender(partial(run_today, kept, op, today_members), before_kept, 1),
        "today:": Contender(partial(run_today, emptied, op, today_members), w.occupy, 1),
    }
    for name, contender in contenders.items():  # compiles, loads, makes tables
        if op != "update" or not name.startswith("today"):
            lap(contender, on_gpu)
    laps = race(contenders, args.repeats, seconds - (now() - began), on_gpu)
    scale = members / today_members
    rivals = {
        **_figures(laps, "copy", 1), **_figures(laps, "today", scale), **_figures(laps, "today_kept", scale),
        **_figures(laps, "randn4x", 1),
        "today_members": today_members, "today_scaled": today_members < members,
    }  # fmt: skip
    draws, moved = sum(len(seeds) for seeds, _, _ in todo), 2 * w.plan.nbytes * len(todo)
    for backend in backends:
        ours = laps[f"ours:{backend}"]
        ms = median(x.ms for x in ours)
        yield {
            "backend": backend, "members": members, "draws": draws, "passes": len(todo), "repeats": len(ours),
            "ms_median": ms, "ms_min": min(x.ms for x in ours), "host_us_median": median(x.host_us for x in ours),
            "weights_per_s": w.plan.numel * draws / ms * 1e3, "bytes": moved, "gbytes_per_s": moved / ms / 1e6,
            "share_of_copy": rivals["copy_ms_median"] * len(todo) / ms, **rivals,
            **{f"ratio_to_{name}": rivals[f"{name}_ms_median"] and rivals[f"{name}_ms_median"] / ms
               for name in ("today", "today_kept", "randn4x")},
        }  # fmt: skip


def _figures(laps: dict[str, list[Lap]], rival: str, scale: float) -> dict:
    """Of a rival's fastest variant; `scale` turns the time of some members into that of all."""
    variants = {name.partition(":")[2]: x for name, x in laps.items() if name.partition(":")[0] == rival}
    keys = ("variant", "ms_median", "ms_min", "repeats", "host_us_median")
    if not variants:
        return {f"{rival}_{key}": None for key in keys}
    name, best = min(variants.items(), key=lambda item: median(x.ms for x in item[1]))
    ms = [x.ms * scale for x in best]
    values = (name or None, median(ms), min(ms), len(ms), median(x.host_us for x in best) * scale)
    return dict(zip((f"{rival}_{key}" for key in keys), values, strict=True))


def _memory_row(w: Workload, backend: str, args: argparse.Namespace) -> dict:
    """Extra memory of every operation, the most that any takes: tables that stay, and what a call needs meanwhile. The
    base copy is the user's choice, and not counted."""

    def ours() -> None:
        for kind in args.noise:
            for op in LABELS:
                run_ours(w, passes(op, args.members), kind, backend)

    def todays() -> None:
        for kind in args.noise:
            run_today(Today(w.plan.tensors, kind, False), "update", 2)  # more members take no more

    for base in (None, w.base):
        w.plan.table(base).device.clear()  # backends share tables; each is to answer for its own
    row: dict = {"backend": backend, "members": args.members, "weights_bytes": w.plan.nbytes}
    for whose, work in (("", ours), ("today_", todays)):
        extra = _growth(work, args.device)
        row[f"{whose}extra_bytes"] = extra
        row[f"{whose}share_of_weights"] = None if extra is None else extra / w.plan.nbytes
    return row


def _growth(work: Callable[[], None], device: str) -> int | None:
    """Bytes by which the allocator's peak during `work` exceeds what was allocated before; None on a CPU."""
    if device != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
