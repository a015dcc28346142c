"""PEFT adapters as what is tuned: ES over LoRA weights works like over any others."""

from __future__ import annotations

ADAPTERS = "*lora_*"  # the names of LoRA's weights in PEFT


def with_adapters(model, peft_config):
    """The model with the adapters of a PEFT configuration in it. ImportError without peft."""
    try:
        from peft import get_peft_model
    except ImportError:
        raise ImportError("peft_config: needs the peft package: pip install peft") from None
    return get_peft_model(model, peft_config)
