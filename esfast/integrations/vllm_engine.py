"""A vLLM engine with the interface of esfast.rollout.Engine; it also holds the weights of ES."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from ..rollout.encoding import PromptReader

EXTENSION = "esfast.integrations.vllm.WorkerExtension"


class VLLMEngine:
    """Completions from vLLM, and the weights that they come from.

    Args:
        model: Hugging Face folder or name.
        max_new_tokens: longest completion, in tokens.
        temperature: of completions that are asked for with seeds; without seeds they are greedy.
        tensor_parallel_size, dtype: as vLLM's.
        options: further arguments of vllm.LLM. For `members`: enable_lora=True, max_loras and max_lora_rank.

    vLLM gets token ids. Prompts are tokenized as by TransformersEngine, and a completion always has room for
    max_new_tokens; vLLM itself would cut it off at max_model_len.

    The scheduler runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0, which must be set before vLLM is imported). So
    all prompts of a call are there before the first one begins, and batches, with the last bits of their results, are
    the same in every call and every engine.
    """

    def __init__(
        self,
        model: str | Path,
        max_new_tokens: int,
        temperature: float = 1.0,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        **options,
    ):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        options = {"worker_extension_cls": EXTENSION, "disable_log_stats": True} | options
        self.llm = LLM(str(model), tensor_parallel_size=tensor_parallel_size, dtype=dtype, **options)
        self.max_new_tokens, self.temperature, self.tokens = max_new_tokens, temperature, 0
        config = self.llm.llm_engine.vllm_config
        # On a CPU vLLM gives a request without an adapter what is in the last slot. An empty adapter is the base.
        self._base_needs_adapter = config.lora_config is not None and config.device_config.device_type == "cpu"

    @functools.cached_property
    def prompts(self) -> PromptReader:
        """Made when it is first needed: in a fleet, which reads the prompts of all engines, never."""
        return PromptReader(self.llm.get_tokenizer(), self.max_new_tokens, **self.limits())

    def limits(self) -> dict[str, int]:
        """How many tokens the model has an embedding for, and how many a prompt and its completion may have."""
        config = self.llm.llm_engine.vllm_config.model_config
        return {"vocabulary": config.get_vocab_size(), "limit": config.max_model_len}

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt that `generate` would refuse."""
        self.prompts.check(prompts)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[str]:
        """As in esfast.rollout.Engine. vLLM samples with its own generator for each prompt, so samples differ from
        those of TransformersEngine.

        Raises ValueError or TypeError for prompts as PromptReader does."""
        return self.complete(self.prompts(prompts), seeds)

    def complete(self, rows: Sequence[Sequence[int]], seeds: Sequence[int] | None = None) -> list[str]:
        """Like `generate`, for prompts given as token ids."""
        adapters = self._adapters([(0, 0.0)]) * len(rows) if self._base_needs_adapter else None
        return [text for text, _ in self._complete(rows, seeds, adapters)]

    def member(
        self, seed: int, coeff: float, rows: Sequence[Sequence[int]], seeds: Sequence[int] | None = None
    ) -> tuple[list[str], int]:
        """Perturbs the model by coeff * noise(seed), and returns the result of `complete` and its number of tokens. The
        weights are restored when it returns or raises."""
        before = self.tokens
        try:
            self.call("perturb_self_weights", seed, coeff)
            return self.complete(rows, seeds), self.tokens - before
        finally:
            self.call("esfast_restore")

    def members(
        self,
        members: Sequence[tuple[int, float]],
        rows: Sequence[Sequence[int]],
        seeds: Sequence[int] | None = None,
    ) -> list[tuple[list[str], int]]:
        """Several members at once, each (seed, coeff), as LoRA adapters in one batch: all answer all prompts. Returns
        for each what `member` returns. No weight changes.

        Raises ValueError or RuntimeError as WorkerExtension.esfast_members does."""
        adapters = [adapter for adapter in self._adapters(members) for _ in rows]
        again = len(members)
        done = self._complete(list(rows) * again, None if seeds is None else list(seeds) * again, adapters)
        parts = [done[i * len(rows) : (i + 1) * len(rows)] for i in range(again)]
        return [([text for text, _ in part], sum(tokens for _, tokens in part)) for part in parts]

    def _adapters(self, members: Sequence[tuple[int, float]]) -> list:
        from vllm.lora.request import LoRARequest

        given = self.call("esfast_members", [seed for seed, _ in members], [coeff for _, coeff in members])
        return [LoRARequest(**fields) for fields in given]

    def _complete(
        self, rows: Sequence[Sequence[int]], seeds: Sequence[int] | None, adapters: list | None
    ) -> list[tuple[str, int]]:
        """The text of each prompt and its number of tokens."""
        from vllm import SamplingParams

        if seeds is None:
            settings = SamplingParams(temperature=0.0, max_tokens=self.max_new_tokens)
        else:
            settings = [
                SamplingParams(temperature=self.temperature, max_tokens=self.max_new_tokens, seed=s % 2**63)
                for s in seeds
            ]
        asked = [{"prompt_token_ids": list(row)} for row in rows]
        done = self.llm.generate(asked, settings, use_tqdm=False, lora_request=adapters)
        found = [(d.outputs[0].text, len(d.outputs[0].token_ids)) for d in done]
        self.tokens += sum(tokens for _, tokens in found)
        return found

    def call(self, method: str, *args, **kwargs):
        """Calls WorkerExtension.`method` on all ranks; returns the first rank's answer."""
        return self.llm.collective_rpc(method, args=args, kwargs=kwargs)[0]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
