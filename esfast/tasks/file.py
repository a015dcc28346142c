"""The task of a user's file: prompts from the file, rewards from functions named on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from ..utils.errors import BadImport, BadValue
from ..utils.rows import check_prompt
from . import data
from .base import Task


def row(record: dict, style: str = "paper") -> dict:
    """The record without its column "split"; its `prompt` goes to the model."""
    check_prompt(data.fields(record, "prompt")[0])
    return {key: value for key, value in record.items() if key != "split"}


def reward_function(name: str) -> Callable[..., list[float]]:
    """The reward function that `module:function` names; see `imported`."""
    return imported(name, "reward")


def imported(name: str, what: str, form: str = "MODULE:FUNCTION") -> Any:
    """What `module:function` names, a function or a class. The module is looked for in sys.path; commands of esfast add
    the current folder to it.

    Raises ValueError if the name has another form; ImportError if the module or the function is missing, or if
    importing the module raised."""
    module, _, function = name.partition(":")
    if not module or not function.isidentifier():
        raise BadValue(f"{what}: expected {form}, for example {what}s:mine, got {name!r}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BadImport(f"{what}: no module {error.name!r} here or among the installed packages") from None
    except (Exception, SystemExit) as error:
        # It is the user's code, and may raise anything.
        raise BadImport(f"{what}: importing {module} raised {type(error).__name__}: {error}") from error
    if not callable(getattr(found, function, None)):
        raise BadValue(f"{what}: {module} has no function {function!r}")
    return getattr(found, function)


def task(path: str, reward: Sequence[str] = (), style: str = "paper", train_prompts: int | None = None) -> Task:
    """The task of a file's prompts (see data.read) and of reward functions named `module:function`."""
    functions = tuple(map(reward_function, reward))
    if not functions:
        raise BadValue("task: a file needs a reward function: --reward MODULE:FUNCTION")
    train_rows, eval_rows = data.source(lambda *a: [], row, lambda r: r["prompt"], style, path, train_prompts)
    return Task("file", functions, train_rows, eval_rows, None, 1024)
