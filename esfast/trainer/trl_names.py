"""Translates the names of settings of TRL and Transformers (GRPOConfig, TrainingArguments).

A setting with the same meaning here is renamed. A setting that only back-propagation or GRPO's loss needs is ignored;
one warning lists these. A setting that would change the outcome and has no counterpart is refused, and the error says
what to do instead; at its default value it is ignored like the others.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ..utils.errors import BadType, BadValue
from ..utils.settings import convert, number, plain, truth, whole_number
from ..utils.suggest import unknown

log = logging.getLogger(__name__)

_Class = TypeVar("_Class", bound=type)

RENAMED = {
    "learning_rate": "lr",
    "max_steps": "generations",
    "eval_steps": "eval_every",
    "save_steps": "checkpoint_every",
    "lr_scheduler_type": "lr_schedule",
    "adam_epsilon": "adam_eps",
}
# Names; "*" at the end matches every ending.
LEFT_OUT = tuple(
    """
    accelerator_config activation_* auto_find_batch_size average_tokens_* batch_eval_metrics bf16*
    cache_implementation cast_lm_head_* data_seed dataloader_* ddp_* debug deepspeed delta disable_dropout do_*
    ds3_* enable_jit_* entropy_* epsilon* eval_accumulation_steps eval_delay eval_do_* eval_on_start eval_use_*
    fp16* fsdp* full_determinism generation_batch_size gradient_* greater_is_better group_by_length hub_*
    ignore_data_skip importance_sampling_* include_for_metrics include_inputs_for_metrics
    include_num_input_tokens_seen include_tokens_per_second jit_mode_eval label_names length_column_name liger_*
    load_best_model_at_end local_rank log_* log_completions logging_* loss_type lr_scheduler_kwargs
    max_grad_norm max_prompt_length max_tool_calling_* metric_for_best_model multi_objective_* neftune_* no_cuda
    num_completions_to_print num_generations_eval num_iterations off_policy_* optim optim_args
    optim_target_modules overwrite_output_dir pad_to_* parallelism_config per_device_* prediction_loss_only
    project ref_model_* remove_unused_columns restore_callback_* router_aux_* run_name sapo_* save_on_each_node
    save_only_model save_safetensors save_total_limit scale_rewards shuffle_dataset skip_memory_metrics
    steps_per_generation tf32 top_entropy_* torch_* trackio_* train_sampling_strategy transformers_continuous_*
    trust_remote_code use_adaptive_* use_bias_* use_cache use_cpu use_liger* use_reentrant use_transformers_*
    vespo_* vllm_* wandb_*
    _n_gpu adafactor half_precision_backend mp_parameters past_index per_gpu_* push_to_hub_* ray_scope torchdynamo
    tpu_* use_ipex use_legacy_* use_mps_device
