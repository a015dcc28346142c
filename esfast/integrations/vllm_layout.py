"""Where the weights of a vLLM model lie in the tensors of the Hugging Face model that it was loaded from.

vLLM fuses q, k and v into one matrix, and gate and up into another, pads embeddings, and gives each tensor-parallel
rank a shard. With enable_lora it wraps layers, whose weights are then called `...base_layer.weight`. Noise belongs to
the Hugging Face tensors. So each vLLM tensor is described by pieces: views of it, each a Slice of a whole Hugging Face
tensor.

| vLLM layer                       | pieces on rank r of R                                                             |
|----------------------------------|-----------------------------------------------------------------------------------|
| ReplicatedLinear, norms          | the whole tensor                                                                  |
| ColumnParallelLinear             | 1/R of the rows                                                                   |
| MergedColumnParallelLinear       | one after the other, 1/R of the rows of each of the matrices that it fuses        |
| QKVParallelLinear                | rows of q, of k and of v; with fewer kv heads than ranks, several ranks hold one  |
| RowParallelLinear                | 1/R of the columns; the whole bias                                                |
| VocabParallelEmbedding, LM head  | rows of the vocabulary; rows that pad it are no weights, and nobody reads them    |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core.segments import Slice
from ..utils.errors import BadValue

# The end of the name of a layer that vLLM has wrapped for LoRA.
WRAPPED = ".base_layer"
Shape = tuple[int, ...]
Piece = tuple[str, torch.Tensor, Slice]


@dataclass(frozen=True)
class RowRange:
    """`count` consecutive rows of a vLLM tensor: rows first, first + 1, ... of the Hugging Face tensor of layer
    `leaf`."""

    leaf: str
    count: int
    first: int


def hf_shapes(config) -> dict[str, Shape]:
    """Names and shapes of a Hugging Face causal LM's parameters, from its config alone, in the order of
    `named_parameters()`. Tied weights stand there once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def pieces(model: torch.nn.Module, wholes: Mapping[str, Shape]) -> list[Piece]:
    """Every parameter of a vLLM model on this rank as (Hugging Face name, view, Slice), in the order of `wholes`.

    Args:
        model: as a vLLM worker's get_model() gives it, its layers unquantized.
        wholes: names and shapes of the Hugging Face model: `hf_shapes`.

    Raises ValueError, which names the parameter, if it has no elements, has a name or shape that `wholes` lacks, or is
    tied where the Hugging Face model has two parameters. `check_covered` checks, over all ranks, that nothing is
    missing.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    order = {name: i for i, name in enumerate(wholes)}
    found: list[Piece] = []
    names: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            name = f"{prefix.removesuffix(WRAPPED)}.{leaf}"
            if p.numel() == 0:
                raise BadValue(
                    f"vLLM: {name!r} has no elements (shape {tuple(p.shape)}): its values were repacked elsewhere, "
                    "where noise can't reach them"
                )
            if id(p) in names:
                if name in wholes:
                    raise BadValue(
                        f"vLLM: {name!r} and {names[id(p)]!r} share memory, but the Hugging Face model has weights "
                        "for each"
                    )
                continue
            names[id(p)] = name
            found += pieces_of(prefix, leaf, module, p, packed, wholes)
    return sorted(found, key=lambda piece: (order[piece[0]], piece[2].offset))


def check_covered(wholes: Mapping[str, Shape], ranks: Sequence[Sequence[tuple[str, Shape, Shape]]]) -> list[list[bool]]:
    """Checks that the pieces (name, shape, offset) of all ranks cover every whole tensor. Several ranks may hold the
    same piece. Returns, for each piece of each rank, whether it is the first that holds these elements.

    Raises ValueError, which names the weight, if a part of it is missing or pieces overlap in part."""
    held: dict[str, list[tuple[Shape, Shape]]] = {}
    first: list[list[bool]] = []
    for places in ranks:
        first.append([])
        for name, shape, offset in places:
            window, earlier = (tuple(shape), tuple(offset)), held.setdefault(name, [])
            first[-1].append(window not in earlier)
            if window not in earlier:
                earlier.append(window)
    for name, whole in wholes.items():
        windows = held.get(name, [])
        if sum(math.prod(shape) for shape, _ in windows) != math.prod(whole) or _meet(windows):
            raise BadValue(f"vLLM: the ranks hold {windows or 'nothing'} of {name!r} {whole}, not each weight once")
    return first


def _meet(windows: list[tuple[Shape, Shape]]) -> bool:
    return any(
        all(x < y + m and y < x + n for x, y, n, m in zip(o, p, s, t, strict=True))
        for i, (s, o) in enumerate(windows)
        for t, p in windows[:i]
    )


def pieces_of(
    prefix: str,
    leaf: str,
    module: Any,
    p: torch.Tensor,
    packed: Mapping[str, Sequence[str]],
    wholes: Mapping[str, Shape],
) -> Iterator[Piece]:
    """The pieces of one parameter `p`, called `leaf`, of the layer at `prefix`, in the order of its rows. `packed` is
    the model's packed_modules_mapping. ValueError as in `pieces`."""
    prefix = prefix.removesuffix(WRAPPED)
    parent, _, layer = prefix.rpartition(".")
    column = 0
    rows = _rows(layer, module, packed)
    if rows is None:
        rows = [RowRange(layer, p.shape[0], 0)]
        if is_a(module, "RowParallelLinear") and p.dim() == 2:
            column = module.tp_rank * p.shape[1]
    start = 0
    for part in rows:
        name = ".".join(filter(None, (parent, part.leaf, leaf)))
        if name not in wholes:
            raise BadValue(
                f"vLLM: {prefix}.{leaf} would be {name!r}, which the Hugging Face model doesn't have; "
                f"{type(module).__name__} of this model is not supported"
            )
        view = p.detach()[start : start + part.count]
        offset = (part.first, column)[: p.dim()]
        whole = wholes[name]
        fits = len(whole) == view.dim() and all(o + n <= w for o, n, w in zip(offset, view.shape, whole, strict=True))
        if not fits or view.shape[0] != part.count:
            raise BadValue(
                f"vLLM: {prefix}.{leaf} {tuple(p.shape)} can't hold rows {part.first} to {part.first + part.count} of "
                f"{name!r} {whole}"
            )
        if part.count:
            yield name, view, Slice(whole, offset)
        start += part.count
    if start != p.shape[0] and not is_a(module, "VocabParallelEmbedding"):
        raise BadValue(f"vLLM: {prefix}.{leaf} has {p.shape[0]} rows, of which only {start} are known")


