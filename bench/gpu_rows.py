"""The work of `esfast bench gpu`, in a process of its own (bench/isolated.py): its rows, and what they leave out.

A contender that fails is left out of a row, and the others are timed without it. A backend that differs from the
reference in one bit is not timed at all. After an error that the GPU does not survive, such as an illegal address, this
process ends, and gpu.py continues in a new one, without the contender that ran.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

from ..core.kinds import ELEMENTWISE
from ..core.ops import backend_report
from . import BenchmarkError
from .gpu_race import (
    Budget,
    Contender,
    ContenderError,
    Workload,
    cost_of,
    figures,
    lap,
    now,
    passes,
    race,
    randn4x_contenders,
    run_ours,
    run_today,
    too_large,
)
from .isolated import reason_of
from .models import MODELS, parameters
from .noise import note
from .rivals import Today, copy_each, copy_flat
from .workload import expected_ends, verify, verify_ends

OPS = ("perturb_base", "perturb", "restore_base", "perturb_restore_base", "perturb_restore", "update")
RIVALS = ("today", "today_kept", "randn4x")


def ready_backends(device: str) -> list[str]:
    """The backends that run on the device, without the reference, which is slow."""
    report = backend_report(device)
    ready = [name for name, state in report.items() if state == "ready" and name != "reference"]
    if not ready:
        reasons = "; ".join(f"{name}: {state}" for name, state in report.items() if name != "reference")
        raise BenchmarkError(f"no backend can run on {device}: {reasons}")
    return ready


def events(job: dict) -> Iterator[dict]:
    """{"row": ...}, {"left_out": ...} with a reason, {"at": what runs now}, {"done": (model, dtype)}.

    The job: device, models as pairs with their dtypes, noise, members, repeats, seconds, `backends` (None: the ready
    ones), `without` (names of contenders that are not run), and `had`, the (op, noise) of the first pair that are done.
    """
    device, without = job["device"], set(job["without"])
    began = now()
    backends = [b for b in job["backends"] or ready_backends(device) if f"ours:{b}" not in without]
    # If this GPU can't run one backend's kernels, the others are measured all the same.
    if device == "cuda":
        for name, state in backend_report(device).items():
            if name in ("cuda", "triton") and state != "ready" and job["backends"] is None:
                yield {"left_out": {"backend": name, "reason": f"not ready: {state}", "failed": True}}
    verified = []
    for backend in backends:
        yield {"at": {"contender": f"ours:{backend}"}}
        if reason := _differs(backend, job):
            yield {"left_out": {"backend": backend, "reason": reason, "failed": True, "everywhere": True}}
        else:
            verified.append(backend)
    if not verified:
        return
    todo = [tuple(pair) for pair in job["todo"]]
    budget = Budget(
        began + job["seconds"], sum(cost_of(m, d, op, job["members"]) for m, d in todo for op, _ in _cases(job))
    )
    for i, (model, dtype) in enumerate(todo):
        what = {"model": model, "dtype": dtype}
        yield {"at": what}
        if reason := too_large(parameters(MODELS[model]), dtype, device):
            yield {"left_out": {**what, "reason": reason}}
        elif now() > budget.deadline and (i or job["had"]):
            yield {"left_out": {**what, "reason": f"no time was left of {job['seconds']:.0f} s"}}
        else:
            note(f"{model}, {dtype}")
            try:
                yield from _rows(model, dtype, verified, budget, job, [] if i else job["had"])
            except Exception as error:
                if not _survives(error, device):
                    raise
                yield {"left_out": {**what, "reason": reason_of(error), "failed": not _no_memory(error)}}
        yield {"done": [model, dtype]}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _differs(backend: str, job: dict) -> str | None:
    for dtype in dict.fromkeys(d for _, d in job["todo"]):
        for kind in job["noise"]:
            note(f"checking to the bit: {backend}, {dtype}, {kind}")
            try:
                verify(backend, getattr(torch, dtype), kind, job["members"], job["device"])
            except BenchmarkError as error:
                return str(error)
    return None


def _cases(job: dict) -> list[tuple[str, str]]:
    """(operation, kind of noise); restoring draws none."""
    return [
        (op, "none") if op == "restore_base" else (op, kind)
        for kind in job["noise"]
        for op in OPS
        if op != "restore_base" or kind == job["noise"][0]
    ]


def _rows(model: str, dtype: str, backends: list[str], budget: Budget, job: dict, had: list) -> Iterator[dict]:
    w = Workload.make(parameters(MODELS[model]), getattr(torch, dtype), job["device"])
    what = {"model": model, "dtype": dtype, "device": job["device"], "numel": w.plan.numel, "tensors": len(w.plan)}
    had, memory, right = {tuple(h) for h in had}, [], []
    for backend in backends:
        yield {"at": {**what, "contender": f"ours:{backend}"}}
        # Memory is measured first, since it includes the tables that a first call makes.
        memory.append(_memory_row(w, backend, job))
    ends = {kind: expected_ends(w.base, 12345, kind) for kind in job["noise"]}
    for backend in backends:
        try:
            for kind in job["noise"]:
                verify_ends(w.plan, w.base, 12345, kind, backend, ends[kind])
        except BenchmarkError as error:
            yield {"left_out": {"backend": backend, "reason": str(error), "failed": True, "everywhere": True}}
        else:
            right.append(backend)
    yield {"at": what}
    fused = randn4x_contenders(w, job["device"]) if right else {}
    for op, kind in _cases(job):
        seconds = budget.share(cost_of(model, dtype, op, job["members"]))
        if (op, kind) in had or not right:
            continue
        where = {"op": op, "noise": kind, **what}
        for event in _race_row(w, op, kind, right, fused, seconds, job):
            yield {name: {**where, **found} for name, found in event.items()}
    for row in memory:
        if row["backend"] in right:
            yield {"row": {"op": "memory", "noise": " or ".join(job["noise"]), **what, **row}}


def _race_row(
    w: Workload, op: str, kind: str, backends: list[str], fused: dict[str, Callable], seconds: float, job: dict
) -> Iterator[dict]:
    """One operation: a row for each backend; the rivals are timed once for all."""
    began, wall, on_gpu = now(), time.time(), job["device"] == "cuda"
    kind = job["noise"][0] if kind == "none" else kind
    # The rival on Triton's generator draws a number for each weight, so it has no low-rank noise.
    fused = fused if kind in ELEMENTWISE else {}
    todo = passes(op, job["members"])
    kept, emptied = (Today(w.plan.tensors, kind, empties_cache) for empties_cache in (False, True))

    def before_kept() -> None:
        kept.fill_cache()
        w.occupy()

    members = max(1, len(todo[0][0]))
    today_members = members
    if op == "update" and "today_kept:" not in job["without"]:
        # As many members as allow two runs, with and without the cache, in six tenths of the time.
        yield {"at": {"contender": "today_kept:"}}
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
    contenders = {name: c for name, c in contenders.items() if name not in job["without"]}
    laps: dict = {}
    while contenders and not laps:
        try:
            # The first call compiles, loads code and makes tables.
            for name, contender in contenders.items():
                yield {"at": {"contender": name}}
                if op != "update" or not name.startswith("today"):
                    race({name: contender}, 1, 0.0, on_gpu)
            yield {"at": {}}
            laps = race(contenders, job["repeats"], seconds - (now() - began), on_gpu)
        except ContenderError as failed:
            name, error = failed.args
            yield {"at": {"contender": name}}
            if not _survives(error, job["device"]):
                raise error from failed
            del contenders[name]
            yield {"left_out": {"contender": name, "reason": reason_of(error), "failed": not _no_memory(error)}}
    rivals = figures(laps, "copy", 1)
    for name in RIVALS:
        rivals |= figures(laps, name, members / today_members if name.startswith("today") else 1)
    rivals |= {"today_members": today_members, "today_scaled": today_members < members}
    draws, moved = sum(len(seeds) for seeds, _, _ in todo), 2 * w.plan.nbytes * len(todo)
    for backend in backends:
        if f"ours:{backend}" not in laps:
            continue
        ours = laps[f"ours:{backend}"]
        ms = median(x.ms for x in ours)
        yield {
            "row": {
                "backend": backend,
                "members": members,
                "draws": draws,
                "passes": len(todo),
                "repeats": len(ours),
                "ms_median": ms,
                "ms_min": min(x.ms for x in ours),
                "host_us_median": median(x.host_us for x in ours),
                "weights_per_s": w.plan.numel * max(1, draws) / ms * 1e3,
                "bytes": moved,
                "gbytes_per_s": moved / ms / 1e6,
                "share_of_copy": rivals["copy_ms_median"] and rivals["copy_ms_median"] * len(todo) / ms,
                **rivals,
                **{
                    f"ratio_to_{name}": rivals[f"{name}_ms_median"] and rivals[f"{name}_ms_median"] / ms
                    for name in RIVALS
                },
                "began": wall,
                "ended": time.time(),
            }
        }


def _survives(error: Exception, device: str) -> bool:
    """Whether the GPU still works after an error. (The error of a launch shows at a later call.)"""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device=device).item())
    except Exception:
        note(f"the GPU is of no more use to this process: {reason_of(error)}")
        return False


def _no_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def _memory_row(w: Workload, backend: str, job: dict) -> dict:
    """Extra memory of every operation, the most that any takes: tables that stay (each backend has tiles of a size of
    its own, and so tables of its own), and what a call needs meanwhile. The base copy is the user's choice, and not
    counted."""

    def ours() -> None:
        for op, kind in _cases(job):
            run_ours(w, passes(op, job["members"]), job["noise"][0] if kind == "none" else kind, backend)

    def todays() -> None:
        for kind in job["noise"]:
            run_today(Today(w.plan.tensors, kind, False), "update", 2)  # more members take no more

    row: dict = {"backend": backend, "members": job["members"], "weights_bytes": w.plan.nbytes}
    for whose, work in (("", ours), ("today_", todays)):
        extra = _growth(work, job["device"])
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
