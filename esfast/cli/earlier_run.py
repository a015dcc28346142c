"""Reads a run's settings from its folder, for a command that resumes the run or evaluates its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..trainer.run_folder import RunFolder
from ..utils.errors import BadValue, FileMissing
from .run_options import OF_EPISODES, as_flag, read_yaml

# Fields of RunOptions that a resumed run may not change. The trainer itself compares the model and the data.
_FIXED = ("task", "environment", "style", "train_prompts", "reward")
# Fields that belong to the machine and to the processes of one start, not to the run.
_OF_THE_LAUNCH = ("device", "tensor_parallel_size")
_OF_THE_TASK = (
    *"task style data reward reward_weights max_completion_length chat_template_kwargs".split(),
    *OF_EPISODES,
)


def resumed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run to resume: the given ones, and all others from its folder, if that holds a run.

    Raises ValueError if a given setting contradicts the run's, or if neither names a task: the folder of an ESTrainer
    does not hold the task, since that is an object of somebody's program."""
    if "output_dir" not in given:
        raise BadValue("--resume: name the folder of the run with --out")
    folder = Path(given["output_dir"])
    if not (folder / "config.yaml").exists() or not RunFolder(folder).begun():
        return dict(given)
    found = read_yaml(folder / "config.yaml")
    if "task" not in found and given.get("task") is None:
        raise BadValue(
            f"--resume: the run in {folder} was started in Python, and its folder does not say what its task and model "
            "are: go on there with ESConfig(resume=True), or name them: --model, --task, --reward"
        )
    for name in _FIXED:
        if name in given and name in found and given[name] != found[name]:
            raise BadValue(f"{as_flag(name)}: the run in {folder} has {found[name]!r}, asked for is {given[name]!r}")
    mine = _OF_THE_LAUNCH if found.get("engine") != "vllm" else ("device",)
    return {name: value for name, value in found.items() if name not in mine} | dict(given)


def run_of(model: str) -> Path | None:
    """The run folder that `model` names, or that holds it as model/ or best/; None if there is none."""
    return next((p for p in (Path(model), Path(model).parent) if _is_run(p)), None)


def model_in(path: str) -> str:
    """The path itself; for a run folder the path of the model in it. FileNotFoundError if the run has no model yet."""
    if not _is_run(Path(path)):
        return path
    for name in ("model", "best"):
        if (Path(path) / name).is_dir():
            return str(Path(path) / name)
    raise FileMissing(f"--model: the run in {path} has neither model/ nor best/ yet")


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and any((path / f"{n}.jsonl").is_file() for n in ("metrics", "journal"))


def asked_of(run: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings of its task, overridden by those in `given`. If `given` names another task, only `given`.

    Raises ValueError if neither names a task, as for a folder that ESTrainer wrote."""
    found = {name: value for name, value in read_yaml(run / "config.yaml").items() if name in _OF_THE_TASK}
    if "task" not in found and "task" not in given:
        raise BadValue(
            f"--task: the run in {run} was started in Python, and its folder does not say what its task is: name one, "
            "with --reward if it is a file"
        )
    if given.get("task", found.get("task")) != found.get("task"):
        return dict(given)
    if "reward" in given:
        found.pop("reward_weights", None)
    return found | dict(given)
