"""The one primitive, `add_noise_`, and the backends that can run it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from .noise import DOMAINS, check_kind, check_seed, fma, noise_at
from .plan import Plan

ROUNDINGS = ("nearest",)


def add_noise_(
    plan: Plan,
    seeds: Sequence[int],
    coeffs: Sequence[float],
    base: Plan | None = None,
    noise: str = "gaussian",
    rounding: str = "nearest",
    backend: str = "auto",
) -> None:
    """`plan = round(base + sum_j coeffs[j] * noise(seeds[j]))` in one pass over the weights, in place.

    For every weight: acc = float32(base); acc = fma(coeffs[j], noise(seeds[j]), acc) for each j in order; the weight
    becomes acc rounded once to its dtype. One seed perturbs, two move from one member to the next, a population's make
    the ES update, none copies the base.

    Args:
        plan: the weights that are written.
        seeds: K ints, 0 <= seed < 2**64; K may be 0. For a plan on a GPU also an int64 tensor of their bits there.
        coeffs: K finite numbers, rounded to float32. With a tensor of seeds a float32 tensor there, whose values are
            not looked at: such a call copies nothing from the host and can be captured in a CUDA graph.
        base: what is read; the same tensors as `plan` (`plan.clone()` is). Default: `plan` itself, in place.
        noise: "gaussian" or "rademacher".
        rounding: "nearest" (to even).
        backend: "auto", "cpu", "triton" or "reference". All give the same bits; a NaN weight stays some NaN.

    Raises:
        TypeError, ValueError: an argument outside the above; no weight was changed.
        RuntimeError: the backend can't run here (it says why), or the plan's memory moved.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected an esfast.Plan, got {type(plan).__name__}; write esfast.Plan(model)")
    check_kind(noise)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(map(repr, ROUNDINGS))}, got {rounding!r}")
    run = get_backend(backend, plan.device)
    with _subnormals_kept():
        if isinstance(seeds, torch.Tensor) and run is _triton:
            _check_device_members(plan, seeds, coeffs)
        else:
            seeds, coeffs = check_members(seeds, coeffs)
        run(plan, seeds, coeffs, base, noise)


@contextlib.contextmanager
def _subnormals_kept():
    """This thread calculates as IEEE 754 says, torch.set_flush_denormal or not; csrc/module.cpp sees to its own."""
    flushing = (np.ones(1, dtype=np.uint32).view(np.float32) * np.float32(1))[0] == 0
    if flushing:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushing:
            torch.set_flush_denormal(True)