""".split()
)
_KINDS = {bool: bool | None, int: float | None, dict: dict | None}
# For each name, the values that have no effect, and what to do for any other value.
_SAMPLING = "responses are greedy, or sampled with a temperature alone"
REFUSED: dict[str, tuple[tuple, str]] = {
    "beta": (
        (0,),
        "ES has no KL penalty; kl_to_base=True measures the divergence, and weight_decay with decay_to='initial' pulls "
        "the weights back",
    ),
    "sync_ref_model": ((False,), "ES has no reference model; kl_to_base=True measures the divergence from the base"),
    "num_train_epochs": ((), "ES counts generations of prompts_per_generation prompts: give generations, or max_steps"),
    "use_vllm": ((False,), "for vLLM take `esfast train --engine vllm`, or esfast.integrations.fleet.FleetTrainer"),
    "push_to_hub": ((False,), "upload the folder OUTPUT_DIR/model after the training, for example with `hf upload`"),
    "resume_from_checkpoint": ((False,), "a run goes on in its own folder: output_dir=... and resume=True"),
    "model_init_kwargs": (({},), "load the model with them, and give it to ESTrainer"),
    "generation_kwargs": (({},), _SAMPLING),
    "top_p": ((1,), _SAMPLING),
    "top_k": ((0, -1), _SAMPLING),
    "min_p": ((0,), _SAMPLING),
    "repetition_penalty": ((1,), _SAMPLING),
    "mask_truncated_completions": (
        (False,),
        "every response is scored; a reward function may return None for those that it shall not judge",
    ),
    "label_smoothing_factor": ((0,), "there is no loss of labels"),
}


def translate(settings: Mapping[str, Any], known: Iterable[str], what: str = "ESConfig") -> dict[str, Any]:
    """The settings under esfast's names; `what` begins the messages.

    TypeError for an unknown name, and for two names of one setting. ValueError for a setting without a counterpart.
    Both say what to do. One warning lists the ignored settings.
    """
    known, left_out = list(known), []
    result: dict[str, Any] = {}
    meant: dict[str, str] = {}
    for name, value in settings.items():
        mine = name if name in known else RENAMED.get(name)
        if mine is not None:
            if mine in result or (mine != name and mine in settings):
                raise BadType(f"{what}: {name!r} is another name of {mine!r}; give one of them")
            if mine == name or not _says_nothing(name, value):
                result[mine] = _VALUES.get(value, value) if name == "lr_scheduler_type" else value
        elif name in _MEANINGS:
            meant |= _MEANINGS[name](f"{what}.{name}", plain(value), settings)
        elif name in REFUSED:
            silent, instead = REFUSED[name]
            if not _is_silent(value, silent) and (name != "num_train_epochs" or not _steps(settings)):
                raise BadValue(f"{what}: {name}={value!r} can't be had: {instead}")
        elif any(name == n or n.endswith("*") and name.startswith(n[:-1]) for n in LEFT_OUT):
            if value not in (None, False):
                left_out.append(name)
        else:
            raise BadType(f"{what}: {unknown('setting', name, [*known, *RENAMED])}")
    if left_out:
        log.warning("%s: left out, since ES has no use for them: %s", what, ", ".join(left_out))
    given = plain(settings.get("learning_rate", 1.0))
    found_by_the_run = isinstance(given, str) and given.strip().lower() == "auto"
    if not found_by_the_run and number(f"{what}.learning_rate", given) < 2e-5:
        log.warning(
            "%s: learning_rate=%s is one for gradients. Here it is the length of a step of every weight: see "
            "docs/how-to/choosing.md, and begin with half of sigma",
            what,
            settings["learning_rate"],
        )
    return result | meant


def _steps(settings: Mapping[str, Any]) -> int | None:
    """The number of steps, if it is given. It then overrides the epochs, as in Transformers."""
    for name in ("generations", "max_steps"):
        if name in settings and not _says_nothing(name, settings[name]):
            return whole_number(name, plain(settings[name]))
    return None


def _is_silent(value: Any, silent: tuple) -> bool:
    """Whether the value, perhaps as YAML's text, is None or one of the values that have no effect."""
    try:
        value = convert("", value, _KINDS[type(silent[0])] if silent else float | None)
    except TypeError:  # some other kind of value
        return False
    return value is None or value in silent


def _says_nothing(name: str, value: Any) -> bool:
    """Whether this is the value that stands for "not given" in Transformers."""
    return value is None or name == "max_steps" and plain(value) == -1


def _warmup(what: str, value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A number of steps; below 1, a fraction of all steps."""
    if not value or not number(what, value):
        return {}
    if number(what, value) >= 1:
        return {"warmup_generations": value}
    steps = _steps(settings)
    if steps is None:
        raise BadValue(f"{what}: {value} is a share of the generations: give their number, or warmup_generations")
    return {"warmup_generations": math.ceil(number(what, value) * steps)}


def _strategy(setting: str) -> Callable[[str, Any, Mapping[str, Any]], dict[str, Any]]:
    def meaning(what: str, value: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        if value in ("no", False, None):
            return {setting: 0}
        if value not in ("steps", True):
            raise BadValue(f"{what}: expected 'steps' or 'no', got {value!r}; {setting} counts generations")
        return {}

    return meaning


# Names whose values must be converted, and how.
_MEANINGS: dict[str, Callable[[str, Any, Mapping[str, Any]], dict[str, Any]]] = {
    "warmup_ratio": _warmup,
    "warmup_steps": _warmup,
    "eval_strategy": _strategy("eval_every"),
    "evaluation_strategy": _strategy("eval_every"),
    "save_strategy": _strategy("checkpoint_every"),
    "disable_tqdm": lambda what, value, settings: {} if value is None else {"progress": not truth(what, value)},
}
_VALUES = {"constant_with_warmup": "constant"}


def accepts_trl_names(cls: _Class) -> _Class:
    """Class decorator: the dataclass's keyword arguments go through `translate`."""
    init: Callable[..., None] = vars(cls)["__init__"]
    fields = [field.name for field in dataclasses.fields(cls)]

    @functools.wraps(init)
    def __init__(self, *args, **settings):
        init(self, *args, **translate(settings, fields))

    setattr(cls, "__init__", __init__)  # noqa: B010  a plain assignment is one to a method, to a type checker
    return cls
