"""The settings of the paper's experiments (arXiv 2509.24372) under names: `esfast train --preset NAME`."""

from __future__ import annotations

from typing import Any

from ..utils.errors import BadValue
from ..utils.suggest import unknown

_COUNTDOWN_MODELS = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
}
_METHOD = {"style": "paper", "mirrored": False, "shaping": "zscore", "optimizer": "sgd", "weight_decay": 0.0}


def _countdown(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "task": "countdown",
        "train_prompts": 200,
        "prompts_per_generation": 200,
        "eval_prompts": 2000,
        "population_size": 30,
        "sigma": 1e-3,
        "lr": 5e-4,
        "generations": 500,
        "max_completion_length": 1024,
        **_METHOD,
    }


PRESETS: dict[str, dict[str, Any]] = {
    **{f"paper/countdown-{name}": _countdown(model) for name, model in _COUNTDOWN_MODELS.items()},
    "paper/conciseness-qwen2.5-7b": {
        "model": "Qwen/Qwen2.5-7B-Instruct",
        "task": "conciseness",
        "prompts_per_generation": 2,
        "eval_prompts": 8,
        "population_size": 30,
        "sigma": 1e-3,
        "lr": 5e-4,
        "generations": 1000,
        "max_completion_length": 100,
        "kl_to_base": True,
        **_METHOD,
    },
    "paper/math-qwen2.5-math-7b": {  # 160 to 336 generations
        "model": "Qwen/Qwen2.5-Math-7B",
        "task": "math",
        "population_size": 30,
        "sigma": 1e-3,
        "lr": 5e-4,
        "generations": 336,
        "max_completion_length": 3000,
        **_METHOD,
    },
    "paper/sudoku-qwen2.5-3b": {
        "model": "Qwen/Qwen2.5-3B-Instruct",
        "task": "sudoku",
        "train_prompts": 800,
        "eval_prompts": 200,
        "population_size": 32,
        "sigma": 1e-3,
        "lr": 5e-4,
        "generations": 2500,
        **_METHOD,
    },
    # The riddles as they are: without reasoning-gym's rotations, mirrors and permutations.
    "paper/arc-agi-qwen2.5-14b": {
        "model": "Qwen/Qwen2.5-14B",
        "task": "gym:arc_agi?rotations=&mirrors=&use_color_permutation=false&shuffle_example_order=false",
        "train_prompts": 200,
        "prompts_per_generation": 200,
        "eval_prompts": 200,
        "population_size": 50,
        "sigma": 1e-3,
        "lr": 3e-4,
        "generations": 1500,
        # The largest grid takes 1800 tokens; the paper doesn't say how many it allows.
        "max_completion_length": 4096,
        **_METHOD,
    },
}


NEEDS_DATA = {"paper/math-qwen2.5-math-7b": "MATH's problems of levels 3 to 5"}


def preset(name: str) -> dict[str, Any]:
    """Settings of a run: fields of RunOptions and ESConfig. ValueError, with the closest name, if there is none."""
    if name not in PRESETS:
        raise BadValue(unknown("preset", name, PRESETS))
    return dict(PRESETS[name])
