"""ESConfig and ESTrainer: the loop from a model, prompts and reward functions to a tuned model in a run folder.

The conventions are those of TRL's GRPOTrainer: rows have a "prompt" column, and reward functions are called with
prompts, completions and the rows' other columns as keyword lists.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from .es import ES, SHAPINGS
from .noise import KINDS, check_int
from .ops import ROUNDINGS
from .rollout import TransformersEngine
from .run_folder import RunFolder, write_whole
from .schedules import SCHEDULES, check_schedule
from .weights import MODES

log = logging.getLogger(__name__)

RewardFunc = Callable[..., Sequence[float]]
Rows = Sequence[Mapping[str, Any]]


def _option(default, text: str, choices: Sequence[str] | None = None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class ESConfig:
    """Settings of a run; the defaults are the paper's for Countdown (arXiv 2509.24372). Each is also an option of
    `esfast train`. ValueError or TypeError names a field that is out of range."""

    output_dir: str = _option("runs/esfast", "run folder: config, metrics, journal, curves and the tuned model")
    seed: int = _option(0, "seed of the run: of its noise and of the order of its prompts")
    generations: int = _option(500, "number of updates")
    population_size: int = _option(30, "members, that is perturbed models, a generation")
    sigma: float = _option(1e-3, "standard deviation of the perturbation, in units of the weights")
    lr: float = _option(5e-4, "step size of the update (the paper's alpha)")
    sigma_schedule: str = _option("constant", "how sigma changes over the generations", tuple(SCHEDULES))
    lr_schedule: str = _option("constant", "how lr changes over the generations", tuple(SCHEDULES))
    sigma_final_fraction: float = _option(0.1, "share of sigma that a schedule other than constant ends at")
    lr_final_fraction: float = _option(0.1, "share of lr that a schedule other than constant ends at")
    warmup_generations: int = _option(0, "first generations, in which lr rises to its full value")
    mirrored: bool = _option(False, "members come in pairs, +noise and -noise")
    noise: str = _option("gaussian", "kind of noise", KINDS)
    shaping: str = _option("zscore", "how rewards become weights of the noise", tuple(SHAPINGS))
    weights: str = _option(
        "base",
        "base: exact, one extra copy; master: exact float32 updates, two; host: the copy is in host memory; "
        "inplace: none, drifts; auto: the most exact that fits",
        (*MODES, "auto"),
    )
    rounding: str = _option("nearest", "of updates to 16-bit weights", ROUNDINGS)
    weight_decay: float = _option(0.0, "an update moves the weights by lr times this towards zero")
    prompts_per_generation: int = _option(200, "prompts that every member of a generation answers")
    max_completion_length: int = _option(1024, "longest response, in tokens")
    batch_size: int | None = _option(
        None, "most prompts generated at once (default: what fits a quarter of the memory)"
    )
    eval_every: int = _option(10, "generations between evaluations; 0: only before and after")
    eval_prompts: int = _option(500, "held-out prompts of an evaluation")
    progress: bool = _option(True, "show the progress bar")

    def __post_init__(self):
        for name, least in {"seed": 0, "generations": 1, "population_size": 2, "prompts_per_generation": 1,
                            "max_completion_length": 1, "eval_every": 0, "eval_prompts": 1}.items():  # fmt: skip
            check_int(f"ESConfig.{name}", getattr(self, name), least, 2**63)
        if self.batch_size is not None:
            check_int("ESConfig.batch_size", self.batch_size, 1, 2**63)
        check_int("ESConfig.warmup_generations", self.warmup_generations, 0, self.generations)
        for name in ("sigma", "lr"):
            check_schedule(f"ESConfig.{name}", *(getattr(self, name + s) for s in ("", "_schedule", "_final_fraction")))

    def rates(self, generation: int) -> tuple[float, float]:
        """sigma and lr of a generation (0, 1, ...), from its number alone, so that a run can be taken up anywhere."""
        sigma = SCHEDULES[self.sigma_schedule](self.sigma, generation, self.generations, self.sigma_final_fraction)
        lr = SCHEDULES[self.lr_schedule](
            self.lr, generation, self.generations, self.lr_final_fraction, self.warmup_generations
        )
        return sigma, lr


class Clock:
    """Seconds by phase: `lap(phase)` books the time since the last lap."""

    def __init__(self, device: torch.device):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device, self._last = device, time.perf_counter()

    def lap(self, phase: str) -> None:
        if self._device.type == "cuda":  # kernels run on after the call that launched them
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now


class ESTrainer:
    """Fine-tunes all weights of a causal language model by evolution strategies.

    Args:
        model: a Hugging Face causal LM, or the name or folder of one. It is tuned in place.
        reward_funcs: one function or several, whose rewards are added: f(prompts=, completions=, **columns) -> list of
            floats, one a completion (a list of str), higher is better. A member's reward is the mean over the prompts.
        args: an ESConfig.
        train_dataset: rows (dicts or a datasets.Dataset) with a "prompt" column, drawn without repetition until all
            were used; or a function (generation, count) -> rows, for fresh problems in every generation.
        eval_dataset: rows that are never trained on (optional).
        processing_class: the tokenizer; by default the model's own.
        metrics: further functions of the reward functions' form, evaluated on eval_dataset and logged under their name.
        engine: what generates, an object with generate(prompts) -> completions; default TransformersEngine.

    Raises:
        TypeError, ValueError: arguments outside the above, before anything is written.
        FileExistsError: the run folder holds a run already.
    """

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
    ):
        self.args = args if args is not None else ESConfig()
        if not isinstance(self.args, ESConfig):
            raise TypeError(f"args: expected an esfast.ESConfig, got {type(args).__name__}")
        self.reward_funcs = list(reward_funcs) if isinstance(reward_funcs, Sequence) else [reward_funcs]
        self.metrics = dict(metrics or {})
        for f in [*self.reward_funcs, *self.metrics.values()]:
            if not callable(f):
                raise TypeError(f"reward_funcs and metrics: expected functions, got {type(f).__name__} {f!r:.60}")
        if not self.reward_funcs:
            raise ValueError("reward_funcs: expected at least one function")
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        if not callable(train_dataset):
            _check_rows("train_dataset", train_dataset)
        _check_rows("eval_dataset", eval_dataset, required=False)
        if isinstance(model, str):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(model)
        if processing_class is None:
            from transformers import AutoTokenizer

            processing_class = AutoTokenizer.from_pretrained(model.config._name_or_path)
        self.model, self.processing_class = model, processing_class
        c = self.args
        self.engine = engine or TransformersEngine(model, processing_class, c.max_completion_length, c.batch_size)
        self.folder = RunFolder.claim(c.output_dir)
        self.es = ES(model, c.sigma, c.lr, c.population_size, c.seed, c.mirrored, c.noise, c.shaping, c.weights,
                     journal=self.folder.journal, rounding=c.rounding, weight_decay=c.weight_decay)  # fmt: skip
        self.clock = Clock(self.es.plan.device)
        self.summary: dict[str, Any] = {}

    def train(self) -> dict[str, Any]:
        """Runs all generations and saves; returns the summary. On Ctrl-C the last completed generation is saved."""
        c = self.args
        write_whole(self.folder.path / "config.yaml", yaml.safe_dump(dataclasses.asdict(c), sort_keys=False))
        self.clock = Clock(self.es.plan.device)
        bar = tqdm(total=c.generations, unit="gen", disable=not c.progress, dynamic_ncols=True, smoothing=0.1)
        before = after = self._evaluate()
        self.folder.append_metrics({"generation": 0, **before})
        try:
            while self.es.generation < c.generations:
                row = self._generation()
                last = self.es.generation == c.generations
                if last or (c.eval_every and self.es.generation % c.eval_every == 0):
                    after = self._evaluate()
                    row.update(after)
                self.folder.append_metrics(row)
                shown = {"reward": f"{row['reward_mean']:.3f}", "best": f"{row['reward_max']:.3f}"}
                shown |= {k.removeprefix("eval_"): f"{v:.3f}" for k, v in after.items() if k != "eval_reward"}
                bar.set_postfix(shown, refresh=False)
                bar.update()
        except KeyboardInterrupt:
            log.warning("interrupted: saving the model after generation %d", self.es.generation)
            raise
        finally:
            bar.close()
            self._finish(before, after)
        return self.summary

    def _generation(self) -> dict[str, Any]:
        began, generation = time.perf_counter(), self.es.generation
        rows = self._train_rows(generation)
        self.es.sigma, self.es.lr = self.args.rates(generation)
        self.clock.lap("other")
        with self.es.population() as members:
            for member in members:
                self.clock.lap("perturb")
                member.reward = self._score(rows, self.reward_funcs)
        self.clock.lap("perturb")
        record = self.es.step()
        self.clock.lap("update")
        rewards, drift = np.array(record.rewards), self.es.drift()
        return ({} if drift is None else {"drift": drift}) | {
            "generation": self.es.generation, "reward_mean": float(rewards.mean()), "reward_max": float(rewards.max()),
            "reward_min": float(rewards.min()), "reward_std": float(rewards.std()), "sigma": record.sigma,
            "lr": record.lr, "seconds": time.perf_counter() - began,
        }  # fmt: skip

    def _train_rows(self, generation: int) -> Rows:
        """A pure function of seed and generation, so that a run can be taken up anywhere."""
        count = self.args.prompts_per_generation
        if callable(self.train_dataset):
            rows = self.train_dataset(generation, count)
            _check_rows(f"train_dataset({generation}, {count})", rows)
            return rows
        size = len(self.train_dataset)
        places = range(generation * count, (generation + 1) * count) if count < size else range(size)
        epochs = {p // size: np.random.default_rng((self.args.seed, p // size)).permutation(size) for p in places}
        return [self.train_dataset[int(epochs[p // size][p % size])] for p in places]

    def _score(self, rows: Rows, functions: Sequence[RewardFunc]) -> float:
        prompts = [row["prompt"] for row in rows]
        completions = self.engine.generate(prompts)
        self.clock.lap("generate")
        total = math.fsum(math.fsum(_call(f, rows, prompts, completions)) for f in functions)
        self.clock.lap("score")
        return total / len(rows)

    def _evaluate(self) -> dict[str, float]:
        if self.eval_dataset is None:
            return {}
        rows = self.eval_dataset
        prompts = [row["prompt"] for row in rows]
        completions = self.engine.generate(prompts)
        values = {"eval_reward": [math.fsum(v) for v in zip(*(_call(f, rows, prompts, completions)
                                                              for f in self.reward_funcs), strict=True)]}  # fmt: skip
        values |= {f"eval_{name}": _call(f, rows, prompts, completions) for name, f in self.metrics.items()}
        self.clock.lap("evaluate")
        return {name: math.fsum(v) / len(v) for name, v in values.items()}

    def _finish(self, before: dict[str, float], after: dict[str, float]) -> None:
        self.folder.save_model(self.model, self.processing_class)
        self.folder.draw_curves()
        self.clock.lap("save")
        seconds = {phase: round(s, 3) for phase, s in self.clock.seconds.items()}
        self.summary = {
            "generations": self.es.generation, "seed": self.args.seed, "eval_prompts": len(self.eval_dataset or ()),
            "before": before, "after": after, "seconds": seconds | {"total": round(sum(seconds.values()), 3)},
        }  # fmt: skip
        write_whole(self.folder.path / "summary.json", json.dumps(self.summary, indent=2) + "\n")


def _check_rows(what: str, rows, required: bool = True) -> None:
    if rows is None and not required:
        return
    if rows is None or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise TypeError(f'{what}: expected rows with a "prompt" column, for example a list of dicts, got {rows!r:.60}')
    if len(rows) == 0:
        raise ValueError(f"{what}: expected at least one row")
    for row in [rows[i] for i in range(len(rows))]:
        if not isinstance(row, Mapping) or "prompt" not in row:
            raise ValueError(f'{what}: its rows must be dicts with a "prompt", got {row!r:.80}')
        if row.keys() != rows[0].keys():
            raise ValueError(f"{what}: its rows must have equal columns, got {sorted(rows[0])} and {sorted(row)}")


def _call(function: RewardFunc, rows: Rows, prompts: list[str], completions: list[str]) -> list[float]:
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    name = getattr(function, "__name__", repr(function))
    values = list(function(prompts=prompts, completions=completions, **columns))
    if len(values) != len(completions):
        raise ValueError(f"reward function {name}: expected {len(completions)} rewards, got {len(values)}")
    for i, value in enumerate(values):
        if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise ValueError(f"reward function {name}: its reward for completion {i} is {value!r}, no finite number")
    return [float(v) for v in values]
