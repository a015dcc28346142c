"""Greedy completions of a small Qwen2 without the bookkeeping of `generate`, which costs most of a tiny model's time.

It is for `esfast bench training`, whose 3 million rollouts differ only in the weights. Each call converts the weights
to float32, and activations are float32. On a CPU this is faster than bfloat16, and the benchmark compares what ES does
to the weights. For the embedded model it takes less than half the time of TransformersEngine, and gives the same
completions as that with the converted model; `check` compares them before anything is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import embedding, silu

from ..rollout.engine import TransformersEngine
from . import BenchmarkError


class Greedy:
    """An engine for ESTrainer, like TransformersEngine: each call reads the weights anew."""

    def __init__(self, model, tokenizer, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self._tokens: dict[str, list[int]] = {}

    @torch.no_grad()
    def generate(self, prompts: Sequence[str]) -> list[str]:
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        for prompt in prompts:
            if prompt not in self._tokens:
                self._tokens[prompt] = self.tokenizer(prompt)["input_ids"]
        rows = [self._tokens[prompt] for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        starts = torch.tensor([width - len(row) for row in rows])[:, None]
        places = torch.arange(width + self.max_new_tokens)
        cos, sin = self.model.model.rotary_emb(torch.empty(0), (places - starts).clamp(min=0))
        cos, sin = cos[:, :, None], sin[:, :, None]  # (batch, places, any head, size)
        seen = places >= starts  # (batch, places): not padding
        mask = seen[:, None, None, :width] & (places[:width] <= places[:width, None])
        # A padded place attends to itself: without any key the result would be NaN.
        mask |= torch.eye(width, dtype=torch.bool)
        hidden = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        later = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None, None]
        net = _Network(self.model)
        token = net.next(ids, cos[:, :width], sin[:, :width], hidden)
        written, done = [token], token == end
        for at in range(width, width + self.max_new_tokens - 1):
            if done.all():
                break
            here = slice(at, at + 1)
            token = net.next(token[:, None], cos[:, here], sin[:, here], later[..., : at + 1]).masked_fill_(done, pad)
            written.append(token)
            done |= token == end
        return self.tokenizer.batch_decode(torch.stack(written, 1), skip_special_tokens=True)


def check(model, tokenizer, max_new_tokens: int, prompts: Sequence[str]) -> None:
    """BenchmarkError at the first prompt for which TransformersEngine, with a float32 `model`, has another
    completion."""
    ours = Greedy(model, tokenizer, max_new_tokens).generate(prompts)
    theirs = TransformersEngine(model, tokenizer, max_new_tokens).generate(prompts)
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        if a != b:
            raise BenchmarkError(f"the completion of {prompt!r} is {a!r}, that of TransformersEngine {b!r}")


class _Network:
    """The present weights in float32, with matrices of the same input joined, and the keys and values so far."""

    def __init__(self, model):
        self.embedding, self.head = (m.weight.float() for m in (model.model.embed_tokens, model.lm_head))
        self.norm, self.layers = _Norm(model.model.norm), []
        for layer in model.model.layers:
            a, m = layer.self_attn, layer.mlp
            qkv = a.q_proj, a.k_proj, a.v_proj
            self.layers.append(
                (
                    _Norm(layer.input_layernorm),
                    torch.cat([p.weight for p in qkv]).float().t(),
                    torch.cat([p.bias for p in qkv]).float(),
                    a.o_proj.weight.float().t(),
                    _Norm(layer.post_attention_layernorm),
                    torch.cat([m.gate_proj.weight, m.up_proj.weight]).float().t(),
                    m.down_proj.weight.float().t(),
                )
            )
        c = model.config
        self.heads, self.size = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads), a.head_dim
        self.scale, self.cache = a.scaling, [None] * len(self.layers)

    def next(self, ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The next token of each row of ids (batch, places)."""
        x = embedding(ids, self.embedding)
        turned = sum(self.heads[:2])
        for i, (norm, qkv, bias, out, norm2, gate_up, down) in enumerate(self.layers):
            h = torch.add(norm(x) @ qkv, bias).unflatten(-1, (-1, self.size))
            v = h[:, :, turned:].transpose(1, 2)
            h = h[:, :, :turned]
            first, second = h.chunk(2, -1)
            h = torch.addcmul(h * cos, torch.cat((-second, first), -1), sin).transpose(1, 2)  # rotary embedding
            q, k = h.split(self.heads[:2], 1)
            q = q * self.scale
            if self.cache[i] is not None:
                k, v = (torch.cat(pair, 2) for pair in zip(self.cache[i], (k, v), strict=True))
            self.cache[i] = k, v
            h = torch.matmul(q, k.transpose(2, 3)).add_(mask).softmax(-1) @ v
            x = x + h.transpose(1, 2).flatten(2) @ out
            gate, up = (norm2(x) @ gate_up).chunk(2, -1)
            x = x + (silu(gate) * up) @ down
        return (self.norm(x[:, -1]) @ self.head.t()).argmax(-1)


class _Norm:
    def __init__(self, module):
        size = module.weight.numel()  # x / sqrt(mean + eps) = x / sqrt(sum + size eps) * sqrt(size)
        self.weight, self.eps = module.weight.float() * size**0.5, size * module.variance_epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x * x).sum(-1, keepdim=True).add_(self.eps).rsqrt_() * self.weight
