"""Tasks: prompts to train on, prompts to be judged on, and the reward of a response.

`get(name)` is the one door. A task is its rows (dicts whose "prompt" goes to the model and whose other columns go to
the reward functions as keyword lists, as in TRL) and functions of completions; any other source of rows and rewards
can be handed to ESTrainer directly.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from . import countdown


@dataclass(frozen=True)
class Task:
    """What it takes to train and judge a model on one task.

    reward_funcs    each called as f(prompts=, completions=, **columns) -> list of float; rewards are summed
    train_rows      (generation, count, seed) -> rows of that generation; the same call gives the same rows
    eval_rows       (count) -> held-out rows, none of which train_rows ever gives
    accuracy        of the reward functions' form: 1.0 for a right response, 0.0 for a wrong one
    max_new_tokens  room that a response needs, in tokens
    """

    name: str
    reward_funcs: tuple[Callable[..., list[float]], ...]
    train_rows: Callable[[int, int, int], list[dict]]
    eval_rows: Callable[[int], list[dict]]
    accuracy: Callable[..., list[float]]
    max_new_tokens: int


def _countdown(style: str = "paper") -> Task:
    countdown.prompt([1], 1, style)  # an unknown style is refused here rather than at the first generation
    return Task(
        name="countdown",
        reward_funcs=(countdown.reward,),
        train_rows=lambda generation, count, seed: countdown.problems(count, f"{seed}/{generation}", "train", style),
        eval_rows=lambda count: countdown.problems(count, "evaluation", "test", style),
        accuracy=countdown.accuracy,
        max_new_tokens={"paper": 1024, "compact": 16}[style],
    )


_TASKS: dict[str, Callable[..., Task]] = {"countdown": _countdown}


def get(name: str, **options) -> Task:
    """The task of that name. Options are the task's own: `style` ("paper" or "compact", for the embedded model) of
    Countdown. Raises ValueError, naming the known tasks, for any other name."""
    if name not in _TASKS:
        close = difflib.get_close_matches(str(name), _TASKS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown task {name!r}.{hint} Known tasks: {', '.join(sorted(_TASKS))}")
    return _TASKS[name](**options)
