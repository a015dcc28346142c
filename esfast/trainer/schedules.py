"""Schedules of lr and sigma: pure functions of the generation's number, so that a run can be taken up anywhere.

All have one form, f(start, step, total, final_fraction, warmup) -> float:

    start            the value in full, > 0
    step             number of the generation, 0 <= step
    total            generations of the run, > warmup; from generation total - 1 on, the value is that of the end
    final_fraction   the end's share of start, > 0 and at most 1; `constant` has no use for it
    warmup           so many first generations are below start: 1, 2, ... of warmup + 1 parts of it

The value at full height is reached in generation `warmup` and is start to the bit; the last generation's is start *
final_fraction. ESConfig calls check_schedule for them; they check nothing themselves.
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
    """Half a wave, flat at both ends (Loshchilov and Hutter, arXiv 1608.03983, without restarts)."""
    left = (1 + math.cos(math.pi * _progress(step, total, warmup))) / 2
    return start * (final_fraction + (1 - final_fraction) * left) * _warmed(step, warmup)


def _warmed(step: int, warmup: int) -> float:
    return min((step + 1) / (warmup + 1), 1.0)  # never 0: ES has no use for a generation that learns nothing


def _progress(step: int, total: int, warmup: int) -> float:
    """From 0 in generation `warmup` to 1 in the last; if they are the same, the value stays at full height."""
    return min(max(step - warmup, 0) / max(total - 1 - warmup, 1), 1.0)


SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "linear": linear, "cosine": cosine}


def check_schedule(what: str, start: float, schedule: str, final_fraction: float) -> None:
    """ValueError that names `what` if there is no such schedule, or if it would leave (0, start]. `start` itself is
    for ES to check; here it only must not vanish, as a float32, on the way to its end, hours after the run began."""
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise BadValue(f"{what}_schedule: expected one of {', '.join(map(repr, SCHEDULES))}, got {schedule!r}")
    number = isinstance(final_fraction, (int, float)) and not isinstance(final_fraction, bool)
    if not number or not 0 < final_fraction <= 1:
        raise BadValue(f"{what}_final_fraction: expected a number above 0 and at most 1, got {final_fraction!r}")
    if schedule != "constant" and isinstance(start, (int, float)) and 0 < start and start * final_fraction < 2.0**-149:
        raise BadValue(f"{what}_final_fraction: {final_fraction} of {start} is 0 as a float32")
