"""MemberTensor: one weight of K members, in a model that answers rows of all K in one forward pass.

A `MemberTensor` looks like one member's weight (shape and dtype) and holds the stack of all K. Activations stay
ordinary tensors: rows k * B to (k + 1) * B belong to member k. An operation on a MemberTensor and activations gives
each member the result of its own weight and rows. `torch.vmap` does this for any operation; the few that take most of
the time have shorter implementations in `member_ops`.

The shape of an activation does not tell which dimension holds the rows: 32 may be rows or channels. So operations are
learned. The model first answers a few rows, whose number has a prime factor that divides no other dimension. Later
calls repeat what was learned for the same operation on the same weight. An operation that was not seen before is
refused.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..utils.errors import EsfastError
from ..utils.memory import out_of_memory

if TYPE_CHECKING:
    from .member_factors import Factors


class Unsupported(EsfastError, NotImplementedError):
    """An operation on weights that can't be done for several members in one call; the message names it."""


class Operations:
    """For each operation on a model's weights, how to do it for several members, as learned from a few rows.

    short  by function: looks for an implementation shorter than vmap, from the arguments; see `member_ops`
    prime  rows of each member while operations are learned, otherwise None
    known  by `_signature`: how to do the operation
    whole  bytes of a member's matrix, by weight, where operations need it and it has to be made of factors
    """

    def __init__(self, short: Mapping[Callable, Callable]):
        self.short = short
        self.prime: int | None = None
        self.known: dict[tuple, Callable] = {}
        self.whole: dict[str, int] = {}


class MemberTensor(torch.Tensor):
    """The values for K members of one weight, or of something computed from weights alone.

    held        a tensor (K, *shape), or the Factors from which it can be made
    stack       (K, *shape), made if need be
    weight      the weight's name without numbers, or several names
    label       the same, and what was done to it
    turned      the stack once more, as (K, out, in) that lies (K, in, out) in memory, for linear layers; or None
    operations  what is known of the model's operations
    bound       operations that are bound to this weight, see `member_ops.OfOneWeight`
    """

    held: torch.Tensor | Factors
    weight: str
    label: str
    operations: Operations
    bound: dict
    turned: torch.Tensor | None = None

    @staticmethod
    def of(held: torch.Tensor | Factors, weight: str, operations: Operations, done: str = "") -> MemberTensor:
        made = torch.Tensor._make_wrapper_subclass(MemberTensor, held.shape[1:], dtype=held.dtype, device=held.device)
        made.held, made.weight, made.label, made.operations = held, weight, weight + done, operations
        made.bound = {}
        return made

    @property
    def stack(self) -> torch.Tensor:
        return self.held if isinstance(self.held, torch.Tensor) else self.held.whole()

    @property
    def members(self) -> int:
        return len(self.held)

    @property
    def done(self) -> str:
        return self.label.removeprefix(self.weight)

    def __repr__(self, **options) -> str:
        return f"MemberTensor({self.label}, {self.members} members of {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise Unsupported(f"{func} of a weight")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in RETURNS_ITSELF and type(args[0]) is MemberTensor:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            if func in READS_NO_VALUES:
                return func(*args, **kwargs)
            leaves, key, first = _signature(func, args, kwargs)
            way = first.operations.known.get(key)
            if way is not None:
                return way(func, args, kwargs, first)
            return _learn(func, args, kwargs, leaves, key, first)


@functools.lru_cache(65536)
def label_of(name: str) -> str:
    """A parameter's name with `*` for numbers, since layers are alike, and so are experts, of which some see no row."""
    return re.sub(r"\b\d+\b", "*", name)


def operation_name(func) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def weights_of(leaves: Sequence) -> str:
    names = (name for leaf in leaves if type(leaf) is MemberTensor for name in leaf.weight.split(", "))
    return ", ".join(dict.fromkeys(names))


def rows_of_member(func, rows: int, members: int, leaves: Sequence) -> int:
    """Rows of each member; Unsupported if their number isn't the same for all."""
    if rows % members:
        raise Unsupported(
            f"{operation_name(func)} of {weights_of(leaves)} and {rows} rows: they must be as many for each of "
            f"{members} members"
        )
    return rows // members


def _getters(names: str) -> set:
    """The getters of tensor attributes that this version of PyTorch has."""
    return {getattr(torch.Tensor, name).__get__ for name in names.split() if hasattr(torch.Tensor, name)}


READS_NO_VALUES = frozenset(
    _getters(
        "shape dtype device ndim layout itemsize nbytes requires_grad grad grad_fn is_leaf is_cpu is_cuda is_meta "
        "is_mps is_xpu is_mkldnn is_nested is_quantized is_sparse is_sparse_csr retains_grad"
    )
    | {
        getattr(torch.Tensor, name)
        for name in (
            "size dim ndimension numel nelement element_size stride get_device is_contiguous is_floating_point "
            "is_complex is_conj is_neg __len__ __hash__"
        ).split()
    }
    | {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_conj, torch.is_neg}
)
RETURNS_ITSELF = frozenset(
    _getters("data") | {torch.detach, torch.Tensor.detach, torch.Tensor.requires_grad_, torch.Tensor.contiguous}
)


def _signature(func, args: tuple, kwargs: dict) -> tuple[Sequence, tuple, MemberTensor]:
    """The arguments as a list, a key that identifies this use of weights, and one of the weights."""
    leaves = [*args, *kwargs.values()] if kwargs else args
    for leaf in leaves:
        if isinstance(leaf, (list, tuple, dict)):
            leaves = tree_flatten((args, kwargs))[0]
            break
    key, first = [func, *kwargs], None
    for leaf in leaves:
        if type(leaf) is MemberTensor:
            key.append(leaf.label)
            first = leaf if first is None else first
        else:
            key.append(leaf.dim() if isinstance(leaf, torch.Tensor) else None)
    return leaves, tuple(key), first


