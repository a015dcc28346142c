"""The folder of a run: settings, metrics, journal, samples, summary, curves, model/ and best/."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from ..journal.journal import peek
from ..utils.errors import BadFile, BadValue, FileMissing, FileTaken
from ..utils.files import TEMPORARY, whole_folder, write_whole
from ..utils.lock import Lock

log = logging.getLogger(__name__)


class RunFolder:
    """A run folder. Files that don't grow by lines are written whole or not at all. A trainer claims the folder and
    owns it until `release`."""

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        self.journal, self.metrics, self.model = path / "journal.jsonl", path / "metrics.jsonl", path / "model"
        self.best, self.samples = path / "best", path / "samples.jsonl"
        self.config, self.checkpoints = path / "config.yaml", path / "checkpoints"
        self.identity, self.summary, self.curves = path / "identity.json", path / "summary.json", path / "curves.png"
        self._lock: Lock | None = None
        self.adapter, self.tuning = path / "adapter", path / "tuning.json"

    @classmethod
    def claim(cls, path: str | Path, resume: bool = False) -> RunFolder:
        """Claims the folder for a new run, or with `resume` to continue the run in it, if there is one.

        Raises:
            FileExistsError: without `resume`: the folder holds a run already, which is never overwritten. Or another
                process or trainer is using it (InUse).
            FileNotFoundError: with `resume`: the folder holds parts of a run, but no journal.
            ValueError: with `resume`: the journal is damaged.
        """
        folder = cls(path)
        folder.own()
        try:
            folder._check(resume)
        except BaseException:
            folder.release()
            raise
        return folder

    def own(self) -> None:
        """Takes the folder's lock, if this object doesn't hold it. Raises InUse."""
        if self._lock is None or not self._lock.held:
            self._lock = Lock.take(self.journal)

    def release(self) -> None:
        """Releases the folder's lock. A folder that was made only for the lock is removed."""
        if self._lock is not None:
            self._lock.release()

    def begun(self) -> bool:
        """Whether a run has done a generation here. A journal without a generation doesn't count as a run: the next
        start begins anew, perhaps with other settings. ValueError if the journal is damaged."""
        found = peek(self.journal)
        return found is not None and bool(found.records)

    def _check(self, resume: bool) -> None:
        if resume:
            if not self.begun() and (left := self._of_an_earlier_run()):
                raise FileMissing(
                    f"resume: {self.path} holds {', '.join(p.name for p in left)} of a run, but no {self.journal.name} "
                    "with a generation to go on from; put it back, move these away, or take another folder"
                )
            return
        try:
            taken = self.begun() or _lines(self.metrics) > 1
        except ValueError:
            taken = True
        if taken:
            raise FileTaken(
                f"output_dir: {self.path} holds a run already; go on with it (--resume, or ESConfig(resume=True)), "
                "choose another folder, or move it away"
            )

    def _of_an_earlier_run(self) -> list[Path]:
        """Files that only a run that has done generations can have left."""
        found = [self.metrics] if _lines(self.metrics) > 1 else []
        found += [p for p in (self.checkpoints, self.best) if p.is_dir() and any(p.iterdir())]
        # Older versions saved these on Ctrl-C before the first generation.
        if not self.journal.exists():
            found += [p for p in (self.model, self.summary, self.samples, self.curves) if p.exists()]
        return found

    def prepare(self) -> None:
        """Removes files that a killed run left half-written. If no run has begun, makes room for one: removes the files
        of a start that did nothing, and moves the files of an earlier run without a journal to earlier-1/, earlier-2/
        and so on."""
        for folder in (self.path, self.checkpoints):
            for left in folder.glob(f".*{TEMPORARY}") if folder.is_dir() else ():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if self.begun():
            for path in (self.metrics, self.samples):
                _cut_torn_line(path)
            return
        if self.journal.exists():
            log.info("%s: a run was started here and did nothing: beginning anew", self.path)
            for path in (self.journal, self.metrics, self.samples, self.identity, self.tuning):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.adapter, ignore_errors=True)
        outputs = (self.model, self.summary, self.curves, self.tuning)
        rest = (self.metrics, self.samples, self.checkpoints, self.best, *outputs)
        if found := [p for p in rest if p.exists()]:
            earlier = next(p for n in range(1, 10**6) if not (p := self.path / f"earlier-{n}").exists())
            earlier.mkdir()
            for path in [*found, *([self.adapter] if self.adapter.exists() else [])]:
                path.rename(earlier / path.name)
            log.info("%s: %s of an earlier run moved to %s", self.path, ", ".join(p.name for p in found), earlier)

    def append_metrics(self, row: dict[str, Any]) -> None:
        _append(self.metrics, row)

    def append_samples(self, row: dict[str, Any]) -> None:
        _append(self.samples, row)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; ValueError as in `read_lines`."""
        return read_lines(self.metrics)

    def write_metrics(self, rows: Sequence[dict[str, Any]]) -> None:
        write_whole(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

    def read_config(self) -> dict[str, Any]:
        """The settings in config.yaml; {} if there is no such file. ValueError names the file and says what to do."""
        if not self.config.exists():
            return {}
        try:
            found = yaml.safe_load(self.config.read_bytes().decode("utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise BadValue(
                f"{self.config} is no YAML ({' '.join(str(error).split())}): mend it, or delete it"
            ) from None
        if not isinstance(found, dict):
            what = "nothing" if found is None else repr(found)[:80]
            raise BadValue(f"{self.config}: expected lines of the form NAME: VALUE, got {what}: mend it, or delete it")
        return found

    def read_identity(self) -> dict[str, Any]:
        """The run's identity (trainer/identity.py); {} in a folder of an older version. ValueError names the file."""
        return _read_json(self.identity, "delete it, and it is written anew")

    def read_summary(self) -> dict[str, Any]:
        """The summary; {} if there is none. ValueError names the file."""
        return _read_json(self.summary, "delete it; resuming the run writes it anew")

    def save_model(self, write: Callable[[Path], None], tokenizer, card: str = "", name: str = "model") -> None:
        save_model(self.path / name, write, tokenizer, card)

    def draw_curves(self, rows: Sequence[dict[str, Any]]) -> None:
        """Reward and held-out metrics over generations, as curves.png."""
        from matplotlib.figure import Figure

        trained = [r for r in rows if "reward_mean" in r]
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        x = [r["generation"] for r in trained]
        left.fill_between(x, [r["reward_min"] for r in trained], [r["reward_max"] for r in trained], alpha=0.2, lw=0)
        left.plot(x, [r["reward_mean"] for r in trained], label="mean of the population")
        left.plot(x, [r["reward_max"] for r in trained], lw=0.8, label="best member")
        left.set(title="Training reward (fresh prompts)", xlabel="generation", ylabel="reward")
        # Left out of the chart, since their units are not those of rewards.
        others = ("_se", "eval_length", "eval_kl_to_base")
        for name in sorted({k for r in rows for k in r if k.startswith("eval_") and not k.endswith(others)}):
            points = [(r["generation"], r[name]) for r in rows if name in r]
            right.plot(*zip(*points, strict=True), marker="o", ms=3, label=name.removeprefix("eval_"))
        right.set(title="Held-out prompts", xlabel="generation")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False)
        temporary = self.path / f".curves.png{TEMPORARY}"
        figure.savefig(temporary, dpi=150, format="png")
        os.replace(temporary, self.curves)


