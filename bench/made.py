"""Models that benchmarks generate with: the embedded one, and shapes of bench/models.py with random weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from ..tasks import embedded
from .models import MODELS


def model_of(name: str, dtype: torch.dtype, device: str):
    if name == "embedded":
        model = AutoModelForCausalLM.from_pretrained(embedded.cached(progress=False))
    else:
        shape = MODELS[name]
        config = Qwen2Config(
            vocab_size=max(shape.vocab, 512),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=shape.tied,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = Qwen2ForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    model.generation_config = GenerationConfig()
    return model.to(device).eval()