def _rows(layer: str, module: Any, packed: Mapping[str, Sequence[str]]) -> list[RowRange] | None:
    """The Hugging Face rows that a layer's tensor holds; None for tensors that are not sharded by rows."""
    if is_a(module, "VocabParallelEmbedding"):
        held = module.shard_indices
        if module.num_added_embeddings:
            raise BadValue(f"vLLM: {layer} has {module.num_added_embeddings} rows for LoRA, which is not supported")
        return [RowRange(layer, held.org_vocab_end_index - held.org_vocab_start_index, held.org_vocab_start_index)]
    if not is_a(module, "ColumnParallelLinear"):
        return None
    counts = list(module.output_partition_sizes)
    ranks = [module.tp_rank] * len(counts)
    sizes = [module.tp_size * count for count in counts]
    if is_a(module, "QKVParallelLinear"):
        ranks[1:] = [module.tp_rank // module.num_kv_head_replicas] * 2
        sizes[1:] = [size // module.num_kv_head_replicas for size in sizes[1:]]
    leaves, starts = list(packed.get(layer, [layer])), [0] * len(counts)
    if leaves == [layer]:  # fused in the Hugging Face model too
        leaves, starts = leaves * len(counts), [0, *itertools.accumulate(sizes[:-1])]
    if len(leaves) != len(counts):
        raise BadValue(f"vLLM: {layer} fuses {len(counts)} matrices, but the model names {leaves}")
    return [
        RowRange(leaf, n, start + rank * n) for leaf, n, start, rank in zip(leaves, counts, starts, ranks, strict=True)
    ]


def is_a(module: torch.nn.Module, name: str) -> bool:
    """Whether it is an instance of vLLM's class `name`, without importing vLLM."""
    return any(c.__name__ == name for c in type(module).__mro__)


@torch.no_grad()
def check_live(model: torch.nn.Module) -> None:
    """Checks that layers compute with their parameters, and not with a packed copy made when they were loaded.

    Each linear layer gets one row of ones. If the signs of all its weights are flipped, the sign of the result must
    flip exactly. Afterwards the weights have the same bits. ValueError names the layer that fails.
    """
    for name, module in model.named_modules():
        apply, weight = getattr(getattr(module, "quant_method", None), "apply", None), getattr(module, "weight", None)
        # A LoRA wrapper forwards both to the layer inside, which comes by itself.
        if apply is None or not isinstance(weight, torch.Tensor) or weight.dim() != 2 or hasattr(module, "base_layer"):
            continue
        x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
        before = apply(module, x, None).clone()
        weight.neg_()
        try:
            after = apply(module, x, None).clone()
        finally:
            weight.neg_()
        if not torch.equal(after, -before) or not before.any():
            raise BadValue(
                f"vLLM: {name!r} computes with a copy of its weights that was packed when it was loaded; noise would "
                "miss it"
            )
