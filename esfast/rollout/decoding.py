"""Decodings: plain, with one static cache, or continuous batching.

A decoding is made once a run and called with rows of prompt tokens. It returns each row's new tokens, up to and
including the token that ended it. Between calls it keeps buffers and captured graphs, which read the weights where they
lie. The keys and values left in its buffers belong to the last member and are never read again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessorList, StaticCache

from ..utils.errors import BadValue
from .grouped_attention import attention_kept, grouped
from .sampling import FiniteLogits, SeededSampling

Tokens = list[list[int]]

# The name of generate's cache argument: `cache` since Transformers 5.24, which still accepts the old name.
CACHE = "cache" if "cache" in getattr(transformers.generation.utils, "ALL_CACHE_NAMES", ()) else "past_key_values"


def until_ended(texts: torch.Tensor, ends: torch.Tensor) -> Tokens:
    """The tokens of each row of `texts`, up to and including the first of `ends`."""
    ended = torch.isin(texts, ends).cumsum(1)
    lengths = (ended == 0).sum(1) + ended.gt(0).any(1)
    return [row[:length] for row, length in zip(texts.tolist(), lengths.tolist(), strict=True)]


class Plain:
    """model.generate with a cache that grows: for CPUs, and for models that support nothing else."""

    rounds_shapes_to = 1

    def __init__(self, model, config: GenerationConfig):
        self.model, self.config = model, config
        self._ends = torch.tensor(config.eos_token_id or [], device=model.device)

    def __call__(self, rows: Tokens, most: int, sampling: SeededSampling | None = None) -> Tokens:
        """`most` is the number of rows in a full mini-batch; the last mini-batch may have fewer."""
        unit, pad = self.rounds_shapes_to, self.config.pad_token_id
        width = -(-max(map(len, rows)) // unit) * unit
        count = len(rows) if unit == 1 else most
        filled = rows + [rows[-1]] * (count - len(rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in filled], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in filled], device=self.model.device)
        finite = FiniteLogits()
        processors = LogitsProcessorList([finite] if sampling is None else [finite, sampling.after(width, count)])
        # no_grad rather than inference_mode: a tensor that the model caches during the call stays an ordinary one.
        with torch.no_grad(), self._attention():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self.config,
                logits_processor=processors,
                **self._cache(count, width),
            )
        finite.check()
        return until_ended(output[: len(rows), width:], self._ends)

    def _cache(self, count: int, width: int) -> dict:
        return {}

    def _attention(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def close(self) -> None:
        pass


def takes_static_cache(model) -> bool:
    """Whether Transformers says that the model may have one. Others cut windows out of the keys that are there, and
    would see other tokens if room for more is among them."""
    return getattr(model, "_supports_static_cache", getattr(model, "_can_compile_fullgraph", True))


class Static(Plain):
    """model.generate from one static cache, which Transformers compiles on GPUs, CUDA graphs included.

    The cache is made once, for the longest prompts so far, and reset before each call, since the graphs contain its
    address. Prompts are padded to a multiple of 64 tokens and mini-batches to one size, since each shape is compiled
    anew.
    """

    rounds_shapes_to = 64

    def __init__(self, model, config: GenerationConfig):
        if not takes_static_cache(model):
            raise BadValue(f"{type(model).__name__} does not support a static cache")
        super().__init__(model, config)
        self._made: tuple[int, int, StaticCache] | None = None

    def _cache(self, count: int, width: int) -> dict:
        length = width + self.config.max_new_tokens
        if self._made is None or self._made[0] != count or self._made[1] < length:
            # Free the old cache's memory first.
            self._made = None
            self._made = count, length, StaticCache(self.model.config.get_text_config(), max_cache_len=length)
        else:
            self._made[2].reset()
        return {CACHE: self._made[2]}

    def _attention(self) -> contextlib.AbstractContextManager:
        return grouped(self.model)  # a static cache always comes with a mask

    def close(self) -> None:
        self._made = None


class Continuous:
    """Continuous batching over a paged cache: when a text ends, the next prompt takes its place. With flash attention
    it replays CUDA graphs that were captured once.

    Requests share no blocks: a block is found by a hash of its tokens, without the weights, and could hold the keys and
    values of an earlier member.
    """

    def __init__(self, model, config: GenerationConfig, **options):
        if (options_of := _continuous_options()) is None:
            raise BadValue(
                f"decoding='continuous': transformers {transformers.__version__} has no continuous batching that "
                f"can be told not to share blocks; take a newer one, or decoding='static'"
            )
        self.model, self.config = model, config
        self._options = options_of(**{"allow_block_sharing": False, "max_memory_percent": 0.6} | options)

    def __call__(self, rows: Tokens, most: int, sampling: SeededSampling | None = None) -> Tokens:
        if sampling is not None:
            raise BadValue("continuous batching knows no seeds for single responses: sample with decoding='static'")
        if self.model.device.type == "cuda":
            # Weights are written in one stream and read in another, so wait until they are written.
            torch.cuda.synchronize(self.model.device)
        session = self.model.continuous_batching_context_manager(
            generation_config=self.config, continuous_batching_config=self._options, persistent_manager=True
        )
        texts: dict[str, list[int]] = {}
        # If a session can't begin, Transformers before 5.24 leaves its paged attention in the model.
        with torch.no_grad(), attention_kept(self.model), session as manager:
            # Paused until all requests are there, so that every run composes the same batches.
            with getattr(manager, "pause", contextlib.nullcontext)():
                names = manager.add_requests(rows, max_new_tokens=self.config.max_new_tokens)
            while len(texts) < len(names):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("continuous batching ended before all texts were done")
                if result is not None and result.error is not None:
                    kind = torch.OutOfMemoryError if "out of memory" in result.error else RuntimeError
                    raise kind(f"continuous batching: {result.error}")
                if result is not None:
                    texts[result.request_id] = list(result.generated_tokens)
        return [texts[name] for name in names]

    def close(self) -> None:
        self.model.destroy_cached_continuous_batching_manager()


def _continuous_options() -> type | None:
    """The class of continuous batching's settings, if this version of Transformers has those that are needed here."""
    options = getattr(transformers.generation.configuration_utils, "ContinuousBatchingConfig", None)
    return options if hasattr(options, "allow_block_sharing") else None


WAYS = {"plain": Plain, "static": Static, "continuous": Continuous}


def choose_ways(model) -> Sequence[str]:
    """The decodings to try for `decoding="auto"`, the fastest first. Without flash attention continuous batching has no
    CUDA graphs, and a static cache is faster."""
    if model.device.type != "cuda":
        return ["plain"]
    from transformers.utils import is_flash_attn_2_available

    paged = _continuous_options() is not None and is_flash_attn_2_available()
    return ["continuous"] * paged + ["static", "plain"]
