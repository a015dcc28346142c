"""Prompts as token ids: what a tokenizer adds, which ids a model has embeddings for, and how many fit its context."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..utils.errors import BadType, BadValue
from ..utils.rows import check_text
from .completion import Asked, check_asked

# Samples: the first one that the vocabulary knows shows what the tokenizer puts around a text.
KNOWN_TEXTS = ("a", "1", "A", "the", ".", "\u4e00")
CLOSING = ("eos_token", "sep_token", "cls_token", "pad_token")

# Names for the longest sequence in configurations; the first one that is there counts.
LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "model_max_length",
    "n_ctx",
    "max_target_positions",
)


class PromptEncoder:
    """Token ids of prompts that a completion is to follow.

    Tokenizers may put tokens before a text (bos) and behind it (eos of Llama's add_eos_token and of T5, [SEP] of BERT).
    Tokens behind it are left out, since they tell the model that the text is over. Tokens that the prompt itself spells
    out stay, for example an end token of a chat template. If the prompt begins with the bos token that the tokenizer
    adds, it stands there once.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        known, bare = self._known()
        places = [i for i in range(len(known) - len(bare) + 1) if known[i : i + len(bare)] == bare]
        before = known[: places[0]] if places and bare else []
        behind = known[places[0] + len(bare) :] if places and bare else []
        named = {name: token for name, token in tokenizer.special_tokens_map.items() if name in CLOSING}
        ends = {tokenizer.convert_tokens_to_ids(token) for token in named.values()}
        # Some tokenizers add their end token even without special tokens. Other tokens behind a text may be the place
        # where an answer begins, and stay.
        self._closing = known[-1:] if known == bare and len(known) > 1 and known[-1] in ends else []
        self._before = before if ends.intersection(behind) else None
        self._bos = tokenizer.bos_token_id if before[-1:] == [tokenizer.bos_token_id] else None
        self._start = len(before)

    def __call__(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, in their order."""
        if not prompts:
            return []
        if self._before is not None:
            rows = [self._before + row for row in self._ids(prompts, add_special_tokens=False)]
        else:
            rows = self._ids(prompts)
        rows = [row[:-1] if self._closing and row[-1:] == self._closing else row for row in rows]
        if self._bos is None:
            return rows
        start = self._start
        return [row[:start] + row[start + 1 :] if row[start : start + 1] == [self._bos] else row for row in rows]

    def _known(self) -> tuple[list[int], list[int]]:
        """A text's tokens with what the tokenizer puts around them, and without."""
        for text in KNOWN_TEXTS:
            try:
                (known,), (bare,) = self._ids([text]), self._ids([text], add_special_tokens=False)
            # The vocabulary has neither the text nor an unknown token.
            except Exception:
                continue
            if bare:
                return known, bare
        return [], []

    def _ids(self, texts: Sequence[str], **options) -> list[list[int]]:
        return [list(row) for row in self.tokenizer(list(texts), **options)["input_ids"]]


class PromptReader:
    """Prompts as an engine gives them to its model: token ids, or an error that says why there is no completion.

    Args:
        tokenizer: the model's.
        max_new_tokens: longest completion, in tokens.
        vocabulary: how many tokens the model has an embedding for.
        limit: the most tokens that a prompt and its completion may have together; None if there is no limit.

    Attributes: `length_setting`, what the engine's user calls max_new_tokens, for errors.
    """

    def __init__(self, tokenizer, max_new_tokens: int, vocabulary: int, limit: int | None):
        self.tokenizer, self.max_new_tokens, self.vocabulary, self.limit = tokenizer, max_new_tokens, vocabulary, limit
        self.encode, self.length_setting = PromptEncoder(tokenizer), "max_new_tokens"
        self._kept: dict[str, list[int]] = {}
        self._tokens: dict[str, list[int]] = {}

    def __call__(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, in order. Keeps the last list of prompts, since all members of a generation have
        the same.

        Raises TypeError for prompts that are not strings, ValueError for one that has no tokens, that no UTF-8 can
        hold, that has a token without an embedding, or that leaves no room for max_new_tokens below the limit.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise BadType("prompts must be a list of strings; for chat messages, apply the chat template first")
        if not self._kept.keys() >= set(prompts):
            # The last set only: fresh prompts must not pile up.
            self._kept = self._read(prompts)
        return [self._kept[prompt] for prompt in prompts]

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, whatever the model can do with them. Keeps those of the last prompts: who asks how
        long they are before they are answered encodes them once."""
        if not self._tokens.keys() >= set(prompts):
            distinct = list(dict.fromkeys(prompts))
            self._tokens = dict(zip(distinct, self.encode(distinct), strict=True))
        return [self._tokens[prompt] for prompt in prompts]

    def of_call(self, prompts: Sequence[str], asked: Asked) -> list[list[int]]:
        """Token ids of prompts that a call asks to continue with settings of its own. Raises ValueError also for
        settings out of range."""
        own, most = self.max_new_tokens, check_asked(asked, self.max_new_tokens, self.length_setting)
        self.set_longest(most)
        try:
            return self(prompts)
        finally:
            self.set_longest(own)

    def set_longest(self, max_new_tokens: int) -> None:
        """Changes how many tokens a completion may have."""
        if max_new_tokens > self.max_new_tokens:
            # Prompts that left room for a shorter completion may leave none for a longer one.
            self._kept = {}
        self.max_new_tokens = max_new_tokens

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt that can't be read."""
        self._read(prompts)

    def _read(self, prompts: Sequence[str]) -> dict[str, list[int]]:
        distinct = list(dict.fromkeys(prompts))
        for prompt in distinct:
            check_text("prompt", prompt)
        read = dict(zip(distinct, self.tokens(distinct), strict=True))
        for prompt, ids in read.items():
            self._check(prompt, ids)
        return read

    def _check(self, prompt: str, ids: list[int]) -> None:
        shown, length = prompt if len(prompt) <= 80 else f"{prompt[:77]}...", len(ids)
        if length == 0:
            raise BadValue(f"the prompt {shown!r} has no tokens: a completion needs something to follow")
        if max(ids) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise BadValue(
                f"the prompt {shown!r} has the token {token!r} with the id {max(ids)}, but the model has embeddings "
                f"for {self.vocabulary}: model.resize_token_embeddings(len(tokenizer)) extends it as the tokenizer was"
            )
        if self.limit is not None and length + self.max_new_tokens > self.limit:
            raise BadValue(
                f"the prompt {shown!r} has {length} tokens, which with {self.max_new_tokens} for the completion "
                f"exceeds the model's context of {self.limit}: shorten the prompt, or lower {self.length_setting}"
            )


def context_limit(model) -> int | None:
    """The most tokens of a sequence; None if the configuration names no limit."""
    config = model.config.get_text_config(decoder=True)
    for name in LIMITS:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            return limit - _reserved(model, limit)
    return None


def _reserved(model, limit: int) -> int:
    """Unused positions of the position table: RoBERTa and models like it count from behind the padding's position."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "num_embeddings", None) == limit:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def embedded_tokens(model) -> int:
    """How many tokens the model has an embedding for: the rows of its embedding table. sys.maxsize if it has no such
    table."""
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        table = None
    return table.shape[0] if getattr(table, "ndim", 0) == 2 else sys.maxsize
