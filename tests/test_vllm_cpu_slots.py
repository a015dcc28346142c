"""Products with LoRA slots on a CPU, against each token's own slot; on a stand-in for vLLM's PunicaWrapperCPU."""

from types import SimpleNamespace

import pytest
import torch

from esfast.integrations import vllm_cpu_slots
from esfast.integrations.vllm_cpu_slots import CpuSlots

SLOTS, ROWS, COLUMNS = 5, 6, 7
TOKENS = torch.tensor([3, 3, -1, 0, 4, -1, 4, 1])


def wrapper_of(tokens):
    wrapper = SimpleNamespace(no_lora=bool((tokens < 0).all()), token_lora_indices=tokens, sampler_indices=tokens[::2])
    wrapper.update_metadata = lambda *args, **kwargs: None
    CpuSlots(wrapper)
    wrapper.update_metadata(None, [None] * SLOTS, SLOTS + 1, 100)
    return wrapper


def wanted(x, a, b, tokens):
    none = torch.zeros(b.shape[-2])
    return torch.stack([none if s < 0 else b[s, 0] @ (a[s, 0] @ row) for row, s in zip(x, tokens, strict=True)])


@pytest.mark.parametrize("most", [SLOTS, 0], ids=["all slots", "copies"])
@pytest.mark.parametrize("rank", [1, 3])
def test_each_token_meets_its_own_slot(monkeypatch, most, rank):
    monkeypatch.setattr(vllm_cpu_slots, "MOST", most)
    torch.manual_seed(0)
    a, b = torch.randn(SLOTS, 1, rank, COLUMNS), torch.randn(SLOTS, 1, ROWS, rank)
    x, base, wrapper = torch.randn(len(TOKENS), COLUMNS), torch.randn(len(TOKENS), 2 * ROWS), wrapper_of(TOKENS)
    # buffers have room for the highest rank
    inner = torch.full((len(TOKENS), rank + 2), 9.0)
    wrapper._shrink_prefill(inner, x, a, 1.0)
    assert (inner[:, rank:] == 9).all()
    y = base.clone()
    wrapper._expand_slice_prefill(y, inner, b, ROWS, ROWS, True)
    assert torch.equal(y[:, :ROWS], base[:, :ROWS])
    assert torch.allclose(y[:, ROWS:] - base[:, ROWS:], wanted(x, a, b, TOKENS), atol=1e-5)
    # a token without a slot has the base's bits, whatever a slot holds
    assert torch.equal(y[TOKENS < 0], base[TOKENS < 0])

    # an embedding's factor of a token without a slot is that of slot 0
    y = base[:, :ROWS].clone()
    wrapper._expand_prefill(y, inner, b, False)
    assert torch.allclose(y, wanted(x, a, b, TOKENS), atol=1e-5)
    # the head has rows that pad the vocabulary
    logits = torch.cat([base, base], 1)[::2].clone()
    wrapper.add_lora_logits(logits, x[::2], a, b, 1.0)
    assert torch.allclose(logits[:, :ROWS] - base[::2, :ROWS], wanted(x, a, b, TOKENS)[::2], atol=1e-5)
    assert torch.equal(logits[:, ROWS:], torch.cat([base, base], 1)[::2, ROWS:])


def test_a_batch_without_adapters_is_the_base_s():
    wrapper, y = wrapper_of(torch.full((4,), -1)), torch.randn(4, ROWS)
    before = y.clone()
    nothing = torch.full((SLOTS, 1, ROWS, 1), torch.inf)
    wrapper._expand_prefill(y, torch.ones(4, 1), nothing, True)
    wrapper.add_lora_logits(y[:2], torch.ones(2, COLUMNS), torch.ones(SLOTS, 1, 1, COLUMNS), nothing, 1.0)
    assert torch.equal(y, before)


def test_weights_of_16_bits():
    torch.manual_seed(0)
    a, b = (torch.randn(SLOTS, 1, *shape).bfloat16() for shape in ((2, COLUMNS), (ROWS, 2)))
    x, y, inner = (
        torch.randn(len(TOKENS), COLUMNS).bfloat16(),
        torch.zeros(len(TOKENS), ROWS).bfloat16(),
        torch.zeros(8, 2),
    )
    wrapper = wrapper_of(TOKENS)
    wrapper._shrink_prefill(inner, x, a, 1.0)
    wrapper._expand_slice_prefill(y, inner, b, 0, ROWS, True)
    exact = wanted(x.float(), a.float(), b.float(), TOKENS)
    assert torch.allclose(y.float(), exact, atol=0.02 * exact.abs().max())
