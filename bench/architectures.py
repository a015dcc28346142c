"""Makes a tiny model of every architecture for which Transformers has a causal language model, from its configuration.

Configurations have many names for the same size; SIZES has a small value for each name. OVERRIDES mends, for some
architectures, what that leaves inconsistent.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MOST_WEIGHTS = 4_000_000


def _each(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, int] = {
    **_each(
        "hidden_size d_model n_embd embedding_size embedding_dim emb_dim word_embed_proj_dim input_embedding_size "
        "output_embedding_size lru_width attention_hidden_size",
        32,
    ),
    **_each(
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff d_inner ffn_hidden_size dim_ff "
        "feed_forward_size intermediate_size_mlp dense_intermediate_size",
        64,
    ),
    **_each(
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size router_hidden_size",
        16,
    ),
    **_each(
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_blocks",
        2,
    ),
    **_each(
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads",
        4,
    ),
    **_each("num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups", 2),
    **_each("head_dim kv_channels d_head dim_head attention_head_size swa_head_dim", 8),
    **_each(
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length model_max_length "
        "original_max_position_embeddings",
        512,
    ),
    **_each("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    **_each("num_experts_per_tok num_experts_per_token moe_k moe_topk", 2),
    **_each("n_group topk_group num_expert_group n_groups mamba_n_groups first_k_dense_replace", 1),
    **_each(
        "qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim index_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim",
        8,
    ),
    **_each("qk_head_dim kv_lora_rank q_lora_rank o_lora_rank", 16),
    **_each("index_n_heads linear_num_key_heads linear_num_value_heads linear_num_heads", 4),
    # More than the texts have tokens, as in the real models. With fewer, the choice among tokens of equal score would
    # depend on the padding.
    **_each("index_topk", 64),
    **_each("state_size mamba_d_state ssm_state_size mamba_n_heads mamba_num_heads", 8),
    **_each("time_step_rank mamba_dt_rank hidden_size_per_layer_input laurel_rank", 8),
    **_each("chunk_size mamba_chunk_size block_size", 16),
    **_each(
        "sliding_window sliding_window_size window_size attention_window_size local_attention keep_window_size "
        "attention_chunk_size",
        32,
    ),
    **_each("num_kv_shared_layers", 0),
}
TOKENS = ("vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input")

MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
ENCODER = {"is_decoder": True}
NGRAMS = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ple_embed_dim": 32,
    "hc_lowrank": 8,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 1,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    **{
        name: ENCODER
        for name in (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        )
    },
    **{
        name: {"num_key_value_heads": 4}
        for name in (
            "axk1",
            "axk2",
            "bailing_hybrid",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "kimi_linear",
            "longcat_flash",
            "minicpm3",
            "sarvam_mla",
        )
    },
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "deepseek_v2": {"num_key_value_heads": 4} | MOE,
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots1": MOE | {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}, "layer_types": ["indexed_attention"] * 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"laurel_rank": 4, "hidden_size_per_layer_input": 8, "altup_num_inputs": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": NGRAMS,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": ENCODER
    | {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "hash_seed": 0,
    },
    "roc_bert": ENCODER
    | {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 300,
        "shape_embed_dim": 8,
        "shape_vocab_size": 300,
    },
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4, "num_hidden_layers": 2, "num_blocks": 2},
    "xmod": ENCODER | {"default_language": "en_XX"},
    # with a pad token Transformers zeroes its embedding whenever the model is loaded
    "youtu": {"num_key_value_heads": 4, "pad_token_id": None},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
# Architectures of which no tiny model is made, each with the reason.
NOT_MADE = {
    "dots3_note": "its parts for pictures and sound are large; its text part is dots3_note_text",
    "gemma3n": "its vision part needs the timm package; its text part is gemma3n_text",
    "gemma4_assistant": "drafts for another model, and reads its keys and values",
    "gemma4_unified_assistant": "drafts for another model, and reads its keys and values",
    "musicgen": "generates sound from a text",
    "musicgen_melody": "generates sound from a text",
}


def architectures() -> list[str]:
    """Names (model types) of the architectures of the installed Transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(name: str, tokenizer) -> PretrainedConfig:
    """A small configuration of the architecture, for the tokenizer's vocabulary."""
    made = CONFIG_MAPPING[name]
    return made(**_small(made(), tokenizer))


def tiny_model(name: str, tokenizer, seed: int = 0) -> torch.nn.Module:
    """A causal LM of the architecture in float32, with random weights that depend on the seed alone.

    ValueError if the configuration gives one that is not tiny; it has taken no memory then. Others are Transformers'.
    """
    config = tiny_config(name, tokenizer)
    with torch.device("meta"):
        numel = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if numel > MOST_WEIGHTS:
        raise ValueError(f"{name}: the tiny model has {numel:,} weights, more than {MOST_WEIGHTS:,}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        # Many fresh models answer everything alike, since they begin with zeros that training would change.
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def _small(config: PretrainedConfig, tokenizer) -> dict[str, Any]:
    """The sizes of a default configuration to make smaller, nested configurations included."""
    given, small = config.to_dict(), {}
    layers = given.get("num_hidden_layers", 0)
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(inner := getattr(config, key, None), PretrainedConfig):
            small[key] = _small(inner, tokenizer)
        elif key in TOKENS:
            small[key] = len(tokenizer)
        elif key.endswith("_token_id"):
            ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            small[key] = ends.get(key, 1)
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[key] = SIZES[key]
        elif isinstance(value, list) and layers > 2 and len(value) == layers:
            small[key] = _two_kinds(value)
    return small | OVERRIDES.get(config.model_type, {})


def _two_kinds(layers: list) -> list:
    """From a list with an entry for each layer: the first entry, and the first that differs from it."""
    others = [entry for entry in layers if entry != layers[0]]
    return [layers[0], (others or layers)[0]]
