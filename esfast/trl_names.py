"""TRL's names of settings: those that mean the same are accepted, of the others it is said that they are GRPO's."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from .suggest import unknown

RENAMED = {
    "learning_rate": "lr",
    "max_steps": "generations",
    "eval_steps": "eval_every",
    "lr_scheduler_type": "lr_schedule",
    "warmup_steps": "warmup_generations",
}
# Of GRPOConfig, by how their names begin: what back-propagation, its batches, and GRPO's loss need, and ES doesn't.
GRPO_ONLY = (
    "per_device_", "gradient_", "num_train_epochs", "beta", "epsilon", "num_iterations", "bf16", "fp16", "use_vllm",
    "vllm_", "optim", "adam_epsilon", "max_grad_norm", "steps_per_generation", "generation_batch_size", "loss_type",
    "scale_rewards", "importance_sampling_", "mask_truncated_completions", "sync_ref_model", "ref_model_", "logging_",
    "save_st", "save_total", "eval_strategy", "ddp_", "dataloader_", "remove_unused_columns", "log_completions",
    "delta", "top_", "min_p", "repetition_penalty", "use_liger", "disable_dropout", "shuffle_dataset",
    "deepspeed", "fsdp",
)  # fmt: skip


def translate(settings: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Settings under the names that are known here. TypeError, which says what to do, for a name that isn't, and for
    two names of one setting."""
    known, result = list(known), {}
    for name, value in settings.items():
        mine = name if name in known else RENAMED.get(name)
        if mine is None and name.startswith(GRPO_ONLY):
            raise TypeError(f"ESConfig: {name!r} is a setting of GRPO's that ES has no use for; leave it out")
        if mine is None:
            raise TypeError(f"ESConfig: {unknown('setting', name, [*known, *RENAMED])}")
        if mine in result or (mine != name and mine in settings):
            raise TypeError(f"ESConfig: {name!r} is another name of {mine!r}; give one of them")
        result[mine] = value
    return result


def accepts_trl_names(cls: type) -> type:
    """A dataclass whose keyword arguments go through `translate`."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *args, **settings):
        init(self, *args, **translate(settings, cls.__dataclass_fields__))

    cls.__init__ = __init__
    return cls
