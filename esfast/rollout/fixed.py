"""A step of decoding over tensors that stay where they are, so that it can be captured as a CUDA graph."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer

from .sampling import SeededSampling


class FixedLayer(StaticLayer):
    """Keys and values of a layer, (rows, heads, length, width). `steps` knows how many tokens are written. Layers with
    a window keep all tokens; the mask hides those outside."""

    def __init__(self, steps: Steps, number: int):
        super().__init__(max_cache_len=steps.length)
        self.steps, self.number = steps, number

    def make(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes memory for states with the rows, heads and width of these."""
        self.keys, self.values = (
            self.steps.arena.take((self.number, i), (*x.shape[:2], self.max_cache_len, x.shape[3]), x)
            for i, x in enumerate((keys, values))
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self.keys is None:
            self.make(key_states, value_states)
        if self.steps.reading:
            self.keys[..., : key_states.shape[2], :] = key_states
            self.values[..., : value_states.shape[2], :] = value_states
            return key_states, value_states
        self.keys.index_copy_(2, self.steps.where, key_states)
        self.values.index_copy_(2, self.steps.where, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query) -> tuple[int, int]:
        """Number of keys, and the first one's position. `query` is the number of new tokens; older versions of
        Transformers pass their positions."""
        tokens = query if isinstance(query, int) else len(query)
        return (tokens if self.steps.reading else self.max_cache_len), 0

    def get_seq_length(self, *args):
        return 0 if self.steps.reading else self.steps.where[0]


class Arena:
    """Memory that is taken again and again under the same names, for other shapes: always from the same address, unless
    it is too small."""

    def __init__(self):
        self._held: dict[tuple, torch.Tensor] = {}

    def take(self, name: tuple, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Of the dtype and on the device of `like`. It holds what was written there last, zeros at first."""
        count = math.prod(shape)
        if name not in self._held or self._held[name].numel() < count:
            self._held.pop(name, None)
            self._held[name] = torch.zeros(count, dtype=like.dtype, device=like.device)
        return self._held[name][:count].view(*shape)

    def clear(self) -> None:
        self._held.clear()


class Kept(NamedTuple):
    """Copies of some rows of Steps."""

    states: list[tuple[torch.Tensor, torch.Tensor]]
    tensors: dict[str, torch.Tensor]


def fixed_layers(model) -> list[type]:
    """The classes of layers in the static cache that Transformers makes for the model."""
    cache = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=2)
    return [type(layer) for layer in cache.layers]


def length_of(width: int, most: int) -> int:
    """Tokens of a text for which there is room. The last one is not read. Attention kernels want multiples of 8."""
    return -(-(width + most - 1) // 8) * 8


class Steps:
    """Texts of `rows` prompts of `width` tokens, padded on the left, of which `step` adds a token to each.

    most      most new tokens, 2 or more
    ends      tokens that end a text
    pad       a row that has ended continues with this token
    sampling  how tokens are drawn from `numbers`; None: greedily
    arena     memory for keys and values

    Tensors: `texts` (rows, most), the new tokens; `ended` (rows,); `fine` (rows,), whether the logits that gave a row's
    tokens were numbers.
    """

    # what belongs to a row, beside its keys and values
    OF_ROWS = ("ids", "positions", "mask", "texts", "ended", "fine", "numbers")

    def __init__(
        self,
        model,
        rows: int,
        width: int,
        most: int,
        ends: torch.Tensor,
        pad: int,
        sampling: SeededSampling | None,
        arena: Arena,
    ):
        self.model, self.rows, self.width, self.most = model, rows, width, most
        self.length = length_of(width, most)
        self.ends, self.pad_token_id, self.sampling, self.arena = ends, pad, sampling, arena
        options: dict[str, Any] = {"dtype": torch.long, "device": ends.device}
        self.pad = torch.full((rows, 1), pad, **options)
        self.prompts = torch.full((rows, width), pad, **options)
        self.ids, self.positions = torch.full((rows, 1), pad, **options), torch.zeros(rows, 1, **options)
        # Where the next token's keys and values go, and which of the new tokens comes next
        self.where, self.done = torch.zeros(1, **options), torch.zeros(1, **options)
        # Padding on the left is hidden; tokens that don't exist yet are hidden by their positions.
        self.mask = torch.ones(rows, self.length, **options)
        self.texts = torch.full((rows, most), pad, **options)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=ends.device)
        self.fine = torch.ones(rows, dtype=torch.bool, device=ends.device)
        self.numbers = torch.zeros(rows, most if sampling else 0, device=ends.device)
        self.reading = False
        self.layers = [FixedLayer(self, i) for i in range(len(fixed_layers(model)))]
        self.cache = Cache(layers=self.layers)
        known = inspect.signature(model.forward).parameters
        # The cache's name is `cache` since Transformers 5.24, in models that came with it.
        self._cache = {"cache" if "cache" in known else "past_key_values": self.cache}
        # Only the last token's logits are wanted of the prompts.
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self._known = known

    def blank(self) -> None:
        """Begins texts of nothing, to try out a step."""
        self.reading = False
        for x in (self.positions, self.done, *self._states()):
            x.zero_()
        self.where.fill_(self.width)
        self.ids.copy_(self.pad)
        self.mask.fill_(1)
        self.ended.fill_(False)
        self.fine.fill_(True)

    def read(
        self,
        rows: Sequence[Sequence[int]],
        numbers: torch.Tensor | None = None,
        counts: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        """Reads prompts, and adds the first token to each. Returns the logits (rows, vocabulary).

        numbers  that tokens are drawn with, (rows, new tokens)
        counts   rows that don't count have ended from the beginning
        """
        self.blank()
        pads = [self.width - len(row) for row in rows]
        padded = [[self.pad_token_id] * n + list(row) for n, row in zip(pads, rows, strict=True)]
        self.prompts.copy_(torch.tensor(padded))
        self.mask[:, : self.width] = torch.tensor([[0] * n + [1] * (self.width - n) for n in pads])
        self.texts.copy_(self.pad.expand_as(self.texts))
        if numbers is not None:
            self.numbers[:, : numbers.shape[1]] = numbers
        if counts is not None:
            self.ended.copy_(~torch.tensor(list(counts)))
        mask = self.mask[:, : self.width]
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        self.positions.copy_(positions[:, -1:])
        self.reading = True
        try:
            logits = self._logits(self.prompts, mask, positions, torch.arange(self.width, device=mask.device))
        finally:
            self.reading = False
        self._take(logits)
        return logits

    def step(self) -> torch.Tensor:
        """Reads the last token of each row and adds the next one. Returns the logits."""
        self.positions.add_(1)
        logits = self._logits(self.ids, self.mask, self.positions, self.where)
        self.where.add_(1)
        self._take(logits)
        return logits

    def kept(self, rows: torch.Tensor) -> Kept:
        """Copies of the rows with these numbers, and of the counts."""
        states = [(layer.keys[rows], layer.values[rows]) for layer in self.layers]
        tensors = {name: getattr(self, name)[rows] for name in self.OF_ROWS}
        return Kept(states, {**tensors, "where": self.where.clone(), "done": self.done.clone()})

    def go_on(self, kept: Kept) -> None:
        """Continues with rows of other Steps."""
        for layer, (keys, values) in zip(self.layers, kept.states, strict=True):
            if layer.keys is None:
                layer.make(keys, values)
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        for name, tensor in kept.tensors.items():
            getattr(self, name).copy_(tensor)

    def _states(self) -> list[torch.Tensor]:
        """What is left in them of other texts is hidden, but a hidden NaN would still be added up."""
        return [x for layer in self.layers if layer.keys is not None for x in (layer.keys, layer.values)]

    def _logits(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        given = {"position_ids": positions, "cache_position": slots}
        given = {name: value for name, value in given.items() if name in self._known}
        output = self.model(
            input_ids=ids, attention_mask=mask, use_cache=True, return_dict=True, **self._cache, **self._last, **given
        )
        return output.logits[:, -1]

    def _take(self, logits: torch.Tensor) -> None:
        # The greatest of a row tells: it is NaN if one is NaN, and infinite if one is inf or all are -inf.
        greatest, token = logits.max(-1, keepdim=True)
        self.fine.logical_and_(greatest.squeeze(1).isfinite() | self.ended)
        if self.sampling is not None:
            token = self.sampling.pick(logits, self.numbers.index_select(1, self.done))
        token = torch.where(self.ended[:, None], self.pad, token)
        self.ids.copy_(token)
        self.texts.index_copy_(1, self.done, token)
        self.done.add_(1)
        self.ended.logical_or_((token == self.ends).any(1))
