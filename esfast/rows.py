"""Rows: dicts with a "prompt" and equal other columns, in TRL's conventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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


def check_text(what: str, text: str) -> None:
    """ValueError for half a character: a UTF-16 surrogate without its other half, which no tokenizer and no file takes.

    JSON's "\\ud83d" without what follows it is the usual way to get one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"{what}: {near!r} holds a lone surrogate, half of a character, which UTF-8 has no form for; replace it: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None


def draw(rows: Rows, generation: int, count: int, seed: int) -> Rows:
    """`count` of the rows, or all if they are fewer, none a second time until all were used: a pure function of seed
    and generation, so that a run can be taken up anywhere."""
    size = len(rows)
    places = range(generation * count, (generation + 1) * count) if count < size else range(size)
    epochs = {p // size: np.random.default_rng((seed, p // size)).permutation(size) for p in places}
    return [rows[int(epochs[p // size][p % size])] for p in places]
