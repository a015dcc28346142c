"""Parameter lists of language models: name and shape of every tensor, as Transformers lays them out."""

from __future__ import annotations

import math
from dataclasses import dataclass

Parameters = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Decoder:
    """The values of a Qwen2 or Llama config that determine its parameters."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    # whether the output layer is the embedding
    tied: bool
    # whether q, k and v have biases: those of Qwen2 do, those of Llama don't
    qkv_bias: bool


MODELS = {
    "Qwen2.5-0.5B": Decoder(896, 24, 14, 2, 4864, 151936, tied=True, qkv_bias=True),
    "Qwen2.5-1.5B": Decoder(1536, 28, 12, 2, 8960, 151936, tied=True, qkv_bias=True),
    "Qwen2.5-7B": Decoder(3584, 28, 28, 4, 18944, 152064, tied=False, qkv_bias=True),
    "Llama-3.1-8B": Decoder(4096, 32, 32, 8, 14336, 128256, tied=False, qkv_bias=False),
    # Only for running the benchmark's code without a GPU. No tile or vector divides its sizes.
    "tiny": Decoder(36, 1, 6, 2, 77, 61, tied=False, qkv_bias=True),
}


def parameters(model: Decoder) -> Parameters:
    """Shapes by name, in the order of `named_parameters()`; tied weights once."""
    hidden, kv = model.hidden, model.hidden // model.heads * model.kv_heads
    shapes: Parameters = {"model.embed_tokens.weight": (model.vocab, hidden)}
    for i in range(model.layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
            if model.qkv_bias:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (model.intermediate, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (model.intermediate, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, model.intermediate)
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not model.tied:
        shapes["lm_head.weight"] = (model.vocab, hidden)
    return shapes


def numel(shapes: Parameters) -> int:
    return sum(map(math.prod, shapes.values()))
