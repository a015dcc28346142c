"""The products of a batch with LoRA slots on a CPU, in place of vLLM's, for members that share a batch.

vLLM copies a slot's factors for every token, once for each matrix, and gives a token without an adapter those of the
last slot. Here all tokens are multiplied with all slots, by one product of matrices, and each keeps what is its own:
less work up to MOST slots. A token without an adapter has none, so it gets the base exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# With more slots than these, copies of the factors cost less.
MOST = 64


class _Own(NamedTuple):
    """
    slot  [rows] number of each row's slot, 0 for a row that has none
    has   [rows, 1] 1 for rows that have a slot, else 0
    mine  [rows, slots] 1 where a row has the slot, else 0
    """

    slot: torch.Tensor
    has: torch.Tensor
    mine: torch.Tensor

    @classmethod
    def of(cls, indices: torch.Tensor, slots: int) -> _Own:
        """From vLLM's numbers of slots, -1 for none."""
        slot, has = indices.clamp(min=0), (indices >= 0).float()[:, None]
        return cls(slot, has, torch.zeros(len(slot), slots).scatter_(1, slot[:, None], has))


NOBODY = _Own.of(torch.empty(0, dtype=torch.long), 1)


class CpuSlots:
    """Takes the place of methods of `wrapper`, vLLM's PunicaWrapperCPU, in this object alone.

    In their arguments y is [tokens, ranks or rows], x [tokens, columns or ranks], and w [slots, 1, ranks, columns] or
    [slots, 1, rows, ranks].
    """

    def __init__(self, wrapper: Any):
        self._wrapper, self._update = wrapper, wrapper.update_metadata
        self._of_tokens = self._of_samples = NOBODY
        wrapper.update_metadata = self.update_metadata
        wrapper._shrink_prefill, wrapper._expand_prefill = self.shrink, self.expand
        wrapper._expand_slice_prefill, wrapper.add_lora_logits = self.expand_slice, self.add_logits

    def update_metadata(self, mapping, lora_index_to_id, *args, **kwargs) -> None:
        self._update(mapping, lora_index_to_id, *args, **kwargs)
        slots = len(lora_index_to_id)
        self._of_tokens = _Own.of(self._wrapper.token_lora_indices, slots)
        self._of_samples = _Own.of(self._wrapper.sampler_indices, slots)

    def shrink(self, y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, scale: float) -> None:
        if not self._wrapper.no_lora:
            _shrink(y, x, w, scale, self._of_tokens)

    def expand(self, y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, add_inputs: bool) -> None:
        self.expand_slice(y, x, w, 0, min(y.shape[1], w.shape[-2]), add_inputs)

    def expand_slice(
        self, y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, first: int, count: int, add_inputs: bool
    ) -> None:
        if not self._wrapper.no_lora:
            _expand(y[:, first : first + count], x, w, add_inputs, self._of_tokens)

    def add_logits(self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale, **options) -> None:
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if self._wrapper.no_lora:
            return
        inner = torch.zeros(len(x), b.shape[-1])
        _shrink(inner, x, a, scale, self._of_samples)
        _expand(y[:, : b.shape[-2]], inner, b, True, self._of_samples)


def _shrink(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, scale: float, own: _Own) -> None:
    """y = scale * x w^T of each row's slot; 0 for a row that has none."""
    slots, _, rank, columns = w.shape
    x = x.to(y.dtype)
    if slots > MOST:
        found = torch.einsum("ni,nri->nr", x, w[own.slot, 0].to(y.dtype))
    else:
        found = (x @ w.view(slots * rank, columns).to(y.dtype).T).view(-1, slots, rank)
        found = found[torch.arange(len(x)), own.slot]
    torch.mul(found, scale * own.has, out=y[:, :rank])


def _expand(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, add_inputs: bool, own: _Own) -> None:
    """y += x w^T of each row's slot, or y = ... if add_inputs is False."""
    slots, _, rows, rank = w.shape
    x = (x[:, :rank] * own.has).to(y.dtype)
    if slots > MOST:
        found = torch.einsum("nr,nor->no", x, w[own.slot, 0].to(y.dtype))
        y.add_(found) if add_inputs else y.copy_(found)
        return
    spread = (own.mine.to(y.dtype)[:, :, None] * x[:, None]).view(len(x), slots * rank)
    factors = w.view(slots, rows, rank).to(y.dtype).transpose(1, 2).reshape(slots * rank, rows)
    y.addmm_(spread, factors, beta=1.0 if add_inputs else 0.0)
