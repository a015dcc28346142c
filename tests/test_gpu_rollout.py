"""On a GPU: the ways to generate agree, and captured graphs follow weights that change in place."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from esfast.rollout import decoding
from esfast.rollout.engine import TransformersEngine
from esfast.tasks import embedded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def as_in_a_run(poisoned_memory):
    """Switches PyTorch's deterministic mode off. The other tests use it to fill new memory with NaN; it changes what
    inductor compiles."""
    torch.use_deterministic_algorithms(False)


PROMPTS = ["1 2 3=6\n<think>", "a", "12 34 56 78=90\n<think>", "1 2 3=7\n<think>", "no tags here", "a"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    tokenizer = embedded.make_tokenizer()
    net = embedded.make_model(tokenizer).cuda().eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return net, tokenizer


@pytest.mark.parametrize("way", ["static", "continuous", "auto"])
def test_graphs_follow_the_weights_and_ways_agree(model, way):
    net, tokenizer = model
    if way == "continuous" and "continuous" not in decoding.choose_ways(net):
        pytest.skip("continuous batching is for GPUs with flash attention")
    plain, engine = (TransformersEngine(net, tokenizer, 12, decoding=each) for each in ("plain", way))
    weight = net.model.layers[0].mlp.up_proj.weight
    original = weight.detach().clone()
    texts = []
    try:
        for shift in (0, 1, 2, 0):  # 0 twice: before and after others
            with torch.no_grad():
                weight.copy_(original.roll(shift, 0))
            texts.append(engine.generate(PROMPTS))
            if way != "continuous":  # whose flash attention has no float32
                assert texts[-1] == plain.generate(PROMPTS)
    finally:
        weight.data.copy_(original)
        engine.close()
    assert texts[0] == texts[3] and len({tuple(t) for t in texts}) == 3


def test_grouped_heads_give_the_same_texts_from_a_static_cache(model):
    """Compiled, by queries that share keys: esfast.rollout.grouped_attention."""
    tokenizer = model[1]
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    net = Qwen2ForCausalLM(config).cuda().eval()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    plain, static = (TransformersEngine(net, tokenizer, 12, decoding=way) for way in ("plain", "static"))
    texts = plain.generate(PROMPTS)
    assert len(set(texts)) > 2 and static.generate(PROMPTS) == static.generate(PROMPTS) == texts
    static.close()


def test_sampled_texts_are_those_of_a_cpu(model):
    net, tokenizer = model
    seeds = list(range(len(PROMPTS)))
    on_gpu = TransformersEngine(net, tokenizer, 6).generate(PROMPTS, seeds)
    on_cpu = TransformersEngine(net.cpu(), tokenizer, 6).generate(PROMPTS, seeds)
    net.cuda()
    assert sum(a == b for a, b in zip(on_gpu, on_cpu, strict=True)) >= len(PROMPTS) - 1  # sums differ in the last bit
