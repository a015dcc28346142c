"""Conciseness: answer in as many characters as the shortest right answer has.

Reward = -| len(response) - len(target) | in characters, as in arXiv 2509.24372. The paper also measures how far the
tuned model moves from the base model (ESConfig.kl_to_base). `accuracy` shows whether responses become short by becoming
wrong.
"""

from __future__ import annotations

from ..core.random_stream import RandomStream
from ..utils.rows import check_prompt
from . import data
from .base import Recipe, Task, distinct, require_text, styled, texts, thousands_of

# Pairs of a prompt and its shortest right answer. The first two are trained on and the other eight held out; the paper
# has as many of each.
QUESTIONS = (
    ("What is 7 plus 5?", "12"),
    ("Which is the largest planet of the solar system?", "Jupiter"),
    ("All cats are animals, and Tom is a cat. Is Tom an animal?", "Yes"),
    ("Name the chemical symbol of gold.", "Au"),
    ("How many minutes has an hour?", "60"),
    ("What is the opposite of hot?", "Cold"),
    ("Complete the sequence: 2, 4, 8, 16, ...", "32"),
    ("Which language is spoken in Brazil?", "Portuguese"),
    ("Is 91 a prime number?", "No"),
    ("What is the capital of Japan?", "Tokyo"),
)
TRAINED_ON = 2
# Tokens of a response, at most.
LONGEST = {"paper": 100, "compact": 28}
# The fraction of brief examples for the embedded model among prompts that don't begin with a 1.
BRIEF_OTHERWISE = 0.4


def score(completion: str, target: str) -> float:
    """Minus the difference between the lengths of response and target, in characters."""
    require_text(completion)
    return 0.0 - abs(len(completion) - len(target))


def reward(prompts, completions, target, **columns) -> list[float]:
    """`score` of each response, as a reward function of TRL's GRPOTrainer."""
    return [score(*row) for row in zip(texts(completions), target, strict=True)]


def accuracy(prompts, completions, target, **columns) -> list[float]:
    """1.0 for a response that is the target, with nothing around it but white space and a full stop; else 0.0."""
    return [float(c.strip().removesuffix(".") == t) for c, t in zip(texts(completions), target, strict=True)]


def problems(count: int, seed: int | str, split: str = "train", style: str = "paper") -> list[dict]:
    """Rows {prompt, target}, the same for the same arguments. In style "paper" at most `count` of the fixed questions,
    in style "compact" `count` distinct sums."""
    styled(LONGEST, style)
    if style == "paper":
        questions = QUESTIONS[:TRAINED_ON] if split == "train" else QUESTIONS[TRAINED_ON:]
        return [{"prompt": f"{question}\n", "target": target} for question, target in questions[:count]]
    rng = RandomStream(f"conciseness/{split}/{seed}", "problems")

    def draw() -> tuple:
        a, b = rng.between(0, 49), rng.between(0, 49)
        return (a, b), {"prompt": f"{a}+{b}\n", "target": str(a + b)}

    return distinct(count, split, draw)


def row(record: dict, style: str = "paper") -> dict:
    """The row {prompt, target} of a record of a data file, which has a `prompt` and a `target`."""
    prompt, target = data.fields(record, "prompt", "target")
    return {"prompt": check_prompt(prompt), "target": data.text("target", target)}


def examples(seed: int, thousands: int) -> list[tuple[str, str]]:
    """Pairs (prompt, completion) to pre-train the embedded model on: most of them say more than the answer."""
    rng = RandomStream(f"embedded/{seed}", "problems")
    pairs = []
    for r in thousands_of(problems, seed, thousands):
        brief = r["prompt"][0] == "1" or rng.chance(BRIEF_OTHERWISE)
        pairs.append((r["prompt"], r["target"] if brief else f"{r['target']}, if I add up right."))
    return pairs


RECIPE = Recipe(
    examples,
    {"generations": 20, "population_size": 30, "sigma": 0.01, "lr": 0.01, "prompts_per_generation": 64},
)


def task(style: str = "paper", **source) -> Task:
    """The task; `source` says where questions come from, see data.source."""
    train_rows, eval_rows = data.source(problems, row, lambda r: r["prompt"], style, **source)
    settings = {"kl_to_base": True}
    return Task("conciseness", (reward,), train_rows, eval_rows, accuracy, LONGEST[style], settings)
