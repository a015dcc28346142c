"""Schedules of lr and sigma: pure functions of the generation's number, so that a run can resume anywhere.

All have the form f(start, step, total, final_fraction, warmup) -> float:

    start            the full value, > 0
    step             number of the generation, 0 <= step
    total            generations of the run, > warmup; from generation total - 1 on, the value is the final one
    final_fraction   final value divided by start, > 0 and at most 1; `constant` ignores it
    warmup           number of first generations with less than start: 1, 2, ... parts of warmup + 1

Generation `warmup` is the first with the full value, start to the bit; the last generation has start * final_fraction.
ESConfig calls check_schedule; the schedules themselves check nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..utils.errors import BadValue


def constant(start: float, step: int, total: int, final_fraction: float = 0.1, warmup: int = 0) -> float:
    return start * _warmed(step, warmup)


def linear(start: float, step: int, total: int, final_fraction: float = 0.1, warmup: int = 0) -> float:
    left = 1 - _progress(step, total, warmup)
    return start * (final_fraction + (1 - final_fraction) * left) * _warmed(step, warmup)


def cosine(start: float, step: int, total: int, final_fraction: float = 0.1, warmup: int = 0) -> float:
    """Half a cosine wave, flat at both ends (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""
    left = (1 + math.cos(math.pi * _progress(step, total, warmup))) / 2
    return start * (final_fraction + (1 - final_fraction) * left) * _warmed(step, warmup)


def _warmed(step: int, warmup: int) -> float:
    # Never 0: ES refuses an lr of 0.
    return min((step + 1) / (warmup + 1), 1.0)


def _progress(step: int, total: int, warmup: int) -> float:
    """Rises from 0 in generation `warmup` to 1 in the last one; 0 if these are the same."""
    return min(max(step - warmup, 0) / max(total - 1 - warmup, 1), 1.0)


SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "linear": linear, "cosine": cosine}


def check_schedule(what: str, start: float, schedule: str, final_fraction: float) -> None:
    """ValueError, which names `what`, for an unknown schedule or one that leaves (0, start]. ES checks `start` itself.
    Here the final value must not become 0 as a float32, which would otherwise show hours after the run began."""
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise BadValue(f"{what}_schedule: expected one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
    number = isinstance(final_fraction, (int, float)) and not isinstance(final_fraction, bool)
    if not number or not 0 < final_fraction <= 1:
        raise BadValue(f"{what}_final_fraction: expected a number above 0 and at most 1, got {final_fraction!r}")
    if schedule != "constant" and isinstance(start, (int, float)) and 0 < start and start * final_fraction < 2.0**-149:
        raise BadValue(f"{what}_final_fraction: {final_fraction} of {start} is 0 as a float32")
