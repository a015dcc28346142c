"""RunRecorder: writes the files of a run folder besides the journal."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import yaml

from ..distributed.team import Team
from ..es.store import WeightStore
from ..journal.journal import read
from ..update.updater import UpdateRecord
from ..utils.files import write_whole
from ..utils.interrupts import signal_of
from .clock import PHASES, PhaseTimer, account
from .config import ESConfig
from .doctor import Doctor
from .loggers import Report
from .run_folder import RunFolder, readable_lines

log = logging.getLogger(__name__)


class RunRecorder:
    """Writes settings, metrics, the best and the last model, and the summary. Process 0 of a team writes. The processes
    with other shards of its model call the same methods, since saving a model needs all of them.

    rows    rows of metrics.jsonl, in process 0: the base model's, then one a generation
    best    best reward of an evaluation so far
    clock   the training's PhaseTimer
    card    (generations done, first row of metrics, last evaluated row) -> the model card
    """

    def __init__(
        self, folder: RunFolder, config: ESConfig, store: WeightStore, tokenizer, team: Team, card: Callable[..., str]
    ):
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.best, self.clock = -math.inf, PhaseTimer(torch.device("cpu"))
        self._config, self._store, self._tokenizer, self._team, self._card = config, store, tokenizer, team, card
        self._report: Report | None = None
        self._evaluation: dict[str, float] = {}
        self._doctor = Doctor(vars(config))

    def finished(self, generation: int, evaluates: bool) -> dict[str, Any] | None:
        """The summary of a run that has done all of its generations and what follows them; else None."""
        try:
            rows, summary = self.folder.read_metrics(), self.folder.read_summary()
        except ValueError:
            # A file is damaged: the run counts as unfinished, so the summary is written again.
            return None
        complete = (
            generation >= self._config.generations
            and [r.get("generation") for r in rows] == list(range(generation + 1))
            and ("eval_length" in rows[-1] or not evaluates)
            and summary.get("generations") == generation
            and summary.get("after") == _evaluated(rows[-1])
            and self.folder.model.is_dir()
        )
        return summary if complete else None

    def open(self, settings: Mapping[str, Any], identity: Mapping[str, Any], generation: int) -> dict[str, Any]:
        """Writes the settings and the identity, and completes the metrics of a resumed run from its journal. Only
        process 0 calls this. Returns the best evaluation so far, and whether the present weights were evaluated."""
        write_whole(self.folder.config, yaml.safe_dump(dict(settings), sort_keys=False))
        self._warn_of_other_draws(identity, generation)
        write_whole(self.folder.identity, json.dumps(identity, indent=1) + "\n")
        self._report = Report(self._config.report_to, self.folder.path, vars(self._config))
        if generation:
            self.rows = self._completed(read(self.folder.journal).records)
            # What these rows show, the log of the run that wrote them said.
            for row in self.rows:
                self._doctor(row)
            for phase, seconds in earlier_seconds(self.rows).items():
                self.clock.seconds[phase] = self.clock.seconds.get(phase, 0.0) + seconds
        best = max((r["eval_reward"] for r in self.rows if "eval_reward" in r), default=-math.inf)
        return {"best": best, "evaluated": bool(self.rows) and "eval_length" in self.rows[-1]}

    def _warn_of_other_draws(self, identity: Mapping[str, Any], generation: int) -> None:
        """Warns about a run of an older version, without "draws" in its identity: its rows came from NumPy's and
        Python's generators. A caller's own function draws as before."""
        own = identity.get("train_dataset", "").startswith("the function")
        if generation and not own and "draws" not in self.folder.read_identity():
            log.warning(
                "%s was begun by an older esfast, which drew rows in another way. What it did in %d generations stays, "
                "to the bit; from here on prompts come in another order, and a task that makes up its problems makes "
                "up other ones, those that are held out too: evaluations before and after are not of the same problems",
                self.folder.path,
                generation,
            )

    def _completed(self, records: Sequence[UpdateRecord]) -> list[dict[str, Any]]:
        """A row for each generation: the file's rows, with rows from the journal in the place of those that are
        missing, damaged or of another run."""
        found = readable_lines(self.folder.metrics)
        by_generation = {r["generation"]: r for r in found if type(r.get("generation")) is int}
        rows, lost = [by_generation.get(0, {"generation": 0})], 0
        for record in records:
            row, known = by_generation.get(record.generation + 1, {}), of_rewards(record)
            fits = math.isclose(row.get("reward_mean", math.nan), known["reward_mean"], rel_tol=1e-9)
            rows.append(row if fits else known)
            # A kill loses at most the last row; that needs no message.
            lost += not fits and record is not records[-1]
        if 0 not in by_generation:
            log.warning("%s: the evaluation of the base model is lost", self.folder.metrics)
        if lost:
            log.warning(
                "%s lacked %d of %d generations: their rewards are taken from the journal",
                self.folder.metrics,
                lost,
                len(records),
            )
        if rows != found:
            self.folder.write_metrics(rows)
        return rows

    def log(self, row: dict[str, Any]) -> None:
        """Writes the metrics of a generation (0: the base model), and saves the model if it is the best so far."""
        self._keep_best(row)
        if self._team.rank == 0:
            self.rows.append(row)
            self.folder.append_metrics(row)
            self._report.log(row)
            self._examine(row)

    def amend(self, evaluation: dict[str, Any], generation: int) -> None:
        """Adds an evaluation to the last generation's row, which was written before."""
        self._keep_best({"generation": generation, **evaluation})
        if self._team.rank == 0:
            self.rows[-1].update(evaluation)
            self.folder.write_metrics(self.rows)
            self._report.log(self.rows[-1])
            self._examine({"generation": generation, **evaluation})

    def _examine(self, row: Mapping[str, Any]) -> None:
        for finding in self._doctor(row):
            log.warning("%s", finding)

    def _keep_best(self, row: Mapping[str, Any]) -> None:
        reward = row.get("eval_reward", -math.inf)
        if reward > self.best:
            self.best = reward
            if self._config.save_best and row["generation"]:
                self.save_model(self.folder.best.name, row["generation"], row)

    def save_model(self, name: str, generation: int, after: Mapping[str, Any]) -> None:
        """Saves the present model under this name. All processes with shards of it call this."""
        with self._team.working():
            gathered = self._store.gather(keep=self._team.rank == 0)
        if self._team.rank == 0:
            card = self._card(generation, self.rows[0], after) if self.rows else ""
            self.folder.save_model(lambda path: self._store.save(path, gathered), self._tokenizer, card, name)
        self.clock.record("save")

    def finish(self, generation: int, eval_prompts: int) -> dict[str, Any]:
        """Saves the present model, writes the summary and returns it; {} in other processes than 0."""
        evaluated = [r for r in self.rows[1:] if "eval_length" in r]
        after = evaluated[-1] if evaluated else {}
        self.save_model(self.folder.model.name, generation, after)
        if not self._team.rank == 0:
            return {}
        seconds = {phase: round(s, 3) for phase, s in self.clock.seconds.items()}
        summary = {
            "generations": generation,
            "seed": self._config.seed,
            "eval_prompts": eval_prompts,
            "before": _evaluated(self.rows[0]),
            "after": _evaluated(after),
            "after_generation": after.get("generation"),
            **account(self.clock.seconds, _tokens(self.rows)),
            "seconds": seconds | {"total": round(sum(seconds.values()), 3)},
        }
        write_whole(self.folder.summary, json.dumps(summary, indent=2) + "\n")
        self.folder.draw_curves(self.rows)
        return summary

    def save_interrupted(self, interrupt: BaseException, generation: int, eval_prompts: int) -> dict[str, Any]:
        """Saves an interrupted run as `finish` does, in process 0 and unless the model is in shards. Says how to
        continue."""
        by = f"interrupted by {signal_of(interrupt).name}" if isinstance(interrupt, KeyboardInterrupt) else "stopped"
        summary = {}
        if self._team.rank == 0 and self._team.shards == 1 and self.rows and generation:
            log.warning("%s: saving the model after generation %d", by, generation)
            try:
                summary = self.finish(generation, eval_prompts)
            except Exception as error:
                # For example engines that the same signal ended, or a full disk.
                log.warning("the model could not be saved: %s: %s", type(error).__name__, error)
        self.say_how_to_go_on(by, generation)
        return summary

    def say_how_to_go_on(self, stopped: str, generation: int) -> None:
        then = "nothing is lost, start it again"
        if generation:
            then = "what was done is in the journal: resume to go on (--resume, or ESConfig(resume=True))"
        if not self.folder.journal.exists():
            then = "its journal is gone"
        if self._team.rank == 0:
            log.warning("%s after generation %d: %s", stopped, generation, then)

    def progress(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Values for the progress bar: the generation's rewards and the metrics of the last evaluation."""
        hidden = ("eval_reward", "eval_reward_se", "eval_length")
        # A metric with a slash is a probe's.
        found = {k: v for k, v in _evaluated(row).items() if k not in hidden and "/" not in k}
        self._evaluation |= {k.removeprefix("eval_"): v for k, v in found.items()}
        shown = {"reward": row["reward_mean"], "best": row["reward_max"], **self._evaluation}
        return {name: f"{value:.3f}" for name, value in shown.items()}

    def close(self) -> None:
        if self._report is not None:
            self._report.close()


def of_rewards(record: UpdateRecord) -> dict[str, Any]:
    """The part of a generation's row of metrics that its record in the journal determines. The journal numbers
    generations from 0; metrics count those that are done, from 1."""
    rewards = np.array([r for r in record.rewards if r is not None])
    return {
        "generation": record.generation + 1,
        "reward_mean": float(rewards.mean()),
        "reward_max": float(rewards.max()),
        "reward_min": float(rewards.min()),
        "reward_std": float(rewards.std()),
        "same_reward": float(np.unique(rewards, return_counts=True)[1].max() / len(rewards)),
        "sigma": record.sigma,
        "lr": record.lr,
        **({"set_aside": n} if (n := record.rewards.count(None)) else {}),
    }


def earlier_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by phase, from the rows. These lack the saving, and generations whose row was lost."""
    seconds = {phase: math.fsum(r.get(f"seconds_{phase}", 0.0) for r in rows) for phase in PHASES}
    return seconds | {"evaluate": math.fsum(r.get("evaluate_seconds", 0.0) for r in rows)}


def _tokens(rows: Sequence[Mapping[str, Any]]) -> int:
    """Tokens generated in training, from the rows."""
    return round(math.fsum(r.get("tokens_per_second", 0.0) * r.get("seconds", 0.0) for r in rows))


def _evaluated(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if k.startswith("eval_")}
