"""Rows of prompts and the functions that score their completions, in TRL's conventions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

RewardFunc = Callable[..., Sequence[float]]
Rows = Sequence[Mapping[str, Any]]


def check_rows(what: str, rows, required: bool = True) -> None:
    if rows is None and not required:
        return
    if rows is None or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise TypeError(f'{what}: expected rows with a "prompt" column, for example a list of dicts, got {rows!r:.60}')
    if len(rows) == 0:
        raise ValueError(f"{what}: expected at least one row")
    for row in [rows[i] for i in range(len(rows))]:
        if not isinstance(row, Mapping) or "prompt" not in row:
            raise ValueError(f'{what}: its rows must be dicts with a "prompt", got {row!r:.80}')
        if row.keys() != rows[0].keys():
            raise ValueError(f"{what}: its rows must have equal columns, got {sorted(rows[0])} and {sorted(row)}")


def call(function: RewardFunc, rows: Rows, prompts: list[str], completions: list[str]) -> list[float]:
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    name = getattr(function, "__name__", repr(function))
    values = list(function(prompts=prompts, completions=completions, **columns))
    if len(values) != len(completions):
        raise ValueError(f"reward function {name}: expected {len(completions)} rewards, got {len(values)}")
    for i, value in enumerate(values):
        if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise ValueError(f"reward function {name}: its reward for completion {i} is {value!r}, no finite number")
    return [float(v) for v in values]
