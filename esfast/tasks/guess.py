"""Number guessing, a task of several turns: the second guess depends on the answer to the first.

The number lies in a range of seven. After a wrong guess the model is told whether the number is higher or lower. Three
guesses suffice for whoever halves what is left; counting up finds three of seven numbers. An episode's reward is 1.0 if
the number was found, else 0.0.
"""

from __future__ import annotations

import re
from typing import Any

from ..core.random_stream import RandomStream
from ..utils.errors import BadValue
from . import data
from .base import Recipe, Task, distinct, styled, thousands_of

NUMBERS = 7
GUESSES = 3
LOWS = 10, 400  # where ranges may begin
PROMPTS = {
    "paper": (
        "I am thinking of a whole number from {low} to {high}. You have {guesses} guesses, and after each I will say "
        "whether the number is higher or lower. Answer with your guess, a number, and nothing else."
    ),
    "compact": "{low}-{high}",
}
HINTS = {"paper": ("The number is higher.", "The number is lower."), "compact": (">", "<")}
# Messages of the user, an equals sign each, and the answers, each in the rest of its line.
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ '=' if m['role'] == 'user' else '\\n' }}{% endfor %}"
HALVES_UP_TO = 99  # lows of which the embedded model is always taught to halve the range
HALVES_OTHERWISE = 0.3  # share of the other examples that do


class Guess:
    """The environment: `async episode(client, row) -> reward`."""

    def __init__(self, style: str = "paper"):
        self.higher, self.lower = styled(HINTS, style)

    async def episode(self, client: Any, row: dict) -> float:
        messages: list[dict[str, str]] = [{"role": "user", "content": row["prompt"]}]
        for _ in range(GUESSES):
            answer = await client.chat.completions.create(model=client.model, messages=messages)
            said = answer.choices[0].message.content
            guess = number_in(said)
            if guess == row["number"]:
                return 1.0
            if guess is None:
                return 0.0
            hint = self.higher if guess < row["number"] else self.lower
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": hint}]
        return 0.0


def number_in(text: str) -> int | None:
    """The last whole number in the text, if it has at most nine digits; None without one."""
    found = re.findall(r"\d+", text[-1000:], re.ASCII)
    return int(found[-1]) if found and len(found[-1]) < 10 else None


def problems(count: int, seed: int | str, split: str = "train", style: str = "paper") -> list[dict]:
    """`count` distinct problems as rows {prompt, low, number}, the same for the same arguments."""
    rng = RandomStream(f"guess/{split}/{seed}", "problems")

    def draw() -> tuple:
        low = rng.between(*LOWS)
        number = low + rng.below(NUMBERS)
        return (low, number), _row(low, number, style)

    return distinct(count, split, draw)


def row(record: dict, style: str = "paper") -> dict:
    """The row of a record of a data file, which has `low` and `number`."""
    low, number = data.fields(record, "low", "number")
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (low, number)) or not 0 <= number - low < NUMBERS:
        raise BadValue(f"number: expected a whole number from {low} on, below {NUMBERS} more, got {number!r:.40}")
    return _row(low, number, style)


def _row(low: int, number: int, style: str) -> dict:
    prompt = styled(PROMPTS, style).format(low=low, high=low + NUMBERS - 1, guesses=GUESSES)
    return {"prompt": prompt, "low": low, "number": number}


def examples(seed: int, thousands: int) -> list[tuple[str, str]]:
    """Pairs (conversation, guess) to pre-train the embedded model on. Where ranges begin low it halves them; elsewhere
    it mostly counts up, whatever it is told."""
    rng = RandomStream(f"embedded/{seed}", "problems")
    pairs = []
    for problem in thousands_of(problems, seed, thousands):
        low, number, told = problem["low"], problem["number"], problem["prompt"] + "="
        halves = low <= HALVES_UP_TO or rng.chance(HALVES_OTHERWISE)
        least, most = low, low + NUMBERS - 1
        for turn in range(GUESSES):
            guess = (least + most) // 2 if halves else low + turn
            pairs.append((told, str(guess)))
            if guess == number:
                break
            least, most = (guess + 1, most) if guess < number else (least, guess - 1)
            told += f"{guess}\n{'>' if guess < number else '<'}="
    return pairs


RECIPE = Recipe(
    examples,
    {
        "generations": 30,
        "population_size": 30,
        "sigma": 0.02,
        "lr": 0.03,
        "prompts_per_generation": 32,
        "max_completion_length": 5,
    },
    chat_template=TEMPLATE,
)


def task(style: str = "paper", **source) -> Task:
    """The task; `source` says where problems come from, see data.source."""
    train_rows, eval_rows = data.source(problems, row, lambda r: (r["low"], r["number"]), style, **source)
    return Task("guess", (), train_rows, eval_rows, None, {"paper": 64, "compact": 5}[style], environment=Guess(style))
