"""The task of an environment of one's own: `environment:MODULE:NAME`, a class, an object or a coroutine function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..utils.errors import BadImport, BadType, BadValue
from ..utils.rows import Rows
from . import data, file
from .base import Task
from .steps import TextArena
from .verifiers import Verifiers

PREFIX = "environment:"
# Environments of these libraries go by their names there: textarena:GuessTheNumber-v0, verifiers:gsm8k-v1.
LIBRARIES: dict[str, Callable[[str], Any]] = {"textarena": TextArena, "verifiers": Verifiers}
LONGEST_ANSWER = 256  # tokens, unless the environment says otherwise


def task(name: str, style: str = "paper", source: str | None = None, train_prompts: int | None = None) -> Task:
    """The task of the environment that `name` says, `MODULE:NAME`.

    A class is called without arguments. It has `async episode(client, row) -> reward`. Rows come from the file
    `source`, or from its methods `rows(generation, count, seed)` and `held_out(count)`; a coroutine function has no
    methods and needs a file. Its attributes `max_new_tokens`, of one answer, and `settings`, of ESConfig, are defaults
    of the run.

    Raises ValueError or ImportError for a name that leads to nothing, TypeError for what is no environment.
    """
    environment = _made(name)
    if source is not None:
        train_rows, eval_rows = data.source(lambda *a: [], row, _identity, style, source, train_prompts)
    else:
        if train_prompts is not None:
            raise BadValue("train_prompts: an environment makes up its own rows; give it a file of rows with --data")
        train_rows, eval_rows = _method(environment, "rows", name), getattr(environment, "held_out", _nothing)
    return Task(
        _short(name),
        (),
        train_rows,
        lambda count: list(eval_rows(count)),
        None,
        getattr(environment, "max_new_tokens", LONGEST_ANSWER),
        dict(getattr(environment, "settings", {})),
        environment=environment,
    )


def _short(name: str) -> str:
    """The name without its library, owner, version and options: it becomes a part of a folder's."""
    return re.split(r"[?@]", name.partition(":")[2])[0].rpartition("/")[2].lower()


def row(record: dict, style: str = "paper") -> dict:
    """The record without its column "split", and with an empty prompt if it has none."""
    return {"prompt": "", **{key: value for key, value in record.items() if key != "split"}}


def _made(name: str) -> Any:
    kind, _, rest = name.partition(":")
    if kind in LIBRARIES:
        return LIBRARIES[kind](rest)
    found: Any = file.imported(name, "environment", "MODULE:CLASS")
    if not isinstance(found, type):
        return found
    try:
        return found()
    except Exception as error:
        # It is the user's code, and may raise anything.
        raise BadImport(f"environment: {name}() raised {type(error).__name__}: {error}") from error


def _method(environment: Any, method: str, name: str) -> Callable[[int, int, int], Rows]:
    found = getattr(environment, method, None)
    if not callable(found):
        raise BadType(
            f"environment: {name} has no method rows(generation, count, seed) that gives its rows; write one, or give "
            "a file of rows with --data"
        )
    return found


def _identity(row: dict) -> list:
    return sorted((key, repr(value)) for key, value in row.items())


def _nothing(count: int) -> Rows:
    return []
