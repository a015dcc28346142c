"""Where the factors of low-rank members lie in vLLM's LoRA slots, and how they are drawn there.

A member's matrix is W + A^T B (docs/concepts/low_rank.md), and vLLM computes x W^T + (x lora_a^T) lora_b^T. So lora_a
holds B, and lora_b holds A transposed, times sigma / sqrt(rank). An embedding's two are exchanged: its lora_a has a row
for each token. vLLM's buffers have all slots: [slots, 1, rank, columns] and [slots, 1, rows, rank], on each
tensor-parallel rank for the rows or columns that this rank holds. Each is described here as Slices of the factors, so
the kernels draw what belongs there, whatever the sharding; nothing is copied.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from ..core.noise import factor_names, low_rank_scale
from ..core.ops import add_noise_, check_members
from ..core.plan import Plan
from ..core.segments import Slice
from ..update.updater import Group
from ..utils.errors import BadValue
from .vllm_layout import Shape, is_a, pieces_of

EMBEDDING = "VocabParallelEmbeddingWithLoRA"


class Place(NamedTuple):
    """A part of a factor in all slots.

    name     of the Hugging Face matrix
    side     0: A, whose rows have a number for each row of the matrix; 1: B, one for each column
    buffer   [slots, ranks, elements]: a view of vLLM's memory
    whole    number of elements that a row of the factor has
    rank     number of the factor's row that `buffer[:, 0]` holds
    offset   number of the element that `buffer[..., 0]` holds
    """

    name: str
    side: int
    buffer: torch.Tensor
    whole: int
    rank: int = 0
    offset: int = 0


class Slots:
    """The LoRA slots of a worker's model.

    Args:
        model: as a vLLM worker's get_model() gives it, loaded with enable_lora.
        wholes: names and shapes of the Hugging Face model: `vllm_layout.hf_shapes`.
        modules: the LoRA layers by name: `modules` of vLLM's LoRAModelManager.
        tied: whether the head's weights are the embedding's.

    `carried` has the names of the matrices that slots hold the noise of. Norms, biases and what has no LoRA layer are
    not among them. Raises ValueError, which names it, for a LoRA layer that is not understood.
    """

    def __init__(self, model, wholes: Mapping[str, Shape], modules: Mapping[str, Any], tied: bool):
        packed = getattr(model, "packed_modules_mapping", {})
        embedding = next((f"{p}.weight" for p, m in modules.items() if is_a(m, EMBEDDING)), "")
        found: list[Place] = []
        uses: list[str] = []
        for prefix, module in modules.items():
            places = list(_places(prefix, module, packed, wholes, embedding))
            found += places
            uses += {place.name for place in places}
        # Tied weights are used twice, as embedding and as head: a member needs its noise in both places.
        needed = {embedding: 2} if tied else {}
        self.carried = [name for name in wholes if uses.count(name) >= needed.get(name, 1)]
        kept = set(self.carried)
        self._places = [place for place in found if place.name in kept]
        self._plans: dict[tuple[int, int], list[tuple[float, Plan]]] = {}

    def begin(self, sigma_of: Callable[[str], float]) -> None:
        """Chooses what `write` draws: `sigma_of` gives a matrix's factor of the coefficient, 0 for one that keeps its
        weights."""
        self._sigma_of, self._plans = sigma_of, {}

    def write(self, slot: int, seed: int, coeff: float, rank: int) -> None:
        """Makes a slot the member base + coeff * noise(seed). With a coefficient of 0 it is the base, exactly."""
        for place in self._places:
            place.buffer[slot].zero_()
        if coeff == 0:
            return
        if (slot, rank) not in self._plans:
            self._plans[slot, rank] = list(self._drawn(slot, rank))
        for factor, plan in self._plans[slot, rank]:
            # B is drawn as it is; the coefficient goes to A, as in `low_rank_factors`.
            scaled = [1.0] if factor == 0 else check_members([seed], [factor * coeff])[1] * low_rank_scale(rank)
            add_noise_(plan, [seed], list(map(float, scaled)))

    def _drawn(self, slot: int, rank: int) -> Iterator[tuple[float, Plan]]:
        """Plans of the factors in a slot: (0, plan) of Bs, and (a group's sigma, plan) of As. A factor that stands in
        several places, as that of tied weights, is in a plan of its own for each."""
        parts: dict[tuple, list[tuple]] = {}
        for place in self._places:
            sigma = self._sigma_of(place.name)
            rows = min(place.buffer.shape[1], rank - place.rank)
            if sigma == 0 or rows <= 0:
                continue
            buffer = place.buffer[slot, :rows]
            window = Slice((rank, place.whole), (place.rank, place.offset))
            item = (factor_names(place.name)[place.side], buffer, window)
            kind = 0.0 if place.side else sigma
            again = 0
            while any(name == item[0] and w == window for name, _, w in parts.setdefault((kind, again), [])):
                again += 1
            parts[kind, again].append(item)
        for (kind, _), items in parts.items():
            yield kind, Plan(items)


def _places(prefix: str, module, packed, wholes: Mapping[str, Shape], embedding: str) -> Iterator[Place]:
    """The factors in the slots of one LoRA layer; none for a kind of layer that esfast does not know."""
    if is_a(module, EMBEDDING):
        name = f"{prefix}.weight"
        rows, cols = wholes[name]
        yield Place(name, 0, module.lora_a_stacked.transpose(1, 2)[..., :rows], rows)
        yield Place(name, 1, module.lora_b_stacked[:, 0].transpose(1, 2), cols)
    elif is_a(module, "LogitsProcessorWithLoRA"):
        name = f"{prefix}.weight" if f"{prefix}.weight" in wholes else embedding
        if not name:
            return
        rows, cols = wholes[name]
        yield Place(name, 0, module.lora_b_stacked[:, 0, :rows].transpose(1, 2), rows)
        yield Place(name, 1, module.lora_a_stacked[:, 0], cols)
    elif is_a(module, "BaseLinearLayerWithLoRA"):
        yield from _linear(prefix, module, packed, wholes)


def _linear(prefix: str, module, packed, wholes: Mapping[str, Shape]) -> Iterator[Place]:
    base, count = module.base_layer, len(module.lora_a_stacked)
    parts = list(pieces_of(prefix, "weight", base, base.weight, packed, wholes))
    if count not in (1, len(parts)) or (count == 1 and len({name for name, *_ in parts}) > 1):
        raise BadValue(
            f"vLLM: the LoRA layer {type(module).__name__} of {prefix!r} has {count} slots for {len(parts)} parts "
            f"({', '.join(name for name, *_ in parts)}), which is not supported: members_at_once=1 does without slots"
        )
    start = 0
    for i, (name, view, window) in enumerate(parts):
        at = i if count > 1 else 0
        # [slots, rank, columns] and [slots, rows, rank]; fully sharded layers hold a part of the ranks, or of the rows
        a, b = module.lora_a_stacked[at][:, 0], module.lora_b_stacked[at][:, 0]
        (rows, cols), (row, col) = window.shape, window.offset
        if i == 0 or count > 1:
            first = module.tp_rank * a.shape[1] if a.shape[1] < b.shape[2] else 0
            yield Place(name, 1, a, cols, first, col)
            start = 0
        held = min(view.shape[0], b.shape[1])
        if held < view.shape[0]:
            row += module.tp_rank * held
        yield Place(name, 0, b[:, start : start + held].transpose(1, 2), rows, 0, row)
        start += held


def groups_that_freeze(names: Sequence[str], carried: Sequence[str]) -> list[Group]:
    """Groups with sigma and lr 0 for the tensors that slots do not carry. The numbers of layers become `*` where that
    matches no other tensor."""
    kept, patterns = set(carried), []
    for name in names:
        if name in kept:
            continue
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        if any(fnmatchcase(other, pattern) for other in carried):
            pattern = name
        patterns.append(pattern)
    return [Group(pattern, 0.0, 0.0) for pattern in dict.fromkeys(patterns)]
