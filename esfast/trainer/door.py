"""Converts ESTrainer's arguments to one form: the model, its tokenizer, the reward functions."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..es.store import WeightStore
from ..rewards.scorer import RewardFunc
from ..rollout import adapters
from ..rollout.engine import TransformersEngine, as_engine
from ..rollout.evaluator import MemberEvaluator, SequentialEvaluator
from ..rollout.models import load_model, load_tokenizer
from ..rollout.population import asking
from ..utils.errors import BadType, BadValue
from ..utils.unwrap import unwrap
from .config import ESConfig


def open_model(model):
    """The plain model: loads a name or folder, and unwraps a wrapper."""
    return load_model(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else unwrap(model)


def open_tokenizer(processing_class, name: str):
    """The tokenizer. Without one, the model's own; a name or folder is loaded; of a processor it is the tokenizer
    inside, with the processor's chat template if it has none. TypeError for anything else."""
    given = name if processing_class is None else processing_class
    if given == "":
        raise BadType("processing_class: the model was not loaded by a name or from a folder; give its tokenizer")
    if isinstance(given, (str, os.PathLike)):
        return load_tokenizer(os.fspath(given))
    tokenizer = getattr(given, "tokenizer", given)
    if not callable(tokenizer) or not hasattr(tokenizer, "save_pretrained"):
        raise BadType(f"processing_class: expected a tokenizer, or a processor that has one, got {given!r:.60}")
    template = getattr(given, "chat_template", None)
    if tokenizer is not given and template and not getattr(tokenizer, "chat_template", None):
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def open_evaluator(evaluator: MemberEvaluator | None, engine, model, tokenizer, config: ESConfig) -> MemberEvaluator:
    """See `_open_evaluator`. ValueError if it can't give members prompts of their own and is to."""
    found = _open_evaluator(evaluator, engine, model, tokenizer, config)
    if config.prompts_per_member == "own" and not getattr(found, "own_prompts", False):
        raise BadValue(
            f"prompts_per_member: a {type(found).__name__} asks all members the same prompts; take 'shared', or an "
            "evaluator with own_prompts = True (see esfast.rollout.MemberEvaluator)"
        )
    return found


def _open_evaluator(evaluator: MemberEvaluator | None, engine, model, tokenizer, config: ESConfig) -> MemberEvaluator:
    """The evaluator that asks the members.

    It is the given one. For a given engine, it is one that asks one member after another. Without either, it generates
    with the model itself, and may ask several members at once. TypeError if both are given, or one has the wrong
    type."""
    if evaluator is not None:
        if engine is not None:
            raise BadType("evaluator: it has an engine of its own; give either an evaluator or an engine")
        if not callable(getattr(evaluator, "evaluate", None)) or not hasattr(evaluator, "engine"):
            raise BadType(
                "evaluator: expected an object with evaluate(members, prompts, seeds) and an engine "
                f"(esfast.rollout.MemberEvaluator), got {type(evaluator).__name__}"
            )
        return evaluator
    if engine is not None:
        if config.members_at_once not in ("auto", "1"):
            raise BadValue(
                "members_at_once: an engine of yours is asked for one member after another; leave it at auto"
            )
        found: Any = SequentialEvaluator(as_engine(engine))
        return found
    if isinstance(model, WeightStore):
        raise BadType("evaluator: weights in a store need an evaluator whose engine generates from them")
    adapters.check_generates(model)
    made = TransformersEngine(
        model, tokenizer, config.max_completion_length, config.batch_size, config.temperature or 1.0, config.decoding
    )
    made.prompts.length_setting = "max_completion_length"
    found = asking(made, config.members_at_once, config.noise)
    return found


def open_rewards(
    reward_funcs, metrics: Mapping[str, RewardFunc], weights: Sequence[float] | None
) -> tuple[list[Callable], list[float]]:
    """The reward functions as a list, and a list with a weight for each. TypeError or ValueError if they don't fit."""
    functions = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    for f in [*functions, *metrics.values()]:
        if not callable(f):
            raise BadType(f"reward_funcs and metrics: expected functions, got {type(f).__name__} {f!r:.60}")
    if not functions:
        raise BadValue("reward_funcs: expected at least one function")
    if weights and len(weights) != len(functions):
        raise BadValue(f"reward_weights: expected one for each of the {len(functions)} reward functions, got {weights}")
    return functions, list(weights or ()) or [1.0] * len(functions)
