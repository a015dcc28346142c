"""All settings of `esfast train`: RunOptions says which model to tune on which task, ESConfig how.

The options of the command line, the keys of a YAML file and the fields of these two dataclasses have the same names.
Each is documented once, where it is defined.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..trainer.config import ESConfig
from ..trainer.trl_names import translate
from ..utils.errors import BadValue
from ..utils.settings import check_int, convert_fields, convert_given, option
from .options import as_flag
from .presets import NEEDS_DATA, preset


@dataclass
class RunOptions:
    """Model, task, data and devices of a run. `None` leaves the choice to the model or the task."""

    model: str | None = option(None, "Hugging Face name or folder (default: the embedded small model)")
    task: str | None = option(
        None,
        "countdown, conciseness, math or sudoku; gym:NAME, one of reasoning-gym's 105; file:PATH or dataset:NAME, with "
        "--reward; or your own, MODULE:FUNCTION (default: what the model was made for, else countdown)",
    )
    environment: str | None = option(
        None,
        "MODULE:CLASS in the place of a task: code of yours that talks with the model and returns the reward of each "
        "episode; or one of a library's, textarena:NAME or verifiers:NAME",
    )
    style: str | None = option(
        None,
        "style of the prompts; chat: messages in the model's template, of gym tasks (default: the style that the model "
        "was made with, else paper)",
        ("paper", "compact", "chat"),
    )
    data: str | None = option(
        None, "file of problems (.jsonl, .json, .csv, .parquet, ...) or dataset:NAME, instead of the task's generator"
    )
    train_prompts: int | None = option(
        None, "train on this many fixed problems (default: fresh ones in every generation)"
    )
    reward: list[str] | None = option(None, "reward functions MODULE:FUNCTION instead of the task's")
    probe: list[str] | None = option(
        None, "other tasks whose held-out problems are evaluated alongside, to see what the model forgets"
    )
    dtype: str = option(
        "auto", "dtype of the weights; auto: the checkpoint's", ("auto", "float32", "bfloat16", "float16")
    )
    device: str = option(
        "auto",
        "cpu, cuda:1, ...; auto: a GPU (under torchrun one a process) if a backend is ready for it, else the CPU",
    )
    engine: str = option(
        "transformers",
        "what generates. transformers: this process; vllm: processes of Ray, which hold the weights",
        ("transformers", "vllm"),
    )
    num_engines: int = option(1, "number of vLLM engines")
    tensor_parallel_size: int = option(
        1,
        "processes of torchrun that hold one model together, each a part of it; with --engine vllm: GPUs of "
        "each engine",
    )
    engine_timeout: float | None = option(
        None,
        "seconds after which a vLLM engine that does not answer is given up, and others do its members (default: ten "
        "times the longest so far, at least five minutes)",
    )

    def __post_init__(self):
        convert_fields(self)
        for name in ("model", "task", "environment", "data", "device"):
            # An empty text comes from a shell variable that is not set.
            if getattr(self, name) == "":
                raise BadValue(f"RunOptions.{name}: expected a name, got an empty text")
        if self.environment is not None:
            if self.task not in (None, f"environment:{self.environment}"):
                raise BadValue(f"environment: it takes the place of a task; leave --task {self.task} out")
            self.task = f"environment:{self.environment}"
        for name in ("train_prompts", "num_engines", "tensor_parallel_size"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1, 2**31)


# Defaults of `esfast train` that differ from ESConfig's. Where the task decides, a text for the help.
TRAIN_DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/TASK-DATE-TIME",
    "max_completion_length": "the task's",
    # A worker can import the rewards of tasks: they are functions of a module that use nothing but their arguments.
    "reward_workers": 1,
}

# Titles of groups of options in the help; the key is the first option of the group.
GROUPS = {
    "model": "model and task",
    "output_dir": "run",
    "population_size": "evolution strategies (defaults: the paper's for Countdown; the embedded model has its own)",
    "weights": "weights and their updates",
    "prompts_per_generation": "prompts and responses",
    "reward_weights": "rewards",
    "eval_every": "evaluation and logging",
}

# How the episodes of an environment run.
OF_EPISODES = ("max_episode_turns", "max_episode_tokens", "episode_timeout", "episodes_at_once", "endpoint_port")

SETTINGS = (RunOptions, ESConfig)
FIELDS = {f.name: f for owner in SETTINGS for f in dataclasses.fields(owner)}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Settings from a YAML file, such as a run folder's config.yaml or the output of --print-config.

    Raises FileNotFoundError, or ValueError if the file is no mapping or has an unknown key (the message names the
    closest known one).
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadValue(f"{path}: no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise BadValue(f"{path}: expected lines of the form NAME: VALUE, got {type(settings).__name__}")
    try:
        return translate({str(name): value for name, value in settings.items()}, FIELDS, str(path))
    except TypeError as error:
        raise BadValue(str(error)) from None


def dump(*parts: RunOptions | ESConfig) -> str:
    """Settings as YAML, which read_yaml reads."""
    return yaml.safe_dump({k: v for part in parts for k, v in dataclasses.asdict(part).items()}, sort_keys=False)


def in_flags(message: str) -> str:
    """An error's message in which settings have the names of their options: `--lr-schedule` for `lr_schedule`."""
    message = re.sub(r"\b(?:ESConfig|RunOptions)\.(\w+)", lambda m: as_flag(m[1]) if m[1] in FIELDS else m[0], message)
    message = re.sub(r"\Aresume: the run has (\w+) ", lambda m: f"{as_flag(m[1])}: the run has ", message)
    message = re.sub(r"\A(\w+):", lambda m: f"{as_flag(m[1])}:" if m[1] in FIELDS else m[0], message)
    long = {**{name: name for name in FIELDS if "_" in name}, "max_new_tokens": "max_completion_length"}
    names = "|".join(sorted(long, key=len, reverse=True))
    # Names in a path or in quotes stay as they are.
    return re.sub(rf"(?<![\w/.'\"-])(?:{names})(?![\w/'\"-])(?!\.\w)", lambda m: as_flag(long[m[0]]), message)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given: by the command line, the file of --config and the --preset, in this order of
    precedence. Each is converted to its field's type; TypeError or ValueError names one that can't be."""
    settings = preset(args.preset) if args.preset else {}
    settings |= read_yaml(args.config) if args.config else {}
    settings |= {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    if args.preset in NEEDS_DATA and not settings.get("data"):
        raise BadValue(f"preset {args.preset}: name a file of {NEEDS_DATA[args.preset]} with --data")
    return {name: value for owner in SETTINGS for name, value in convert_given(owner, settings).items()}


def run_options(settings: Mapping[str, Any]) -> RunOptions:
    return RunOptions(**{f.name: settings[f.name] for f in dataclasses.fields(RunOptions) if f.name in settings})


def es_config(settings: Mapping[str, Any]) -> ESConfig:
    return ESConfig(**{f.name: settings[f.name] for f in dataclasses.fields(ESConfig) if f.name in settings})
