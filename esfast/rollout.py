"""How a member of the population is scored: prompts in, completions out.

ES spends nearly all its time here. The trainer needs only an object with `generate(prompts) -> completions`.
"""

import logging
import os
from collections.abc import Sequence

import torch
from transformers import GenerationConfig

log = logging.getLogger(__name__)


class TransformersEngine:
    """Greedy completions from a Hugging Face causal LM, in mini-batches of similar length, padded on the left.

    The model's weights are only read, and read anew at each call: change them in place between two calls and the next
    completions are those of the changed model. Its generation_config is not consulted, except for the tokens that end
    a text: a member is judged by its weights, not by sampling settings that a checkpoint happens to carry.

    model           any causal LM with `generate`; it generates in eval mode and is left in the mode it was in
    tokenizer       its tokenizer; without a pad token the eos token pads
    max_new_tokens  longest completion, in tokens
    batch_size      most prompts at once; None takes as many as have their keys and values in a quarter of the device's
                    memory. When memory runs out nevertheless it is halved, and stays so

    Raises ValueError if max_new_tokens or batch_size is below 1, or if neither a pad nor an eos token is known.
    """

    def __init__(self, model, tokenizer, max_new_tokens: int, batch_size: int | None = None):
        if max_new_tokens < 1 or (batch_size is not None and batch_size < 1):
            raise ValueError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        ends = _end_tokens(model, tokenizer)
        self.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [None])[0]
        if self.pad_token_id is None:
            raise ValueError(
                "the tokenizer has neither a pad nor an eos token: set one, for example tokenizer.pad_token = '<|pad|>'"
            )
        self.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=self.pad_token_id, eos_token_id=ends or None
        )
        self._encoded: dict[str, list[int]] = {}

    def generate(self, prompts: Sequence[str]) -> list[str]:
        """The completion of each prompt, in the order given, without the prompt and without special tokens.

        Raises TypeError for prompts that are not strings, ValueError for one that is empty or that leaves no room for
        max_new_tokens in the model's context, and torch.OutOfMemoryError if not even a single prompt fits in memory.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("prompts must be a list of strings; for chat messages, apply the chat template first")
        encoded = self._encode(prompts)
        # Longest first: if memory is short it shows in the first mini-batch, before work is done that would be lost.
        order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
        completions = [""] * len(prompts)
        was_training, own_config = self.model.training, self.model.generation_config
        self.model.eval()
        # Passing a config is not enough: generate fills what it leaves open from the model's (a repetition penalty).
        self.model.generation_config = self.generation_config
        try:
            done = 0
            while done < len(order):
                longest = len(encoded[order[done]]) + self.max_new_tokens
                batch = order[done : done + (self.batch_size or batch_that_fits(self.model, longest))]
                texts = self._try_batch([encoded[i] for i in batch])
                if texts is None:
                    self.batch_size = len(batch) // 2
                    log.warning("out of memory with %d prompts at once: going on with %d", len(batch), self.batch_size)
                    continue
                for i, text in zip(batch, texts, strict=True):
                    completions[i] = text
                done += len(batch)
        finally:
            self.model.generation_config = own_config
            self.model.train(was_training)
        return completions

    def _try_batch(self, rows: list[list[int]]) -> list[str] | None:
        """Completions of one mini-batch, None if it does not fit in memory but fewer rows may."""
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        device = self.model.device
        try:
            # no_grad rather than inference_mode: a tensor that the model caches during the call stays an ordinary one.
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=self.generation_config,
                )
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        else:
            return self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        # Outside the except block, whose traceback keeps the failed batch's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt. Kept from one call to the next, since all members of a generation share prompts."""
        if not self._encoded.keys() >= set(prompts):
            distinct = list(dict.fromkeys(prompts))
            encoded = dict(zip(distinct, self.tokenizer(distinct)["input_ids"], strict=True))
            limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            for prompt, ids in encoded.items():
                self._check(prompt, len(ids), limit)
            self._encoded = encoded  # the last set of prompts only: fresh ones every generation must not pile up
        return [self._encoded[prompt] for prompt in prompts]

    def _check(self, prompt: str, length: int, limit: int | None) -> None:
        shown = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
        if length == 0:
            raise ValueError(f"the prompt {shown!r} has no tokens: a completion needs something to follow")
        if limit is not None and length + self.max_new_tokens > limit:
            raise ValueError(
                f"the prompt {shown!r} has {length} tokens, which with max_new_tokens={self.max_new_tokens} exceeds "
                f"the model's context of {limit}: shorten the prompt or lower max_new_tokens"
            )


def batch_that_fits(model, tokens: int) -> int:
    """How many sequences of `tokens` tokens keep their keys and values in a quarter of the device's memory, at least 1.

    Of all memory, not of what is free just now: a batch's size can show in the last bits of what it computes, and the
    same run on the same machine shall give the same completions.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_sequence = 2 * config.num_hidden_layers * heads * width * tokens * model.dtype.itemsize
    if model.device.type == "cuda":
        memory = torch.cuda.get_device_properties(model.device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, memory // 4 // per_sequence)


def _end_tokens(model, tokenizer) -> list[int]:
    """Ids that end a text: the tokenizer's eos and those in the model's generation config (chat models: several)."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *configured] if i is not None))
