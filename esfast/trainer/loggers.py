"""Loggers besides metrics.jsonl: TensorBoard and Weights & Biases, both optional (`report_to`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..utils.errors import BadImport, BadValue


class Logger(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder's tensorboard/, a scalar for each metric."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, named as the run folder; project and mode are those of its environment variables."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(name=folder.name, dir=str(folder), config=dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, type] = {"tensorboard": TensorBoard, "wandb": WandB}


def check_report_to(names: str | Sequence[str] | None) -> list[str]:
    """The loggers' names as a list; "none", None and an empty list mean no logger. ValueError for unknown names."""
    listed = [names] if isinstance(names, str) else list(names or ())
    for name in listed:
        if name not in (*LOGGERS, "none"):
            raise BadValue(f"report_to: expected {', '.join(map(repr, LOGGERS))} or 'none', got {name!r}")
    return [name for name in listed if name != "none"]


def require(names: str | Sequence[str] | None) -> None:
    """ImportError, which says what to install, if the package of a logger is missing."""
    for name in check_report_to(names):
        if importlib.util.find_spec(name) is None:
            raise BadImport(f"report_to: {name} is not installed: pip install {name}")


class Report:
    """Sends each row of metrics to all loggers: its numbers, with the generation as the step."""

    def __init__(self, names: str | Sequence[str] | None, folder: Path, config: Mapping[str, Any]):
        self._loggers: list[Logger] = [LOGGERS[name](folder, config) for name in check_report_to(names)]

    def log(self, row: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "generation"}
        for logger in self._loggers:
            logger.log(row["generation"], numbers)

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()
