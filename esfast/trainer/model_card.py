"""The model card of a tuned model: its base model, its training, its results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .config import ESConfig


def model_card(
    name: str, library: str, config: ESConfig, generations: int, before: Mapping[str, Any], after: Mapping[str, Any]
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads. `name` is the base model's, `library` loads the tuned
    one. `before` and `after` are rows of metrics; `after` may belong to an earlier generation than the model."""
    from .. import __version__

    origin = name or "a model without a name"
    header: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["esfast", "evolution-strategies"],
    }
    if "/" in origin and not origin.startswith(("/", ".")):
        header["base_model"] = origin
    measured = [n for n in {**before, **after} if n.startswith("eval_") and not n.endswith("_se")]
    rows = [f"| {n.removeprefix('eval_')} | {_value(before, n)} | {_value(after, n)} |" for n in measured]
    when = "after" if after.get("generation") == generations else f"after generation {after.get('generation')}"
    table = [""]
    if any(name in after for name in measured):
        table = ["", f"| on held-out prompts | before | {when} |", "|---|--:|--:|", *rows, ""]
    settings = "\n".join(
        f"    {field}: {getattr(config, field)}"
        for field in (
            "seed",
            "population_size",
            "sigma",
            "lr",
            "noise",
            "rank",
            "mirrored",
            "shaping",
            "optimizer",
            "weights",
            "prompts_per_generation",
            "max_completion_length",
            "include",
            "exclude",
            "groups",
        )
    )
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False) + "---",
            "",
            "# Tuned by evolution strategies",
            "",
            f"{origin}, all of its selected weights tuned for {generations} generations with esfast {__version__}: no",
            "gradients, rewards only (arXiv 2509.24372).",
            *table,
            "Settings:",
            "",
            settings,
            "",
            "The run's journal, seeds and coefficients alone, leads from the base weights to these, to the bit.",
            "",
        ]
    )


def _value(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.4g}" if name in row else "not known"
