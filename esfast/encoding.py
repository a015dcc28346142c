"""Prompts as token ids, which of them a model knows, and how many fit into its context."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# The first that a vocabulary knows shows what a tokenizer puts around a text.
KNOWN_TEXTS = ("a", "1", "A", "the", ".", "\u4e00")
CLOSING = ("eos_token", "sep_token", "cls_token", "pad_token")

# What configurations call the longest sequence that a model takes, the first that is there counts.
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
    Those behind it are left out: a model that reads them has been told that the text is over. What a prompt spells out
    itself stays, an end token of a chat template for example; but a bos token that both the prompt's text and the
    tokenizer begin with is taken once.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        known, bare = self._known()
        places = [i for i in range(len(known) - len(bare) + 1) if known[i : i + len(bare)] == bare]
        before = known[: places[0]] if places and bare else []
        behind = known[places[0] + len(bare) :] if places and bare else []
        named = {name: token for name, token in tokenizer.special_tokens_map.items() if name in CLOSING}
        ends = {tokenizer.convert_tokens_to_ids(token) for token in named.values()}
        # Some add their end token even when asked for none; what else stands behind a text may be where answers begin.
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
            # of a vocabulary that knows neither the text nor an unknown token
            except Exception:
                continue
            if bare:
                return known, bare
        return [], []

    def _ids(self, texts: Sequence[str], **options) -> list[list[int]]:
        return [list(row) for row in self.tokenizer(list(texts), **options)["input_ids"]]


def context_limit(model) -> int | None:
    """The most tokens of a sequence, None where the configuration names none or says that there is no limit."""
    config = model.config.get_text_config(decoder=True)
    for name in LIMITS:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            return limit - _reserved(model, limit)
    return None


def _reserved(model, limit: int) -> int:
    """Positions of a table that no token gets: RoBERTa and its kin begin to count behind the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "num_embeddings", None) == limit:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def embedded_tokens(model) -> int:
    """How many tokens the model has an embedding for; where it doesn't say, more than there are tokens."""
    try:
        table = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):
        table = None
    return table.shape[0] if getattr(table, "ndim", 0) == 2 else sys.maxsize