def save_model(path: Path, write: Callable[[Path], None], tokenizer, card: str = "") -> None:
    """Makes a Hugging Face folder for from_pretrained, whole or not at all. `write` puts the model into it;
    a tokenizer and a model card (README.md) are added. It replaces an older one. OSError if it can't be written."""
    with whole_folder(path) as unfinished:
        try:
            write(unfinished)
        except SafetensorError as error:
            raise BadFile(f"{path} could not be written: {error}") from None
        tokenizer.save_pretrained(unfinished)
        if card:
            (unfinished / "README.md").write_text(card, encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; [] if there is no file. An incomplete last line is ignored, as a crash
    leaves it. ValueError names the file and the line that is damaged."""
    rows = []
    for number, row in _rows(path):
        if row is None:
            raise BadValue(
                f"{path}: line {number} is damaged (no JSON object): delete the line"
                + (", or resume the run, which writes it anew from the journal" if path.name == "metrics.jsonl" else "")
            )
        rows.append(row)
    return rows


def readable_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without damaged lines."""
    return [row for _, row in _rows(path) if row is not None]


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Line numbers with their objects; None for a damaged line."""
    *whole, last = (path.read_bytes() if path.exists() else b"").split(b"\n")
    for number, line in enumerate(whole, start=1):
        yield number, _object(line)
    if _object(last) is not None:
        yield len(whole) + 1, _object(last)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    found = _object(path.read_bytes())
    if found is None:
        raise BadValue(f"{path} is damaged (no JSON object): {advice}")
    return found


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _cut_torn_line(path: Path) -> None:
    whole = path.read_bytes() if path.exists() else b""
    if not whole.endswith(b"\n") and whole:
        os.truncate(path, whole.rfind(b"\n") + 1)
