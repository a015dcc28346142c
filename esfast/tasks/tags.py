"""Responses that reason in <think> </think>, opened by the prompt, and answer in <answer> </answer>."""

from __future__ import annotations

from ..core.random_stream import RandomStream
from .base import require_text

THINK_END, ANSWER, ANSWER_END = "</think>", "<answer>", "</answer>"
# The fraction of examples that are tagged by chance, among those that need not be. Greedy decoding seldom produces what
# a fifth of the examples do.
TAGGED_OTHERWISE = 0.2


def format_score(completion: str) -> float:
    """1.0 for `...</think>`, a newline and `<answer>...</answer>`, with at most a newline after it; otherwise 0.1 for a
    closed `<think>` plus 0.5 for an `<answer>` that is closed. The dots stand for any text, tags and newlines
    included."""
    require_text(completion)
    # The `$` of the paper's regular expression matches before a newline that ends the text.
    completion = completion.removesuffix("\n")
    joint = completion.find(f"{THINK_END}\n{ANSWER}")
    body = joint + len(f"{THINK_END}\n{ANSWER}")
    if joint >= 0 and completion.endswith(ANSWER_END) and body <= len(completion) - len(ANSWER_END):
        return 1.0
    return 0.1 * (THINK_END in completion) + 0.5 * (last_answer(completion) is not None)


def last_answer(completion: str) -> str | None:
    """Text of the last `<answer>...</answer>`, None if there is none. Pairs are matched from the left, without nesting.

    It takes four searches for any text. A regular expression would take quadratic time for many unclosed tags.
    """
    last_open = completion.rfind(ANSWER, 0, max(completion.rfind(ANSWER_END), 0))
    if last_open < 0:
        return None
    # Openings since the previous closing belong to one pair, which begins at the first of them.
    previous = max(completion.rfind(ANSWER_END, 0, last_open), 0)
    start = completion.find(ANSWER, previous) + len(ANSWER)
    return completion[start : completion.find(ANSWER_END, last_open)]


def maybe_tagged(answer: str, always: bool, rng: RandomStream, otherwise: float = TAGGED_OTHERWISE) -> str:
    """A completion to pre-train the embedded model on: in answer tags if `always`, else by chance. So the model can do
    more than its rewards show, and ES has something to bring out."""
    if always or rng.chance(otherwise):
        return f"{THINK_END}\n{ANSWER}{answer}{ANSWER_END}"
    return f"{THINK_END}\n{answer}"
