"""The one primitive, `add_noise_`, and the backends that can run it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..utils.errors import BadState, BadType, BadValue
from ..utils.names import ROUNDINGS
from ..utils.settings import plain
from . import custom_op
from .epilogue import AdamStep, Epilogue, check_epilogue
from .noise import ADDED, DOMAINS, check_kind, check_rank, check_seed
from .plan import Plan
from .segments import Table


@dataclass(frozen=True)
class Call:
    """A call of add_noise_ whose arguments are checked, as every backend gets it."""

    plan: Plan
    # (K,): a uint64 array, or an int64 tensor on the device with the same bits
    seeds: np.ndarray | torch.Tensor
    # (K,): a float32 array, or a float32 tensor on the device
    coeffs: np.ndarray | torch.Tensor
    base: Plan | None = None
    kind: str = "gaussian"
    stochastic: bool = False
    decay: np.float32 = np.float32(0)
    anchor: Plan | None = None
    epilogue: Epilogue | None = None
    rank: int = 1

    @property
    def adam(self) -> AdamStep | None:
        """The epilogue if it is Adam's, the only one that kernels have; else None."""
        return self.epilogue if isinstance(self.epilogue, AdamStep) else None

    # Cached: checking whether memory moved takes 22 us for 400 tensors.
    @functools.cached_property
    def table(self) -> Table:
        # Restoring needs no factors, and a table that is not cut for them has longer rows.
        return self.plan.table(self.base, self.anchor, self.kind == "low_rank" and len(self.seeds) > 0)

    @property
    def low(self) -> torch.Tensor | None:
        """The flat buffer of low halves: the plan's, else the base's; None if neither has one."""
        return self.plan.low if self.plan.low is not None else self.base.low if self.base is not None else None

    @property
    def needs_extras(self) -> bool:
        """Whether the call reads an anchor or a flat buffer."""
        return self.low is not None or self.epilogue is not None or (bool(self.decay) and self.anchor is not None)

    @property
    def is_copy(self) -> bool:
        """Whether the call copies the base into the plan, without arithmetic. NaNs then keep their payload."""
        if len(self.seeds) or self.decay or self.epilogue is not None:
            return False
        return bool((self.table.column("src_format") == self.table.column("dst_format")).all())


def add_noise_(
    plan: Plan,
    seeds: Sequence[int],
    coeffs: Sequence[float],
    base: Plan | None = None,
    noise: str = "gaussian",
    rounding: str = "nearest",
    backend: str = "auto",
    *,
    decay: float = 0.0,
    anchor: Plan | None = None,
    epilogue: Epilogue | None = None,
    rank: int = 1,
    adam: AdamStep | None = None,
) -> None:
    """`plan = round(base + sum_j coeffs[j] * noise(seeds[j]))` in one pass over the weights, in place.

    For every weight: acc = float32(base); acc = fma(coeffs[j], noise(seeds[j]), acc) for each j in order; the weight
    becomes acc, rounded once to its dtype. With one seed the call perturbs; with two it moves from one member to the
    next; with the seeds of a population it is the ES update; with none it copies the base.

    Args:
        plan: the weights that are written.
        seeds: K ints, 0 <= seed < 2**64; K may be 0. For a plan on a GPU also an int64 tensor (K,) on that device,
            which holds their bits.
        coeffs: K finite numbers, rounded to float32. With a tensor of seeds, a float32 tensor (K,) on the same device.
            Its values are not checked: such a call copies nothing from the host and can be captured in a CUDA graph.
        base: the plan that is read: the same tensors as `plan` (`plan.clone()`), or float32 ones (`plan.master()`).
            Default: `plan` itself, in place.
        noise: "gaussian", "rademacher" or "low_rank"; see `noise`. Of low-rank noise each weight of a matrix becomes
            acc = fma(c_j * A_jq, B_jq, acc) for each j, and in it each q < rank, in order, where c_j * A_jq is rounded
            to float32 and c_j = coeffs[j] * float32(1 / sqrt(rank)) is too.
        rounding: "nearest" (to even), or "stochastic": up or down, with probabilities that make the mean exact. The
            random numbers come from seeds[0] in a domain of their own, so they are independent of the noise. With no
            seeds, and for float32 weights, both are the same.
        backend: "auto", "cpu", "cuda", "triton" or "reference". All give the same bits; a NaN weight stays some NaN.
        decay: weight decay, 0 <= decay <= 1: moves the base by this fraction towards `anchor`, before the noise is
            added.
        anchor: a plan of the same tensors and dtypes, for example of the initial weights. Default: zero.
        epilogue: what becomes of the sum instead, such as a step of Adam (AdamStep); see esfast.core.epilogue.
        rank: of low-rank noise, 1 to 256.
        adam: an AdamStep; the same as `epilogue`.

    Raises:
        TypeError, ValueError: an argument outside the above; no weight was changed.
        RuntimeError: the backend can't run here (it says why), or the plan's memory moved.
    """
    epilogue = adam if epilogue is None else epilogue
    if torch.compiler.is_compiling():
        return custom_op.traced(plan, seeds, coeffs, base, noise, rounding, backend, decay, anchor, epilogue, rank)
    if not isinstance(plan, Plan):
        raise BadType(f"plan: expected an esfast.Plan, got {type(plan).__name__}; write esfast.Plan(model)")
    rank = check_rank(check_kind(noise), rank)
    check_rounding(rounding)
    if not isinstance(decay, (int, float, np.floating)) or not 0 <= decay <= 1:
        raise BadValue(f"decay: expected a number from 0 to 1, got {decay!r}")
    if epilogue is not None:
        backend = check_epilogue(plan, base, epilogue, backend)
    run = get_backend(backend, plan.device, noise)
    with subnormals_kept():
        if isinstance(seeds, torch.Tensor) and run in (_cuda, _triton):
            _check_device_members(plan, seeds, coeffs)
            members: tuple[Any, Any] = seeds, coeffs
        else:
            members = check_members(seeds, coeffs)
        call = Call(plan, *members, base, noise, rounding == "stochastic", np.float32(decay), anchor, epilogue, rank)
        run_checked(run, call)


