"""Repeatable sampling: a response is a function of its seed and of the probabilities of its tokens.

Each token is drawn by inverting the cumulative probabilities at one uniform number, which comes from Philox under the
response's seed. Other rows of the batch and its size have no effect. Members that answer with the same seeds differ by
their weights alone (common random numbers).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from ..core.noise import DOMAINS, philox
from ..utils.errors import EsfastError


class LogitsError(EsfastError, ValueError):
    """A model's logits are NaN or infinite, so that they determine no next token."""


class FiniteLogits(LogitsProcessor):
    """Remembers whether all scores were finite, without waiting for the device. It doesn't change them.

    It looks at the maximum of each row: that is NaN if a score is NaN, and infinite if one is inf or all are -inf.
    """

    def __init__(self):
        self._fine: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        fine = scores.amax(-1).isfinite().all()
        self._fine = fine if self._fine is None else self._fine & fine
        return scores

    def check(self) -> None:
        """LogitsError unless all scores so far were finite."""
        if self._fine is not None and not self._fine:
            raise LogitsError("the model's logits are NaN or infinite")


def response_seeds(seed: int, generation: int, prompts: int, responses: int) -> list[int]:
    """64-bit seeds for `responses` responses to each of `prompts` prompts, prompt by prompt."""
    blocks = np.arange(prompts, dtype=np.uint64) | np.uint64(generation << 32)
    words = [philox(seed, blocks, response, DOMAINS["response_seeds"]) for response in range(responses)]
    return [int(w[0][prompt]) | int(w[1][prompt]) << 32 for prompt in range(prompts) for w in words]


def turn_seeds(seeds: Sequence[int], turns: Sequence[int]) -> list[int]:
    """The seed of each answer of a batch, from the seed of its episode and its turn: what response_seeds(seed, turn, 1,
    1) gives for each pair, all at once."""
    keys: Any = np.array(seeds, dtype=np.uint64)
    low, high, *_ = philox(keys, np.array(turns, dtype=np.uint64) << np.uint64(32), 0, DOMAINS["response_seeds"])
    return [int(word) | int(upper) << 32 for word, upper in zip(low, high, strict=True)]


def uniforms(seed: int, count: int) -> np.ndarray:
    """The uniform numbers that pick the tokens of one response: float32 (count,) in [0, 1), multiples of 2^-24."""
    words = philox(seed, np.arange(-(-count // 4), dtype=np.uint64), 0, DOMAINS["tokens"])
    return ((np.stack(words, 1).reshape(-1)[:count] >> np.uint32(8)) * np.float32(2**-24)).astype(np.float32)


class SeededSampling(LogitsProcessor):
    """Masks all tokens of a row but the one that its uniform number picks, so that greedy search samples.

    seeds        one a row
    temperature  divides the scores, > 0
    steps        most tokens of a response
    top_p        keeps the fewest tokens whose probabilities sum to at least this; 1: all
    """

    def __init__(
        self,
        seeds: list[int],
        temperature: float,
        steps: int,
        device: torch.device | str = "cpu",
        top_p: float = 1.0,
    ):
        self.temperature, self.top_p = temperature, top_p
        self._numbers = torch.tensor(np.stack([uniforms(seed, steps) for seed in seeds])).to(device)
        self._width = 0

    def after(self, width: int, rows: int) -> SeededSampling:
        """A copy for prompts padded to `width` tokens, in a batch that is filled up to `rows` rows."""
        made = copy.copy(self)
        made._width = width
        made._numbers = torch.cat([self._numbers, self._numbers[-1:].expand(rows - len(self._numbers), -1)])
        return made

    def of_rows(self, which: torch.Tensor, width: int) -> SeededSampling:
        """A copy for the rows with the numbers `which`, in this order, of prompts padded to `width` tokens."""
        made = copy.copy(self)
        made._width, made._numbers = width, self._numbers[which]
        return made

    @property
    def numbers(self) -> torch.Tensor:
        """The uniform numbers that pick the tokens: float32 (rows, steps)."""
        return self._numbers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self._width
        token = self.pick(scores, self._numbers[:, step : step + 1])
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0)

    def pick(self, scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The token of each row, int64 (rows, 1), for scores (rows, vocabulary) and one number a row (rows, 1)."""
        probabilities = torch.softmax(scores.float() / self.temperature, -1)
        if self.top_p < 1:
            ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            probabilities = probabilities.masked_fill(beyond.scatter(-1, places, beyond), 0)
        sums = probabilities.cumsum(-1)
        total = sums[:, -1:]
        point = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
        # Take the first token whose cumulative sum exceeds `point`; its probability is not 0. If sums are NaN no token
        # qualifies; FiniteLogits raises for that.
        return torch.searchsorted(sums, point, right=True).clamp(max=scores.shape[-1] - 1)
