"""Low-rank noise of a matrix that K members share, and the operations that need no member's matrix.

Member k's linear layer is x W^T + (x B_k^T) A_k: one product for the rows of all members, and two thin ones for each
member's own. `Factors` stands where `stacked_model` has a stack of K weights. An operation that is not in `LOW_RANK`
gets the members' whole weights, made for that call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..core.ops import backend_report
from .member_ops import SHORT, BoundLinear, OfRows, Way
from .member_tensor import MemberTensor, rows_of_member


class Factors:
    """A weight shared by K members, and each one's low-rank noise of it. Index k gives member k's whole weight, in new
    memory; a slice gives the Factors of some members.

    weight  (rows, columns); a batch of matrices (n, rows, columns); or (rows, *others)
    a       (K, rank, rows), of a batch (K, rank, n, rows): with the factor sigma / sqrt(rank)
    b       (K, rank, columns), of a batch (K, rank, n, columns), else (K, rank, *others)
    """

    def __init__(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor):
        self.weight, self.a, self.b = weight, a, b
        self.dtype, self.device = weight.dtype, weight.device

    @classmethod
    def empty(cls, weight: torch.Tensor, members: int, rank: int) -> Factors:
        rows, columns = weight.shape[:1], weight.shape[1:]
        if weight.dim() == 3:
            rows, columns = weight.shape[:2], weight.shape[::2]
        return cls(weight, weight.new_empty(members, rank, *rows), weight.new_empty(members, rank, *columns))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.a), *self.weight.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """What members have of their own, by member."""
        return self.a, self.b

    @property
    def mT(self) -> Factors:
        return Factors(self.weight.mT, self.b, self.a)

    def __len__(self) -> int:
        return len(self.a)

    def __getitem__(self, which):
        if isinstance(which, slice):
            return Factors(self.weight, self.a[which], self.b[which])
        return self.whole_of(which)

    def whole_of(self, k: int) -> torch.Tensor:
        a, b = self.a[k].float(), self.b[k].float()
        noise = torch.einsum("qni,qnj->nij", a, b) if a.dim() == 3 else a.mT @ b.flatten(1)
        return (self.weight + noise.view(self.weight.shape)).to(self.dtype)

    def whole(self) -> torch.Tensor:
        """The weights of all members, (K, *shape)."""
        return torch.stack([self.whole_of(k) for k in range(len(self))])

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x @ weight of each member + bias, for x (K * rows, ..., rows of the matrix)."""
        return self.bound_product(None if bias is None else bias.unsqueeze(1))(x)

    def bound_product(self, bias: torch.Tensor | None) -> OfRows:
        """`product` as a function of x alone, for a bias (K, 1, columns)."""
        weight, a, b, members, (size, out) = self.weight, self.a.mT, self.b, len(self), self.weight.shape
        add = thin_product_for(self.a, self.b)
        # The kernel wants rows without gaps; a bias that is a part of a longer vector has some.
        bias = None if bias is None else bias.contiguous()

        def product(x: torch.Tensor) -> torch.Tensor:
            # Two dimensions: of a slice with more, such as each text's last token, PyTorch would multiply the matrix
            # with every row alone.
            rows = x.reshape(-1, size)
            if add is not None and rows.dtype == weight.dtype and not rows.requires_grad:
                y = rows @ weight
                add(y, rows if rows.stride(1) == 1 else rows.contiguous(), self.a, b, bias)
                return y.view(*x.shape[:-1], out)
            thin = torch.bmm(rows.view(members, -1, size), a)
            if bias is None:
                y = rows @ weight
                y.view(members, -1, out).baddbmm_(thin, b)
            else:
                y = torch.baddbmm(bias, thin, b).view(-1, out).addmm_(rows, weight)
            return y.view(*x.shape[:-1], out)

        return product


# Up to this rank a kernel of ours adds the noise. On an H200, for 30 members with 16 rows each and a matrix of 4864 x
# 896, it takes 5 us with rank 1, 11 with rank 4 and 11 with rank 16. Two batched products take 20, 18 and 13.
MOST_RANK = 16


def thin_product_for(a: torch.Tensor, b: torch.Tensor) -> Callable | None:
    """What adds (x A^T) B of all members at once to a tensor, in place; None where PyTorch's products must do it."""
    if a.device.type != "cuda" or a.shape[1] > MOST_RANK or not (a.is_contiguous() and b.is_contiguous()):
        return None
    return _thin_product(a.device)


@functools.cache
def _thin_product(device: torch.device) -> Callable | None:
    # Triton may be installed and yet not work: it needs a C compiler.
    if backend_report(device)["triton"] != "ready":
        return None
    from ..kernels.thin_product import add_thin_product

    return add_thin_product


