"""The folder of a run: settings, metrics, journal, samples, summary, curves, model/ and best/."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from .files import TEMPORARY, whole_folder, write_whole  # noqa: F401


class RunFolder:
    """Every file but the two that grow by lines is written whole or not at all."""

    def __init__(self, path: Path):
        self.path = path
        self.journal, self.metrics, self.model = path / "journal.jsonl", path / "metrics.jsonl", path / "model"
        self.best, self.samples = path / "best", path / "samples.jsonl"
        self.config, self.checkpoints = path / "config.yaml", path / "checkpoints"

    @classmethod
    def claim(cls, path: str | Path, resume: bool = False) -> RunFolder:
        """The folder for a new run, not made before there is something to write; with `resume`, or that of a run to go
        on with. FileExistsError if a run lives there already and is not to be resumed: its record is never
        overwritten."""
        folder = cls(Path(path))
        if not resume and (folder.journal.exists() or folder.metrics.exists()):
            raise FileExistsError(
                f"output_dir: {path} holds a run already; go on with it (--resume, or ESConfig(resume=True)), choose "
                "another folder, or move it away"
            )
        return folder

    def tidy(self) -> None:
        """Removes what a run that was killed left half-written."""
        for folder in (self.path, self.checkpoints):
            for left in folder.glob(f".*{TEMPORARY}") if folder.is_dir() else ():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if self.metrics.exists():
            whole = self.metrics.read_bytes()
            os.truncate(self.metrics, whole.rfind(b"\n") + 1)

    def append_metrics(self, row: dict[str, Any]) -> None:
        self._append(self.metrics, row)

    def append_samples(self, row: dict[str, Any]) -> None:
        self._append(self.samples, row)

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def save_model(self, model, tokenizer, card: str = "", name: str = "model", weights: dict | None = None) -> None:
        save_model(self.path / name, model, tokenizer, card, weights)

    def draw_curves(self) -> None:
        """Reward and held-out metrics over generations, as curves.png."""
        from matplotlib.figure import Figure

        rows = self.read_metrics()
        trained = [r for r in rows if "reward_mean" in r]
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        x = [r["generation"] for r in trained]
        left.fill_between(x, [r["reward_min"] for r in trained], [r["reward_max"] for r in trained], alpha=0.2, lw=0)
        left.plot(x, [r["reward_mean"] for r in trained], label="mean of the population")
        left.plot(x, [r["reward_max"] for r in trained], lw=0.8, label="best member")
        left.set(title="Training reward (fresh prompts)", xlabel="generation", ylabel="reward")
        others = ("eval_reward_se", "eval_length", "eval_kl_to_base")  # of other units than rewards
        for name in sorted({k for r in rows for k in r if k.startswith("eval_") and k not in others}):
            points = [(r["generation"], r[name]) for r in rows if name in r]
            right.plot(*zip(*points, strict=True), marker="o", ms=3, label=name.removeprefix("eval_"))
        right.set(title="Held-out prompts", xlabel="generation")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False)
        temporary = self.path / f".curves.png{TEMPORARY}"
        figure.savefig(temporary, dpi=150, format="png")
        os.replace(temporary, self.path / "curves.png")


def save_model(path: Path, model, tokenizer, card: str = "", weights: dict | None = None) -> None:
    """A Hugging Face folder that from_pretrained loads, with a model card (README.md), whole or not at all; an older
    one there is replaced. `weights` is the state dict of a model that holds them in shards."""
    with whole_folder(path) as unfinished:
        model.save_pretrained(unfinished, **({} if weights is None else {"state_dict": weights}))
        tokenizer.save_pretrained(unfinished)
        if card:
            (unfinished / "README.md").write_text(card, encoding="utf-8")
