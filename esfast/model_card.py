"""The model card of a tuned model: what it came from, how it was tuned, and how it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .config import ESConfig


def model_card(model, config: ESConfig, generations: int, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Markdown with the metadata that the Hugging Face hub reads. `before` and `after` are rows of metrics."""
    from . import __version__

    origin = getattr(model.config, "_name_or_path", "") or "a model without a name"
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation",
                              "tags": ["esfast", "evolution-strategies"]}  # fmt: skip
    if "/" in origin and not origin.startswith(("/", ".")):
        header["base_model"] = origin
    rows = [
        f"| {name.removeprefix('eval_')} | {before[name]:.4g} | {after[name]:.4g} |"
        for name in before
        if name.startswith("eval_") and not name.endswith("_se") and name in after
    ]
    table = ["", "| on held-out prompts | before | after |", "|---|--:|--:|", *rows, ""] if rows else [""]
    settings = "\n".join(
        f"    {field}: {getattr(config, field)}"
        for field in ("seed", "population_size", "sigma", "lr", "noise", "mirrored", "shaping", "optimizer", "weights",
                      "prompts_per_generation", "max_completion_length", "include", "exclude", "groups")
    )  # fmt: skip
    return "\n".join([
        "---", yaml.safe_dump(header, sort_keys=False) + "---", "", "# Tuned by evolution strategies", "",
        f"{origin}, all of its selected weights tuned for {generations} generations with esfast {__version__}: no",
        "gradients, rewards only (arXiv 2509.24372).", *table, "Settings:", "", settings, "",
        "The run's journal, seeds and coefficients alone, leads from the base weights to these, to the bit.", "",
    ])  # fmt: skip
