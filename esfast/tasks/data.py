"""Sources of a task's problems: its generator, fresh or a fixed set, or a data file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..utils.errors import BadValue
from ..utils.rows import Rows
from .base import FixedRows, split_of
from .records import DATASETS, SPLITS, read

__all__ = ["DATASETS", "Source", "fields", "read", "source", "split", "text"]

Source = tuple[Callable[[int, int, int], Rows], Callable[[int], Rows]]


def source(
    problems: Callable[..., list[dict]],
    row: Callable[[dict, str], dict],
    identity: Callable[[dict], Any],
    style: str,
    data: str | Path | None = None,
    train_prompts: int | None = None,
) -> Source:
    """Makes a task's `train_rows` and `eval_rows` (see Task) from these functions:

    problems       (count, seed, split, style) -> generated rows
    row            (record of a data file, style) -> row; ValueError or TypeError says what is wrong with the record
    identity       (row) -> what decides about the split of a row from a file
    data           a file (see `read`) whose records are used instead of generated problems
    train_prompts  train on that many fixed problems instead of fresh ones in every generation
    """
    if data is not None:
        train, test = split(read(data), lambda record: row(record, style), identity, data)
        train = train[:train_prompts]
        return FixedRows(lambda seed: train), lambda count: test[:count]
    # Refuses an unknown style here, not at the first generation.
    problems(1, 0, "train", style)
    train_rows: Callable[[int, int, int], Rows]
    if train_prompts is None:
        train_rows = lambda generation, count, seed: problems(count, f"{seed}/{generation}", "train", style)  # noqa: E731
    else:
        train_rows = FixedRows(
            functools.lru_cache(lambda seed: problems(train_prompts, f"{seed}/fixed", "train", style))
        )
    return train_rows, lambda count: problems(count, "evaluation", "test", style)


def split(
    records: Sequence[Mapping], row: Callable[[dict], dict], identity: Callable[[dict], Any], what: str | Path
) -> tuple[list[dict], list[dict]]:
    """Divides rows into training rows and held-out rows. The file's column "split" decides, "train" or "test" (also
    "validation"). Without it, a hash of the problem holds out a quarter."""
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    first: dict | None = None
    for number, record in enumerate(records, start=1):
        try:
            made = row(dict(record))
            first = first or made
            if made.keys() != first.keys():
                raise BadValue(f"expected the columns of record 1, {', '.join(first)}, got {', '.join(made)}")
            name = record.get("split")
            if name is not None and name not in SPLITS:
                raise BadValue(f"split {name!r:.60}: expected train, test or validation")
            held_out = split_of(identity(made)) == "test" if name is None else name != "train"
            rows["test" if held_out else "train"].append(made)
        except (ValueError, TypeError) as error:
            raise BadValue(f"{what}: record {number}: {error}") from None
    if not rows["train"]:
        raise BadValue(f'{what}: all {len(records)} records are held out; add more, or a column "split"')
    return rows["train"], rows["test"]


def fields(record: Mapping, *names: str | tuple[str, ...]) -> list:
    """The values of a record under these names. A tuple holds several names of one field; the first that is there and
    not None counts. ValueError names the field that is missing."""
    choices = [(name,) if isinstance(name, str) else name for name in names]
    found = [[record[name] for name in alike if name in record] for alike in choices]
    if not all(found):
        wanted = " and ".join(" (or ".join(map(repr, alike)) + ")" * (len(alike) - 1) for alike in choices)
        raise BadValue(f"expected {wanted}, got only {', '.join(map(repr, record)) or 'an empty record'}")
    return [next((value for value in values if value is not None), None) for values in found]


def text(what: str, value) -> str:
    """The field as a text; a number becomes one. ValueError for everything else (also None and NaN), and for a blank
    text."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, (float, Decimal)) and math.isfinite(value):
        # LaTeX would read 1e-07 as a product.
        return format(Decimal(str(value)), "f")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadValue(f"{what}: expected a text, got {value!r:.60}")
    return value
