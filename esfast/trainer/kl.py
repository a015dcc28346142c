"""The KL divergence of a tuned model from its base model, over the tuned model's own responses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.dtensors import fsdp_modules, reshard
from ..rollout.encoding import PromptEncoder, embedded_tokens
from ..utils.interrupts import defer_sigint

# Logits of one mini-batch at most: 256 MB in float32.
MOST_LOGITS = 2**26


class KLToBase:
    """A metric with the signature of a reward function: for each response, the KL divergence of the present model from
    the model at the time when this object was made, in nats a token:

        mean over the response's tokens t of  sum_v p(v | before t) * (log p(v | before t) - log p_base(v | before t))

    It sums over the whole vocabulary; arXiv 2509.24372 estimates it from the sampled tokens alone. The base weights are
    a copy in host memory. To compare, they are swapped with the tuned weights, tensor by tensor, and swapped back to
    the bit. Don't call it while a member is in place.

    model           the causal LM that is tuned, in place
    tokenizer       its tokenizer
    max_new_tokens  responses shorter than this ended by themselves: their end token counts too

    The call returns a float a completion; 0.0 for one without tokens.
    """

    __name__ = "kl_to_base"

    def __init__(self, model, tokenizer, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self._encode = PromptEncoder(tokenizer)
        self._gathering = fsdp_modules(model)
        reshard(self._gathering)
        # The shard of a DTensor.
        here = (getattr(p, "_local_tensor", p) for p in model.parameters())
        # Tied parameters once.
        parameters = {p.data_ptr(): p for p in here}
        self._tuned = [p.detach() for p in parameters.values()]
        self._base = [p.to("cpu", copy=True) for p in self._tuned]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
        rows = [self._ids(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        values = [0.0] * len(rows)
        order = sorted((i for i in range(len(rows)) if rows[i][1] > 0), key=lambda i: len(rows[i][0]))
        vocabulary = embedded_tokens(self.model)
        was_training = self.model.training
        self.model.eval()
        try:
            while order:
                width = len(rows[order[-1]][0])
                size = max(1, MOST_LOGITS // (2 * width * vocabulary))
                batch, order = order[-size:], order[:-size]
                for i, value in zip(batch, self._batch([rows[i] for i in batch], width), strict=True):
                    values[i] = value
        finally:
            self.model.train(was_training)
        return values

    def _batch(self, rows: list[tuple[list[int], int]], width: int) -> list[float]:
        device = self._tuned[0].device
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows], device=device)
        tuned = self._log_probabilities(ids, mask)
        self._exchange()
        try:
            base = self._log_probabilities(ids, mask)
        finally:
            self._exchange()
        # At each position, over the next token.
        divergence = (tuned.exp() * (tuned - base)).sum(-1)
        return [
            divergence[i, len(row) - count - 1 : len(row) - 1].double().mean().item()
            for i, (row, count) in enumerate(rows)
        ]

    def _log_probabilities(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)

    def _exchange(self) -> None:
        reshard(self._gathering)
        # All or nothing: half swapped weights are no model.
        with defer_sigint():
            for tuned, base in zip(self._tuned, self._base, strict=True):
                kept = tuned.to("cpu", copy=True)
                tuned.copy_(base)
                base.copy_(kept)

    def _ids(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """Tokens of prompt and response, and how many are the response's."""
        (before,) = self._encode([prompt])
        after = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        if len(after) < self.max_new_tokens and self.tokenizer.eos_token_id is not None:
            after = [*after, self.tokenizer.eos_token_id]
        return before + after, len(after)
