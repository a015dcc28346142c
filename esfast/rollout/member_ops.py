"""Implementations shorter than torch.vmap, for the operations that take most of a model's time: see `member_tensor`.

Each function gets an operation's arguments and the dimensions `dims` of their rows. It returns an implementation for
all members, or None to use vmap. The implementation gives each member the same sums as the operation alone: one batched
matrix product, one lookup in a longer table, one product with a broadcast weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .member_products import product_of
from .member_tensor import MemberTensor, rows_of_member

Way = Callable[..., torch.Tensor]


def _are_weights(*values) -> bool:
    return all(type(value) is MemberTensor for value in values)


# A function of an operation's rows alone, for the weights of certain members
OfRows = Callable[[torch.Tensor], torch.Tensor]
# The same, which is also told how many rows each member has
OfEqualRows = Callable[[torch.Tensor, int], torch.Tensor]


class BoundLinear:
    """How to do F.linear for all members.

    bind  gives the function of x for a weight and a bias or None, with all that needn't be done at every call
    """

    def __init__(self, bind: Callable[[MemberTensor, MemberTensor | None], OfRows]):
        self.bind = bind

    def __call__(self, func, args: tuple, kwargs: dict, first: MemberTensor) -> torch.Tensor:
        return self.bind(args[1], args[2] if len(args) > 2 else None)(args[0])


class OfOneWeight:
    """How to do an operation on one weight and rows, for all members. What needn't be done at every call is done once
    for a weight: of 480 rows a norm's product with its weight then takes 30 us instead of 48.

    at    which argument the rows are
    bind  gives the function of the rows for the operation and its weight. What is learned stays as long as the model:
          `bind` may keep no tensor. The function may keep views of the stack, whose memory CUDA graphs go on reading,
          and no tensor of its own; and not the weight, which keeps the function.
    """

    def __init__(self, at: int, bind: Callable[[Callable, MemberTensor], OfEqualRows]):
        self.at, self.bind = at, bind

    def __call__(self, func, args: tuple, kwargs: dict, first: MemberTensor) -> torch.Tensor:
        of_rows = first.bound.get(self)
        if of_rows is None:
            of_rows = first.bound[self] = self.bind(func, first)
        x = args[self.at]
        return of_rows(x, rows_of_member(func, x.shape[0], first.members, args))


def stacked_linear(weight: MemberTensor, bias: MemberTensor | None) -> OfRows:
    stack = weight.stack if weight.turned is None else weight.turned
    product = product_of(stack.mT, None if bias is None else bias.stack.unsqueeze(1))
    members = weight.members

    def linear(x: torch.Tensor) -> torch.Tensor:
        rows_of_member(F.linear, x.shape[0], members, (weight, bias))
        return product(x)

    return linear


def _linear(args: tuple, kwargs: dict, dims: list) -> Way | None:
    x, weight, bias = (*args, *[None] * (3 - len(args)))
    if kwargs or dims[0] != 0 or x.dim() < 2 or not _are_weights(weight) or not (bias is None or _are_weights(bias)):
        return None

    return BoundLinear(stacked_linear)


def _addmm(args: tuple, kwargs: dict, dims: list) -> Way | None:
    """Of Transformers' Conv1D: bias, rows, weight (in, out)."""
    if kwargs or len(args) != 3 or dims[1] != 0 or not _are_weights(args[0], args[2]) or args[0].dim() != 1:
        return None

    def way(func, args: tuple, kwargs: dict, first: MemberTensor) -> torch.Tensor:
        bias, x, w = args[0].stack, args[1], args[2].stack
        rows_of_member(func, x.shape[0], w.shape[0], args)
        return torch.baddbmm(bias[:, None], x.reshape(w.shape[0], -1, x.shape[-1]), w).view(x.shape[0], -1)

    return way


def _embedding(args: tuple, kwargs: dict, dims: list) -> Way | None:
    """One lookup in the joined tables of all members. Not with max_norm, which would change the table."""
    if len(args) != 2 or dims[0] != 0 or not _are_weights(args[1]) or kwargs.get("max_norm") is not None:
        return None
    return OfOneWeight(0, _bound_lookup)


def _bound_lookup(func, weight: MemberTensor) -> OfEqualRows:
    members, size, width = weight.stack.shape
    table = weight.stack.reshape(members * size, width)

    def of_rows(ids: torch.Tensor, rows: int) -> torch.Tensor:
        starts = torch.arange(0, members * size, size, device=ids.device)
        shifted = ids.reshape(members, rows, *ids.shape[1:]) + starts.view(-1, *[1] * ids.dim())
        return F.embedding(shifted.view(ids.shape), table)

    return of_rows


def _elementwise(args: tuple, kwargs: dict, dims: list) -> Way | None:
    """One weight and one tensor of rows, in either order; the weight is broadcast over the rows."""
    if kwargs or len(args) != 2 or _are_weights(*args) or not all(isinstance(a, torch.Tensor) for a in args):
        return None
    at = 0 if _are_weights(args[0]) else 1
    weight, x = args[at], args[1 - at]
    spans_rows = weight.dim() > x.dim() or (weight.dim() == x.dim() and weight.shape[:1] != (1,))
    if dims[1 - at] != 0 or spans_rows:
        return None
    dim = x.dim()

    def bind(func, weight: MemberTensor) -> OfEqualRows:
        members, *shape = weight.stack.shape
        wide = weight.stack.reshape(members, *[1] * (dim - len(shape)), *shape)

        def of_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
            mine = x.unflatten(0, (members, rows))
            return (func(mine, wide) if at else func(wide, mine)).flatten(0, 1)

        return of_rows

    return OfOneWeight(1 - at, bind)


def _layer_norm(args: tuple, kwargs: dict, dims: list) -> Way | None:
    if len(args) != 2 or dims[0] != 0 or not all(p is None or _are_weights(p) for p in map(kwargs.get, _AFFINE)):
        return None

    def way(func, args: tuple, kwargs: dict, first: MemberTensor) -> torch.Tensor:
        weight, bias = map(kwargs.get, _AFFINE)
        y = _by_member(func, F.layer_norm(*args, eps=kwargs["eps"]), first)
        y = y if weight is None else y * _wide(weight, y)
        y = y if bias is None else y + _wide(bias, y)
        return y.view(args[0].shape)

    return way


def _rms_norm(args: tuple, kwargs: dict, dims: list) -> Way | None:
    if len(args) != 2 or dims[0] != 0 or not _are_weights(kwargs.get("weight")):
        return None

    def way(func, args: tuple, kwargs: dict, first: MemberTensor) -> torch.Tensor:
        y = _by_member(func, F.rms_norm(*args, eps=kwargs["eps"]), first)
        return (y * _wide(kwargs["weight"], y)).view(args[0].shape)

    return way


_AFFINE = ("weight", "bias")


def _by_member(func, y: torch.Tensor, first: MemberTensor) -> torch.Tensor:
    members = first.stack.shape[0]
    return y.unflatten(0, (members, rows_of_member(func, y.shape[0], members, (first,))))


def _wide(weight: MemberTensor, y: torch.Tensor) -> torch.Tensor:
    stack = weight.stack
    return stack.view(stack.shape[0], *[1] * (y.dim() - stack.dim()), *stack.shape[1:])


SHORT: dict[Callable, Callable[[tuple, dict, list], Way | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    **dict.fromkeys(
        (torch.mul, torch.add, torch.sub, torch.div)
        + tuple(
            getattr(torch.Tensor, name)
            for name in "mul add sub div __mul__ __rmul__ __add__ __radd__ __sub__ __rsub__ __truediv__".split()
        ),
        _elementwise,
    ),
}
