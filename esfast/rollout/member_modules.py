"""Replaces a module's weights, and calls modules for one member after another.

`Places` puts tensors in the places of a module's parameters and takes them away again; the parameters themselves are
not written. `OneByOne` is for a module with an operation that members can't share, such as experts to which each member
sends other rows: it is called for each member, while the modules around it answer for all members at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.plan import Plan
from ..utils.errors import BadValue
from .member_factors import Factors
from .member_tensor import Operations, Unsupported, divisible, label_of

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Places:
    """The places in a module, its submodules included, that hold a plan's tensors.

    It finds parameters, and the same tensors in other attributes, lists and dicts, as LSTMs keep them.
    Raises ValueError for a tensor of the plan without a place in the module, and for attributes that are views of one.
    """

    def __init__(self, module: torch.nn.Module, plan: Plan):
        self._numbers = {_place(t): i for i, t in enumerate(plan.tensors)}
        self._memory = {t.untyped_storage().data_ptr(): i for i, t in enumerate(plan.tensors)}
        # of each module (container, key, number of the tensor)
        self._found = [(m, p) for name, m in module.named_modules() for p in self._places_in(m, name, plan.names)]
        self._before = [container[key] for _, (container, key, _) in self._found]
        missing = set(range(len(plan))) - {number for _, (_, _, number) in self._found}
        if missing:
            name = plan.names[min(missing)]
            raise BadValue(f"stacked: {name!r} of the plan is no parameter of this {type(module).__name__}")

    def inside(self, module: torch.nn.Module) -> list[tuple]:
        modules = set(map(id, module.modules()))
        return [place for m, place in self._found if id(m) in modules]

    def numbers(self, kind: Callable[[torch.nn.Module, object], bool]) -> set[int]:
        """Of tensors all of whose places are such that kind(module, key)."""
        others = {number for module, (_, key, number) in self._found if not kind(module, key)}
        return {number for _, (_, _, number) in self._found} - others

    def put(self, values: Sequence[torch.Tensor]) -> None:
        """Puts values[i] in the places of tensor i of the plan."""
        fill((place for _, place in self._found), values.__getitem__)

    def restore(self) -> None:
        for (_, (container, key, _)), tensor in zip(self._found, self._before, strict=True):
            container[key] = tensor

    def _places_in(self, module: torch.nn.Module, name: str, names: Sequence[str]) -> Iterator[tuple]:
        attributes = vars(module)
        inner = [v for k, v in attributes.items() if isinstance(v, (list, dict)) and k not in ("_modules", "_buffers")]
        for container in (attributes, *inner):
            keys = range(len(container)) if isinstance(container, list) else list(container)
            for key in keys:
                tensor = container[key]
                if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                    continue
                number = self._numbers.get(_place(tensor))
                if number is not None:
                    yield container, key, number
                elif tensor.numel() and (owner := self._memory.get(tensor.untyped_storage().data_ptr())) is not None:
                    if container is not attributes.get("_parameters"):
                        raise BadValue(
                            f"stacked: {name or 'the model'} keeps a view of the weight {names[owner]!r} in "
                            f"{key!r}, which no member's weights could replace"
                        )


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def fill(places: Iterable[tuple], value_of: Callable[[int], torch.Tensor]) -> None:
    for container, key, number in places:
        container[key] = value_of(number)


class OneByOne:
    """The `forward` of a module that is called for each member with its own weights and rows.

    stacks   for each weight of the plan (K, *shape), or Factors
    tensors  the MemberTensors in the weights' places between calls
    known    by label and arguments: the dimensions of rows in the arguments and in the results
    """

    def __init__(
        self,
        module: torch.nn.Module,
        path: str,
        places: Places,
        stacks: Sequence[torch.Tensor | Factors],
        tensors: Sequence[torch.Tensor],
        operations: Operations,
        known: dict,
    ):
        self.module, self.path, self._forward = module, path, module.forward
        self._places, self._stacks, self._tensors = places.inside(module), stacks, tensors
        self._operations, self._known = operations, known

    def __call__(self, *args, **kwargs):
        leaves, spec = tree_flatten((args, kwargs))
        key = (label_of(self.path), *(x.dim() if isinstance(x, torch.Tensor) else None for x in leaves))
        dims, out_dims = self._known.get(key, (None, None))
        if dims is None:
            dims = self._learn(leaves)
        members, results = len(self._stacks[0]), []
        try:
            for k in range(members):
                fill(self._places, lambda number, k=k: self._stacks[number][k])
                own_args, own_kwargs = tree_unflatten(self._own(leaves, dims, k, members), spec)
                results.append(tree_flatten(self._forward(*own_args, **own_kwargs)))
        finally:
            fill(self._places, self._tensors.__getitem__)
        lists = [found for found, _ in results]
        if out_dims is None:
            prime = self._operations.prime
            out_dims = [divisible(x.shape, prime) if isinstance(x, torch.Tensor) else None for x in lists[0]]
            if all(x.numel() for x in leaves if isinstance(x, torch.Tensor)):
                self._known[key] = dims, out_dims
        merged = [self._merge(of_members, dim) for dim, *of_members in zip(out_dims, *lists, strict=True)]
        return tree_unflatten(merged, results[0][1])

    def _learn(self, leaves: Sequence) -> list[int | None]:
        prime = self._operations.prime
        if prime is None:
            raise Unsupported(f"{self.path} with arguments that the first look did not see")
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, *PLAIN)):
                raise Unsupported(f"{self.path}, which is handed a {type(leaf).__name__} of all members' rows")
        dims = [
            divisible(x.shape, prime * len(self._stacks[0])) if isinstance(x, torch.Tensor) else None for x in leaves
        ]
        if all(dim is None for dim in dims):
            raise Unsupported(f"{self.path}, which is handed no rows")
        return dims

    def _own(self, leaves: Sequence, dims: Sequence[int | None], k: int, members: int) -> list:
        own = []
        for leaf, dim in zip(leaves, dims, strict=True):
            if dim is not None:
                rows, rest = divmod(leaf.shape[dim], members)
                if rest:
                    raise Unsupported(f"{self.path} of {leaf.shape[dim]} rows for {members} members")
                leaf = leaf.narrow(dim, k * rows, rows)
            own.append(leaf)
        return own

    def _merge(self, results: Sequence, dim: int | None):
        if dim is not None:
            return torch.cat(results, dim)
        if all(isinstance(r, PLAIN) and r == results[0] for r in results):
            return results[0]
        raise Unsupported(f"{self.path}, which gives something of its own for each member")


def modules_on_the_way(error: BaseException) -> list[torch.nn.Module]:
    """The modules that were running when the error was raised, the innermost last."""
    found: list[torch.nn.Module] = []
    traceback = error.__traceback__
    while traceback is not None:
        caller = traceback.tb_frame.f_locals.get("self")
        caller = caller.module if isinstance(caller, OneByOne) else caller
        if isinstance(caller, torch.nn.Module) and not any(caller is m for m in found):
            found.append(caller)
        traceback = traceback.tb_next
    return found


# ---- which module's answers differ ----------------------------------------------------------------------------------

Call = tuple[str, int, list[torch.Tensor], list[torch.Tensor]]
SAME = 1e-3


@contextlib.contextmanager
def recorded(module: torch.nn.Module) -> Iterator[list[Call]]:
    """In the block each call of a submodule is noted when it returns: its path, which call of it, the tensors that it
    got, and those that it gave."""
    calls: list[Call] = []
    given: dict[str, list] = {}
    counts: dict[str, int] = {}

    def before(path: str) -> Callable:
        def note(module, args, kwargs) -> None:
            given[path] = _tensors((args, kwargs))

        return note

    def after(path: str) -> Callable:
        def note(module, args, kwargs, result) -> None:
            counts[path] = counts.get(path, 0) + 1
            calls.append((path, counts[path], given.pop(path, []), _tensors(result)))

        return note

    handles = []
    try:
        for path, each in module.named_modules():
            if path:
                handles.append(each.register_forward_pre_hook(before(path), with_kwargs=True))
                handles.append(each.register_forward_hook(after(path), with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def first_difference(alone: Sequence[Call], together: Sequence[Call]) -> str | None:
    """The path of the first module that was given the same for the first member in both, and gave something else."""
    found = {call[:2]: call for call in together}
    for path, count, given, gave in alone:
        other = found.get((path, count))
        if other is not None and _agree(given, other[2]) and _agree(gave, other[3]) is False:
            return path
    return None


def rows_of_one(k: int, alone: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """Member k's part of a result for two members; `alone` is that of one. A result without rows is returned as is."""
    dim = next((d for d, (m, n) in enumerate(zip(alone.shape, both.shape)) if n == 2 * m), None)  # noqa: B905
    return both if dim is None else both.narrow(dim, k * alone.shape[dim], alone.shape[dim])


def _agree(alone: Sequence[torch.Tensor], together: Sequence[torch.Tensor]) -> bool | None:
    """Whether the first half of the rows is the same as alone; None where they can't be compared."""
    if len(alone) != len(together):
        return None
    for one, both in zip(alone, together, strict=True):
        both = rows_of_one(0, one, both)
        if one.shape != both.shape:
            return None
        if not one.is_floating_point():
            if not torch.equal(one, both):
                return False
            continue
        one, both = (t.float().nan_to_num(0, 0, 0) for t in (one, both))
        if (one - both).square().mean().sqrt() > SAME * one.square().mean().sqrt():
            return False
    return True


def _tensors(values) -> list[torch.Tensor]:
    return [x.detach().clone() for x in tree_flatten(values)[0] if type(x) is torch.Tensor]
