"""A cache of keys and values with room for all tokens of a text.

The cache of `model.generate` grows: each token copies keys and values of all tokens before it into new tensors, and
each of these is a little larger than the memory that the last one left, so a process takes half as much memory again as
its tensors. Here each layer takes its memory once, and a token is written behind the others. Rows that leave make room
for those behind them, and the next batch can take the same memory again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..utils.memory import own_pages

# When rows leave, the others are copied to their places by parts of so many bytes, or a 16th of all where that is more.
MOVED_AT_ONCE = 2**22


class KeptMemory:
    """Memory for the caches of one batch after another: a batch takes tensors in the order of the one before."""

    def __init__(self):
        self._tensors: list[torch.Tensor] = []
        self._taken = 0

    def begin(self) -> None:
        """The tensors are for another batch."""
        self._taken = 0

    def take(self, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        place, self._taken = self._taken, self._taken + 1
        if place < len(self._tensors):
            flat = self._tensors[place]
            if flat.numel() >= shape.numel() and (flat.dtype, flat.device) == (like.dtype, like.device):
                return flat[: shape.numel()].view(shape)
        # Frees those that are too small first.
        del self._tensors[place:]
        with own_pages():
            self._tensors.append(like.new_empty(shape.numel()))
        return self._tensors[place].view(shape)

    def free(self) -> None:
        self._tensors.clear()
        self._taken = 0


@dataclass
class Room:
    """What the layers of a cache have in common.

    most     tokens of a text
    memory   that the tensors are taken from
    members, each   of the rows, and which of each member's rows (a slice) are being read, where prompts are read by
             parts; None: all rows are in every call
    """

    most: int
    memory: KeptMemory = field(default_factory=KeptMemory)
    members: int = 1
    each: int = 0
    part: slice | None = None


class LayerWithRoom(DynamicLayer):
    """Keys and values of a layer, (rows, heads, tokens, width), at the beginning of memory for `room.most` tokens."""

    def __init__(self, room: Room):
        super().__init__()
        self.room = room
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.keys is None:
            super().update(key_states[..., :0, :], value_states[..., :0, :], *args, **kwargs)
        if self._whole is None:
            self._whole = self._with_room(key_states), self._with_room(value_states)
        if self.room.part is not None:
            for whole, new in zip(self._whole, (key_states, value_states), strict=True):
                places = whole.unflatten(0, (self.room.members, -1))[:, self.room.part, ..., : new.shape[-2], :]
                places.copy_(new.unflatten(0, (self.room.members, -1)))
            return key_states, value_states
        had = self.get_seq_length()
        tokens = had + key_states.shape[-2]
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[..., had:tokens, :] = new
        self.show(tokens)
        return self.keys, self.values

    def show(self, tokens: int) -> None:
        """Counts so many tokens as written."""
        assert self._whole is not None
        self.keys, self.values = (whole[..., :tokens, :] for whole in self._whole)

    @property
    def nbytes(self) -> int:
        return sum(whole.nbytes for whole in self._whole or ())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self._whole is None:
            return
        rows, tokens = len(beam_idx), self.get_seq_length()
        # A row that comes from behind is read before its place is written, whatever is moved first.
        from_behind = bool((beam_idx >= torch.arange(rows, device=beam_idx.device)).all())
        for whole in self._whole:
            row_bytes = whole[0].nbytes
            step = max(1, max(MOVED_AT_ONCE, whole.nbytes // 16) // row_bytes) if from_behind else rows
            for begin in range(0, rows, step):
                chosen = beam_idx[begin : begin + step]
                whole[begin : begin + len(chosen), :, :tokens] = whole[:, :, :tokens].index_select(0, chosen)
        self._whole = self._whole[0][:rows], self._whole[1][:rows]
        self.show(tokens)

    def _with_room(self, states: torch.Tensor) -> torch.Tensor:
        room = self.room
        rows = len(states) if room.part is None else room.members * room.each
        shape = torch.Size((rows, *states.shape[1:-2], room.most, states.shape[-1]))
        return room.memory.take(shape, states)


def show_all(cache: DynamicCache, tokens: int) -> None:
    """Counts so many tokens as written in all layers."""
    for layer in cache.layers:
        layer.show(tokens)


def cache_with_room(model, room: Room) -> DynamicCache | None:
    """A cache for texts of at most `room.most` tokens, prompts included, where `generate` would make one whose layers
    hold all tokens; else None."""
    if model.config.is_encoder_decoder or not getattr(model, "_supports_default_dynamic_cache", lambda: False)():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    room.memory.begin()
    cache.layers = [LayerWithRoom(room) for _ in cache.layers]
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = partial(LayerWithRoom, room)
    return cache