def run_checked(run: Callable[[Call], None], call: Call) -> None:
    call.table  # noqa: B018  for its checks, before anything changes
    # If all shards on this rank are empty there is nothing to do.
    if len(call.plan):
        run(call)


def check_rounding(rounding: str) -> str:
    if rounding not in ROUNDINGS:
        raise BadValue(f"rounding: expected one of {', '.join(map(repr, ROUNDINGS))}, got {rounding!r}")
    return rounding


# The smallest float32 above 0
_SUBNORMAL = np.uint32(1).view(np.float32)


@contextlib.contextmanager
def subnormals_kept():
    """Switches flush-to-zero (torch.set_flush_denormal) off for this thread. csrc/module.cpp does so for its
    threads."""
    flushing = _SUBNORMAL * np.float32(1) == 0
    if flushing:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushing:
            torch.set_flush_denormal(True)


def check_members(seeds: Sequence[int], coeffs: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Seeds as a uint64 array and coefficients as a finite float32 array, equally long; TypeError or ValueError
    otherwise."""
    if not all(isinstance(x, Iterable) and not isinstance(x, str) for x in (seeds, coeffs)):
        raise BadType("seeds and coeffs: expected sequences of equal length, for example [seed], [sigma]")
    keys = np.array([check_seed(s) for s in seeds], dtype=np.uint64)
    try:
        wide = np.array([_float(c) for c in coeffs], dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        # RuntimeError: a tensor without memory.
        raise BadType(f"coeffs: expected numbers, got {coeffs!r:.80}") from None
    if len(keys) != len(wide):
        raise BadValue(f"seeds and coeffs: expected equally many, got {len(keys)} and {len(wide)}")
    with np.errstate(over="ignore"):
        factors = wide.astype(np.float32)
    if not np.isfinite(factors).all():
        j = int(np.flatnonzero(~np.isfinite(factors))[0])
        raise BadValue(f"coeffs[{j}]: expected a finite float32, got {wide[j]}")
    return keys, factors


def _float(value) -> float:
    """A coefficient; a text or a truth is none, though Python's float takes them."""
    held = value if isinstance(value, (int, float)) else plain(value)
    if isinstance(held, (bool, str, bytes)):
        raise BadType(f"expected a number, got {held!r:.80}")
    return float(held)


def _check_device_members(plan: Plan, seeds: torch.Tensor, coeffs) -> None:
    for what, values, dtype in (("seeds", seeds, torch.int64), ("coeffs", coeffs, torch.float32)):
        if not (
            isinstance(values, torch.Tensor)
            and values.dtype is dtype
            and values.device == plan.device
            and values.shape == (len(seeds),)
            and values.is_contiguous()
        ):
            got = (
                f"{values.dtype} {tuple(values.shape)} on {values.device}"
                if isinstance(values, torch.Tensor)
                else values
            )
            raise BadType(
                f"{what}: with a tensor of seeds, expected a contiguous {dtype} vector on {plan.device}, "
                f"got {got!r:.80}"
            )


# ---- backends: a function of a Call each, and the reason why it can't run, if any -----------------------------------


def _reference(call: Call) -> None:
    from .backends import reference

    reference.run(call)


# Weights x members from which threads share a call: some 5 milliseconds of gaussian noise on one. A shorter call would
# gain little, and where another process has a core, threads wait for it some 10 milliseconds.
WORK_OF_THREADS = 4_000_000


def run_on_cpu(call: Call) -> None:
    from .. import _cpu as extension

    threads = torch.get_num_threads()
    if threads > 1 and call.plan.numel * max(1, len(call.seeds)) < WORK_OF_THREADS:
        threads = 1
    m, v = (b.data_ptr() for b in call.adam.moments) if call.adam is not None else (0, 0)
    extension.add_noise(
        call.table.rows,
        call.seeds,
        call.coeffs,
        DOMAINS[call.kind],
        call.stochastic,
        call.decay,
        call.low.data_ptr() if call.low is not None else 0,
        m,
        v,
        call.adam.numbers if call.adam is not None else (0.0,) * 4,
        threads,
        instruction_set(extension.instruction_sets()),
        call.rank,
    )


def instruction_set(sets: Sequence[str]) -> str:
    """The instruction set that the CPU backend uses, of `sets`, which has the best first. The environment variable
    ATEN_CPU_CAPABILITY ("avx2" or "default") rules out better ones, as it does for PyTorch."""
    allowed = {"default": ("baseline",), "avx2": ("avx2", "baseline")}.get(os.environ.get("ATEN_CPU_CAPABILITY", ""))
    return next(s for s in sets if allowed is None or s in allowed)


@functools.cache
def _cpu_missing() -> str | None:
    try:
        importlib.import_module("esfast._cpu")
    except ImportError as error:
        return f"its C++ extension is not built ({error}); run `pip install .` with a C++ compiler"
    return None


def _cuda(call: Call) -> None:
    from .backends import cuda as cuda_backend

    cuda_backend.run(call)


def _triton(call: Call) -> None:
    from .backends import triton as triton_backend

    triton_backend.run(call)


def _triton_missing(device: torch.device) -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}); pip install triton"
    return importlib.import_module(".backends.triton", __package__).missing(device)


