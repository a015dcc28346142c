"""The factors of low-rank noise alone, written into buffers such as the LoRA slots of an inference engine."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..utils.errors import BadType, BadValue
from ..utils.suggest import unknown
from .kinds import check_rank
from .noise import factor_names, low_rank_scale, matrices_of
from .ops import add_noise_, check_members, get_backend
from .plan import Plan
from .segments import Entry, Slice, check_overlap, describe


def low_rank_factors(
    plan: Plan,
    seed: int,
    rank: int = 1,
    *,
    out: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    coeff: float = 1.0,
    backend: str = "auto",
) -> None:
    """Writes the factors of low-rank noise into buffers, in place: for a matrix W, `a.T @ b` is coeff * noise(seed).

    They are the numbers that `add_noise_(noise="low_rank")` uses, rounded to the buffers' dtypes: `a` is A times
    float32(coeff / sqrt(rank)), `b` is B. A LoRA adapter computes x @ lora_a.T @ lora_b.T, so for it give
    `out={name: (lora_b.T, lora_a)}`; then the adapter's scaling must be 1.

    Args:
        plan: the weights whose noise it is. A slice or a shard gets the factors of its rows and columns.
        seed: 0 <= seed < 2**64.
        rank: 1 to 256.
        out: a dict from names of matrices of the plan (all or some) to buffers (a, b): float32, bfloat16 or float16, on
            one device, of any strides. For a matrix [rows, cols] a is [rank, rows] and b is [rank, cols]. For a batch
            of matrices [n, rows, cols] a is [rank, n, rows] and b is [rank, n, cols]. For a tensor with four or more
            dimensions a is [rank, first] and b is [rank, *others].
        coeff: factor of the noise, such as sigma; with -sigma it is the mirrored member.
        backend: as in `add_noise_`.

    Raises:
        TypeError, ValueError: an argument outside the above, a name that the plan doesn't have or that is no matrix, or
            a buffer of another shape. No buffer was changed.
    """
    FactorBuffers(plan, rank, out).write(seed, coeff, backend)


class FactorBuffers:
    """Buffers for the low-rank factors of a plan's matrices. They are checked once; `write` then fills them with the
    factors of one member after another. See `low_rank_factors`."""

    def __init__(self, plan: Plan, rank: int, out: Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
        if not isinstance(plan, Plan):
            raise BadType(f"plan: expected an esfast.Plan, got {type(plan).__name__}; write esfast.Plan(model)")
        self.rank = check_rank("low_rank", rank)
        if not isinstance(out, Mapping) or not out:
            raise BadType(f"out: expected a dict of (a, b) buffers by the name of their matrix, got {out!r:.80}")
        by_name: dict[str, list[Entry]] = {}
        # Also empty shards: their matrices have factors, of which one is empty.
        for e in plan._held:
            by_name.setdefault(e.name, []).append(e)
        # The table itself is not used here; making it checks that no two factors have the same numbers.
        plan.table(matrices=True)
        items = [item for name, buffers in out.items() for item in self._items(name, by_name, buffers)]
        both = Plan(items)
        if len(both) < sum(buffer.numel() > 0 for _, buffer, _ in items):
            raise BadValue("out: a buffer is given twice; each factor needs its own")
        memory = {t.untyped_storage().data_ptr() for t in plan.tensors}
        if any(t.untyped_storage().data_ptr() in memory for t in both.tensors):
            try:
                check_overlap(both.entries + plan.entries, both.table(), plan.table())
            except BadValue as error:
                raise BadValue(f"out: buffers can't be in the memory of the plan's weights ({error})") from None
        self.a, self.b = (
            both.subset([i for i, e in enumerate(both.entries) if e.name in names])
            for names in zip(*map(factor_names, out), strict=True)
        )

    def _items(self, name: str, by_name: Mapping[str, list[Entry]], buffers) -> list[tuple]:
        """Checks the buffers of one matrix; returns (name, buffer, Slice) of factors A and B, for a Plan."""
        if name not in by_name:
            raise BadValue(f"out: {unknown('tensor', name, by_name)}")
        entry, *others = by_name[name]
        if others:
            raise BadValue(f"out: the plan has {name!r} in {len(others) + 1} pieces; give a Plan of one of them")
        window = entry.window
        if matrices_of(window.shape) is None:
            raise BadValue(
                f"out: {describe(entry)} is no matrix, so low-rank noise has no factors for it; it gets gaussian noise "
                "of its own (add_noise_)"
            )
        if not isinstance(buffers, (tuple, list)) or len(buffers) != 2:
            raise BadType(f"out: expected a pair of buffers (a, b) for {name!r}, got {buffers!r:.80}")
        dims = range(len(window.shape))
        # A has the matrix's rows, B its columns. Both have the first dimension of a batch.
        rows = 1 if len(dims) == 3 else 0
        kept = [dims[: rows + 1], [d for d in dims if d != rows]]
        rank, items = self.rank, []
        for side, virtual, buffer, mine in zip("ab", factor_names(name), buffers, kept, strict=True):
            shape, offset, whole = (
                (first, *(source[d] for d in mine))
                for first, source in ((rank, entry.tensor.shape), (0, window.offset), (rank, window.shape))
            )
            if not isinstance(buffer, torch.Tensor):
                raise BadType(f"out: {side} of {name!r} must be a torch.Tensor, got {type(buffer).__name__}")
            if tuple(buffer.shape) != shape:
                raise BadValue(
                    f"out: {side} of {name!r} must have the shape {shape} for {describe(entry)}, "
                    f"got {tuple(buffer.shape)}"
                )
            items.append((virtual, buffer, Slice(whole, offset)))
        return items

    def write(self, seed: int, coeff: float = 1.0, backend: str = "auto") -> None:
        """Writes the factors of one member."""
        _, coeffs = check_members([seed], [coeff])
        get_backend(backend, self.a.device)
        for plan, factors in ((self.a, coeffs * low_rank_scale(self.rank)), (self.b, [1.0])):
            if len(plan):
                with torch.no_grad():
                    torch._foreach_zero_(plan.tensors)
                add_noise_(plan, [seed], list(factors), backend=backend)