def _learn(func, args: tuple, kwargs: dict, leaves: Sequence, key: tuple, first: MemberTensor):
    """Does an operation for the first time, and remembers how."""
    prime, members = first.operations.prime, first.members
    if prime is None:
        raise Unsupported(f"{operation_name(func)} of {weights_of(leaves)}, which the first look did not see")
    leaves = tree_flatten((args, kwargs))[0]
    dims = [
        divisible(leaf.shape, prime * members)
        if isinstance(leaf, torch.Tensor) and type(leaf) is not MemberTensor
        else None
        for leaf in leaves
    ]
    short = first.operations.short.get(func, lambda *_: None)(args, kwargs, dims)
    way = short or Mapped(func, args, kwargs, dims, leaves)
    result = (short or way.first)(func, args, kwargs, first)
    if all(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)):
        # An expert that gets no rows teaches nothing.
        first.operations.known[key] = way
        if not short:
            made = (leaf for leaf in leaves if type(leaf) is MemberTensor and not isinstance(leaf.held, torch.Tensor))
            first.operations.whole.update((leaf.weight, leaf.held.weight.nbytes) for leaf in made)
    return result


def divisible(shape: Sequence[int], number: int) -> int | None:
    """The first dimension that `number` divides."""
    return next((d for d, size in enumerate(shape) if size and size % number == 0), None)


def changes_its_argument(func) -> bool:
    name = operation_name(func)
    inplace_operator = name.startswith("__i") and name not in ("__int__", "__index__", "__invert__")
    return name == "__setitem__" or inplace_operator or (name.endswith("_") and not name.endswith("__"))


class Mapped:
    """An operation done for each member by torch.vmap.

    dims    for each argument the dimension of its rows; None for weights and for what all members share
    leaves  the arguments of the first call
    """

    def __init__(self, func, args: tuple, kwargs: dict, dims: list[int | None], leaves: Sequence):
        self.dims, self.weight = dims, weights_of(leaves)
        # for a result that is calculated from weights alone
        labels = (leaf.done for leaf in leaves if type(leaf) is MemberTensor)
        self.done = f"{''.join(labels)}.{operation_name(func)}"
        self.has_rows = any(dim is not None for dim in dims)
        self.inplace = changes_its_argument(func)
        # the dimension of the rows in each result, None where the result holds no rows
        self.out_dims: list[int | None] = []
        if kwargs.get("out") is not None:
            raise Unsupported(f"{operation_name(func)} of {self.weight} with out=")
        if self.inplace and type(args[0]) is MemberTensor:
            raise Unsupported(f"{operation_name(func)}, which changes the weight {self.weight}")

    def first(self, func, args: tuple, kwargs: dict, weight: MemberTensor):
        results, spec = tree_flatten(self._mapped(func, args, kwargs, weight.members))
        prime = weight.operations.prime
        self.out_dims = [divisible(r.shape[1:], prime) if isinstance(r, torch.Tensor) else None for r in results]
        return self._merged(results, spec, args, weight)

    def __call__(self, func, args: tuple, kwargs: dict, weight: MemberTensor):
        results, spec = tree_flatten(self._mapped(func, args, kwargs, weight.members))
        return self._merged(results, spec, args, weight)

    def _mapped(self, func, args: tuple, kwargs: dict, members: int):
        """The results of all members, each (K, ...)."""
        leaves, spec = tree_flatten((args, kwargs))
        places, given, in_dims = [], [], []
        for i, (leaf, dim) in enumerate(zip(leaves, self.dims, strict=True)):
            if type(leaf) is MemberTensor:
                places, given, in_dims = [*places, i], [*given, leaf.stack], [*in_dims, 0]
            elif dim is not None:
                rows = rows_of_member(func, leaf.shape[dim], members, leaves)
                places, given = [*places, i], [*given, leaf.unflatten(dim, (members, rows))]
                in_dims.append(dim)

        def of_one_member(*mine):
            inside = list(leaves)
            for i, value in zip(places, mine, strict=True):
                inside[i] = value
            own_args, own_kwargs = tree_unflatten(inside, spec)
            result = func(*own_args, **own_kwargs)
            # An in-place operation has changed its argument already.
            return () if self.inplace else result

        try:
            with warnings.catch_warnings():
                # vmap warns that it does some operations for one member after another.
                warnings.filterwarnings("ignore", "There is a performance drop")
                return torch.vmap(of_one_member, tuple(in_dims))(*given)
        except Exception as error:
            if out_of_memory(error):
                raise
            first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise Unsupported(f"{operation_name(func)} of {self.weight}: {first_line:.200}") from error

    def _merged(self, results: list, spec, args: tuple, weight: MemberTensor):
        if self.inplace:
            return args[0]
        merged = [self._merge(result, dim, weight) for result, dim in zip(results, self.out_dims, strict=True)]
        return tree_unflatten(merged, spec)

    def _merge(self, result, dim: int | None, weight: MemberTensor):
        if not isinstance(result, torch.Tensor):
            return result
        if dim is None:
            return MemberTensor.of(result, self.weight, weight.operations, self.done)
        if self.has_rows:
            return result.movedim(0, dim).flatten(dim, dim + 1)
        # A weight that the model repeated for all rows of the batch: each member keeps its own rows.
        rows, rest = divmod(result.shape[dim + 1], len(result))
        if rest:
            raise Unsupported(f"{self.weight} repeated {result.shape[dim + 1]} times for {len(result)} members")
        own = [of_member.narrow(dim, k * rows, rows) for k, of_member in enumerate(result)]
        return torch.cat(own, dim)
