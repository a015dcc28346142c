"""`perturbed`: a perturbed model for the time of a block, for loops that choose seeds and coefficients themselves."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

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
    rank: int = 1,
) -> Iterator[Plan]:
    """Perturbs a model inside a `with` block.

    Inside the block the weights are round(weights + sigma * noise(seed)). After it, however it is left, they have the
    same bits as before, and so have the buffers of a module (see es/buffers.py). Blocks may be nested. Weights that are
    loaded into the model inside a block are lost after it.

        with esfast.perturbed(model, seed, sigma):
            reward = evaluate(model)

    Args:
        model: an nn.Module, a Plan, or an iterable of (name, tensor).
        seed: 0 <= seed < 2**64.
        sigma: factor of the noise, in units of the weights. -sigma gives the mirrored member.
        base: a copy of the weights (`plan.clone()`), from which the member is written and restored. Make a new one
            after loading other weights into the model. Without a base each block makes its own copy, which costs one
            more pass over the weights and the allocation.
        noise, rank, backend: as in `add_noise_`.

    Yields:
        The Plan.

    Raises:
        TypeError, ValueError: Plan or `add_noise_` refuses an argument. No weight has changed.
    """
    plan = model if isinstance(model, Plan) else Plan(model)
    plan.check_module()
    base = plan.clone() if base is None else base
    options: dict[str, Any] = {"base": base, "noise": noise, "rank": rank, "backend": backend}
    # Check that the base fits before anything is written: the restore reads it.
    plan.table(base)
    with unchanged_buffers(plan):
        try:
            add_noise_(plan, [seed], [sigma], **options)
            yield plan
        finally:
            try:
                add_noise_(plan, [], [], **options)
            except KeyboardInterrupt:
                # Ctrl-C while restoring: finish the restore, then raise.
                add_noise_(plan, [], [], **options)
                raise


# Copies of a plan's buffers are kept for its next block.
_IDLE: weakref.WeakKeyDictionary[Plan, Buffers] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def unchanged_buffers(plan: Plan) -> Iterator[None]:
    """Restores the buffers of the plan's module after the block."""
    # Nested blocks have a copy each.
    buffers = _IDLE.pop(plan, None) or Buffers(plan)
    buffers.note()
    try:
        yield
    finally:
        buffers.put_back()
        _IDLE[plan] = buffers
