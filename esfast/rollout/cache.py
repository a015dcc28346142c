"""A cache of keys and values with room for all tokens of a text.

The cache of `model.generate` grows: each token copies keys and values of all tokens before it into new tensors, and
each of these is a little larger than the memory that the last one left, so a process takes half as much memory again as
its tensors. Here each layer takes its memory once, and a token is written behind the others.
"""

from __future__ import annotations

from functools import partial

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class LayerWithRoom(DynamicLayer):
    """Keys and values of a layer, (rows, heads, tokens, width), at the beginning of memory for `most` tokens."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.keys is None:
            super().update(key_states[..., :0, :], value_states[..., :0, :], *args, **kwargs)
        had = self.get_seq_length()
        if self._whole is None:
            self._whole = self._with_room(key_states, self.keys, had), self._with_room(value_states, self.values, had)
        tokens = had + key_states.shape[-2]
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[..., had:tokens, :] = new
        self.show(tokens)
        return self.keys, self.values

    def show(self, tokens: int) -> None:
        """Counts so many tokens as written."""
        assert self._whole is not None
        self.keys, self.values = (whole[..., :tokens, :] for whole in self._whole)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._whole = None

    def _with_room(self, states: torch.Tensor, before: torch.Tensor, had: int) -> torch.Tensor:
        whole = states.new_empty(*states.shape[:-2], self.most, states.shape[-1])
        if had:
            whole[..., :had, :] = before
        return whole


def cache_with_room(model, most: int) -> DynamicCache | None:
    """A cache for texts of at most `most` tokens, prompts included, where `generate` would make one whose layers hold
    all tokens; else None."""
    if model.config.is_encoder_decoder or not getattr(model, "_supports_default_dynamic_cache", lambda: False)():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [LayerWithRoom(most) for _ in cache.layers]
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = partial(LayerWithRoom, most)
    return cache
