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
        options: further arguments of vllm.LLM.

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
        from vllm import SamplingParams

        if seeds is None:
            settings = SamplingParams(temperature=0.0, max_tokens=self.max_new_tokens)
        else:
            settings = [
                SamplingParams(temperature=self.temperature, max_tokens=self.max_new_tokens, seed=s % 2**63)
                for s in seeds
            ]
        done = self.llm.generate([{"prompt_token_ids": list(row)} for row in rows], settings, use_tqdm=False)
        self.tokens += sum(len(d.outputs[0].token_ids) for d in done)
        return [d.outputs[0].text for d in done]

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

    def call(self, method: str, *args, **kwargs):
        """Calls WorkerExtension.`method` on all ranks; returns the first rank's answer."""
        return self.llm.collective_rpc(method, args=args, kwargs=kwargs)[0]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
