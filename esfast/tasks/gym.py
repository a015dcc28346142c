"""reasoning-gym's tasks: `gym:NAME`, with options `gym:countdown?min_numbers=3`, and mixtures `gym:a+2*b`.

Problems are made without end, by (seed, generation). A response is graded by the task's own `score_answer`, on the text
of its last `<answer> </answer>`, without white space around it; a response without the tags scores 0.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re
from collections.abc import Callable

from ..core.random_stream import RandomStream
from ..utils.errors import BadValue
from ..utils.rows import Rows
from . import gym_problems, gym_scoring
from .base import FixedRows, Recipe, Task, styled, texts, thousands_of
from .gym_options import PREFIX, parse, require_package
from .tags import last_answer, maybe_tagged

log = logging.getLogger(__name__)

__all__ = ["ANY_ANSWER", "PREFIX", "WITHOUT_ANSWER", "accuracy", "problems", "recipe", "reward", "score", "task"]

_ASK = (
    "Reason step by step inside <think> </think>, then give only the final answer inside <answer> </answer>, in the "
    "form that was asked for."
)
PROMPTS = {
    "paper": f"{{question}}\n\n{_ASK}\n<think>",
    "compact": "{question}\n<think>",
    "chat": f"{{question}}\n\n{_ASK}",
}
# Tasks of which reasoning-gym tells no answer, since many are right.
WITHOUT_ANSWER = ("boxnet", "rush_hour")
# Tasks whose grader gives 1 to any answer (as of version 0.1.25): there is nothing to learn.
ANY_ANSWER = ("game_of_life_halting",)
# Tokens of a response. The embedded model has one for each byte and each tag; what its answers take is measured.
LONGEST = {"paper": 1024, "compact": 24, "chat": 1024}
TAGS = 8
# Share of the examples for the embedded model that are tagged where nothing demands it.
TAGGED_OTHERWISE = 0.2


def score(completion: str, problem: str, entry: str) -> float:
    """The task's own score of one response, 0.0 without an `<answer> </answer>`."""
    answer = last_answer(completion)
    return 0.0 if answer is None else gym_scoring.score(problem, entry, answer.strip())


def reward(prompts, completions, problem, entry, **columns) -> list[float]:
    """`score` of each response, as a reward function of TRL's GRPOTrainer."""
    return [score(*row) for row in zip(texts(completions), problem, entry, strict=True)]


def accuracy(prompts, completions, problem, entry, **columns) -> list[float]:
    """1.0 for a response whose score is 1, else 0.0: some graders give part of it for a part of the answer."""
    return [float(value == 1) for value in reward(prompts, completions, problem, entry)]


def problems(spec: str, count: int, seed: str, split: str = "train", style: str = "paper") -> list[dict]:
    """At most `count` rows {prompt, problem, entry, answer}, the same for the same arguments; see gym_problems.make."""
    form = styled(PROMPTS, style)

    def prompt(question: str):
        asked = form.format_map({"question": question})
        return [{"role": "user", "content": asked}] if style == "chat" else asked

    made = gym_problems.make(spec, count, seed, split)
    return [{"prompt": prompt(row.pop("question")), **row} for row in made]


def recipe(spec: str) -> Recipe:
    """How the embedded model is made for the task: of answers in tags where their first character says so (its code is
    a multiple of 3), and mostly without tags elsewhere. Whether it learns the task depends on the task."""

    def examples(seed: int, thousands: int) -> list[tuple[str, str]]:
        rng = RandomStream(f"embedded/{seed}", "problems")
        rows = thousands_of(functools.partial(problems, spec), seed, thousands)
        known = [(row["prompt"], row["answer"]) for row in rows if row["answer"]]
        return [(p, maybe_tagged(answer, ord(answer[0]) % 3 == 0, rng, TAGGED_OTHERWISE)) for p, answer in known]

    # As bench/forgetting.py measured them; with a sigma of 0.01 members answer alike.
    settings = {"generations": 40, "population_size": 30, "sigma": 0.03, "lr": 0.03, "prompts_per_generation": 16}
    return Recipe(examples, settings)


def task(spec: str, style: str = "paper", data=None, train_prompts: int | None = None) -> Task:
    """The task that `spec` names, without its prefix. Its name and its options are checked, by making one problem."""
    if data is not None:
        raise BadValue(f"data: {PREFIX}{spec} makes its own problems; a file of prompts is --task file:PATH")
    require_package()
    checked = problems(spec, 1 if style != "compact" else 16, "check", "train", style)
    for part in parse(spec):
        if part.name in ANY_ANSWER:
            log.warning("%s%s: reasoning-gym's grader scores any answer 1: the model can't learn it", PREFIX, part.name)
    rows = functools.partial(problems, spec, style=style)
    train_rows: Callable[[int, int, int], Rows]
    if train_prompts is None:
        train_rows = lambda generation, count, seed: rows(count, f"{seed}/{generation}")  # noqa: E731
    else:
        train_rows = FixedRows(functools.lru_cache(lambda seed: rows(train_prompts, f"{seed}/fixed")))
    name = re.sub(r"[^\w.+-]+", "-", PREFIX[:-1] + "-" + "+".join(part.name for part in parse(spec)))[:60]
    return Task(
        name,
        (reward,),
        train_rows,
        lambda count: rows(count, "evaluation", "test"),
        accuracy,
        max(LONGEST[style], *(len((row["answer"] or "").encode()) + TAGS for row in checked)),
        source=f"{PREFIX}{spec} of reasoning-gym {importlib.metadata.version('reasoning-gym')}",
    )
