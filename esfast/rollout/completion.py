"""What one call of an engine may ask for besides its prompts, and what comes back besides texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..utils.errors import BadValue
from .sampling import LogitsError


class Asked(NamedTuple):
    """How the prompts of one call are to be continued. None stands for the engine's own setting.

    max_tokens   longest completion, in tokens
    temperature  of sampled completions; 0: greedy
    top_p        tokens are sampled from the fewest whose probabilities sum to at least this, more than 0, at most 1
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0

    def most(self, longest: int) -> int:
        """How many tokens a completion may have, `longest` being the engine's own setting."""
        return longest if self.max_tokens is None else self.max_tokens


@dataclass(frozen=True)
class Completion:
    """A completion: its text without special tokens, how many tokens were generated, and whether a token ended it
    (rather than the limit on its length)."""

    text: str
    tokens: int
    ended: bool


OWN = Asked()

# (numbers of members, texts, seeds, how the texts are asked) -> what each member answers to its text. A member whose
# weights give no text has a LogitsError in the place of each completion.
Complete = Callable[[Sequence[int], Sequence[str], "Sequence[int] | None", Asked], "Sequence[Completion | LogitsError]"]


def decoded(tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of token ids, without special tokens. Equal rows are decoded once: members have many."""
    if not rows:
        # Tokenizers of older Transformers make one empty text of them.
        return []
    distinct = dict.fromkeys(map(tuple, rows))
    texts = tokenizer.batch_decode([list(ids) for ids in distinct], skip_special_tokens=True)
    text_of = dict(zip(distinct, texts, strict=True))
    return [text_of[tuple(ids)] for ids in rows]


def check_asked(asked: Asked, longest: int, setting: str) -> int:
    """How many tokens a completion may have. ValueError for more than `longest`, which `setting` names, and for a top_p
    out of range."""
    most = asked.most(longest)
    if not 1 <= most <= longest:
        raise BadValue(f"max_tokens: expected 1 to {longest} ({setting}), got {most}")
    if not 0 < asked.top_p <= 1:
        raise BadValue(f"top_p: expected more than 0 and at most 1, got {asked.top_p}")
    return most


def complete(
    engine: Any, prompts: Sequence[str], seeds: Sequence[int] | None = None, asked: Asked = OWN
) -> list[Completion]:
    """Completions of any engine. An engine without a method `complete` has fixed settings: ValueError for others. It
    tells no numbers of tokens for single texts; they are counted anew if it has a tokenizer, and otherwise 0."""
    if callable(getattr(engine, "complete_texts", None)):
        return engine.complete_texts(prompts, seeds, asked)
    reader = getattr(engine, "prompts", None)
    longest = getattr(engine, "max_new_tokens", None) or getattr(reader, "max_new_tokens", None)
    greedy = asked.temperature == 0 and seeds is None
    temperatures = (None, getattr(engine, "temperature", None), asked.temperature if greedy else None)
    fixed = {"max_tokens": (None, longest), "temperature": temperatures, "top_p": (1.0,)}
    for name, known in fixed.items():
        if (value := getattr(asked, name)) not in known:
            raise BadValue(f"{name}: {type(engine).__name__} answers all prompts alike; leave {name} out, got {value}")
    texts = engine.generate(prompts, *([] if seeds is None else [seeds]))
    encode = getattr(reader, "encode", None)
    lengths = [0] * len(texts) if encode is None else [len(ids) for ids in encode(texts)]
    return [Completion(t, n, longest is None or n < longest) for t, n in zip(texts, lengths, strict=True)]
