"""ESConfig: the settings of a run, each also an option of `esfast train`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.kinds import KINDS, check_rank
from ..es.shaping import SHAPINGS
from ..rollout.chat import check_options
from ..update.optimizers import OPTIMIZERS, Adam, Group, Momentum, Optimizer, check_groups
from ..utils.errors import BadValue, EsfastError
from ..utils.names import DECAY_TO, DECODINGS, ROUNDINGS, WEIGHT_MODES
from ..utils.settings import check_int, check_number, check_positive, convert_fields, convert_given, option
from .loggers import LOGGERS, check_report_to
from .schedules import SCHEDULES, check_schedule
from .trl_names import accepts_trl_names

# All others are part of what a run is: when it is resumed they must be the same.
_MAY_CHANGE = ("output_dir", "reward_workers", "reward_timeout", "eval_every", "eval_prompts", "on_reward_error",
              "checkpoint_every", "resume", "progress", "samples", "save_best", "report_to", "kl_to_base")  # fmt: skip

# What ES takes under the same name
_OF_ES = (
    "sigma", "lr", "population_size", "seed", "mirrored", "noise", "shaping", "weights", "rounding", "weight_decay",
    "decay_to", "perturb_rounding", "rank",
)  # fmt: skip

# The least that whole numbers may be
_LEAST = {
    "generations": 1, "prompts_per_generation": 1, "max_completion_length": 1, "num_generations": 1, "batch_size": 1,
    "reward_workers": 0, "eval_every": 0, "checkpoint_every": 0, "eval_prompts": 1, "samples": 0,
}  # fmt: skip
# Seconds: three years, which every timer of the system takes
_LONGEST = 1e8
# By optimizer: settings, and what they are called there
_NUMBERS = {
    "sgd": {},
    "momentum": {"momentum": "beta", "momentum_window": "window"},
    "adam": {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_eps": "eps"},
}


@accepts_trl_names
@dataclass
class ESConfig:
    """Settings of a run; the defaults are the paper's for Countdown (arXiv 2509.24372). Each is also an option of
    `esfast train`. TRL's names are accepted where they mean the same (learning_rate, max_steps, eval_steps, ...).
    ValueError or TypeError names a field that is out of range, or unknown, and says what to do."""

    output_dir: str = option("runs/esfast", "run folder: config, metrics, journal, curves and the tuned model")
    seed: int = option(0, "seed of the run: of its noise and of the order of its prompts")
    generations: int = option(500, "number of updates")
    population_size: int = option(30, "members, that is perturbed models, a generation")
    sigma: float = option(1e-3, "standard deviation of the perturbation, in units of the weights")
    lr: float = option(5e-4, "step size of the update (the paper's alpha)")
    sigma_schedule: str = option("constant", "how sigma changes over the generations", tuple(SCHEDULES))
    lr_schedule: str = option("constant", "how lr changes over the generations", tuple(SCHEDULES))
    sigma_final_fraction: float = option(0.1, "share of sigma that a schedule other than constant ends at")
    lr_final_fraction: float = option(0.1, "share of lr that a schedule other than constant ends at")
    warmup_generations: int = option(0, "first generations, in which lr rises to its full value")
    mirrored: bool = option(False, "members come in pairs, +noise and -noise")
    noise: str = option("gaussian", "kind of noise", KINDS)
    rank: int = option(1, "rank of low_rank noise, 1 to 256")
    shaping: str = option("zscore", "how rewards become weights of the noise", tuple(SHAPINGS))
    weights: str = option(
        "base",
        "base: exact, one extra copy; master: exact float32 updates, two; host: the copy is in host memory; "
        "inplace: none, drifts; auto: the most exact that fits",
        (*WEIGHT_MODES, "auto"),
    )
    rounding: str = option("nearest", "of updates to 16-bit weights", ROUNDINGS)
    perturb_rounding: str = option("nearest", "of members of 16-bit weights", ROUNDINGS)
    weight_decay: float = option(0.0, "an update moves the weights by lr times this of their way to decay_to")
    decay_to: str = option("zero", "where weight decay leads: initial keeps a copy of the initial weights", DECAY_TO)
    optimizer: str = option(
        "sgd", "sgd: the paper's; momentum: replays seeds, no memory; adam: 8 bytes a weight", tuple(OPTIMIZERS)
    )
    momentum: float = option(Momentum.beta, "of optimizer momentum: share of the velocity that a generation keeps")
    momentum_window: int = option(Momentum.window, "of optimizer momentum: generations that an update replays")
    adam_beta1: float = option(Adam.beta1, "of optimizer adam: how much the mean of the gradient keeps")
    adam_beta2: float = option(Adam.beta2, "of optimizer adam: how much the mean of its square keeps")
    adam_eps: float = option(Adam.eps, "of optimizer adam: added to the root of that mean")
    include: list[str] | None = option(None, "patterns of the names of the weights that are tuned (default: all)")
    exclude: list[str] | None = option(None, "patterns of weights that stay as they are, such as *embed* or *norm*")
    groups: list[str] | None = option(
        None, "weights with a sigma and an lr of their own: PATTERN:sigma=X,lr=Y, factors of the run's, such as "
        "*embed*:lr=0.1; the first pattern that matches a name counts"
    )  # fmt: skip
    prompts_per_generation: int = option(200, "prompts that every member of a generation answers")
    max_completion_length: int = option(1024, "longest response, in tokens")
    temperature: float = option(0.0, "of sampled responses; 0: the likeliest tokens are taken, as in the paper")
    num_generations: int = option(
        1, "responses to each prompt, all of which are scored; more than 1 needs a temperature"
    )
    decoding: str = option(
        "auto",
        "how Transformers generates: plain, static (one cache), continuous (batching); auto: "
        "plain on a CPU, else the fastest that works",
        DECODINGS,
    )
    batch_size: int | None = option(None, "most prompts generated at once (default: what fits a quarter of the memory)")
    chat_template_kwargs: dict | None = option(
        None, "variables of the tokenizer's chat template, such as enable_thinking; as JSON on the command line"
    )  # fmt: skip
    reward_weights: list[float] | None = option(None, "a factor for each reward function (default: 1)")
    reward_workers: int = option(0, "processes that score while the next member generates; 0: none, but in this one")
    reward_timeout: float = option(300.0, "seconds that a reward function may take for one member's completions")
    eval_every: int = option(10, "generations between evaluations; 0: only before and after")
    eval_prompts: int = option(500, "held-out prompts of an evaluation")
    kl_to_base: bool = option(
        False, "evaluations also measure the KL divergence of responses from the base model (a copy in host memory)"
    )
    save_best: bool = option(True, "keep the model of the best evaluation, by its reward, in the run folder's best/")
    samples: int = option(8, "held-out responses of each evaluation that are kept in samples.jsonl")
    report_to: list[str] | None = option(None, "where metrics go besides metrics.jsonl", (*LOGGERS, "none"))
    on_reward_error: str = option(
        "stop", "when a reward function fails for a member; skip: it is left out", ("stop", "skip")
    )
    checkpoint_every: int = option(50, "generations between checkpoints, for a faster resume; 0: none")
    resume: bool = option(False, "go on with the run in the run folder, if there is one")
    progress: bool = option(True, "show the progress bar")

    def __post_init__(self):
        self._take_optimizer()
        self.groups = [str(g) if isinstance(g, Group) else g for g in _listed(self.groups)] or None
        self.check()

    def check(self) -> None:
        """Brings every field to its type, and raises TypeError or ValueError for one that is out of range. For those
        who changed fields since the settings were made."""
        convert_fields(self)
        self.report_to = check_report_to(self.report_to) or None
        if not self.output_dir.strip() or "\0" in self.output_dir:
            raise BadValue(f"ESConfig.output_dir: expected the name of a folder, got {self.output_dir!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None:
                check_int(f"ESConfig.{name}", value, least, 2**63)
        check_int("ESConfig.seed", self.seed, 0, 2**64)
        check_int("ESConfig.population_size", self.population_size, 2, 2**32)
        check_rank(self.noise, self.rank, "ESConfig.rank")
        check_int("ESConfig.warmup_generations", self.warmup_generations, 0, self.generations)
        if self.mirrored and self.population_size % 2:
            raise BadValue(
                f"ESConfig.population_size: mirrored sampling needs an even number, got {self.population_size}"
            )
        check_options("ESConfig.chat_template_kwargs", self.chat_template_kwargs or {})
        for name in ("temperature", "weight_decay"):
            check_number(f"ESConfig.{name}", getattr(self, name), 0)
        for weight in self.reward_weights or ():
            check_number("ESConfig.reward_weights", weight, -1e300, 1e300)
        if not 0 < self.reward_timeout <= _LONGEST:
            raise BadValue(
                f"ESConfig.reward_timeout: expected seconds, more than 0 and at most {_LONGEST:g}, "
                f"got {self.reward_timeout!r}"
            )
        if self.num_generations > 1 and self.temperature == 0:
            raise BadValue(
                f"ESConfig.num_generations: {self.num_generations} equal responses to a prompt at temperature 0; "
                "leave it at 1, or set a temperature (GRPO's is 1.0)"
            )
        try:
            check_groups(self.groups or ())
        except EsfastError as error:
            raise BadValue(f"ESConfig.groups: {error}") from None
        for name in OPTIMIZERS:
            self._optimizer(name)
        for name in ("sigma", "lr"):
            check_positive(f"ESConfig.{name}", getattr(self, name))
            check_schedule(f"ESConfig.{name}", *(getattr(self, name + s) for s in ("", "_schedule", "_final_fraction")))
        if self.lr * self.weight_decay > 1:
            raise BadValue(
                f"ESConfig.weight_decay: {self.weight_decay} times lr {self.lr} is more than all of the weights"
            )

    def _take_optimizer(self) -> None:
        """The numbers of an esfast.Momentum or Adam that is given in place of a name."""
        for name, kind in OPTIMIZERS.items():
            if type(self.optimizer) is kind:
                for mine, theirs in _NUMBERS[name].items():
                    setattr(self, mine, getattr(self.optimizer, theirs))
                self.optimizer = name

    def check_resumes(self, found: Mapping[str, Any]) -> None:
        """ValueError if a run with the settings `found` can't go on with these; what differs is named."""
        may_change = set(_MAY_CHANGE)
        if self.lr_schedule == self.sigma_schedule == "constant" and not self.warmup_generations:
            may_change.add("generations")
        fixed = {name: value for name, value in found.items() if name not in may_change}
        for name, theirs in convert_given(type(self), fixed).items():
            mine = getattr(self, name)
            if theirs != mine:
                raise BadValue(f"resume: the run has {name} {theirs!r}, asked for is {mine!r}")

    def es_settings(self) -> dict[str, Any]:
        """Arguments of `esfast.ES`."""
        same = {name: getattr(self, name) for name in _OF_ES}
        return same | {"optimizer": self.make_optimizer(), "groups": self.groups or ()}

    def make_optimizer(self) -> Optimizer:
        return self._optimizer(self.optimizer)

    def _optimizer(self, name: str) -> Optimizer:
        kind, numbers = OPTIMIZERS[name], _NUMBERS[name]
        try:
            return kind(**{its: getattr(self, mine) for mine, its in numbers.items()})
        except BadValue as error:
            message = str(error)
            for mine, its in numbers.items():
                message = message.replace(f"{kind.__name__}.{its}", f"ESConfig.{mine}")
            raise BadValue(message) from None

    def rates(self, generation: int) -> tuple[float, float]:
        """sigma and lr of a generation (0, 1, ...), from its number alone, so that a run can be taken up anywhere."""
        sigma = SCHEDULES[self.sigma_schedule](self.sigma, generation, self.generations, self.sigma_final_fraction)
        lr = SCHEDULES[self.lr_schedule](
            self.lr, generation, self.generations, self.lr_final_fraction, self.warmup_generations
        )
        return sigma, lr


def _listed(value) -> list:
    if value is None:
        return []
    return [value] if isinstance(value, (str, Group)) or not isinstance(value, Iterable) else list(value)
