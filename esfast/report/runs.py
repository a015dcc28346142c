"""Reads run folders for a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..journal.journal import peek
from ..trainer.doctor import WINDOW, Finding, diagnose
from ..trainer.recorder import of_rewards
from ..trainer.run_folder import RunFolder, read_lines
from ..update.updater import UpdateRecord
from ..utils.errors import FileMissing

_OF_A_REPEAT = ("seed", "output_dir", "progress", "resume")  # settings in which repeats of an experiment differ


@dataclass
class Run:
    """A run folder: settings, rows of metrics, rewards of every generation's members, samples, the summary."""

    name: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    rewards: list[list[float]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def experiment(self) -> str:
        """The settings without the seed: equal for repeats."""
        return repr(sorted((k, repr(v)) for k, v in self.config.items() if k not in _OF_A_REPEAT))

    def series(self, name: str) -> list[tuple[Any, ...]]:
        """(generation, value) of a metric, for the generations that have it."""
        return self.together(name)

    def together(self, *names: str) -> list[tuple[Any, ...]]:
        """(generation, values) of these metrics, for the generations that have all of them."""
        rows = [[r.get(name) for name in ("generation", *names)] for r in self.metrics]
        return [tuple(row) for row in rows if all(map(is_number, row))]

    @property
    def findings(self) -> list[Finding]:
        """What is wrong with the run: esfast.trainer.doctor."""
        return diagnose(self.metrics, self.config)

    @property
    def verdict(self) -> str:
        """In a few words whether something is wrong; `findings` say what."""
        trained = sum("reward_mean" in row for row in self.metrics)
        few = f", fewer than the {WINDOW} that a diagnosis needs" if trained < WINDOW else ""
        return f"{trained} generations{few or (', found:' if self.findings else ', nothing is wrong')}"

    @property
    def evaluated(self) -> list[str]:
        """Names of the metrics of evaluations."""
        return list(dict.fromkeys(name for r in self.metrics for name in r if name.startswith("eval_")))

    @property
    def generations(self) -> int | str:
        return self.metrics[-1].get("generation", "") if self.metrics else 0


def is_number(value: Any) -> bool:
    """Whether the value can be drawn: it is finite, and not so large that the range of an axis would be infinite."""
    return isinstance(value, (int, float)) and abs(value) < 1e300


def load(path: str | Path) -> Run:
    """Loads a run, finished or not. FileNotFoundError or ValueError for a folder without one."""
    folder = RunFolder(Path(path))
    if not folder.metrics.exists():
        raise FileMissing(f"report: {path} is no run folder (it has no {folder.metrics.name})")
    found = peek(folder.journal)
    records = found.records if found else []
    return Run(
        name=str(path).rstrip("/") if Path(path).name not in ("", "..") else str(Path(path).resolve()),
        config=folder.read_config(),
        metrics=_completed(folder.read_metrics(), records),
        rewards=[[r for r in record.rewards if r is not None] for record in records],
        samples=read_lines(folder.samples),
        summary=folder.read_summary(),
    )


def _completed(rows: list[dict[str, Any]], records: Sequence[UpdateRecord]) -> list[dict[str, Any]]:
    """The rows, with what older versions did not write of the rewards, from the journal."""
    known = {record.generation + 1: record for record in records}
    trained = [type(g := row.get("generation")) is int and g in known and "reward_mean" in row for row in rows]
    return [of_rewards(known[row["generation"]]) | row if t else row for row, t in zip(rows, trained, strict=True)]
