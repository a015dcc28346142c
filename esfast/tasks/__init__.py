"""Tasks: prompts to train on, held-out prompts, and the reward of a response.

`get(name)` returns a task. A task has rows and reward functions: a row is a dict whose "prompt" goes to the model and
whose other columns go to the reward functions as keyword lists, as in TRL. ESTrainer also takes rows and reward
functions from any other source.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from ..utils.errors import BadType, BadValue
from ..utils.suggest import unknown
from . import conciseness, countdown, environment, file, guess, gym, math, sudoku
from .base import Recipe, Task
from .data import DATASETS

__all__ = ["MODULES", "Recipe", "Task", "get"]

MODULES: dict[str, ModuleType] = {
    "countdown": countdown,
    "conciseness": conciseness,
    "math": math,
    "sudoku": sudoku,
}
# Tasks of several turns: each has an environment in the place of reward functions.
GAMES: dict[str, ModuleType] = {"guess": guess}


def get(
    name: str,
    style: str = "paper",
    data: str | None = None,
    train_prompts: int | None = None,
    reward: Sequence[str] = (),
) -> Task:
    """The task of that name.

    Args:
        name: a key of MODULES or GAMES; `gym:NAME` for reasoning-gym's (see the module gym); `environment:MODULE:CLASS`
            (see environment.task); `file:PATH` (see records.read) or `dataset:NAME` for prompts of your own; or a task
            of your own: `module:function`, or the name of an entry point in the group "esfast.tasks" of an installed
            package. Your own is called as function(style=, data=, train_prompts=) and returns a Task.
        style: style of the prompts: "paper", or "compact" for the embedded model; gym tasks have "chat", too.
        data: a file of problems to use instead of the task's generator.
        train_prompts: how many fixed problems to train on. None: fresh ones in every generation (all, from a file).
        reward: names `module:function` of reward functions, which replace the task's own. Prompts of your own need
            them.

    Raises:
        TypeError, ValueError, ImportError: the name is unknown (the message names the known ones), or the task refuses
            an argument.
    """
    source: dict[str, Any] = {"style": style, "train_prompts": train_prompts}
    if name.startswith(("file:", DATASETS)):
        return file.task(name.removeprefix("file:"), reward, **source)
    if name.startswith(environment.PREFIX):
        if reward:
            raise BadValue("reward: an environment's episodes return their rewards; leave --reward out")
        return environment.task(name.removeprefix(environment.PREFIX), style, data, train_prompts)
    task = _maker(name)(data=data, **source)
    if not isinstance(task, Task):
        raise BadType(f"task: expected an esfast.tasks.Task from {name}, got {task!r:.80}")
    return dataclasses.replace(task, reward_funcs=tuple(map(file.reward_function, reward))) if reward else task


def _maker(name: str) -> Callable[..., Task]:
    """The function that makes the task of this name."""
    if name in MODULES or name in GAMES:
        return (MODULES | GAMES)[name].task
    if name.startswith(gym.PREFIX):
        return functools.partial(gym.task, name.removeprefix(gym.PREFIX))
    for point in entry_points(group="esfast.tasks"):
        if point.name == name:
            return point.load()
    if ":" in name:
        return file.imported(name, "task")
    raise BadValue(unknown("task", name, [*MODULES, *GAMES, "gym:NAME", "file:PATH", "MODULE:FUNCTION"]))
