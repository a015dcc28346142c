"""From a source to the tensors of a Plan: names, patterns, and what is refused."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..utils.errors import BadType, BadValue
from ..utils.unwrap import named_parameters
from .noise import check_int, factor_names, matrices_of, tensor_id
from .segments import FORMATS, Entry, Slice, describe

# Elements of a whole tensor, at most. The last tile may end beyond the last element, and its numbers must fit an int64.
MAX_NUMEL = 2**62


def entries(source) -> list[Entry]:
    """The entries of a module, or of an iterable of (name, tensor) or (name, tensor, Slice). TypeError or ValueError
    for anything else."""
    if isinstance(source, torch.nn.Module):
        items: Iterable = named_parameters(source)
    elif isinstance(source, Iterable) and not isinstance(source, (torch.Tensor, str, dict)):
        items = source
    else:
        hint = " (pass .items())" if isinstance(source, dict) else ""
        raise BadType(
            f"Plan: expected an nn.Module or an iterable of (name, tensor) pairs, got {type(source).__name__}{hint}"
        )
    entries = []
    for item in items:
        if not isinstance(item, tuple) or len(item) not in (2, 3):
            raise BadType(f"Plan: expected (name, tensor) or (name, tensor, Slice), got {item!r:.80}")
        name, tensor = item[:2]
        if not isinstance(name, str) or not name:
            raise BadType(f"Plan: a tensor's name must be a non-empty str, got {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise BadType(f"Plan: {name!r} must be a torch.Tensor, got {type(tensor).__name__}")
        # Before its shape is read, which a nested tensor does not have.
        if tensor.is_nested:
            raise BadType(f"Plan: {name!r} is a nested tensor; pass the tensors inside it, or exclude it")
        window = item[2] if len(item) == 3 else None
        entries.append(Entry(name, tensor, _check_window(name, tensor, window)))
    return entries


def _check_window(name: str, tensor: torch.Tensor, window: Slice | None) -> Slice:
    if window is None:
        return Slice(tuple(tensor.shape), (0,) * tensor.dim())
    if not isinstance(window, Slice):
        raise BadType(f"Plan: the third item of {name!r} must be an esfast.Slice, got {type(window).__name__}")
    if not all(isinstance(x, Iterable) for x in (window.shape, window.offset)):
        raise BadType(
            f"Plan: the Slice of {name!r} needs one number a dimension, "
            f"got shape {window.shape!r} and offset {window.offset!r}"
        )
    shape = tuple(check_int(f"Slice.shape of {name!r}", n, 0, 2**63) for n in window.shape)
    offset = tuple(check_int(f"Slice.offset of {name!r}", n, 0, 2**63) for n in window.offset)
    if not len(shape) == len(offset) == tensor.dim():
        raise BadValue(
            f"Plan: {name!r} has {tensor.dim()} dimensions, but its Slice has shape {shape} and offset {offset}"
        )
    for d, (size, start, whole) in enumerate(zip(tensor.shape, offset, shape, strict=True)):
        if start + size > whole:
            raise BadValue(
                f"Plan: {name!r} reaches outside its whole in dimension {d}: offset {start} + size {size} > {whole}"
            )
    if math.prod(shape) > MAX_NUMEL:
        raise BadValue(f"Plan: the whole of {name!r}, {shape}, has more than 2**62 elements, too many to number")
    return Slice(shape, offset)


def select(entries: list[Entry], include, exclude) -> list[Entry]:
    """Entries whose names match a pattern of `include` and none of `exclude`. ValueError if a pattern matches
    nothing."""
    names = [e.name for e in entries]

    def matching(what: str, patterns) -> set[str]:
        found: set[str] = set()
        globs = [patterns] if isinstance(patterns, str) or not isinstance(patterns, Iterable) else list(patterns)
        if not all(isinstance(glob, str) for glob in globs):
            raise BadType(f"Plan: {what}: expected a glob pattern or a list of them, got {patterns!r:.80}")
        for pattern in globs:
            hits = {n for n in names if fnmatch.fnmatchcase(n, pattern)}
            if not hits:
                close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
                example = f"; a name here is {(close or names)[0]!r}" if names else ""
                raise BadValue(f"Plan: the {what} pattern {pattern!r} matches no tensor{example}")
            found |= hits
        return found

    kept = matching("include", include) if include is not None else set(names)
    kept -= matching("exclude", exclude) if exclude is not None else set()
    selected = [e for e in entries if e.name in kept]
    if not selected:
        raise BadValue(
            "Plan: no tensors selected" + (" (include and exclude leave nothing)" if names else ": the source has none")
        )
    return selected


def missing_parameter(module: torch.nn.Module, names: Iterable[str], tensors: Iterable[torch.Tensor]) -> str | None:
    """The first name whose tensor is not in the memory of the module's parameters; None if all are."""
    memory = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return next((n for n, t in zip(names, tensors) if t.untyped_storage().data_ptr() not in memory), None)  # noqa: B905