def check_members(seeds: Sequence[int], coeffs: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Seeds as uint64 and coefficients as float32, equally many and finite; TypeError or ValueError otherwise."""
    if not all(isinstance(x, Iterable) and not isinstance(x, str) for x in (seeds, coeffs)):
        raise TypeError("seeds and coeffs: expected sequences of equal length, for example [seed], [sigma]")
    seeds = np.array([check_seed(s) for s in seeds], dtype=np.uint64)
    try:
        wide = np.array([float(c) for c in coeffs], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"coeffs: expected numbers, got {coeffs!r:.80}") from None
    if len(seeds) != len(wide):
        raise ValueError(f"seeds and coeffs: expected equally many, got {len(seeds)} and {len(wide)}")
    with np.errstate(over="ignore"):
        coeffs = wide.astype(np.float32)
    if not np.isfinite(coeffs).all():
        j = int(np.flatnonzero(~np.isfinite(coeffs))[0])
        raise ValueError(f"coeffs[{j}]: expected a finite float32, got {wide[j]}")
    return seeds, coeffs


def _check_device_members(plan: Plan, seeds: torch.Tensor, coeffs) -> None:
    for what, values, dtype in (("seeds", seeds, torch.int64), ("coeffs", coeffs, torch.float32)):
        if not (
            isinstance(values, torch.Tensor) and values.dtype is dtype and values.device == plan.device
            and values.shape == (len(seeds),) and values.is_contiguous()
        ):  # fmt: skip
            got = (
                f"{values.dtype} {tuple(values.shape)} on {values.device}"
                if isinstance(values, torch.Tensor)
                else values
            )
            raise TypeError(
                f"{what}: with a tensor of seeds, expected a contiguous {dtype} vector on {plan.device}, "
                f"got {got!r:.80}"
            )


# ---- backends: a function (plan, seeds, coeffs, base, kind) each, and the reason why it can't run, if any -----------


def _reference(plan: Plan, seeds: np.ndarray, coeffs: np.ndarray, base: Plan | None, kind: str) -> None:
    plan.table(base)  # for its checks
    for dst, src in zip(plan.entries, (base or plan).entries, strict=True):
        corner = np.ix_(*(np.arange(o, o + n) for o, n in zip(dst.window.offset, dst.tensor.shape, strict=True)))
        index = np.ravel_multi_index(corner, dst.window.shape) if corner else np.zeros(())
        acc = src.tensor.detach().cpu().to(torch.float32).numpy()
        for seed, coeff in zip(seeds, coeffs, strict=True):
            acc = fma(coeff, noise_at(int(seed), dst.name, index, kind), acc)
        if len(seeds):
            dst.tensor.detach().copy_(torch.from_numpy(np.asarray(acc)).to(dst.tensor.dtype))
        elif dst is not src:
            dst.tensor.detach().copy_(src.tensor.detach())


def _cpu(plan: Plan, seeds: np.ndarray, coeffs: np.ndarray, base: Plan | None, kind: str) -> None:
    from . import _cpu as extension

    extension.add_noise(
        plan.table(base), seeds, coeffs, DOMAINS[kind],
        torch.get_num_threads(), extension.instruction_sets()[0],
    )  # fmt: skip


@functools.cache
def _cpu_missing() -> str | None:
    try:
        importlib.import_module("._cpu", __package__)
    except ImportError as error:
        return f"its C++ extension is not built ({error}); run `pip install .` with a C++ compiler"
    return None


def _triton(plan: Plan, seeds, coeffs, base: Plan | None, kind: str) -> None:
    from . import triton_backend

    triton_backend.run(plan, seeds, coeffs, base, kind)


def _triton_missing(device: torch.device) -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error}); pip install triton"
    return importlib.import_module(".triton_backend", __package__).missing(device)


@functools.cache
def _why_not(name: str, device: torch.device) -> str | None:
    """Why the backend can't work on tensors of this device, or None if it can."""
    if name == "triton":
        return _triton_missing(device)
    if name == "cpu":
        return _cpu_missing() if device.type == "cpu" else f"it works on CPU tensors, and these are on {device}"
    return None


# Best first: the order in which "auto" tries them.
_BACKENDS = {"cpu": _cpu, "triton": _triton, "reference": _reference}


def get_backend(name: str, device: torch.device):
    """The function that runs backend `name` on `device`; RuntimeError says why it can't."""
    if name == "auto":
        return _BACKENDS[auto_backend(device)]
    if not isinstance(name, str) or name not in _BACKENDS:
        known = ", ".join(map(repr, ("auto", *_BACKENDS)))
        raise ValueError(f"backend: expected one of {known}, got {name!r}")
    reason = _why_not(name, device)
    if reason:
        raise RuntimeError(f"backend {name!r} can't run: {reason}")
    return _BACKENDS[name]


@functools.cache
def auto_backend(device: torch.device) -> str:
    """What backend="auto" takes for tensors of this device."""
    chosen = next(name for name in _BACKENDS if _why_not(name, device) is None)
    if chosen == "reference":
        better = "cpu" if device.type == "cpu" else "triton"
        warnings.warn(
            f"esfast uses its slow reference on {device}, as backend {better!r} can't run: {_why_not(better, device)}",
            RuntimeWarning,
            stacklevel=4,
        )
    return chosen


def backend_report(device: torch.device | str = "cpu") -> dict[str, str]:
    """For each backend "ready" or the reason why it can't run on `device`: what `esfast info` prints."""
    return {name: _why_not(name, torch.device(device)) or "ready" for name in _BACKENDS}
