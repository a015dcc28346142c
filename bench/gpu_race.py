"""The contenders of `esfast bench gpu`, and how they are timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from ..core.ops import add_noise_
from ..core.plan import Plan
from .models import MODELS, Parameters, numel, parameters
from .noise import note
from .rivals import Today, copy_flat
from .workload import SIGMA, population

# Rounds that every contender but today's gets, however short the time is.
MIN_ROUNDS = 3
# Bytes at multiples of which torch's allocator places memory.
ALIGNMENT = 512

now = time.perf_counter


# ---- the weights -----------------------------------------------------------------------------------------------------


@dataclass
class Workload:
    """A model's weights, in one allocation so that one copy moves them all, and a base copy of them."""

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


def too_large(shapes: Parameters, dtype: str, device: str) -> str | None:
    """Why the weights, their base and the temporaries of today's way don't fit the GPU, or None."""
    if device != "cuda":
        return None
    largest = max(map(math.prod, shapes.values()))
    # The 3 % are for tables, and for rounding sizes up.
    needed = 1.03 * getattr(torch, dtype).itemsize * (2 * numel(shapes) + 2 * largest)
    free = torch.cuda.mem_get_info()[0]
    return None if needed <= free else f"needs {needed / 2**30:.1f} GiB of GPU memory, and {free / 2**30:.1f} are free"


# ---- the contenders --------------------------------------------------------------------------------------------------

# Seeds, coefficients, and whether the weights are written from the base.
Pass = tuple[list[int], list[float], bool]


def passes(op: str, members: int) -> list[Pass]:
    """The passes over the weights that an operation is made of."""
    seed = [12345]
    return {
        "perturb_base": [(seed, [SIGMA], True)],
        "perturb": [(seed, [SIGMA], False)],
        "restore_base": [([], [], True)],
        "perturb_restore_base": [(seed, [SIGMA], True), ([], [], True)],
        "perturb_restore": [(seed, [SIGMA], False), (seed, [-SIGMA], False)],
        "update": [(*population(members), False)],
    }[op]


def run_ours(w: Workload, todo: list[Pass], kind: str, backend: str) -> None:
    for seeds, coeffs, from_base in todo:
        add_noise_(w.plan, seeds, coeffs, base=w.base if from_base else None, noise=kind, backend=backend)


def run_today(today: Today, op: str, members: int) -> None:
    """Runs today's way, which is always in place."""
    if op == "update":
        seeds, coeffs = population(members)
        today.update_weights_from_seeds(seeds, coeffs, alpha=1.0, population_size=1)
    elif op == "restore_base":
        today.restore_self_weights(12345, SIGMA)
    else:
        today.perturb_self_weights(12345, SIGMA)
        if "restore" in op:
            today.restore_self_weights(12345, SIGMA)


def randn4x_contenders(w: Workload, device: str) -> dict[str, Callable]:
    """The rival's launches (todo, kind), by compile options; none if Triton can't run."""
    try:
        from . import randn4x
    except ImportError as error:
        note(f"without tl.randn4x: {error}")
        return {}
    if device == "cpu" and not randn4x.INTERPRETED:
        note("without tl.randn4x: on a CPU it needs TRITON_INTERPRET=1")
        return {}
    from ..core.backends import triton as triton_backend

    if reason := triton_backend.missing(w.plan.device):
        note(f"without tl.randn4x: {reason}")
        return {}
    rival = randn4x.Randn4x(w.plan, w.base)

    def launch(options: dict, todo: list[Pass], kind: str) -> None:
        for seeds, coeffs, from_base in todo:
            rival.run(seeds, coeffs, from_base, kind, options)

    return {f"randn4x:{name}": partial(launch, options) for name, options in randn4x.OPTIONS.items()}


# ---- the clock -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lap:
    # time on the device in ms; on a CPU by the wall clock
    ms: float
    # time until the call returned, in us
    host_us: float
    # seconds that measuring took
    seconds: float


@dataclass(frozen=True)
class Contender:
    work: Callable[[], None]
    # queued before `run`, and not timed
    prepare: Callable[[], None]
    # rounds that it gets, however short the time is
    rounds: int = MIN_ROUNDS


class ContenderError(Exception):
    """A contender failed: (its name, the error)."""


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
    """Times each contender in turn. Each gets its minimum number of rounds, and more while time is left."""
    end = now() + seconds
    laps: dict[str, list[Lap]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            mine = laps[name]
            if len(mine) < min(contender.rounds, repeats) or now() + mine[-1].seconds <= end:
                try:
                    mine.append(lap(contender, on_gpu))
                except Exception as error:
                    raise ContenderError(name, error) from error
    return laps


class Budget:
    """Divides the remaining time by cost: time that one row saves goes to later rows."""

    def __init__(self, deadline: float, cost: float):
        self.deadline, self.cost = deadline, cost

    def share(self, cost: float) -> float:
        seconds = max(0.0, self.deadline - now()) * cost / self.cost
        self.cost -= cost
        return seconds


def cost_of(model: str, dtype: str, op: str, members: int) -> float:
    """The cost of a row, in bytes: what the slowest contender passes over, plus a constant for work that does not
    depend on the size."""
    weight = {"update": max(1.0, members / 3), "perturb_restore": 2.0, "perturb_restore_base": 2.0}.get(op, 1.0)
    return weight * (numel(parameters(MODELS[model])) * getattr(torch, dtype).itemsize + 2**30)


def figures(laps: dict[str, list[Lap]], rival: str, scale: float) -> dict:
    """Figures of a rival's fastest variant; `scale` converts the time of some members to that of all."""
    variants = {name.partition(":")[2]: x for name, x in laps.items() if name.partition(":")[0] == rival}
    keys = ("variant", "ms_median", "ms_min", "repeats", "host_us_median")
    if not variants:
        return {f"{rival}_{key}": None for key in keys}
    name, best = min(variants.items(), key=lambda item: median(x.ms for x in item[1]))
    ms = [x.ms * scale for x in best]
    values = (name or None, median(ms), min(ms), len(ms), median(x.host_us for x in best) * scale)
    return dict(zip((f"{rival}_{key}" for key in keys), values, strict=True))