def _are_factors(value) -> bool:
    return type(value) is MemberTensor and isinstance(value.held, Factors) and value.dim() == 2


def _are_vectors(value) -> bool:
    return value is None or (type(value) is MemberTensor and value.dim() == 1)


def _linear(args: tuple, kwargs: dict, dims: list) -> Way | None:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else None
    if kwargs or dims[0] != 0 or x.dim() < 2 or not _are_factors(weight) or not _are_vectors(bias):
        return None

    return BoundLinear(factored_linear)


def factored_linear(weight: MemberTensor, bias: MemberTensor | None) -> OfRows:
    held, b = weight.held, None if bias is None else bias.stack.unsqueeze(1)
    assert isinstance(held, Factors)
    members, product = len(held), held.mT.bound_product(b)

    def linear(x: torch.Tensor) -> torch.Tensor:
        rows_of_member(F.linear, x.shape[0], members, (weight, bias))
        return product(x)

    return linear


def _addmm(args: tuple, kwargs: dict, dims: list) -> Way | None:
    """Of Transformers' Conv1D: bias, rows, weight (in, out)."""
    if kwargs or len(args) != 3 or dims[1] != 0 or not _are_factors(args[2]) or not _are_vectors(args[0]):
        return None

    def way(func, args: tuple, kwargs: dict, first: MemberTensor) -> torch.Tensor:
        rows_of_member(func, args[1].shape[0], len(args[2].held), args)
        return args[2].held.product(args[1], args[0].stack)

    return way


def _matmul(args: tuple, kwargs: dict, dims: list) -> Way | None:
    if kwargs or len(args) != 2 or dims[0] != 0 or args[0].dim() < 2 or not _are_factors(args[1]):
        return None

    def way(func, args: tuple, kwargs: dict, first: MemberTensor) -> torch.Tensor:
        rows_of_member(func, args[0].shape[0], len(args[1].held), args)
        return args[1].held.product(args[0])

    return way


def _transpose(args: tuple, kwargs: dict, dims: list) -> Way | None:
    if kwargs or not _are_factors(args[0]) or sorted(d % 2 for d in args[1:] if isinstance(d, int)) not in ([], [0, 1]):
        return None

    def way(func, args: tuple, kwargs: dict, first: MemberTensor) -> MemberTensor:
        return MemberTensor.of(first.held.mT, first.weight, first.operations, f"{first.done}.mT")

    return way


def _embedding(args: tuple, kwargs: dict, dims: list) -> Way | None:
    """Not with max_norm, which would change the table."""
    if len(args) != 2 or not _are_factors(args[1]) or kwargs.get("max_norm") is not None or dims[0] not in (0, None):
        return None
    own_rows = dims[0] == 0

    def way(func, args: tuple, kwargs: dict, first: MemberTensor) -> torch.Tensor:
        ids, held = args[0], args[1].held
        members, rank = held.a.shape[:2]
        if own_rows:
            rows_of_member(func, ids.shape[0], members, args)
            found = F.embedding(ids, held.weight)
            mine = ids.reshape(members, 1, -1).expand(-1, rank, -1)
        else:
            found = F.embedding(ids, held.weight).repeat(members, *([1] * ids.dim()))
            mine = ids.reshape(1, 1, -1).expand(members, rank, -1)
        of_members = found.view(members, -1, found.shape[-1])
        of_members.baddbmm_(held.a.gather(2, mine).mT, held.b)
        if own_rows:
            return found
        stack = found.view(members, *ids.shape, found.shape[-1])
        return MemberTensor.of(stack, first.weight, first.operations, f"{first.done}.embedding")

    return way


def _or_stacked(way: Callable, func: Callable) -> Callable:
    """`way` for weights with factors, and the implementation in `member_ops` for others."""

    def find(args: tuple, kwargs: dict, dims: list) -> Way | None:
        found = way(args, kwargs, dims)
        has_factors = any(type(a) is MemberTensor and isinstance(a.held, Factors) for a in (*args, *kwargs.values()))
        return found if found is not None or has_factors or func not in SHORT else SHORT[func](args, kwargs, dims)

    return find


_FACTORED: dict[Callable, Callable] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), _matmul),
    **dict.fromkeys(
        (torch.t, torch.Tensor.t, torch.transpose, torch.Tensor.transpose)
        + tuple(getattr(torch.Tensor, name).__get__ for name in ("T", "mT")),
        _transpose,
    ),
}


def _nothing(args: tuple, kwargs: dict, dims: list) -> None:
    return None


LOW_RANK = {func: _or_stacked(_FACTORED.get(func, _nothing), func) for func in {**SHORT, **_FACTORED}}
