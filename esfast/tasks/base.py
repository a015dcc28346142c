"""What a task is, and how the embedded model is prepared for one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..core.random_stream import permutation
from ..utils.errors import BadType, BadValue
from ..utils.rows import Rows

# The fraction of all problems that is held out: the split "test".
HELD_OUT = 0.25


def draw(rows: Rows, generation: int, count: int, seed: int) -> Rows:
    """The rows of a generation: `count` of them, or all if there are fewer. No row comes a second time until all were
    used. A pure function of seed and generation, so that a run can be resumed anywhere."""
    size = len(rows)
    places = range(generation * count, (generation + 1) * count) if count < size else range(size)
    epochs = {p // size: permutation(size, seed, "row_order", p // size) for p in places}
    return [rows[int(epochs[p // size][p % size])] for p in places]


@dataclass(frozen=True)
class Recipe:
    """How the embedded model is made for a task, and ES settings under which it then learns reliably within minutes.

    Attributes:
        examples: (seed, thousands) -> that many thousand pairs (prompt, completion) to pre-train on, all of the split
            "train".
        settings: fields of ESConfig.
        chat_template: for the model's tokenizer, if the task is a conversation.
    """

    examples: Callable[[int, int], list[tuple[str, str]]]
    settings: dict[str, Any]
    chat_template: str | None = None


@dataclass(frozen=True)
class FixedRows:
    """The `train_rows` of a Task that trains on the same rows in every generation: `all(seed)`."""

    all: Callable[[int], Rows]

    def __call__(self, generation: int, count: int, seed: int) -> Rows:
        return draw(self.all(seed), generation, count, seed)


@dataclass(frozen=True)
class Task:
    """What is needed to train and evaluate a model on one task.

    Attributes:
        name: the task's name, for run folders and messages.
        reward_funcs: functions f(prompts=, completions=, **columns) -> list of float, one number a completion. Their
            rewards are summed.
        train_rows: (generation, count, seed) -> rows of that generation, dicts with a "prompt". The same call gives the
            same rows.
        eval_rows: (count) -> at most so many held-out rows, none of which train_rows ever gives.
        accuracy: a function like a reward function: 1.0 for a right response, 0.0 for a wrong one. None if the task
            can't tell.
        max_new_tokens: longest response that the task needs, in tokens.
        settings: fields of ESConfig that the task sets, whatever the model.
        source: name and version of what makes up the rows, if the version matters. A resumed run must have the same.
        environment: an object with `async episode(client, row) -> reward` (see ESTrainer), in the place of reward
            functions. None for a task of one response.
    """

    name: str
    reward_funcs: tuple[Callable[..., list[float]], ...]
    train_rows: Callable[[int, int, int], Rows]
    eval_rows: Callable[[int], Rows]
    accuracy: Callable[..., list[float]] | None
    max_new_tokens: int
    settings: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    environment: Any = None

    def train_dataset(self, seed: int) -> Rows | Callable[[int, int], Rows]:
        """The `train_dataset` for ESTrainer. If the task's rows are fixed it is all of them, which the trainer can
        check before the run begins. Otherwise it is a function (generation, count) -> fresh rows. Both give the rows
        that train_rows gives with this seed."""
        if isinstance(self.train_rows, FixedRows):
            return self.train_rows.all(seed)
        return FreshRows(self, seed)


@dataclass(frozen=True)
class FreshRows:
    """A task's rows of every generation, (generation, count), under one seed."""

    task: Task
    seed: int

    @property
    def source(self) -> str:
        return self.task.source

    def __call__(self, generation: int, count: int) -> Rows:
        return self.task.train_rows(generation, count, self.seed)


def split_of(identity) -> str:
    """The split, "train" or "test", of a problem. `identity` is what makes it this problem; a hash of its repr decides.

    So a problem is in the same split with every seed, count and run, and no held-out problem is ever trained on.
    """
    digest = hashlib.sha256(repr(identity).encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32 else "train"


def distinct(count: int, split: str, draw: Callable[[], tuple[Any, dict] | None]) -> list[dict]:
    """`count` rows of different problems of a split. `draw` returns (identity, row) of a random problem, or None for a
    draw that failed. ValueError if so many can't be found, or for an unknown split."""
    if split not in ("train", "test"):
        raise BadValue(f"unknown split {split!r}: expected 'train' or 'test'")
    if count < 0:
        raise BadValue(f"expected count >= 0 problems, got {count}")
    seen: set = set()
    rows: list[dict] = []
    failures = 0
    while len(rows) < count:
        drawn = draw()
        if drawn is not None and drawn[0] not in seen and split_of(drawn[0]) == split:
            seen.add(drawn[0])
            rows.append(drawn[1])
            failures = 0
        elif (failures := failures + 1) > 20_000:
            raise BadValue(
                f"only {len(rows)} of {count} distinct {split} problems found: ask for fewer, or widen what they are "
                "drawn from"
            )
    return rows


def thousands_of(problems: Callable[..., list[dict]], seed: int, thousands: int) -> list[dict]:
    """Rows to pre-train the embedded model on, drawn a thousand at a time. Problems are distinct only within one call;
    here a problem may come again with another solution."""
    return [row for part in range(thousands) for row in problems(1000, f"embedded/{seed}/{part}", "train", "compact")]


def styled(table: dict[str, Any], style: str) -> Any:
    """table[style], or a ValueError that names the styles there are."""
    if style not in table:
        raise BadValue(f"unknown prompt style {style!r}: expected one of {', '.join(table)}")
    return table[style]


def texts(completions) -> list[str]:
    """Each completion as a str. In TRL's conventions a completion may be a list of chat messages; the last one
    counts."""
    return [c if isinstance(c, str) else c[-1]["content"] for c in completions]


def require_text(completion: str) -> None:
    if not isinstance(completion, str):
        raise BadType(f"completion must be the generated text (str), got {type(completion).__name__}")
