"""Mathematics with answers in \\boxed{}, verified by the math-verify package: pip install 'esfast[math]'.

Without a data file the problems are made-up arithmetic. Reward = 0.1 for a box + 1 for a right answer in the
last one. Only LaTeX is read, by math-verify's grammar; nothing of a response is evaluated as code.
"""

from __future__ import annotations

import functools
import re
import threading

from ..core.random_stream import RandomStream
from ..utils.errors import BadImport, BadValue
from . import data
from .base import Recipe, Task, distinct, require_text, styled, texts, thousands_of

PROMPTS = {
    "paper": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}.\n",
    "compact": "{problem}\n",
}
# For made-up problems by style: how many numbers, the smallest and the largest.
GAMES = {"paper": (4, 1, 99), "compact": (2, 0, 49)}
# Characters of an answer, at most.
LONGEST_ANSWER = 300
# Seconds that math-verify may take to read an answer, and again to compare it.
TIMEOUT = 2
# The fraction of examples for the embedded model that are boxed by chance, among those that need not be.
BOXED_OTHERWISE = 0.4
BOX = "\\boxed{"
# Characters that are read, from the end of a response: the answer stands there, and the limit bounds the work on a
# hostile response.
READ = 20_000
# A box that a brace opens, a box without one (\boxed 2, \boxed\frac12), and braces. Escaped braces are no braces.
_TOKEN = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\(?:boxed|fbox)(?![A-Za-z{])|\\.|[{}]", re.DOTALL)
# The contents of a box without a brace, and the rest of its line.
_BARE = re.compile(r"[ \t]*(?=[-+]?[\d.(\\]|[A-Za-z](?![A-Za-z]))(.+)")
_BOXED = re.compile(r"\s*\\(?:boxed|fbox)\s*\{(.*)\}\s*", re.DOTALL)
# How deep boxes may be nested that hold nothing but a box.
NESTED = 3
# Text up to the first white space outside braces.
_WORD = re.compile(r"(?:\{(?:[^{}]|\{[^{}]*\})*\}|\S)*")
_MATH_ENDS = re.compile(r"\$|\\\)|\\\]")
_MARK = "####"
# In GSM8K the answer follows this mark in the last line. In other lines the mark is a heading of Markdown.
_MARKED = re.compile(r".*####\s*([^\n]*)\s*", re.DOTALL)
# What tables hold where there is no answer.
_MISSING = frozenset({"nan", "NaN", "null", "NULL", "None", "<NA>", "N/A"})
_COMMAND = re.compile(r"\\[A-Za-z]+")
_QUOTED = re.compile(r"\$\$(.+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_AMOUNT = re.compile(r"(?:\\?\$)?\s*([-+]?)\s*(?:\\?\$)?\s*(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?\s*\.?")


def last_box(completion: str) -> str | None:
    """The contents of the \\boxed{...} or \\fbox{...} that is closed last; None if the last READ characters have none.
    A box without braces, \\boxed 2, counts too; it ends with the formula or the word."""
    require_text(completion)
    text, answer = completion[-READ:], None
    opened: list[int | None] = []  # where a box begins; None for other braces
    for token in _TOKEN.finditer(text):
        if token[0] == "}" and opened:
            start = opened.pop()
            answer = answer if start is None else text[start : token.start()]
        elif token[0] == "{" or token[1]:
            opened.append(token.end() if token[1] else None)
        elif token[0] in ("\\boxed", "\\fbox"):
            bare = _bare_box(text[token.end() : token.end() + LONGEST_ANSWER])
            answer = answer if bare is None else bare
    for _ in range(NESTED):
        inner = _BOXED.fullmatch(answer or "")
        answer = inner[1] if inner and _balanced(inner[1]) else answer
    return answer


def _bare_box(text: str) -> str | None:
    found = _BARE.match(text)
    if found is None:
        return None
    formula = _MATH_ENDS.search(found[1])
    if formula is None and found[1][0] not in "+-.\\0123456789":
        return None
    content = found[1][: formula.start()] if formula else _WORD.match(found[1])[0]
    return content.strip().rstrip(".,;:") or None


def score(completion: str, answer: str) -> float:
    """Reward of one response: 0.1 for a box, and 1 for a right answer in it."""
    return 0.1 * (last_box(completion) is not None) + answer_score(completion, answer)


def answer_score(completion: str, answer: str) -> float:
    """1.0 if math-verify takes the contents of the last box for equal to `answer` (LaTeX), else 0.0."""
    given = last_box(completion)
    return 0.0 if given is None or len(given) > LONGEST_ANSWER else _equal(given, gold(answer))


@functools.lru_cache(maxsize=65536)
def _equal(given: str, answer: str) -> float:
    parse, verify, options = _math_verify()
    # math-verify limits its time by an alarm, which only a main thread can set. Reward workers score in their main
    # thread.
    limit = TIMEOUT if threading.current_thread() is threading.main_thread() else None
    try:
        gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=limit, **options)
        found = parse(f"\\boxed{{{given}}}", parsing_timeout=limit, **options)
        return float(bool(gold) and verify(gold, found, timeout_seconds=limit))
    except Exception:
        # The parser may raise anything for a hostile text; the answer is then not right.
        return 0.0


@functools.cache
def _math_verify():
    import logging

    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        raise BadImport(
            "the task math verifies answers with the math-verify package: pip install 'esfast[math]'"
        ) from None
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        # It would warn about each answer that it can't parse.
        logging.getLogger(name).setLevel(logging.ERROR)
    config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    return parse, verify, {"extraction_config": [config], "extraction_mode": "first_match"}


def reward(prompts, completions, answer, **columns) -> list[float]:
    """`score` of each response, as a reward function of TRL's GRPOTrainer."""
    _math_verify()
    return [score(*row) for row in zip(texts(completions), answer, strict=True)]


def accuracy(prompts, completions, answer, **columns) -> list[float]:
    """`answer_score` of each response; arguments as in `reward`."""
    return [answer_score(*row) for row in zip(texts(completions), answer, strict=True)]


def prompt(problem: str, style: str = "paper") -> str:
    return styled(PROMPTS, style).format(problem=problem)


def problems(count: int, seed: int | str, split: str = "train", style: str = "paper") -> list[dict]:
    """`count` distinct problems of made-up arithmetic, sums and differences (and products, in style "paper"), as rows
    {prompt, answer}, the same for the same arguments."""
    size, low, high = styled(GAMES, style)
    rng = RandomStream(f"math/{split}/{seed}", "problems")

    def draw() -> tuple:
        numbers = [rng.between(low, high) for _ in range(size)]
        symbols = [rng.choice("+-*" if style == "paper" else "+-") for _ in numbers[1:]]
        text = str(numbers[0]) + "".join(s + str(n) for s, n in zip(symbols, numbers[1:], strict=True))
        latex = text.replace("*", " \\cdot ")
        spoken = text if style == "compact" else f"What is ${latex}$?"
        return text, {"prompt": prompt(spoken, style), "answer": str(_value(numbers, symbols))}

    return distinct(count, split, draw)


def _value(numbers: list[int], symbols: list[str]) -> int:
    terms = [numbers[0]]
    for symbol, number in zip(symbols, numbers[1:], strict=True):
        if symbol == "*":
            terms[-1] *= number
        else:
            terms.append(number if symbol == "+" else -number)
    return sum(terms)


def row(record: dict, style: str = "paper") -> dict:
    """The row {prompt, answer} of a record of a data file, which has a `problem` (or `question`) and an `answer`, or a
    `solution` whose last \\boxed{} holds the answer, as in MATH. ValueError if nothing could match the answer."""
    problem = data.text("problem", data.fields(record, ("problem", "question"))[0])
    data.fields(record, ("answer", "solution"))
    answer, solution = record.get("answer"), record.get("solution")
    if answer is None or (isinstance(answer, float) and answer != answer) or _is_missing(str(answer)):
        if not isinstance(solution, str) or (last_box(solution) is None and not _MARKED.fullmatch(solution)):
            raise BadValue(
                f"expected an 'answer', or a 'solution' with a \\boxed{{}}, got {answer!r:.40} and {solution!r:.40}"
            )
        answer = solution
    return {"prompt": prompt(problem, style), "answer": gold(answer)}


def _is_missing(answer: str) -> bool:
    return not answer.strip() or answer.strip() in _MISSING


def gold(answer: str | float) -> str:
    """The right answer as LaTeX. Data may give the answer itself, an answer in $...$ or in a box, a solution that holds
    a box, or GSM8K's "... #### 42". ValueError for an answer that no response could match."""
    return _gold(data.text("answer", answer))


@functools.lru_cache(maxsize=65536)
def _gold(answer: str) -> str:
    if _is_missing(answer):
        raise BadValue(f"answer: {answer!r} stands for a missing answer; leave the record out, or write \\text{{...}}")
    marked = _MARKED.fullmatch(answer)
    text = marked[1] if marked else answer
    box = last_box(text)
    text = (text if box is None else box).strip()
    quoted = _QUOTED.fullmatch(text)
    text = next(filter(None, quoted.groups())).strip() if quoted else text
    amount = _AMOUNT.fullmatch(text)
    text = amount[1] + amount[2].replace(",", "") + (amount[3] or "") if amount else text
    # Reading the answer out of a box must give it back. An open brace or a backslash at the end would prevent that.
    boxes = last_box(f"{BOX}{text}}}") == text
    if not text or _MARK in text or len(text) > LONGEST_ANSWER or not boxes or _matches_nothing(text):
        raise BadValue(
            f"answer: expected LaTeX of at most {LONGEST_ANSWER} characters, with braces in pairs and no backslash at "
            f"its end, got {answer!r:.60}"
        )
    return text


def _matches_nothing(text: str) -> bool:
    """Whether math-verify does not even take the text for equal to itself, such as \\text{} or a lone $. It takes
    milliseconds, so it is asked only if the text has no letter or digit outside commands, and if it is installed."""
    if re.search(r"\w", _COMMAND.sub("", text)):
        return False
    try:
        return not _equal(text, text)
    except ImportError:
        return False


def _balanced(text: str) -> bool:
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += token[0].endswith("{") and not token[0].startswith("\\{")
        depth -= token[0] == "}"
        if depth < 0:
            return False
    return depth == 0


def examples(seed: int, thousands: int) -> list[tuple[str, str]]:
    """Pairs (prompt, completion) to pre-train the embedded model on: boxed where the first digit is 1, or by chance."""
    rng = RandomStream(f"embedded/{seed}", "problems")
    rows = thousands_of(problems, seed, thousands)
    boxed = [r["prompt"][0] == "1" or rng.chance(BOXED_OTHERWISE) for r in rows]
    return [(r["prompt"], f"{BOX}{r['answer']}}}" if b else r["answer"]) for r, b in zip(rows, boxed, strict=True)]


RECIPE = Recipe(
    examples,  # at lr 0.01 accuracy rises from 0.29 to 0.42 in 25 generations and is lost again in the next 25
    {"generations": 100, "population_size": 30, "sigma": 0.01, "lr": 0.002, "prompts_per_generation": 64},
)


def task(style: str = "paper", **source) -> Task:
    """The task; `source` says where problems come from, see data.source. ImportError without math-verify."""
    _math_verify()
    train_rows, eval_rows = data.source(problems, row, lambda r: r["prompt"], style, **source)
    return Task("math", (reward,), train_rows, eval_rows, accuracy, {"paper": 3000, "compact": 16}[style])