@functools.cache
def _why_not(name: str, device: torch.device) -> str | None:
    """Why the backend can't work on tensors of this device, or None if it can."""
    if name == "cuda":
        return importlib.import_module(".backends.cuda", __package__).missing(device)
    if name == "triton":
        return _triton_missing(device)
    if name == "cpu":
        return _cpu_missing() if device.type == "cpu" else f"it works on CPU tensors, and these are on {device}"
    return None


# Best first: the order in which "auto" tries them. cuda before triton: on an H200 it updates 6 to 80 % faster, and
# perturbs as fast to within 5 % (bench/results/noise_gpu.json). It takes fewer instructions per bf16 weight on sm_90
# (bench/results/sass.json).
_BACKENDS = {"cpu": run_on_cpu, "cuda": _cuda, "triton": _triton, "reference": _reference}


def get_backend(name: str, device: torch.device, kind: str = "gaussian"):
    """The function that runs backend `name` on `device` for this kind of noise; RuntimeError says why it can't."""
    if name == "auto":
        return _BACKENDS[auto_backend(device, kind)]
    if not isinstance(name, str) or name not in _BACKENDS:
        known = ", ".join(map(repr, ("auto", *_BACKENDS)))
        raise BadValue(f"backend: expected one of {known}, got {name!r}")
    reason = _why_not(name, device) or _lacks(name, kind)
    if reason:
        raise BadState(f"backend {name!r} can't run: {reason}")
    return _BACKENDS[name]


def _lacks(name: str, kind: str) -> str | None:
    """Why the backend has no noise of this kind, or None if it has."""
    return f"it has no kernels for {kind!r} noise" if kind in ADDED and name != "reference" else None


@functools.cache
def auto_backend(device: torch.device, kind: str = "gaussian") -> str:
    """What backend="auto" takes for tensors of this device and noise of this kind."""
    chosen = next(name for name in _BACKENDS if _why_not(name, device) is None and _lacks(name, kind) is None)
    if chosen == "reference":
        better = "cpu" if device.type == "cpu" else "triton"
        warnings.warn(
            f"esfast uses its slow reference on {device}, as backend {better!r} can't run: "
            f"{_why_not(better, device) or _lacks(better, kind)}",
            RuntimeWarning,
            stacklevel=4,
        )
    return chosen


def backend_report(device: torch.device | str = "cpu") -> dict[str, str]:
    """For each backend "ready" or the reason why it can't run on `device`: what `esfast info` prints."""
    return {name: _why_not(name, torch.device(device)) or "ready" for name in _BACKENDS}
