"""Microbenchmarks of add_noise_ under pytest-benchmark: `make bench`, or `pytest bench/micro` with its options.

A group is one operation on one kind of noise and one dtype. In it stand esfast's backends that run here, what ES code
does today, and a copy of the same bytes. A backend is held to the reference before it is timed. What a row moves is in
its extra_info: GB/s, share of the copy's speed, weights a second.

To see what a change does to speed, keep the figures of before and compare:

    pytest bench/micro --benchmark-save before
    pytest bench/micro --benchmark-compare --benchmark-compare-fail=min:15%

Rows of a group run one after another, so a machine that gets slower meanwhile tilts them; `esfast bench noise` runs its
contenders in turn, round by round, and is what the figures of the docs come from.
"""

from __future__ import annotations

import functools

import pytest
import torch

from esfast.bench import count, today
from esfast.bench.workload import SIGMA, make_plan, population, verify, verify_ends
from esfast.core.kinds import KINDS
from esfast.core.ops import add_noise_, auto_backend, backend_report

DTYPES = ("bfloat16", "float32")
# perturb: write a member from a base. restore: write the base. move: from one member to the next, in place. update: add
# the noise of the whole population.
OPERATIONS = ("perturb", "restore", "move", "update")
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
ROUNDS = 7


def backends(device: str) -> list[str]:
    """The contenders on a device, by name. The reference and interpreted kernels are left out, since they are slow."""
    ready = [name for name, state in backend_report(torch.device(device)).items() if state == "ready"]
    slow = {"reference"} if device == "cuda" else {"reference", "triton"}
    return [name for name in ready if name not in slow]


CONTENDERS = [(d, c) for d in DEVICES for c in (*backends(d), "today", "copy")]


class EventTimer:
    """Seconds on the device's own clock, by CUDA events: what the host does meanwhile is not counted."""

    def __init__(self):
        self._start = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        self._start = self._start or event
        return self._start.elapsed_time(event) / 1e3


@functools.lru_cache(maxsize=1)
def weights(numel: int, dtype: str, device: str):
    """The plan that is changed, and its base. One pair at a time: models may be large."""
    plan = make_plan(numel, 30, getattr(torch, dtype), device)
    return plan, plan.clone()


@functools.cache
def verified(backend: str, dtype: str, kind: str, members: int, device: str) -> None:
    """Raises BenchmarkError if a bit differs from the reference: nothing is timed then."""
    verify(backend, getattr(torch, dtype), kind, members, device)


def operation(name: str, contender: str, kind: str, plan, base, members: int):
    """The work of one round, a function without arguments."""
    tensors, (seeds, coeffs) = plan.tensors, population(members)

    def copy() -> None:
        for mine, theirs in zip(plan.tensors, base.tensors, strict=True):
            mine.copy_(theirs)

    if contender == "copy":
        return copy
    if contender == "today":
        return {
            "perturb": lambda: today.perturb_(tensors, 1, SIGMA, kind),
            "restore": lambda: today.perturb_(tensors, 1, -SIGMA, kind),
            "move": lambda: (today.perturb_(tensors, 1, -SIGMA, kind), today.perturb_(tensors, 2, SIGMA, kind)),
            "update": lambda: today.update_(tensors, seeds, coeffs, kind),
        }[name]
    call = functools.partial(add_noise_, plan, noise=kind, backend=contender)
    return {
        "perturb": lambda: call([1], [SIGMA], base=base),
        "restore": lambda: call([], [], base=base),
        "move": lambda: call([1, 2], [-SIGMA, SIGMA]),
        "update": lambda: call(seeds, coeffs),
    }[name]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "contender"), CONTENDERS)
def test_add_noise(benchmark, request, device, contender, dtype, kind, name):
    numel, members = count(request.config.getoption("--numel")), request.config.getoption("--members")
    plan, base = weights(numel, dtype, device)
    if contender not in ("today", "copy"):
        verified(contender, dtype, kind, members, device)
        verify_ends(plan, base, 12345, kind, contender)
    work = operation(name, contender, kind, plan, base, members)
    if device == "cuda":
        benchmark._timer = EventTimer()
    benchmark.group = f"{name}, {kind}, {dtype}, {device}, {plan.numel:.0e} weights"
    # Today's update takes a hundred times as long as a perturb, so fewer rounds are enough.
    slow = name == "update" and contender == "today"
    benchmark.pedantic(work, rounds=3 if slow else ROUNDS, iterations=1, warmup_rounds=0 if slow else 1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    draws = {"perturb": 1, "restore": 0, "move": 2, "update": members}[name]
    benchmark.extra_info |= {
        "backend": contender,
        "auto": auto_backend(torch.device(device)),
        "numel": plan.numel,
        "members": members,
        "GB/s": 2 * plan.nbytes / seconds / 1e9,
        "draws_per_s": plan.numel * draws / seconds,
    }
