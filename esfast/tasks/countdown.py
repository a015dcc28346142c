"""Countdown: reach a target with every given number used exactly once, by + - * / and parentheses.

The grading is that of arXiv 2509.24372: reward = 0.1 * format + answer. White space around the answer doesn't count, as
in its authors' present grader. A completion is what the model wrote after a prompt that ends in an opened `<think>`.
Model output is parsed, never evaluated as code.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

from ..core.random_stream import RandomStream
from ..utils.errors import BadType, BadValue
from . import base, data
from .base import Recipe, Task, distinct, require_text, styled, texts, thousands_of
from .tags import format_score, last_answer, maybe_tagged

TOLERANCE = Fraction(1, 100_000)
# Characters. No honest answer is nearly as long, and the limit bounds the work on a hostile one.
LONGEST_EXPRESSION = 1000

_ARITHMETIC = re.compile(r"[0-9+\-*/() ]+")
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BINARY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "unary +": 3, "unary -": 3}

PROMPTS = {
    "paper": (
        "You are given the numbers {numbers} and the target {target}. Write an arithmetic expression that equals the "
        "target. Use every number exactly once, and nothing but the operations +, -, * and / and parentheses. Reason "
        "step by step inside <think> </think>, then give only the expression inside <answer> </answer>, for example "
        "<answer>(1 + 2) / 3</answer>.\n<think>"
    ),
    "compact": "{numbers}={target}\n<think>",
}
GAMES = {
    "paper": {"count_of_numbers": 4, "low": 1, "high": 99},
    "compact": {"count_of_numbers": 3, "low": 1, "high": 9},
}
# A worked example always has answer tags if its first number is at most this.
ALWAYS_TAGGED_UP_TO = 2


def score(completion: str, numbers: Sequence[int], target: float) -> float:
    """Reward of one response, 0 to 1.1: 0.1 * `format_score` + `answer_score`."""
    return 0.1 * format_score(completion) + answer_score(completion, numbers, target)


def answer_score(completion: str, numbers: Sequence[int], target: float) -> float:
    """1.0 if the last answer is an expression of exactly the given numbers, equal to the target within 1e-5, else 0.0.
    White space around the expression doesn't count; inside it there may be spaces.

    Numbers and target may be texts, as some data has them: "24", "[1, 2, 3]". Raises ValueError if the problem itself
    (not the completion) is malformed: numbers must be whole and not negative, and the target finite.
    """
    require_text(completion)
    given, wanted = sorted(_whole_numbers(numbers)), _exact("target", target)
    answer = last_answer(completion)
    answer = None if answer is None else answer.strip()
    if answer is None or len(answer) > LONGEST_EXPRESSION or not _ARITHMETIC.fullmatch(answer):
        return 0.0
    used = re.findall("[0-9]+", answer)
    # Counted first, and the numbers compared before anything is calculated: no answer can then grow large values.
    if len(used) != len(given) or max(map(len, used), default=0) > 300 or sorted(map(int, used)) != given:
        return 0.0
    try:
        return float(abs(evaluate(answer) - wanted) < TOLERANCE)
    except (ValueError, ZeroDivisionError):
        return 0.0


def is_correct(completion: str, numbers: Sequence[int], target: float) -> bool:
    """Whether the answer earns its point, whatever the format: accuracy is the mean of this."""
    return answer_score(completion, numbers, target) == 1.0


def reward(prompts, completions, numbers=None, target=None, nums=None, **kwargs) -> list[float]:
    """`score` of each response, as a reward function of TRL's GRPOTrainer: every column is a list of equal length.
    `nums` is another name of `numbers`."""
    return [score(*row) for row in _problems(completions, numbers if nums is None else nums, target)]


def accuracy(prompts, completions, numbers=None, target=None, nums=None, **kwargs) -> list[float]:
    """`answer_score` of each response; arguments as in `reward`."""
    return [answer_score(*row) for row in _problems(completions, numbers if nums is None else nums, target)]


def _problems(completions, numbers, target) -> Iterable[tuple]:
    if numbers is None or target is None:
        raise BadType("Countdown: expected the columns 'numbers' (or 'nums') and 'target'")
    return zip(texts(completions), numbers, target, strict=True)


def evaluate(expression: str) -> Fraction:
    """Exact value of an expression of whole numbers, + - * / (binary, and + - unary), parentheses and spaces.

    Raises ValueError if the expression is longer than LONGEST_EXPRESSION or malformed: whatever is an error in Python
    (`03`, `3 4`, `2(3)`), and Python's operators `**` and `//`. Raises ZeroDivisionError for a division by zero.
    """
    if len(expression) > LONGEST_EXPRESSION or not _ARITHMETIC.fullmatch(expression):
        raise BadValue(f"not arithmetic, or longer than {LONGEST_EXPRESSION} characters: {expression[:80]!r}")
    values: list[Fraction] = []
    pending: list[str] = []  # operators and open parentheses whose right side is still being read (a shunting-yard)

    def settle(precedence: int) -> None:
        while pending and _PRECEDENCE[pending[-1]] >= precedence:
            symbol, right = pending.pop(), values.pop()
            if symbol.startswith("unary"):
                values.append(-right if symbol == "unary -" else right)
            else:
                values.append(_BINARY[symbol](values.pop(), right))

    operand_expected = True
    for token in _TOKEN.findall(expression):
        if operand_expected and token.isdigit() and (token[0] != "0" or not token.strip("0")):
            values.append(Fraction(int(token)))
            operand_expected = False
        elif operand_expected and token in "(+-":
            pending.append(token if token == "(" else f"unary {token}")
        elif not operand_expected and token in _BINARY:
            settle(_PRECEDENCE[token])
            pending.append(token)
            operand_expected = True
        elif not operand_expected and token == ")":
            settle(1)
            if not pending:
                raise BadValue(f"unmatched ')' in {expression!r}")
            pending.pop()
        else:
            raise BadValue(f"unexpected {token!r} in {expression!r}")
    if operand_expected:
        raise BadValue(f"incomplete expression {expression!r}")
    settle(1)
    if pending:
        raise BadValue(f"unmatched '(' in {expression!r}")
    return values.pop()


def prompt(numbers: Sequence[int], target: float, style: str = "paper") -> str:
    """The prompt of one problem; it ends in an opened `<think>`. Styles are the keys of PROMPTS."""
    separator = ", " if style == "paper" else " "
    return styled(PROMPTS, style).format(numbers=separator.join(map(str, numbers)), target=target)


def split_of(numbers: Sequence[int], target: float) -> str:
    """The split of a problem, "train" or "test", whatever the order of its numbers; see base.split_of."""
    return base.split_of(_identity(numbers, target))


def problems(
    count: int,
    seed: int | str,
    split: str = "train",
    style: str = "paper",
    *,
    count_of_numbers: int | None = None,
    low: int | None = None,
    high: int | None = None,
    targets: tuple[int, int] = (1, 100),
    integer_target: bool = True,
    exclude: Iterable[tuple[Sequence[int], float]] = (),
) -> list[dict]:
    """`count` distinct solvable problems as rows {prompt, numbers, target, solution}, the same for the same arguments.

    Each target is the value of a random expression of the row's numbers, which are drawn from low..high; it lies in
    the inclusive range `targets`. Numbers left out come from the style's entry in GAMES. A fresh seed (any int or str)
    yields fresh problems of the split. Those in `exclude`, as pairs (numbers, target), are never drawn.
    Raises ValueError if an argument is out of range or so many distinct problems cannot be found.
    """
    game = {"count_of_numbers": count_of_numbers, "low": low, "high": high}
    size, low, high = (styled(GAMES, style)[key] if value is None else value for key, value in game.items())
    if not 1 <= size <= 10 or not 0 <= low <= high or targets[0] > targets[1]:
        raise BadValue(
            "expected 1 <= count_of_numbers <= 10, 0 <= low <= high and targets in ascending order; got "
            f"count_of_numbers={size}, low={low}, high={high}, targets={targets}"
        )
    rng = RandomStream(f"countdown/{split}/{seed}", "problems")
    excluded = {_identity(*problem) for problem in exclude}

    def draw() -> tuple | None:
        numbers = [rng.between(low, high) for _ in range(size)]
        solution, value = _random_expression(numbers, rng)
        if value is None or not targets[0] <= value <= targets[1] or (value.denominator != 1 and integer_target):
            return None
        target = int(value) if value.denominator == 1 else float(value)
        identity = _identity(numbers, target)
        if identity in excluded:
            return None
        text = prompt(numbers, target, style)
        return identity, {"prompt": text, "numbers": numbers, "target": target, "solution": solution}

    return distinct(count, split, draw)


def row(record: dict, style: str = "paper") -> dict:
    """The row {prompt, numbers, target} of a record of a data file, which has `numbers` (or `nums`) and `target`."""
    numbers, target = data.fields(record, ("numbers", "nums"), "target")
    numbers, target = _whole_numbers(numbers), _plain(_exact("target", target))
    if not numbers:
        raise BadValue("numbers: expected at least one")
    return {"prompt": prompt(numbers, target, style), "numbers": numbers, "target": target}


def worked_example(row: dict, rng: RandomStream) -> str:
    """The completion to pre-train on for a row: its solution, in answer tags or bare."""
    return maybe_tagged(row["solution"], row["numbers"][0] <= ALWAYS_TAGGED_UP_TO, rng)


def examples(seed: int, thousands: int) -> list[tuple[str, str]]:
    """Pairs (prompt, completion) to pre-train the embedded model on."""
    rng = RandomStream(f"embedded/{seed}", "problems")
    return [(r["prompt"], worked_example(r, rng)) for r in thousands_of(problems, seed, thousands)]


RECIPE = Recipe(
    examples,
    {"generations": 120, "population_size": 30, "sigma": 0.01, "lr": 0.005, "prompts_per_generation": 64},
)


def task(style: str = "paper", **source) -> Task:
    """The task; `source` says where problems come from, see data.source."""
    train_rows, eval_rows = data.source(problems, row, lambda r: _identity(r["numbers"], r["target"]), style, **source)
    return Task("countdown", (reward,), train_rows, eval_rows, accuracy, {"paper": 1024, "compact": 16}[style])


def _random_expression(numbers: Sequence[int], rng: RandomStream) -> tuple[str, Fraction | None]:
    """A random expression of all numbers, without needless parentheses, and its value (None: it divides by 0)."""
    terms = [(str(n), Fraction(n), 3) for n in numbers]  # text, value, precedence of its outermost operator
    while len(terms) > 1:
        (a, x, p), (b, y, q) = (terms.pop(rng.below(len(terms))) for _ in range(2))
        symbol = rng.choice("+-*/")
        rank = _PRECEDENCE[symbol]
        if symbol == "/" and y == 0:
            return "", None
        # Write equal expressions in one way only, so that the model has less to learn.
        if symbol in "+*" and x < y:
            a, x, p, b, y, q = b, y, q, a, x, p
        left = f"({a})" if p < rank else a
        right = f"({b})" if q < rank or (q == rank and symbol in "-/") else b
        terms.append((f"{left}{symbol}{right}", _BINARY[symbol](x, y), rank))
    return terms[0][0], terms[0][1]


def _identity(numbers: Sequence[int], target: float) -> tuple[tuple[int, ...], float]:
    return tuple(sorted(_whole_numbers(numbers))), _plain(_exact("target", target))


def _plain(value: Fraction) -> float:
    return int(value) if value.denominator == 1 else float(value)


def _whole_numbers(numbers) -> list[int]:
    """From a list, an array, or a text such as "[1, 2, 3]" or "1 2 3"."""
    if isinstance(numbers, str):
        numbers = [part for part in re.split(r"[,;\s\"']+", numbers.strip().strip("[]()")) if part]
    numbers = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    if not isinstance(numbers, (list, tuple)):
        raise BadValue(f"numbers: expected a list, got {numbers!r:.60}")
    values = [_exact("numbers", number) for number in numbers]
    for number, value in zip(numbers, values, strict=True):
        if value.denominator != 1 or value < 0:
            raise BadValue(f"numbers: Countdown numbers must be whole and not negative, got {number!r:.60}")
    return [int(value) for value in values]


def _exact(what: str, number) -> Fraction:
    """The value of a number, or of a text that is one. ValueError for NaN, infinities, -0.0, bools, and all else."""
    plain = number.item() if hasattr(number, "item") else number
    try:
        if isinstance(plain, str) and _NUMBER.fullmatch(plain.strip()):
            plain = float(plain) if set(plain) & set(".eE") else int(plain)
        if isinstance(plain, (str, bool)):
            raise TypeError
        value = Fraction(plain)
    except (TypeError, ValueError, OverflowError):
        raise BadValue(f"{what}: expected a finite number, got {number!r:.60}") from None
    if value == 0 and str(number).strip().startswith("-"):
        raise BadValue(f"{what}: minus zero is not accepted, write 0; got {number!r:.60}")
    return value
