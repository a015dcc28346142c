"""`perturbed`: one perturbed model for the time of a block, for loops that keep their own books."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator

import torch

from ..core.ops import add_noise_
from ..core.plan import Plan
from .buffers import Buffers


@contextlib.contextmanager
def perturbed(
    model: torch.nn.Module | Plan | Iterable[tuple],
    seed: int,
    sigma: float,
    base: Plan | None = None,
    noise: str = "gaussian",
    backend: str = "auto",
) -> Iterator[Plan]:
    """Inside the block the weights are round(weights + sigma * noise(seed)); after it, however it is left, they are the
    same bits as before, and so are the buffers of a module (see es/buffers.py). Blocks may be nested. What is loaded
    into the model inside a block is gone after it.

        with esfast.perturbed(model, seed, sigma):
            reward = evaluate(model)

    Args:
        model: an nn.Module, a Plan, or an iterable of (name, tensor).
        seed: 0 <= seed < 2**64.
        sigma: factor of the noise, in units of the weights; with -sigma it is the mirrored member.
        base: a copy of the weights (`plan.clone()`), which members are written from and restored to; make a new one
            after other weights were loaded into the model. Without one each block makes a copy of its own: one more
            pass over the weights, and memory to fetch.
        noise, backend: as in `add_noise_`.

    Yields the Plan. Raises TypeError or ValueError for what Plan and `add_noise_` refuse, before any weight changes.
    """
    plan = model if isinstance(model, Plan) else Plan(model)
    plan.check_module()
    truth = plan.clone() if base is None else base
    options = {"base": truth, "noise": noise, "backend": backend}
    plan.table(truth)  # a base that does not fit must not be restored from
    with unchanged_buffers(plan):
        try:
            add_noise_(plan, [seed], [sigma], **options)
            yield plan
        finally:
            try:
                add_noise_(plan, [], [], **options)
            except KeyboardInterrupt:  # pressed in the very moment of restoring: finish that, then obey
                add_noise_(plan, [], [], **options)
                raise


_IDLE: weakref.WeakKeyDictionary[Plan, Buffers] = weakref.WeakKeyDictionary()  # copies are kept for a plan's next block


@contextlib.contextmanager
def unchanged_buffers(plan: Plan) -> Iterator[None]:
    """After the block the buffers of the plan's module are as before it."""
    buffers = _IDLE.pop(plan, None) or Buffers(plan)  # of nested blocks each has its own
    buffers.note()
    try:
        yield
    finally:
        buffers.put_back()
        _IDLE[plan] = buffers
