"""Methods that scripts for TRL's trainers call at their end, for ESTrainer."""

from __future__ import annotations

from pathlib import Path

from ..utils.errors import BadValue, FileTaken

# Names of TRL's and Transformers' trainers that ESTrainer lacks, and what to use instead.
_INSTEAD = {
    "push_to_hub": "upload the folder {model}, for example with `hf upload NAME {model}`",
    "create_model_card": "{model} has a model card",
    "save_state": "the run folder {path} holds all that a run needs to go on (resume=True)",
    "log_metrics": "metrics are in {path}/metrics.jsonl, and in trainer.summary",
    "save_metrics": "metrics are in {path}/metrics.jsonl, and in trainer.summary",
    "evaluate": "eval_dataset is evaluated every eval_every generations; later, `esfast eval --model {model}`",
    "predict": "`esfast eval --model {model} --save FILE` writes responses to a file",
    "add_callback": "report_to sends metrics to a logger; a loop of one's own is esfast.ES",
    "accelerator": "there is none; several processes are a team, see docs/how-to/distributed.md",
    "state": "trainer.es.generation says how many generations are done, trainer.summary how it went",
}


class SavesLikeTRL:
    """Adds `save_model`, and errors that say what to use instead of TRL's other methods. For a trainer with `folder`,
    `recorder` and `es`."""

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Saves the present model and its tokenizer as a Hugging Face folder. All processes of a team call it.

        Without a folder, or given the run folder itself, it writes the run's model/, as `train` did at its end. Raises
        FileExistsError for a folder that holds other things than a model.
        """
        path = Path(output_dir) if output_dir is not None else self.folder.model
        if path.resolve() == self.folder.path.resolve():
            path = self.folder.model
        is_model = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
        if path.exists() and not is_model and (not path.is_dir() or any(path.iterdir())):
            raise FileTaken(f"save_model: {path} holds other things than a model; take another folder")
        self._write_model(path)

    def _write_model(self, path: Path) -> None:
        evaluated = [row for row in self.recorder.rows if "eval_reward" in row]
        self.recorder.save_model(str(path.absolute()), self.es.generation, evaluated[-1] if evaluated else {})

    def __getattr__(self, name: str):
        if name in _INSTEAD and "folder" in vars(self):
            instead = _INSTEAD[name].format(path=self.folder.path, model=self.folder.model)
            raise AttributeError(f"{type(self).__name__} has no {name}: {instead}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def check_not_resumed_here(checkpoint: bool | str | None, resumes: bool) -> None:
    """ValueError for `resume_from_checkpoint`, unless the trainer was made with ESConfig(resume=True)."""
    if checkpoint and not resumes:
        raise BadValue(
            f"train: resume_from_checkpoint={checkpoint!r}: a run goes on in its own folder, from its journal: make "
            "the trainer with ESConfig(output_dir=..., resume=True)"
        )
