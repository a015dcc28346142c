"""`low_rank`: one set of weights that answers for several members of a population in one forward pass.

    with esfast.low_rank(model, [(seed, sigma) for seed in seeds], rank=1):
        y = model(x)      # x has K * B rows; rows k * B to (k + 1) * B are answered by member k

A member's matrix is the model's plus a product of two thin factors, so a member takes the memory of its factors and of
its vectors (norms, biases). The model's matrices are read once for all members. A matrix that is used otherwise than in
a matrix product or a lookup is made whole for each member, for that one call.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..core.factors import FactorBuffers
from ..core.noise import matrices_of
from ..core.plan import Plan
from ..update.optimizers import Group, check_groups
from ..update.updater import Rule
from .member_factors import LOW_RANK, Factors
from .stacked_model import StackedModel, check_pairs

__all__ = ["LowRankModel", "low_rank"]


@contextlib.contextmanager
def low_rank(
    model: torch.nn.Module | Plan,
    members: Iterable[tuple[int, float]],
    rank: int = 1,
    rounding: str = "nearest",
    groups: Sequence[Group | str] = (),
    backend: str = "auto",
) -> Iterator[torch.nn.Module]:
    """Lets a model answer for K members with low-rank noise at once, inside a `with` block.

    Like `stacked(noise="low_rank")`, but all members share the matrices. A member's answers are those of
    `perturbed(noise="low_rank")` up to rounding, since the sums have another order.

    Args:
        model: an nn.Module, or a Plan of one. The tensors of its first call in a block must have the rows in dimension
            0. A language model generates a few tokens before the block, to find out how its operations are shared;
            meanwhile it takes the memory of its weights a second time.
        members: (seed, sigma) for each of the K members; -sigma gives the mirrored member.
        rank: of the noise, 1 to 256.
        rounding: of the vectors, as in `add_noise_`.
        groups, backend: as in `stacked`.

    Yields:
        The module.

    Raises:
        TypeError, ValueError, Unsupported: as `stacked`.
    """
    members = check_pairs(members)
    rule = Rule(noise="low_rank", groups=check_groups(groups), rank=rank)
    together = LowRankModel(model, len(members), None, rule, rounding, backend)
    together.write(members)
    together.check()
    with together.in_place():
        yield together.module


class LowRankModel(StackedModel):
    """Memory for the factors and vectors of `at_once` members; see StackedModel. The matrices are the model's, also if
    there is a base."""

    short = LOW_RANK
    noise = "low_rank"
    # 5 MB more: the product of all rows with a shared matrix copies blocks of both, to memory that it keeps.
    workspaces = 8_000_000

    def _write(self, terms: list[tuple[int, float]], noise: list[tuple[np.ndarray, np.ndarray]]) -> None:
        super()._write(terms, noise)
        for (seed, coeff), of_member in zip(terms, self._buffers, strict=False):
            for factor, buffers in of_member:
                buffers.write(seed, factor * coeff, self._options["backend"])

    def _allocate(self, at_once: int, rule: Rule) -> list[torch.Tensor | Factors]:
        entries, pieces = self.plan.entries, Counter(self.plan.names)
        held = {
            e.name: Factors.empty(e.tensor.detach(), at_once, rule.rank)
            for e in entries
            if matrices_of(e.window.shape) is not None and pieces[e.name] == 1
        }
        numbers = [i for i, e in enumerate(entries) if e.name in held]
        parts = rule.by_group(self.plan.subset(numbers)) if numbers else []

        def buffers(part: Plan, k: int) -> FactorBuffers:
            return FactorBuffers(part, rule.rank, {n: (held[n].a[k], held[n].b[k]) for n in part.names})

        # of each member (factor of sigma, its buffers) by group
        self._buffers = [[(group.sigma, buffers(part, k)) for group, part in parts] for k in range(at_once)]
        return [held[e.name] if e.name in held else e.tensor.new_empty(at_once, *e.tensor.shape) for e in entries]
