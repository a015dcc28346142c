"""A vLLM engine with the interface of esfast.rollout.Engine; it also holds the weights of ES."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path

from ..rollout.completion import OWN, Asked, Completion, decoded
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
        return [completion.text for completion in self.complete_texts(prompts, seeds)]

    def complete_texts(
        self, prompts: Sequence[str], seeds: Sequence[int] | None = None, asked: Asked = OWN
    ) -> list[Completion]:
        """As `generate`, with settings of this call: a Completion for each prompt, in order. Raises ValueError also for
        settings that are out of range or exceed max_new_tokens."""
        return self.complete(self.prompts.of_call(prompts, asked), seeds, asked)

    def complete(
        self, rows: Sequence[Sequence[int]], seeds: Sequence[int] | None = None, asked: Asked = OWN
    ) -> list[Completion]:
        """Like `complete_texts`, for prompts given as token ids, which are not checked."""
        return self._complete(rows, seeds, None, asked)

    def member(
        self, seed: int, coeff: float, rows: Sequence[Sequence[int]], seeds: Sequence[int] | None = None
    ) -> tuple[list[str], int]:
        """Perturbs the model by coeff * noise(seed), and returns the texts of `complete` and how many tokens they have.
        The weights are restored when it returns or raises."""
        try:
            self.call("perturb_self_weights", seed, coeff)
            return _texts(self.complete(rows, seeds))
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
        return [_texts(done[i * len(rows) : (i + 1) * len(rows)]) for i in range(again)]

    def complete_members(
        self,
        members: Sequence[tuple[int, float]],
        owners: Sequence[int],
        rows: Sequence[Sequence[int]],
        seeds: Sequence[int] | None = None,
        asked: Asked = OWN,
    ) -> list[Completion]:
        """Like `complete`, but row i is answered by the member with the number owners[i], each (seed, coeff), as LoRA
        adapters in one batch. No weight changes. Raises as `members`."""
        adapters = self._adapters(members)
        return self._complete(rows, seeds, [adapters[k] for k in owners], asked)

    def _adapters(self, members: Sequence[tuple[int, float]]) -> list:
        from vllm.lora.request import LoRARequest

        given = self.call("esfast_members", [seed for seed, _ in members], [coeff for _, coeff in members])
        return [LoRARequest(**fields) for fields in given]

    def _complete(
        self, rows: Sequence[Sequence[int]], seeds: Sequence[int] | None, adapters: list | None, asked: Asked = OWN
    ) -> list[Completion]:
        from vllm import SamplingParams

        most = asked.most(self.max_new_tokens)
        if seeds is None or asked.temperature == 0:
            settings = SamplingParams(temperature=0.0, max_tokens=most, detokenize=False)
        else:
            sampled = {"temperature": asked.temperature or self.temperature, "top_p": asked.top_p}
            settings = [
                SamplingParams(seed=seed % 2**63, max_tokens=most, detokenize=False, **sampled) for seed in seeds
            ]
        prompts = [{"prompt_token_ids": list(row)} for row in rows]
        try:
            done = self.llm.generate(prompts, settings, use_tqdm=False, lora_request=adapters)
        except BaseException:
            self._abort()
            raise
        outputs = [d.outputs[0] for d in done]
        # vLLM's own text leaves out the part of a character that the end cut off.
        texts = decoded(self.llm.get_tokenizer(), [o.token_ids for o in outputs])
        found = [
            Completion(text, len(output.token_ids), output.finish_reason == "stop")
            for text, output in zip(texts, outputs, strict=True)
        ]
        self.tokens += sum(completion.tokens for completion in found)
        return found

    def _abort(self) -> None:
        """Ends the requests of a call that was cut short: weights can't change before they are done."""
        engine = self.llm.llm_engine
        # An engine that has died has none.
        with contextlib.suppress(Exception):
            engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def call(self, method: str, *args, **kwargs):
        """Calls WorkerExtension.`method` on all ranks; returns the first rank's answer."""
        return self.llm.collective_rpc(method, args=args, kwargs=kwargs)[0]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def _texts(completions: Sequence[Completion]) -> tuple[list[str], int]:
    return [completion.text for completion in completions], sum(completion.tokens for completion in completions)