def check_tensor(entry: Entry) -> None:
    """TypeError or ValueError, with what to do, for a tensor that can't be perturbed."""
    name, tensor = entry.name, entry.tensor
    if is_traceable_wrapper_subclass(tensor):
        raise BadType(
            f"Plan: {name!r} is a {type(tensor).__name__}, which wraps other tensors; "
            "pass the tensors inside it, with a Slice where they are shards, or exclude it"
        )
    if tensor.layout is not torch.strided:
        raise BadType(f"Plan: {name!r} has layout {tensor.layout}; only dense (strided) tensors can be perturbed")
    if tensor.is_meta:
        raise BadValue(f"Plan: {name!r} is on the meta device and has no memory; load the weights first")
    if tensor.dtype not in FORMATS:
        why = "arithmetic is in float32" if tensor.dtype is torch.float64 else "only float weights can be perturbed"
        raise BadType(
            f"Plan: {name!r} is {tensor.dtype}, expected float32, bfloat16 or float16 ({why}); "
            "convert it, or leave it out with exclude="
        )
    if tensor.is_neg():
        raise BadType(f"Plan: {name!r} is a view whose sign is only turned on reading; pass .resolve_neg() of it")
    # An empty tensor that is not an empty shard.
    if tensor.numel() == 0 and math.prod(entry.window.shape) == 0:
        raise BadValue(
            f"Plan: {name!r} has no elements (shape {tuple(tensor.shape)}); if its values were repacked elsewhere "
            "they would be missed. Leave it out with exclude= if that is meant"
        )


def merge_tied(entries: list[Entry]) -> list[Entry]:
    """Merges tied weights into one entry, under the first name."""
    first: dict[tuple, Entry] = {}
    for e in entries:
        t = e.tensor
        # Tensors without elements have no address.
        memory = t.data_ptr() or t.untyped_storage()._cdata
        first.setdefault((t.device, memory, t.shape, t.stride(), t.dtype), e)
    return list(first.values())


def check_names(entries: list[Entry]) -> None:
    """ValueError for two names that would get the same noise, and for one name that stands for several whole
    tensors."""
    by_name: dict[str, list[Entry]] = {}
    by_id: dict[int, str] = {}
    for e in entries:
        other = by_id.setdefault(tensor_id(e.name), e.name)
        if other != e.name:
            raise BadValue(
                f"Plan: the names {other!r} and {e.name!r} have the same 32-bit id {tensor_id(e.name):08x}, "
                "so they would get the same noise; rename one"
            )
        for twin in by_name.setdefault(e.name, []):
            if twin.window.shape != e.window.shape or _windows_meet(twin, e):
                raise BadValue(
                    f"Plan: the name {e.name!r} is given twice, for {describe(twin)} and {describe(e)}; "
                    "only disjoint slices of one whole may share a name"
                )
        by_name[e.name].append(e)


def check_factor_names(entries: list[Entry]) -> None:
    """ValueError if low-rank noise would draw a factor of one tensor from the numbers of another's noise or factor."""
    owners: dict[int, str] = {}
    for e in {e.name: e for e in entries}.values():
        names = {e.name: f"the tensor {e.name!r}"}
        if matrices_of(e.window.shape):
            names |= {name: f"the factor {name!r} of {e.name!r}" for name in factor_names(e.name)}
        for name, what in names.items():
            if (other := owners.setdefault(tensor_id(name), what)) != what:
                raise BadValue(
                    f"Plan: {other} and {what} have the same 32-bit id {tensor_id(name):08x}, so low-rank noise would "
                    "give them the same numbers; rename a tensor, or take another noise"
                )


def _windows_meet(a: Entry, b: Entry) -> bool:
    return all(
        x < y + m and y < x + n
        for x, y, n, m in zip(a.window.offset, b.window.offset, a.tensor.shape, b.tensor.shape, strict=True)
    )
