"""Members of a population as LoRA adapters of one vLLM worker: their names, and the drawing of each when it is needed.

An adapter is a seed and a coefficient. vLLM asks for it when one of its requests is scheduled, and the kernels draw its
factors into the slot that vLLM has chosen. If vLLM needs the slot for another member, the first is drawn again later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..core.kinds import check_rank
from ..core.ops import check_members
from ..update.updater import Rule
from ..utils.errors import BadState, BadValue
from . import vllm_patches
from .vllm_slots import Slots, groups_that_freeze

# Numbers of other adapters are small, or hashes of 32 bits.
FIRST_NUMBER = 2**48


class Drawn(NamedTuple):
    """An adapter: the member base + coeff * noise(seed)."""

    name: str
    seed: int
    coeff: float
    rank: int


class Members:
    """The adapters of a worker.

    Args:
        lora_manager: `model_runner.lora_manager` of the worker, None if it has no LoRA slots.
        model: the worker's model.
        weights: its WorkerWeights.
        config: vLLM's VllmConfig.
    """

    def __init__(self, lora_manager, model, weights, config):
        self._manager, self._weights, self._config = lora_manager, weights, config.lora_config
        self._on_gpu = config.device_config.device_type == "cuda"
        self._drawn: dict[int, Drawn] = {}
        self._next, self._epoch = FIRST_NUMBER, 0
        self._rule: Rule | None = None
        self.slots: Slots | None = None
        if lora_manager is not None:
            tied = bool(getattr(config.model_config.hf_config, "tie_word_embeddings", False))
            self.slots = Slots(model, weights.wholes, lora_manager._adapter_manager.modules, tied)
            vllm_patches.draw_adapters(lora_manager, self._drawn, self._write)

    def describe(self) -> dict[str, Any]:
        """See WorkerExtension.esfast_adapters."""
        slots = self._checked_slots()
        frozen = groups_that_freeze(list(self._weights.wholes), slots.carried)
        return {
            "slots": self._config.max_loras,
            "rank": self._config.max_lora_rank,
            "frozen": [str(group) for group in frozen],
        }

    def add(self, seeds: Sequence[int], sigmas: Sequence[float], rank: int | None) -> list[dict[str, Any]]:
        """See WorkerExtension.esfast_members."""
        slots, weights = self._checked_slots(), self._weights
        check_members(seeds, sigmas)
        found = self._config.max_lora_rank
        if rank is None:
            rank = weights.rule.rank if weights.mode is not None else 1
        check_rank("low_rank", rank)
        if rank > found:
            raise BadValue(
                f"rank: noise of rank {rank} does not fit into the engine's LoRA slots, whose max_lora_rank is "
                f"{found}: start it with max_lora_rank={least_slot_rank(rank)}"
            )
        if any(sigmas):
            if weights.mode is None or (weights.by_default and not weights.records and not weights.offsets.terms):
                frozen = groups_that_freeze(list(weights.wholes), slots.carried)
                weights.begin(Rule(noise="low_rank", rank=rank, groups=tuple(frozen)))
            self._check_rule(rank)
        self._epoch += 1
        added = []
        for i, (seed, sigma) in enumerate(zip(seeds, sigmas, strict=True)):
            name = f"{vllm_patches.PREFIX}{self._epoch}.{i}"
            self._drawn[self._next] = Drawn(name, int(seed), float(sigma), rank)
            added.append({"lora_name": name, "lora_int_id": self._next, "lora_path": name})
            self._next += 1
        return added

    def forget(self) -> None:
        """Ends all adapters: the weights change, and members with them."""
        for number in list(self._drawn):
            del self._drawn[number]
            self._manager.remove_adapter(number)

    def _checked_slots(self) -> Slots:
        if self.slots is None:
            raise BadState(
                "esfast_members: the engine has no LoRA slots for members; start it with enable_lora=True, max_loras= "
                "(members in one batch) and max_lora_rank= (1, 8, 16, 32, ...: at least the noise's rank)"
            )
        if self._on_gpu and self._config.lora_dtype is torch.float32:
            raise BadValue(
                "esfast_members: the engine's LoRA slots are float32, which vLLM's kernels for GPUs do not take; start "
                "it with dtype='bfloat16' or 'float16', or take members one after another (members_at_once=1)"
            )
        return self.slots

    def _check_rule(self, rank: int) -> None:
        """What members are must be what updates use."""
        weights, rule = self._weights, self._weights.rule
        if weights.offsets.terms:
            raise BadState(
                f"esfast_members: the noise of seed {next(iter(weights.offsets.terms))} is still in place; restore "
                "first"
            )
        weights.offsets.follow()
        if rule.noise != "low_rank" or rule.rank != rank:
            of_rank = f" of rank {rule.rank}" if rule.noise == "low_rank" else ""
            raise BadValue(
                f"esfast_members: updates use {rule.noise!r} noise{of_rank}, LoRA slots hold 'low_rank' noise, asked "
                f"for with rank {rank}: begin with esfast_begin({{'noise': 'low_rank', 'rank': {rank}, ...}})"
            )
        assert self.slots is not None
        carried = set(self.slots.carried)
        lost = [n for n in dict.fromkeys(weights.plan.names) if n not in carried and not rule.group_of(n).frozen]
        if lost:
            raise BadValue(
                f"esfast_members: LoRA slots do not hold the noise of {lost[0]!r} and {len(lost) - 1} other tensors, "
                "which updates would move: freeze them by the groups that esfast_adapters() gives as 'frozen'"
            )
        if rule is not self._rule:
            tuned = set(weights.plan.names)
            self.slots.begin(lambda name: rule.group_of(name).sigma if name in tuned else 0.0)
            self._rule = rule

    def _write(self, slot: int, number: int) -> None:
        member = self._drawn[number]
        assert self.slots is not None
        self.slots.write(slot, member.seed, member.coeff, member.rank)


def least_slot_rank(rank: int) -> int:
    """The least of vLLM's values for max_lora_rank that holds noise of this rank."""
    return next(r for r in (1, 8, 16, 32, 64, 128, 256) if r >= rank)


def lora_options(rank: int, slots: int) -> dict[str, Any]:
    """Arguments of vllm.LLM for members of this rank in so many LoRA slots."""
    return {"enable_lora": True, "max_loras": slots, "max_lora_rank": least_slot_rank(rank)}
