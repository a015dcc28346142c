"""An episode: the outcome of one row, and the conversation that led to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...utils.errors import BadValue
from ...utils.settings import check_int
from .protocol import said


@dataclass(frozen=True)
class Limits:
    """What an episode may use. An episode that asks for more is refused, and one that takes more seconds is ended.

    turns    answers of the model
    tokens   generated tokens
    seconds  time outside the model: an episode that waits for an answer, or for a long step of another, uses none
    at_once  episodes that run at the same time
    """

    turns: int = 64
    tokens: int = 2**31
    seconds: float = 300.0
    at_once: int = 256

    def __post_init__(self):
        for name in ("turns", "tokens", "at_once"):
            check_int(name, getattr(self, name), 1, 2**63)
        if not 0 < self.seconds <= 1e8:
            raise BadValue(f"seconds: expected more than 0 and at most 1e8, got {self.seconds!r}")


@dataclass(frozen=True)
class Episode:
    """One row's episode.

    reward    what the environment returned; None if it failed
    error     why it failed, with the row's number; None if it didn't
    cause     the exception behind the error, if there is one
    turns     answers of the model
    tokens    tokens that the model generated
    seconds   time that the episode took outside the model
    messages  the conversation: dicts {"role", "content", ...}, each once
    """

    reward: float | None
    error: str | None
    turns: int
    tokens: int
    seconds: float
    messages: list[dict[str, Any]] = field(default_factory=list)
    cause: BaseException | None = None

    @property
    def text(self) -> str:
        """What the model said, turn after turn."""
        said = [m.get("content") for m in self.messages if m.get("role") == "assistant"]
        return "\n".join(text for text in said if isinstance(text, str))

    def sample(self) -> dict[str, Any]:
        """For samples.jsonl."""
        asked = next((m.get("content") for m in self.messages if m.get("role") != "assistant"), "")
        failed = {} if self.error is None else {"error": self.error}
        return {"prompt": asked, "completion": self.text, "messages": self.messages, "turns": self.turns, **failed}

    def __deepcopy__(self, memo: dict) -> Episode:
        return self


def add_new(transcript: list[dict[str, Any]], asked: list[dict[str, Any]], answer: dict[str, Any]) -> None:
    """Adds the messages of a request, and that of its answer, to the transcript. Each message stands there once: a
    conversation that goes on is not repeated. Keeps these objects, unless a field is None."""
    known = len(transcript)
    if asked[:known] != transcript and not (len(asked) >= known and all(map(_same, transcript, asked))):
        known = 0
    transcript += map(said, asked[known:])
    transcript.append(answer)


def turns(prompts, completions: Sequence[Episode], **columns) -> list[float]:
    return [float(episode.turns) for episode in completions]


def tokens(prompts, completions: Sequence[Episode], **columns) -> list[float]:
    return [float(episode.tokens) for episode in completions]


def seconds(prompts, completions: Sequence[Episode], **columns) -> list[float]:
    return [episode.seconds for episode in completions]


def failed(prompts, completions: Sequence[Episode], **columns) -> list[float]:
    return [float(episode.error is not None) for episode in completions]


# Metrics of evaluations, logged as eval_NAME; of training, as NAME.
FIGURES = {"episode_turns": turns, "episode_tokens": tokens, "episode_seconds": seconds, "episodes_failed": failed}


def check_reward(value: Any) -> float:
    """The reward as a float. ValueError if it is no finite number: a bool is one."""
    found: Any = value
    if not isinstance(value, (int, float)) and callable(getattr(value, "item", None)):
        found = value.item()
    if not isinstance(found, (int, float)) or not math.isfinite(found):
        raise BadValue(f"expected a finite number as its reward, got {value!r:.80}")
    return float(found)


def _same(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether it is the same message, whatever a client has added to it or left out."""
    return mine.get("role") == theirs.get("role") and (mine.get("content") or "") == (theirs.get("content") or "")
