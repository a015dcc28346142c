"""ESTrainer: the loop from a model, prompts and reward functions to a tuned model in a run folder.

The conventions are those of TRL's GRPOTrainer: rows have a "prompt" column, and reward functions are called with
prompts, completions and the rows' other columns as keyword lists.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..core.plan import Plan
from ..distributed.team import Team
from ..es.es import ES
from ..es.store import WeightStore
from ..rewards.scorer import RewardFunc, check_metrics
from ..rollout.engine import Engine
from ..rollout.evaluator import MemberEvaluator
from ..update.updater import Rule, UpdateRecord, check_groups
from ..utils.errors import BadType, BadValue
from ..utils.files import check_writable, write_whole
from ..utils.interrupts import Stops, stoppable
from ..utils.rows import Rows, check_rows
from .batches import Batches
from .clock import PhaseTimer, account
from .config import ESConfig
from .door import open_evaluator, open_rewards, open_tokenizer
from .environment import Given, of_environment, playing
from .held_out import HeldOut
from .identity import check as check_identity
from .identity import identity as identity_of
from .loggers import require
from .model_card import model_card
from .movement import Movement
from .probes import Probe, Probes, check_probes, open_probes
from .recorder import RunRecorder, of_rewards
from .run_folder import RunFolder
from .scoring import Scoring
from .trl_trainer import SavesLikeTRL, check_not_resumed_here
from .tuned import open_tuned
from .tuning import Tuner, Tuning, adopt

log = logging.getLogger(__name__)


class ESTrainer(SavesLikeTRL):
    """Fine-tunes all weights of a causal language model by evolution strategies.

    A trainer owns its run folder until it has trained, or is deleted.

    Args:
        model: a Hugging Face causal LM, or the name or folder of one or of a PEFT adapter. It is tuned in place. Or an
            esfast.es.WeightStore, which holds weights elsewhere; it needs an evaluator.
        reward_funcs: one function or several, whose rewards are added: f(prompts=, completions=, **columns) -> list of
            floats, one a completion; higher is better. Completions are strings. A member's reward is the mean over the
            prompts. As in TRL, if a prompt is a chat (a list of messages), its completion is a list of one message; a
            function that returns None for a completion leaves it to the others; args.reward_weights weights them.
        args: an ESConfig.
        train_dataset: rows (a list of dicts, a datasets.Dataset, a DataFrame, a dict of columns) with a "prompt". They
            are drawn without repetition until all were used. Or a function (generation, count) -> fresh rows.
        eval_dataset: rows that are never trained on (optional).
        processing_class: the tokenizer, or a processor that has one. Default: the model's own.
        metrics: a dict of further functions of the same form as reward functions. They are evaluated on eval_dataset
            and logged as eval_NAME.
        peft_config: a PEFT configuration (optional); its adapters are put into the model. Of a PeftModel, made this way
            or given as `model`, the weights that require a gradient are tuned, unless args.include selects others.
        engine: generates the completions: a function from prompts to completions or an esfast.rollout.Engine. Default:
            TransformersEngine. It is asked member after member.
        evaluator: asks the members instead: an esfast.rollout.MemberEvaluator, which has an engine of its own.
        probes: other tasks that are evaluated alongside, to see what is forgotten: an esfast.trainer.probes.Probe each,
            by name.
        environment: in the place of reward functions: an object with `async episode(client, row) -> reward`, or such a
            function. `client` is an openai.AsyncOpenAI that a member answers, `client.model` the name to ask for. Its
            methods `rows(generation, count, seed)` and `held_out(count)` give the rows, if train_dataset is left out.
        team: the processes that train together (Team.join()), each with a model of its own or a part of one (see
            esfast.distributed.tensor_parallel). Default: this process alone.

    Raises:
        TypeError, ValueError: an argument is outside the above, or differs from the run that is resumed. Nothing was
            written.
        FileExistsError: the run folder holds a run already, or another process or trainer uses it.
        FileNotFoundError: the run to resume has files, but no journal.
    """

    def __init__(
        self,
        model: torch.nn.Module | str | os.PathLike | WeightStore,
        reward_funcs: RewardFunc | Sequence[RewardFunc] | None = None,
        args: ESConfig | None = None,
        train_dataset: Rows | Callable[[int, int], Rows] | None = None,
        eval_dataset: Rows | None = None,
        processing_class=None,
        metrics: Mapping[str, RewardFunc] | None = None,
        engine: Engine | Callable[..., Sequence[str]] | None = None,
        peft_config=None,
        team: Team | None = None,
        evaluator: MemberEvaluator | None = None,
        probes: Mapping[str, Probe] | None = None,
        environment: Any = None,
    ):
        self.args = args if args is not None else ESConfig()
        if not isinstance(self.args, ESConfig):
            raise BadType(f"args: expected an esfast.ESConfig, got {type(args).__name__}")
        self.args.check()
        if self.args.open_questions():
            # What is found is this run's alone.
            self.args = copy.copy(self.args)
        require(self.args.report_to)
        given = Given(reward_funcs, metrics, train_dataset, eval_dataset)
        given = of_environment(environment, given, self.args, 1 if team is None else team.shards, evaluator)
        reward_funcs, metrics, train_dataset, eval_dataset = given
        self.metrics, self.environment = check_metrics(metrics), environment
        self.reward_funcs, self.reward_weights = open_rewards(reward_funcs, self.metrics, self.args.reward_weights)
        if not callable(train_dataset):
            train_dataset = check_rows("train_dataset", train_dataset)
        eval_dataset = check_rows("eval_dataset", eval_dataset, required=False)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.probes = open_probes(probes, eval_dataset)
        self.team = team if team is not None else Team()
        c = self.args
        self.tuned = open_tuned(model, peft_config, c, self.team)
        self.model = self.tuned.model
        self.processing_class = processing_class = open_tokenizer(processing_class, self.tuned.name)
        self.evaluator = open_evaluator(evaluator, engine, self.model, processing_class, c)
        # Answers prompts. With an environment `engine` plays episodes, which it answers.
        self._speaks = self.evaluator.engine
        self.evaluator = playing(environment, self.evaluator, processing_class, c)
        self.engine = self.evaluator.engine
        self.batches = Batches(train_dataset, c, processing_class, environment is not None)
        self.batches.check(self.engine, eval_dataset, c.progress and self.team.rank == 0)
        check_probes(self.probes, self.batches.rendered, self._speaks, c.progress and self.team.rank == 0)
        # Process 0 evaluates, together with the processes that hold other shards of its model.
        self._evaluates = self.team.rank < self.team.shards
        further = [f for probe in self.probes.values() for f in probe.functions]
        self.scoring = Scoring(
            self.evaluator, self.reward_funcs, self.reward_weights, self.metrics, c, self.team, further
        )
        self.scorer = self.scoring.scorer
        scored_by = self.reward_funcs if environment is None else [environment]
        self.identity = identity_of(self.tuned.identity(), scored_by, self.train_dataset)
        # Further entries of config.yaml, from the command line.
        self.described: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.folder = RunFolder(c.output_dir)
        try:
            with self.team.telling():
                self._begin()
        except BaseException:
            self.folder.release()
            raise

    def _begin(self) -> None:
        """Claims the run folder and makes the ES. With `resume`, the ES is brought to the end of the run's journal."""
        c, resume = self.args, self.args.resume or self.team.restarted
        weights = self.tuned.weights()
        if self.team.rank == 0:
            self.folder = RunFolder.claim(check_writable("output_dir", c.output_dir, folder=True), resume)
            if self.folder.begun():
                c.check_resumes(self.folder.read_config())
                check_identity(self.folder.read_identity(), self.identity)
            self.folder.prepare()
        adopt(c, self.folder, self.team, weights)
        self.tuned.begin(self.folder.adapter, resume and self.folder.begun(), self.team.rank == 0)
        kl = self.tuned.kl(self.processing_class) if self._evaluates else None
        self.held_out = HeldOut(self.batches.texts, self.engine, self.scoring.judge, kl, self.folder, c.samples)
        prompts = self.batches.rendered
        self._probe = Probes(self.probes, prompts, self._speaks, self.scorer, self.folder, self.scoring.skips)
        rule = Rule(groups=check_groups(c.groups or ()))
        self.movement = Movement(weights if isinstance(weights, Plan) else weights.plan, rule)
        self.es = ES(
            weights,
            **c.es_settings(),
            journal=self.folder.journal,
            checkpoints=self.folder.checkpoints,
            team=self.team,
            resume=resume,
        )
        # Reset the baseline after resuming, so that the first logged norm covers one update.
        self.movement.norms()
        self.clock = PhaseTimer(self.es.store.device)
        card = functools.partial(model_card, self.tuned.name, self.tuned.library, c)
        self.recorder = RunRecorder(self.folder, c, self.es.store, self.processing_class, self.team, card)
        self._broadcasts, self._prefix, self._stops = 0, self.team.unique_prefix(), Stops()

    def train(self, resume_from_checkpoint: bool | str | None = None) -> dict[str, Any]:
        """Runs all generations and saves; returns the summary. A finished run is left as it is.

        Ctrl-C, SIGTERM and SIGHUP stop the run at once: the last completed generation is saved, and KeyboardInterrupt
        is raised. Signal handlers that the caller installed stay in place; one that raises KeyboardInterrupt or
        SystemExit stops the run in the same way. In a team, only process 0 writes, evaluates and shows progress, and
        whatever stops one process stops all. A model in shards is then not saved, since that needs all of its
        processes; the journal holds the run. To resume a run, make the trainer with ESConfig(resume=True).
        """
        check_not_resumed_here(resume_from_checkpoint, self.args.resume)
        try:
            with stoppable() as self._stops:
                try:
                    self._train()
                except (KeyboardInterrupt, SystemExit) as interrupt:
                    self.team.fail(interrupt)
                    self.summary = self.recorder.save_interrupted(
                        interrupt, self.es.generation, len(self.eval_dataset or ())
                    )
                    raise
        except Exception as error:
            self.recorder.say_how_to_go_on("stopped", self.es.generation)
            self.team.fail(error)
            raise
        finally:
            self._close()
        return self.summary

    def _close(self) -> None:
        self.recorder.close()
        self.scorer.close()
        self.evaluator.close()
        self.folder.release()

    def _train(self) -> None:
        try:
            if self.team.rank == 0:
                self.folder.own()
            if not self._is_finished():
                self._generations()
            self.team.close()
        except Exception:
            self._stops.wait_for_signal()
            raise

    def _is_finished(self) -> bool:
        """Whether a resumed run is finished, so that there is nothing to do."""
        finished = self.recorder.finished
        told = self.team.broadcast_from_rank0(
            f"{self._prefix}: finished",
            lambda: json.dumps(finished(self.es.generation, self.eval_dataset is not None)).encode(),
        )
        self.summary = json.loads(told) or {}
        if self.summary and self.team.rank == 0:
            log.warning(
                "the run in %s is finished, all of its %d generations: nothing is done; more generations "
                "would go on with it",
                self.folder.path,
                self.es.generation,
            )
        return bool(self.summary)

    def _generations(self) -> None:
        c, recorder, leads = self.args, self.recorder, self.team.rank == 0
        self.clock = recorder.clock = PhaseTimer(self.es.store.device)
        if self.es.generation < c.generations:
            self.batches.check_fresh(self.engine, self.es.generation, c.progress)
        if c.open_questions():
            found = self._find()
            for line in found.lines() if leads else ():
                log.log(logging.INFO if found.learns else logging.WARNING, "%s", line)
        if self._evaluates:
            self._open()
        with tqdm(
            total=c.generations,
            initial=self.es.generation,
            unit="gen",
            disable=not (c.progress and leads),
            dynamic_ncols=True,
            smoothing=0.1,
        ) as bar:
            while self.es.generation < c.generations:
                row = self._generation()
                if self._evaluates:
                    row |= self._evaluate() if self._evaluation_is_due() else {}
                    recorder.log(row)
                last = self.es.generation == c.generations
                if c.checkpoint_every and self.es.generation % c.checkpoint_every == 0 and not last:
                    self.es.checkpoint()
                    self.clock.record("save")
                bar.set_postfix(recorder.progress(row), refresh=False)
                bar.update()
        self.es.record_fingerprint()
        if self._evaluates:
            self.summary = recorder.finish(self.es.generation, len(self.eval_dataset or ()))

    def tune(self) -> Tuning:
        """Only finds the settings that are "auto" (ESConfig(sigma="auto", lr="auto")), and ends. The weights keep their
        bits; the run folder gets tuning.json. `train` may follow. ValueError if neither sigma nor lr is "auto"."""
        if not self.args.open_questions():
            raise BadValue(
                f"tune: nothing is to be found, since sigma is {self.args.sigma:g} and lr {self.args.lr:g}; set one of "
                "them to 'auto'"
            )
        try:
            with stoppable() as self._stops, self.team.telling():
                self.batches.check_fresh(self.engine, self.es.generation, self.args.progress)
                found = self._find()
            self.team.close()
        finally:
            self._close()
        return found

    def _find(self) -> Tuning:
        """Finds sigma and lr, and takes them: from here on they are numbers."""
        c = self.args
        found = Tuner(self.es, self.scoring, self.batches, c, self.engine, self._stops)()
        for name, value in found.settings.items():
            setattr(c, name, value)
        c.check()
        if self.team.rank == 0:
            write_whole(self.folder.tuning, json.dumps(found.to_json(), indent=1) + "\n")
        # weights="inplace" keeps the rounding errors of members.
        self.movement.norms()
        self.clock.record("tune")
        return found

    def _open(self) -> None:
        """Opens the run folder, and makes up for a missing evaluation: of the base model, or of the last generation if
        the run was killed before it."""
        settings = self.described | dataclasses.asdict(self.args)
        state = self._from_process_0(lambda: self.recorder.open(settings, self.identity, self.es.generation))
        self.recorder.best = state["best"]
        if self.es.generation == 0:
            self.recorder.log({"generation": 0, **self._evaluate()})
        elif self.eval_dataset is not None and self._evaluation_is_due() and not state["evaluated"]:
            self.recorder.amend(self._evaluate(), self.es.generation)

    def _evaluation_is_due(self) -> bool:
        done, every = self.es.generation, self.args.eval_every
        return done >= self.args.generations or bool(every) and done % every == 0

    def _from_process_0(self, value: Callable[[], Any]) -> Any:
        """Sends `value()` of process 0 to all processes that hold shards of its model."""
        self._broadcasts += 1
        return json.loads(
            self.team.broadcast_from_rank0(f"{self._prefix}: {self._broadcasts}", lambda: json.dumps(value()).encode())
        )

    def _generation(self) -> dict[str, Any]:
        """One generation: asks the members for completions, scores these, takes the step. Returns its row of
        metrics."""
        generation, clock = self.es.generation, self.clock
        clock.record("other")
        before, tokens, journal = dict(clock.seconds), self.evaluator.tokens, self.es.journal_seconds
        responses = self.scoring.responses
        batch = self.batches(generation)
        self.es.sigma, self.es.lr = self.args.rates(generation)
        clock.record("other")
        self.scoring(self.es, batch, clock, self._stops)
        record = self.es.step(set_aside=self.scoring.skips, families=batch.families(self.es.population_size))
        clock.record("update")
        clock.move(self.es.journal_seconds - journal, "update", "journal")
        drift = self.es.drift()
        clock.record("other")
        seconds, tokens = clock.since(before), self.evaluator.tokens - tokens
        times = {"seconds": sum(seconds.values()), **{f"seconds_{phase}": s for phase, s in seconds.items()}}
        further = {} if drift is None else {"drift": drift}
        # Of the episodes of this process's members.
        further |= getattr(self.engine, "take_figures", dict)()
        if tokens and (responses := self.scoring.responses - responses):
            further["response_tokens"] = tokens / responses
        return (
            further | self.movement.norms(self._exact(record)) | of_rewards(record) | times | account(seconds, tokens)
        )

    def _exact(self, record: UpdateRecord) -> list[float]:
        """The coefficients that the stored weights should have moved by; [] if they are not the whole of it. A master
        keeps what its rounded weights do not show yet."""
        rule = self.es.rule
        simple = rule.optimizer.lr_in_coeffs and self.es.store.mode != "master"
        return record.coeffs if simple else []

    def _evaluate(self) -> dict[str, float]:
        if self.eval_dataset is None:
            return {}
        began = self.clock.seconds.get("evaluate", 0.0)
        with self.team.working():
            found = self.held_out(self.eval_dataset, self.es.generation, self._from_process_0)
            base = self.recorder.rows[0] if self.recorder.rows else {}
            found |= self._probe(self.es.generation, base, self._from_process_0)
        self._stops.check()
        self.clock.record("evaluate")
        return found | {"evaluate_seconds": self.clock.seconds["evaluate"] - began}
