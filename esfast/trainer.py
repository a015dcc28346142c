"""ESTrainer: the loop from a model, prompts and reward functions to a tuned model in a run folder.

The conventions are those of TRL's GRPOTrainer: rows have a "prompt" column, and reward functions are called with
prompts, completions and the rows' other columns as keyword lists.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from . import chat
from .adapters import ADAPTERS, with_adapters
from .clock import Clock, account
from .config import ESConfig
from .distributed import Team
from .es import ES, Member
from .files import write_whole
from .journal import read
from .kl import KLToBase
from .loggers import Report, require
from .model_card import model_card
from .models import load_model, load_tokenizer
from .movement import Movement
from .plan import Plan
from .prompts import check_prompts
from .rewards import RewardError, RewardFunc, Scorer, check_metrics, combine, judge
from .rollout import TransformersEngine, as_engine
from .rows import Rows, check_rows, draw
from .run_folder import RunFolder
from .sampling import response_seeds
from .shards import in_shards, whole_state_dict
from .stats import mean
from .update import Generation

log = logging.getLogger(__name__)

HIDDEN = ("eval_reward", "eval_reward_se", "eval_length")  # of evaluations, from the progress bar


class ESTrainer:
    """Fine-tunes all weights of a causal language model by evolution strategies.

    Args:
        model: a Hugging Face causal LM, or the name or folder of one. It is tuned in place.
        reward_funcs: one function or several, whose rewards are added: f(prompts=, completions=, **columns) -> list of
            floats, one a completion (a list of str), higher is better. A member's reward is the mean over the prompts.
            As in TRL: a chat (a list of messages) as prompt has its completion as a list of one message; None for a
            completion leaves it to the other functions; args.reward_weights weighs them.
        args: an ESConfig.
        train_dataset: rows (dicts or a datasets.Dataset) with a "prompt" column, drawn without repetition until all
            were used; or a function (generation, count) -> rows, for fresh problems in every generation.
        eval_dataset: rows that are never trained on (optional).
        processing_class: the tokenizer; by default the model's own.
        metrics: further functions of the reward functions' form, evaluated on eval_dataset and logged under their name.
        peft_config: a PEFT configuration: its adapters are put into the model, and they alone are tuned (optional).
        engine: what generates, a function from prompts to completions or an esfast.rollout.Engine; default
            TransformersEngine.
        team: the processes that train together (Team.join()), each with a model of its own or a part of one, see
            esfast.tensor_parallel; default: this one alone.

    Raises:
        TypeError, ValueError: arguments outside the above, before anything is written.
        FileExistsError: the run folder holds a run already.
    """

    es_class = ES

    def __init__(
        self,
        model: torch.nn.Module | str,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        args: ESConfig | None = None,
        train_dataset: Rows | Callable[[int, int], Rows] | None = None,
        eval_dataset: Rows | None = None,
        processing_class=None,
        metrics: Mapping[str, RewardFunc] | None = None,
        engine=None,
        peft_config=None,
        team: Team | None = None,
    ):
        self.args = args if args is not None else ESConfig()
        if not isinstance(self.args, ESConfig):
            raise TypeError(f"args: expected an esfast.ESConfig, got {type(args).__name__}")
        self.reward_funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        self.metrics = check_metrics(metrics)
        for f in [*self.reward_funcs, *self.metrics.values()]:
            if not callable(f):
                raise TypeError(f"reward_funcs and metrics: expected functions, got {type(f).__name__} {f!r:.60}")
        if not self.reward_funcs:
            raise ValueError("reward_funcs: expected at least one function")
        self.reward_weights = self.args.reward_weights or [1.0] * len(self.reward_funcs)
        if len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights: expected one for each of the {len(self.reward_funcs)} reward functions, "
                f"got {self.reward_weights}"
            )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        if callable(train_dataset):  # a batch that was looked at is the one that is trained on
            self._fresh_rows = functools.lru_cache(1)(train_dataset)
        else:
            check_rows("train_dataset", train_dataset)
        check_rows("eval_dataset", eval_dataset, required=False)
        self.team = team if team is not None else Team()
        if self.team.shards > 1 and (isinstance(model, str) or peft_config is not None):
            raise ValueError(
                "a model in shards: expected the model itself, without adapters; see esfast.tensor_parallel"
            )
        if isinstance(model, str):
            model = load_model(model)
        if processing_class is None:
            processing_class = load_tokenizer(model.config._name_or_path)
        c = self.args
        include = c.include
        if peft_config is not None:
            model, include = with_adapters(model, peft_config), include or [ADAPTERS]
        self.model, self.processing_class = model, processing_class
        self.engine = as_engine(engine) if engine is not None else TransformersEngine(
            model, processing_class, c.max_completion_length, c.batch_size, c.temperature or 1.0, c.decoding
        )  # fmt: skip
        leads = self.team.rank == 0
        for what, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if rows is not None and not callable(rows):
                check_prompts(what, rows, self._texts, self.engine, c.progress and self.team.rank == 0)
        self._evaluates = self.team.rank < self.team.shards  # process 0, with those that hold its model's other shards
        kl = c.kl_to_base and self._evaluates
        self.kl = KLToBase(model, processing_class, c.max_completion_length) if kl else None
        workers = c.reward_workers if self.team.leads else 0
        self.scorer = Scorer([*self.reward_funcs, *self.metrics.values()], workers, c.reward_timeout)
        require(c.report_to)
        resume = c.resume or self.team.restarted
        self.folder = RunFolder.claim(c.output_dir, resume or not leads)
        if resume and leads:
            if self.folder.config.exists():
                c.check_resumes(yaml.safe_load(self.folder.config.read_text(encoding="utf-8")))
            self.folder.tidy()
        plan = model if isinstance(model, Plan) else Plan(model, include, c.exclude)
        self.movement = Movement(plan)
        self.es = self.es_class(
                     plan, c.sigma, c.lr, c.population_size, c.seed, c.mirrored, c.noise, c.shaping, c.weights,
                     journal=self.folder.journal, rounding=c.rounding, weight_decay=c.weight_decay, decay_to=c.decay_to,
                     optimizer=c.make_optimizer(), perturb_rounding=c.perturb_rounding, team=self.team, resume=resume,
                     checkpoints=self.folder.checkpoints, groups=c.groups or ())  # fmt: skip
        self.movement.norms()  # of a resumed run, the next update's norm is that of the next update
        self.clock = Clock(self.es.plan.device)
        self.described: dict[str, Any] = {}  # what else goes into config.yaml, from the command line
        self.summary: dict[str, Any] = {}
        self._trained_tokens, self._told, self._best, self._run = 0, 0, -math.inf, self.team.run()

    def train(self) -> dict[str, Any]:
        """Runs all generations and saves; returns the summary. On Ctrl-C the last completed generation is saved.

        In a team, process 0 alone writes, evaluates and shows progress; whatever stops one process stops all. Of a
        model in shards nothing is saved on Ctrl-C, since that takes all of its processes: the journal holds the run.
        """
        c, leads = self.args, self.team.rank == 0
        self.clock = Clock(self.es.plan.device)
        bar = tqdm(total=c.generations, initial=self.es.generation, unit="gen", disable=not (c.progress and leads),
                   dynamic_ncols=True, smoothing=0.1)  # fmt: skip
        report = Report(c.report_to if leads else None, self.folder.path, dataclasses.asdict(c))
        before: dict[str, float] = {}
        after: dict[str, float] = {}
        try:
            self._check_first_batch()
            if self._evaluates:
                before = after = self._open_folder(report)
            while self.es.generation < c.generations:
                row = self._generation()
                last = self.es.generation == c.generations
                if self._evaluates:
                    if last or (c.eval_every and self.es.generation % c.eval_every == 0):
                        after = self._evaluate()
                        row.update(after)
                    self._log(row, report)
                if c.checkpoint_every and self.es.generation % c.checkpoint_every == 0 and not last:
                    self.es.checkpoint()
                    self.clock.lap("save")
                shown = {"reward": f"{row['reward_mean']:.3f}", "best": f"{row['reward_max']:.3f}"}
                shown |= {
                    k.removeprefix("eval_"): f"{v:.3f}"
                    for k, v in after.items()
                    if k not in ("eval_reward", "eval_reward_se", "eval_length")
                }
                bar.set_postfix(shown, refresh=False)
                bar.update()
            self.es.vouch()
            if self._evaluates:
                self._finish(before, after)
            self.team.close()
        except KeyboardInterrupt as interrupt:
            self.team.fail(interrupt)
            if leads and self.team.shards == 1:
                log.warning("interrupted: saving the model after generation %d", self.es.generation)
                self._finish(before, after)
            elif leads:
                log.warning("interrupted after generation %d: resume to go on", self.es.generation)
            raise
        except BaseException as error:
            if leads and self.folder.journal.exists():
                log.warning("stopped after generation %d; what was done is in the journal: resume to go on",
                            self.es.generation)  # fmt: skip
            self.team.fail(error)
            raise
        finally:
            bar.close()
            report.close()
            self.scorer.close()
            self.engine.close()
        return self.summary

    def _open_folder(self, report: Report) -> dict[str, float]:
        """Writes what a new run begins with, or sees to it that an old one's metrics are complete; returns the
        evaluation of before."""
        if self.team.rank == 0:
            settings = self.described | dataclasses.asdict(self.args)
            write_whole(self.folder.config, yaml.safe_dump(settings, sort_keys=False))
        first, self._best = self._tell(self._before)
        if first is None:
            first = {"generation": 0, **self._evaluate()}
            self._log(first, report)
        return {k: v for k, v in first.items() if k.startswith("eval_")}

    def _before(self) -> tuple[dict[str, Any] | None, float]:
        """The first line of an old run's metrics, None of a new one, and its best evaluation; completes them."""
        rows = self.folder.read_metrics() if self.folder.metrics.exists() else []
        if rows:
            for record in read(self.folder.journal).records[rows[-1]["generation"] :]:  # it died before it wrote them
                self.folder.append_metrics(_of_rewards(record))
        return next(iter(rows), None), max((r["eval_reward"] for r in rows if "eval_reward" in r), default=-math.inf)

    def _tell(self, value: Callable[[], Any]) -> Any:
        """What `value()` is in process 0, in all that hold its model's shards."""
        self._told += 1
        return json.loads(self.team.tell(f"{self._run}: {self._told}", lambda: json.dumps(value()).encode()))

    def _generation(self) -> dict[str, Any]:
        generation, c = self.es.generation, self.args
        self.clock.lap("other")
        before, tokens, journal = dict(self.clock.seconds), self._tokens(), self.es.journal_seconds
        rows = [row for row in self._train_rows(generation) for _ in range(c.num_generations)]
        texts = self._texts(rows)
        seeds = None  # greedy
        if c.temperature > 0:  # the same for every member: they differ by their weights alone
            seeds = response_seeds(c.seed, generation, len(rows) // c.num_generations, c.num_generations)
        self.es.sigma, self.es.lr = self.args.rates(generation)
        self.clock.lap("other")
        scores = []  # workers score a member while the next one generates
        for member, responses in self._answers(texts, seeds):
            if self.team.leads:  # one of the processes that hold a model together
                answered = chat.answered(rows, responses)
                scores.append((member, self.scorer.submit(self.reward_funcs, *answered)))
            self.clock.lap("score")
        self.clock.lap("perturb")
        for member, rewards in scores:
            member.reward = self._reward(member, rewards)
        self.clock.lap("wait")
        record = self.es.step(set_aside=c.on_reward_error == "skip")
        self.clock.lap("update")
        self.clock.move(self.es.journal_seconds - journal, "update", "journal")
        drift = self.es.drift()
        self.clock.lap("other")
        seconds, tokens = self.clock.since(before), self._tokens() - tokens
        self._trained_tokens += tokens
        return ({} if drift is None else {"drift": drift}) | self.movement.norms() | {
            **_of_rewards(record), "seconds": sum(seconds.values()), **{f"seconds_{k}": v for k, v in seconds.items()},
            **account(seconds, tokens),
        }  # fmt: skip

    def _reward(self, member: Member, rewards: Future) -> float | None:
        try:
            return mean(combine(rewards.result(), self.reward_weights))
        except RewardError as error:
            if self.args.on_reward_error == "stop":
                raise
            log.warning("member %d of generation %d is set aside: %s", member.index, self.es.generation, error)
            return None

    def _answers(self, texts: list[str], seeds: Sequence[int] | None) -> Iterator[tuple[Member, list[str]]]:
        """This process's members of the population, each with its responses."""
        with self.es.population() as members:
            for member in members:
                self.clock.lap("perturb")
                responses = self._generate(texts, seeds)
                self.clock.lap("generate")
                yield member, responses

    def _texts(self, rows: Rows) -> list[str]:
        return chat.texts(rows, self.processing_class, self.args.chat_template_kwargs)

    def _check_first_batch(self) -> None:
        """Of fresh rows; those of a fixed dataset were all looked at before."""
        if callable(self.train_dataset) and self.es.generation < self.args.generations:
            rows = self._train_rows(self.es.generation)
            check_prompts("train_dataset", rows, self._texts, self.engine, self.args.progress)

    def _train_rows(self, generation: int) -> Rows:
        count = self.args.prompts_per_generation
        if callable(self.train_dataset):
            rows = self._fresh_rows(generation, count)
            check_rows(f"train_dataset({generation}, {count})", rows)
            return rows
        return draw(self.train_dataset, generation, count, self.args.seed)

    def _generate(self, texts: list[str], seeds: Sequence[int] | None = None) -> list[str]:
        return self.engine.generate(texts) if seeds is None else self.engine.generate(texts, seeds)

    def _tokens(self) -> int:
        return getattr(self.engine, "tokens", 0)

    def _evaluate(self) -> dict[str, float]:
        if self.eval_dataset is None:
            return {}
        texts = self._texts(self.eval_dataset)
        with self.team.working():
            responses = self._generate(texts)
            # needs the model, so it can't be scored elsewhere
            named = {} if self.kl is None else {"kl_to_base": self.kl(texts, responses)}
            found = self._tell(lambda: self._score(texts, responses, named))
        self.clock.lap("evaluate")
        return found

    def _score(self, texts: list[str], responses: list[str], named: dict[str, list]) -> dict[str, float]:
        c, answered = self.args, chat.answered(self.eval_dataset, responses)
        scores, figures = judge(self.scorer, self.reward_funcs, self.reward_weights, self.metrics, *answered,
                                skip=c.on_reward_error == "skip")  # fmt: skip
        for text, response, *each in list(zip(texts, responses, *scores, strict=True))[: c.samples]:
            self.folder.append_samples({"generation": self.es.generation, "prompt": text, "completion": response,
                                        "rewards": each})  # fmt: skip
        return figures | {f"eval_{name}": mean(values) for name, values in named.items()} | {
            "eval_length": mean(list(map(len, responses)))}  # fmt: skip

    def _log(self, row: dict[str, Any], report: Report) -> None:
        """Metrics go to disk, and the model of the best evaluation so far with them."""
        reward = row.get("eval_reward", -math.inf)
        if reward > self._best:
            self._best = reward
            if self.args.save_best and row["generation"]:
                self._save_model(self.folder.best.name, row)
        if self.team.rank == 0:
            self.folder.append_metrics(row)
            report.log(row)

    def _save_model(self, name: str, after: dict[str, Any]) -> None:
        with self.team.working():
            weights = whole_state_dict(self.model, keep=self.team.rank == 0) if in_shards(self.model) else None
        if self.team.rank == 0:
            self.folder.save_model(self.model, self.processing_class, self._card(after), name, weights)
        self.clock.lap("save")

    def _card(self, after: dict[str, Any]) -> str:
        return model_card(self.model, self.args, self.es.generation, self.folder.read_metrics()[0], after)

    def _finish(self, before: dict[str, float], after: dict[str, float]) -> None:
        self._save_model(self.folder.model.name, after)
        if self.team.rank:
            return
        self.folder.draw_curves()
        self.clock.lap("save")
        seconds = {phase: round(s, 3) for phase, s in self.clock.seconds.items()}
        self.summary = {
            "generations": self.es.generation, "seed": self.args.seed, "eval_prompts": len(self.eval_dataset or ()),
            "before": before, "after": after, **account(self.clock.seconds, self._trained_tokens),
            "seconds": seconds | {"total": round(sum(seconds.values()), 3)},
        }  # fmt: skip
        write_whole(self.folder.path / "summary.json", json.dumps(self.summary, indent=2) + "\n")


def _of_rewards(record: Generation) -> dict[str, Any]:
    """What a generation's line of metrics says that its record in the journal knows."""
    rewards = np.array([r for r in record.rewards if r is not None])
    return {
        "generation": record.generation + 1, "reward_mean": float(rewards.mean()), "reward_max": float(rewards.max()),
        "reward_min": float(rewards.min()), "reward_std": float(rewards.std()), "sigma": record.sigma, "lr": record.lr,
        **({"set_aside": n} if (n := record.rewards.count(None)) else {}),
    }  # fmt: skip
