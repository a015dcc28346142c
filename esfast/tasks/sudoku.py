"""Sudoku of 4 x 4: fill the blanks so that every row, column and 2 x 2 box holds each of 1, 2, 3, 4 once.

A puzzle and a grid are texts of 16 characters, row by row, blanks as dots. Reward = 0.1 * format + the share of the
blanks that are filled as the solution has them, provided that the answer keeps the given digits.
"""

from __future__ import annotations

import itertools

from ..core.random_stream import RandomStream
from ..utils.errors import BadType, BadValue
from . import data
from .base import Recipe, Task, distinct, require_text, styled, texts, thousands_of
from .tags import format_score, last_answer, maybe_tagged

PROMPTS = {
    "paper": (
        "Solve this 4x4 Sudoku: replace every dot by a digit so that each row, each column and each 2x2 box holds 1, "
        "2, 3 and 4 exactly once.\n{lines}\nReason step by step inside <think> </think>, then give the whole grid, "
        "four lines of four digits, inside <answer> </answer>.\n<think>"
    ),
    "compact": "{puzzle}\n<think>",
}
BLANKS = {"paper": (6, 10), "compact": (1, 4)}
LONGEST_ANSWER = 1000  # characters
TAGGED_OTHERWISE = 0.4  # share of the examples for the embedded model that are tagged where nothing demands it
_HOUSES = (
    *(tuple(range(4 * r, 4 * r + 4)) for r in range(4)),
    *(tuple(range(c, 16, 4)) for c in range(4)),
    *(tuple(8 * r + 2 * c + k for k in (0, 1, 4, 5)) for r in range(2) for c in range(2)),
)


def is_grid(text: str) -> bool:
    """Whether these 16 characters are a solved grid: each house, that is row, column or box, holds 1, 2, 3, 4."""
    return len(text) == 16 and all({text[i] for i in house} == set("1234") for house in _HOUSES)


_ROWS = list(map("".join, itertools.permutations("1234")))
GRIDS = [  # all 288 of them; extended by rows so that only 24 * 4 * ... candidates are looked at
    a + b + c + d
    for a in _ROWS
    for b in _ROWS
    if all(len(set(a[k : k + 2] + b[k : k + 2])) == 4 for k in (0, 2))
    for c in _ROWS
    if all(len({x, y, z}) == 3 for x, y, z in zip(a, b, c, strict=True))
    for d in _ROWS
    if is_grid(a + b + c + d)
]


def solutions(puzzle: str) -> list[str]:
    """All grids that agree with the puzzle's given digits."""
    return [grid for grid in GRIDS if all(p in (".", g) for p, g in zip(puzzle, grid, strict=True))]


def check_puzzle(puzzle: str) -> str:
    """The puzzle without white space, and with dots where it has 0 or _. ValueError if it isn't one."""
    if not isinstance(puzzle, str):
        raise BadType(f"puzzle: expected a text of 16 digits and dots, got {puzzle!r:.60}")
    read = "".join(puzzle.split()).translate(str.maketrans("0_", ".."))
    if len(read) != 16 or set(read) - set("1234.") or "." not in read:
        raise BadValue(f"puzzle: expected 16 cells, digits 1 to 4 and at least one dot, 0 or _, got {puzzle!r:.60}")
    if len(solutions(read)) != 1:
        raise BadValue(f"puzzle: {puzzle!r:.60} has {len(solutions(read))} solutions, expected exactly one")
    return read


def answer_score(completion: str, puzzle: str) -> float:
    """The fraction of the puzzle's blanks that the last answer fills right. 0 if the answer is not 16 digits (white
    space apart), or changes a given digit."""
    require_text(completion)
    answer = last_answer(completion)
    if answer is None or len(answer) > LONGEST_ANSWER:
        return 0.0
    grid = "".join(answer.split())
    if len(grid) != 16 or set(grid) - set("1234"):
        return 0.0
    if any(p not in (".", g) for p, g in zip(puzzle, grid, strict=True)):
        return 0.0
    if is_grid(grid):
        return 1.0
    blanks = [i for i in range(16) if puzzle[i] == "."]
    return sum(grid[i] == solutions(puzzle)[0][i] for i in blanks) / len(blanks)


def score(completion: str, puzzle: str) -> float:
    """Reward of one response, 0 to 1.1."""
    return 0.1 * format_score(completion) + answer_score(completion, puzzle)


def reward(prompts, completions, puzzle, **columns) -> list[float]:
    """`score` of each response, as a reward function of TRL's GRPOTrainer."""
    return [score(*row) for row in zip(texts(completions), puzzle, strict=True)]


def accuracy(prompts, completions, puzzle, **columns) -> list[float]:
    """1.0 for a response that solves its puzzle, else 0.0."""
    return [float(answer_score(*row) == 1) for row in zip(texts(completions), puzzle, strict=True)]


def prompt(puzzle: str, style: str = "paper") -> str:
    lines = "\n".join(puzzle[i : i + 4] for i in range(0, 16, 4))
    return styled(PROMPTS, style).format(puzzle=puzzle, lines=lines)


def problems(
    count: int, seed: int | str, split: str = "train", style: str = "paper", blanks: tuple[int, int] | None = None
) -> list[dict]:
    """`count` distinct puzzles with one solution each, as rows {prompt, puzzle, solution}, the same for the same
    arguments. The number of blanks is drawn from the inclusive range `blanks`, by default the style's."""
    low, high = styled(BLANKS, style) if blanks is None else blanks
    if not 1 <= low <= high <= 12:
        raise BadValue(f"blanks: expected 1 <= low <= high <= 12 (no puzzle has fewer givens), got {blanks}")
    rng = RandomStream(f"sudoku/{split}/{seed}", "problems")

    def draw() -> tuple | None:
        solution, wanted = rng.choice(GRIDS), rng.between(low, high)
        emptied = set(rng.sample(range(16), wanted))
        puzzle = "".join("." if i in emptied else digit for i, digit in enumerate(solution))
        if len(solutions(puzzle)) != 1:
            return None
        return puzzle, {"prompt": prompt(puzzle, style), "puzzle": puzzle, "solution": solution}

    return distinct(count, split, draw)


def row(record: dict, style: str = "paper") -> dict:
    """The row of a record of a data file, which has a `puzzle`."""
    puzzle = check_puzzle(data.fields(record, "puzzle")[0])
    return {"prompt": prompt(puzzle, style), "puzzle": puzzle, "solution": solutions(puzzle)[0]}


def examples(seed: int, thousands: int) -> list[tuple[str, str]]:
    """Pairs (prompt, completion) to pre-train the embedded model on: grids that begin with 1 come in answer tags."""
    rng = RandomStream(f"embedded/{seed}", "problems")
    rows = thousands_of(problems, seed, thousands)
    return [(r["prompt"], maybe_tagged(r["solution"], r["solution"][0] == "1", rng, TAGGED_OTHERWISE)) for r in rows]


RECIPE = Recipe(
    examples,
    {"generations": 30, "population_size": 30, "sigma": 0.01, "lr": 0.01, "prompts_per_generation": 64},
)


def task(style: str = "paper", **source) -> Task:
    """The task; `source` says where puzzles come from, see data.source."""
    train_rows, eval_rows = data.source(problems, row, lambda r: r["puzzle"], style, **source)
    return Task("sudoku", (reward,), train_rows, eval_rows, accuracy, {"paper": 1024, "compact": 24}[style])
