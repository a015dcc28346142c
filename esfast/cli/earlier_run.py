"""What a run folder says of its run, for a command that goes on with the run or asks its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..trainer.run_folder import RunFolder
from ..utils.errors import BadValue, FileMissing
from .run_options import as_flag, read_yaml

# Of RunOptions, what a resumed run may not change. What its model and its data are, the trainer compares.
_FIXED = ("task", "style", "train_prompts", "reward")
# What is of the processes that were started, and of their machine, and not of the run.
_OF_THE_LAUNCH = ("device", "tensor_parallel_size")
_OF_THE_TASK = "task style data reward reward_weights max_completion_length chat_template_kwargs".split()


def resumed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run to resume: those that were given, and all others from its folder, if a run is there.

    ValueError if they contradict the run's, and for a run of ESTrainer's, whose model and rewards no file names."""
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
    """The run folder of a model, which lies in it (model/, best/) or is named by it; None if there is none."""
    return next((p for p in (Path(model), Path(model).parent) if _is_run(p)), None)


def model_in(path: str) -> str:
    """The path itself, or of a run folder the path of its model. FileNotFoundError if it has none yet."""
    if not _is_run(Path(path)):
        return path
    for name in ("model", "best"):
        if (Path(path) / name).is_dir():
            return str(Path(path) / name)
    raise FileMissing(f"--model: the run in {path} has neither model/ nor best/ yet")


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and any((path / f"{n}.jsonl").is_file() for n in ("metrics", "journal"))


def asked_of(run: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's model was trained on, less what was given; only that if it is another task.

    ValueError if the folder doesn't name the task, as ESTrainer's don't, and none was given."""
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
