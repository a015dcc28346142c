"""What a run of `esfast train` came to, for the benchmarks that compare held-out rewards before training and after."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Keys of a row, and the metric of summary.json that each holds
REWARD = {"reward": "eval_reward", "error": "eval_reward_se"}
HEADERS = ["held-out problems", "reward before", "reward after", "rose by, standard errors"]


def outcome(folder: Path, metrics: Mapping[str, str] = REWARD) -> dict[str, Any]:
    """Keys of a run's row, from its summary.json.

    They are `problems` (held-out ones), `generations`, `seconds`; NAME_before and NAME_after for each NAME of
    `metrics`, whose values name metrics of the summary; and `rose`: by how many standard errors of the difference the
    held-out reward rose. `rose` is None if there is no error: each evaluation gave one reward to all problems.
    """
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {"problems": summary["eval_prompts"], "generations": summary["generations"]}
    for name, metric in metrics.items():
        found |= {f"{name}_{when}": summary[when][metric] for when in ("before", "after")}
    before, after = summary["before"], summary["after"]
    error = math.hypot(before["eval_reward_se"], after["eval_reward_se"])
    found["rose"] = (after["eval_reward"] - before["eval_reward"]) / error if error else None
    return found | {"seconds": summary["seconds"]["total"]}


def rose_by(row: dict, errors: float) -> bool:
    """Whether a row's reward rose by more than that many standard errors; at all, where there is no error."""
    return row["reward_after"] > row["reward_before"] if row["rose"] is None else row["rose"] > errors


def cells(row: dict, reward: str = "reward", error: str = "error") -> list[str]:
    """A row's cells under HEADERS; `reward` and `error` are the names that `metrics` gave them."""
    shown = [f"{row[f'{reward}_{when}']:.3f} ± {row[f'{error}_{when}']:.3f}" for when in ("before", "after")]
    return [str(row["problems"]), *shown, "any" if row["rose"] is None else f"{row['rose']:.0f}"]
