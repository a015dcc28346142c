"""Rows: dicts with a "prompt" and equal other columns, in TRL's conventions."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import BadType, BadValue

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]

TAKEN = ("prompts", "completions")
_IMMUTABLE = frozenset({str, int, float, bool, bytes, type(None)})
# Columns that a warning was given for.
_shared: set[str] = set()


def check_rows(what: str, rows, required: bool = True) -> Rows | None:
    """The rows as a sequence of dicts. Lists and datasets stay as they are; tables (a dict of columns, a DataFrame)
    become a dict a row; a text becomes a prompt. TypeError or ValueError, with the number of the row (from 0), if the
    rows can't be trained or evaluated on."""
    if rows is None and not required:
        return None
    rows = by_row(what, rows)
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__") or isinstance(rows, str):
        shown = " ".join(f"{rows!r:.60}".split())
        raise BadType(
            f'{what}: expected rows with a "prompt" column, for example a list of dicts, got {shown}; what has no '
            "length is made one by list(...), or given as a function (generation, count) -> rows"
        )
    if len(rows) == 0:
        raise BadValue(f"{what}: expected at least one row")
    for i in range(len(rows)):
        row = rows[i]
        if not isinstance(row, Mapping) or "prompt" not in row:
            raise BadValue(f'{what}: its rows must be dicts with a "prompt", row {i} is {row!r:.80}')
        if i == 0:
            names = row.keys()
            taken = [name for name in names if not isinstance(name, str) or name in TAKEN]
            if taken:
                raise BadValue(
                    f"{what}: a column can't be called {taken[0]!r}: reward functions get the columns by name, and "
                    "`prompts` and `completions` beside them"
                )
        if row.keys() != names:
            raise BadValue(
                f"{what}: its rows must have equal columns, row 0 has {sorted(names)}, row {i} {sorted(map(str, row))}"
            )
        try:
            check_prompt(row["prompt"])
        except TypeError as error:
            raise BadType(f"{what}: row {i}: {error}") from None
    return rows


def by_row(what: str, rows, prompt: bool = True):
    """Tables as lists of dicts; everything else unchanged. With `prompt` a table needs a column of this name."""
    if hasattr(rows, "columns") and hasattr(rows, "to_dict"):  # pandas
        return rows.to_dict("records")
    if hasattr(rows, "columns") and hasattr(rows, "to_dicts"):  # polars
        return rows.to_dicts()
    if hasattr(rows, "to_pylist"):  # pyarrow
        return rows.to_pylist()
    if hasattr(rows, "tolist"):  # an array, a column of pandas
        rows = rows.tolist()
    if isinstance(rows, (list, tuple)) and rows and all(isinstance(row, str) for row in rows):
        return [{"prompt": prompt} for prompt in rows]
    if not isinstance(rows, Mapping):
        return rows
    if prompt and "prompt" not in rows:
        shown = ", ".join(map(str, rows))
        raise BadType(
            f'{what}: expected rows with a "prompt" column; of a dict of splits ({shown}) name one, as dataset["train"]'
        )
    sizes = {name: len(column) for name, column in rows.items() if hasattr(column, "__len__")}
    if len(sizes) < len(rows) or len(set(sizes.values())) > 1 or isinstance(rows.get("prompt"), str):
        raise BadValue(f"{what}: expected columns, lists of equal length, or a list of dicts, got {rows!r:.120}")
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


def check_prompt(prompt):
    """The prompt, if it is a text or a chat; otherwise TypeError."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, (list, tuple)) or not prompt or not all(isinstance(m, Mapping) for m in prompt):
        raise BadType(f"prompt: expected a text, or a chat (a list of messages, dicts), got {prompt!r:.60}")
    return prompt


def check_text(what: str, text: str) -> None:
    """ValueError for a UTF-16 surrogate without its other half, which no tokenizer and no UTF-8 file accepts.

    JSON's "\\ud83d" without what follows it is the usual way to get one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.start + 20]
        raise BadValue(
            f"{what}: {near!r} holds a lone surrogate, half of a character, which UTF-8 has no form for; replace it: "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None


def columns(rows: Rows, completions: Sequence) -> dict[str, list]:
    """The keyword arguments of a reward function: `prompts`, `completions` and the rows' other columns, a list each.

    They are deep copies, so the function may change them. A value that can't be copied (a lock, a connection) is
    shared,
    with a warning."""
    lists = {key: [_own(row[key], key) for row in rows] for key in rows[0] if key != "prompt"}
    return lists | {
        "prompts": [_own(row["prompt"], "prompt") for row in rows],
        "completions": [_own(completion, "completions") for completion in completions],
    }


def _own(value, column: str):
    if type(value) in _IMMUTABLE:
        return value
    try:
        return copy.deepcopy(value)
    except Exception as error:
        # deepcopy may raise anything, as pickle does.
        if column not in _shared:
            _shared.add(column)
            log.warning("column %r: its values can't be copied, so reward functions share them: %s", column, error)
        return value
