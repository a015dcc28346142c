"""One new token's attention over shared keys: the same numbers as Transformers', and no copies of keys and values."""

import pytest
import torch
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from esfast.rollout import grouped_attention
from esfast.rollout.engine import TransformersEngine
from esfast.tasks import embedded

PROMPTS = ["a", "1 2 3=6\n<think>", "no tags here", "a"]


class Module(torch.nn.Module):
    is_causal, num_key_value_groups = True, 3


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head"])
def test_equals_the_attention_of_transformers(tokens, mask):
    torch.manual_seed(0)
    query, (key, value) = torch.randn(2, 6, tokens, 8), torch.randn(2, 2, 2, 9, 8)
    seen = torch.rand(2, 6 if mask == "per head" else 1, tokens, 9) < 0.6
    seen[..., 0] = True
    given = {
        "none": None,
        "bool": seen,
        "float": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
        "per head": seen,
    }
    options = {"attention_mask": given[mask], "dropout": 0.0, "scaling": 0.3}
    ours, _ = grouped_attention.grouped_sdpa(Module(), query, key, value, **options)
    theirs, _ = sdpa_attention_forward(Module(), query, key, value, **options)
    assert ours.shape == theirs.shape == (2, tokens, 6, 8)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    tokenizer = embedded.make_tokenizer()
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    net = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return net, tokenizer


@pytest.mark.parametrize("compiled", [False, True])
def test_a_static_cache_keeps_its_heads(model, compiled, monkeypatch):
    """Also compiled, as on GPUs, where Transformers repeats keys and values in every version."""
    net, tokenizer = model
    expected = TransformersEngine(net, tokenizer, 6).generate(PROMPTS)
    heads, attention = [], functional.scaled_dot_product_attention

    def watched(query, key, value, **options):
        heads.append((query.shape[2], key.shape[1]))
        return attention(query, key, value, **options)

    for module in (grouped_attention, functional):
        monkeypatch.setattr(module, "scaled_dot_product_attention", watched)
    if compiled:
        forward = torch.compile(net.forward, backend="eager", dynamic=False)
        monkeypatch.setattr(net, "get_compiled_call", lambda config: forward)
        monkeypatch.setattr(net, "_valid_auto_compile_criteria", lambda inputs, config: True)
    engine = TransformersEngine(net, tokenizer, 6, decoding="static")
    assert engine.generate(PROMPTS) == expected
    assert net.config._attn_implementation == "sdpa"
    # three query heads a key head, as queries; all the rest are prompts
    assert heads.count((3, 2)) >= 2 and {queries for queries, _ in heads} == {3, 64}, heads


def test_other_attentions_and_models_keep_theirs(model, monkeypatch):
    net, _ = model
    for change in ("eager", "heads", "old code"):
        with monkeypatch.context() as patch:
            if change == "eager":
                patch.setattr(net.config, "_attn_implementation_internal", "eager")
            elif change == "heads":
                patch.setattr(net.config, "num_key_value_heads", 6)
            else:
                patch.setattr(type(net), "_supports_attention_backend", False)
            before = net.config._attn_implementation
            with grouped_attention.grouped(net):
                assert net.config._attn_implementation == before
    with pytest.raises(KeyError), grouped_attention.grouped(net):
        assert net.config._attn_implementation == grouped_attention.NAME
        raise KeyError
    assert net.config._attn_implementation == "sdpa"
