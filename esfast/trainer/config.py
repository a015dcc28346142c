"""ESConfig: the settings of a run, each also an option of `esfast train`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..core.kinds import KINDS, check_rank
from ..es.shaping import SHAPINGS
from ..rollout.chat import check_options
from ..update.optimizers import OPTIMIZERS, Adam, Group, Momentum, Optimizer, check_groups, check_optimizer
from ..utils.errors import BadType, BadValue, EsfastError
from ..utils.names import DECAY_TO, DECODINGS, ROUNDINGS, WEIGHT_MODES
from ..utils.settings import check_int, check_number, check_positive, convert_fields, convert_given, option
from .loggers import LOGGERS, check_report_to
from .schedules import SCHEDULES, check_schedule
from .trl_names import accepts_trl_names

# Settings that may differ when a run is resumed. All others must be the same.
_MAY_CHANGE = """
    output_dir reward_workers reward_timeout eval_every eval_prompts on_reward_error checkpoint_every resume progress
    samples save_best report_to kl_to_base members_at_once episode_timeout episodes_at_once endpoint_port
""".split()

# What ES takes under the same name
_OF_ES = """
    sigma lr population_size seed mirrored noise shaping weights rounding weight_decay decay_to perturb_rounding
    rank
""".split()

# Smallest values of settings that are whole numbers.
_LEAST = {
    "generations": 1,
    "prompts_per_generation": 1,
    "max_completion_length": 1,
    "num_generations": 1,
    "batch_size": 1,
    "reward_workers": 0,
    "eval_every": 0,
    "checkpoint_every": 0,
    "eval_prompts": 1,
    "samples": 0,
    "max_episode_turns": 1,
    "max_episode_tokens": 1,
    "episodes_at_once": 1,
    "endpoint_port": 0,
}
# Of a setting that the run finds: sigma, lr, groups
AUTO: Final = "auto"
# Largest number of seconds, about three years: every timer of the system accepts it.
_LONGEST = 1e8
# For each optimizer: the settings that hold its numbers, and what the optimizer calls them.
_NUMBERS = {
    "sgd": {},
    "momentum": {"momentum": "beta", "momentum_window": "window"},
    "adam": {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_eps": "eps"},
}


@accepts_trl_names
@dataclass
class ESConfig:
    """Settings of a run. The defaults are the paper's for Countdown (arXiv 2509.24372). Each field is also an option of
    `esfast train`. TRL's names are accepted where they mean the same (learning_rate, max_steps, eval_steps, ...).

    Raises:
        TypeError, ValueError: a field is unknown or out of range; the message names it and says what to do.
    """

    output_dir: str = option("runs/esfast", "run folder: config, metrics, journal, curves and the tuned model")
    seed: int = option(0, "seed of the run: it determines the noise and the order of the prompts")
    generations: int = option(500, "number of updates")
    population_size: int = option(30, "members (perturbed models) in a generation")
    sigma: float | Literal["auto"] = option(
        1e-3,
        "standard deviation of the perturbation, in units of the weights; auto: found before the run, as --groups "
        "auto is, unless groups are named",
    )
    lr: float | Literal["auto"] = option(
        5e-4, "step size of the update (the paper's alpha); auto: found before the run"
    )
    sigma_schedule: str = option("constant", "how sigma changes over the generations", tuple(SCHEDULES))
    lr_schedule: str = option("constant", "how lr changes over the generations", tuple(SCHEDULES))
    sigma_final_fraction: float = option(0.1, "final sigma of a schedule, as a fraction of sigma")
    lr_final_fraction: float = option(0.1, "final lr of a schedule, as a fraction of lr")
    warmup_generations: int = option(0, "number of first generations in which lr rises to its full value")
    mirrored: bool = option(False, "members come in pairs, +noise and -noise")
    noise: str = option("gaussian", "kind of noise", KINDS)
    rank: int = option(1, "rank of low_rank noise, 1 to 256")
    shaping: str = option("zscore", "how rewards become the weights of the noise", tuple(SHAPINGS))
    weights: str = option(
        "base",
        "where members are written from. base: exact, one extra copy; master: exact with float32 updates, two copies; "
        "host: exact, the copy is in host memory; inplace: no copy, drifts; auto: the most exact that fits",
        (*WEIGHT_MODES, "auto"),
    )
    rounding: str = option("nearest", "rounding of updates to 16-bit weights", ROUNDINGS)
    perturb_rounding: str = option("nearest", "rounding of members to 16-bit weights", ROUNDINGS)
    weight_decay: float = option(0.0, "each update first moves the weights towards decay_to, by lr times this fraction")
    decay_to: str = option("zero", "target of weight decay; initial takes a copy of the initial weights", DECAY_TO)
    optimizer: str = option(
        "sgd",
        "sgd: the paper's; momentum: takes no memory, replays seeds; adam: takes 8 bytes a weight; or one of your own, "
        "NAME:field=value,...",
    )
    momentum: float = option(Momentum.beta, "momentum: fraction of the velocity that a generation keeps")
    momentum_window: int = option(Momentum.window, "momentum: generations whose seeds an update replays")
    adam_beta1: float = option(Adam.beta1, "adam: fraction of the gradient's running mean that a step keeps")
    adam_beta2: float = option(Adam.beta2, "adam: fraction of the squared gradient's running mean that a step keeps")
    adam_eps: float = option(Adam.eps, "adam: added to the root of the second mean")
    include: list[str] | None = option(None, "name patterns of the weights to tune (default: all)")
    exclude: list[str] | None = option(None, "name patterns of weights to leave unchanged, such as *embed* or *norm*")
    groups: list[str] | None = option(
        None,
        "give weights their own sigma and lr, as factors of the run's: PATTERN:sigma=X,lr=Y, such as "
        "*embed*:lr=0.1; the first pattern that matches a name counts; auto: in proportion to each tensor's RMS "
        "(default: with --sigma auto that, else all weights alike, as with '*:sigma=1')",
    )
    prompts_per_generation: int = option(200, "prompts that every member of a generation answers")
    prompts_per_member: str = option(
        "shared",
        "all members answer the same prompts, or each (of mirrored ones each pair) has its own",
        ("shared", "own"),
    )
    max_completion_length: int = option(1024, "longest response, in tokens")
    temperature: float = option(0.0, "temperature of sampled responses; 0: greedy, as in the paper")
    num_generations: int = option(1, "responses to each prompt; all are scored; more than 1 needs a temperature")
    decoding: str = option(
        "auto",
        "how Transformers generates: plain, static (one cache; several members at once: from CUDA graphs), continuous "
        "(batching); auto: plain on a CPU, on a GPU the fastest that works (several members at once: static)",
        DECODINGS,
    )
    batch_size: int | None = option(None, "most prompts generated at once (default: what fits a quarter of the memory)")
    members_at_once: str = option(
        "auto",
        "members that answer in one batch, or play episodes at the same time; 1: one after another; auto: as many as "
        "fit, where that is faster",
    )
    chat_template_kwargs: dict | None = option(
        None, "variables of the tokenizer's chat template, such as enable_thinking; as JSON on the command line"
    )
    reward_weights: list[float] | None = option(None, "a factor for each reward function (default: 1)")
    reward_workers: int = option(0, "processes that score while the next member generates; 0: this process scores")
    reward_timeout: float = option(300.0, "seconds that a reward function may take for one member's completions")
    max_episode_turns: int = option(64, "answers of the model that an environment's episode may ask for")
    max_episode_tokens: int | None = option(
        None, "tokens that the model may generate in an episode (default: any number)"
    )
    episode_timeout: float = option(300.0, "seconds that an episode may take, without those in which the model answers")
    episodes_at_once: int = option(256, "episodes that run at the same time, of all members that play")
    endpoint_port: int | None = option(
        None,
        "also serve the members on this port of 127.0.0.1, 0 for any, for agents that are programs of their own "
        "(default: only in memory)",
    )
    eval_every: int = option(10, "generations between evaluations; 0: evaluate only before and after the run")
    eval_prompts: int = option(500, "held-out prompts of an evaluation")
    kl_to_base: bool = option(
        False, "also measure the KL divergence from the base model in evaluations (takes a copy in host memory)"
    )
    save_best: bool = option(True, "keep the model with the best evaluation reward in the run folder's best/")
    samples: int = option(8, "responses of each evaluation to keep in samples.jsonl")
    report_to: list[str] | None = option(None, "loggers for metrics besides metrics.jsonl", (*LOGGERS, "none"))
    on_reward_error: str = option(
        "stop", "what to do when a reward function fails for a member; skip: leave the member out", ("stop", "skip")
    )
    checkpoint_every: int = option(50, "generations between checkpoints, which make a resume faster; 0: no checkpoints")
    resume: bool = option(False, "continue the run in the run folder, if there is one")
    progress: bool = option(True, "show the progress bar")

    def __post_init__(self):
        self.members_at_once = str(self.members_at_once).strip().lower()
        self.groups = [str(g) if isinstance(g, Group) else g for g in _listed(self.groups)] or None
        self.check()

    def check(self) -> None:
        """Converts every field to its type; TypeError or ValueError for one that is out of range. Call it after
        changing fields."""
        self._take_optimizer()
        convert_fields(self)
        self.report_to = check_report_to(self.report_to) or None
        self.groups = [AUTO if g.strip().lower() == AUTO else g for g in self.groups or ()] or None
        if not self.output_dir.strip() or "\0" in self.output_dir:
            raise BadValue(f"ESConfig.output_dir: expected the name of a folder, got {self.output_dir!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None:
                check_int(f"ESConfig.{name}", value, least, 2**63)
        self._check_members_at_once()
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
        for name in ("reward_timeout", "episode_timeout"):
            if not 0 < getattr(self, name) <= _LONGEST:
                raise BadValue(
                    f"ESConfig.{name}: expected seconds, more than 0 and at most {_LONGEST:g}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.endpoint_port is not None:
            check_int("ESConfig.endpoint_port", self.endpoint_port, 0, 2**16)
        if self.num_generations > 1 and self.temperature == 0:
            raise BadValue(
                f"ESConfig.num_generations: {self.num_generations} equal responses to a prompt at temperature 0; "
                "leave it at 1, or set a temperature (GRPO's is 1.0)"
            )
        if AUTO in (self.groups or ()) and self.groups != [AUTO]:
            raise BadValue(
                f"ESConfig.groups: 'auto' makes a group of every kind of tensor, and stands alone, got {self.groups}; "
                "to change some of its groups, take those that `esfast tune --groups auto --json` prints"
            )
        try:
            check_groups(() if self.groups == [AUTO] else self.groups or ())
        except EsfastError as error:
            raise BadValue(f"ESConfig.groups: {error}") from None
        for name in _NUMBERS:
            self._optimizer(name)
        for name in ("sigma", "lr"):
            given, *schedule = (getattr(self, name + s) for s in ("", "_schedule", "_final_fraction"))
            number = 1.0 if given == AUTO else check_positive(f"ESConfig.{name}", given)
            check_schedule(f"ESConfig.{name}", number, *schedule)
        if self.lr != AUTO and self.lr * self.weight_decay > 1:
            raise BadValue(
                f"ESConfig.weight_decay: {self.weight_decay} times lr {self.lr} is more than all of the weights"
            )

    def _check_members_at_once(self) -> None:
        given = self.members_at_once
        if given != "auto" and not (given.isascii() and given.isdecimal() and int(given) > 0):
            raise BadValue(f"ESConfig.members_at_once: expected 'auto' or a number, at least 1, got {given!r:.80}")

    def _take_optimizer(self) -> None:
        """Turns an optimizer that is given as an object, or with its numbers, into a string. One that has settings of
        its own here sets them."""
        if isinstance(self.optimizer, str) and self.optimizer in _NUMBERS:
            return
        try:
            given = check_optimizer(self.optimizer)
        except (BadType, BadValue) as error:
            raise type(error)(f"ESConfig.{error}") from None
        for mine, theirs in _NUMBERS.get(given.name, {}).items():
            setattr(self, mine, getattr(given, theirs))
        self.optimizer = given.name if given.name in _NUMBERS else given.text

    def check_resumes(self, found: Mapping[str, Any]) -> None:
        """ValueError if a run with the settings `found` can't continue with these; the message names what differs."""
        may_change = set(_MAY_CHANGE)
        if self.lr_schedule == self.sigma_schedule == "constant" and not self.warmup_generations:
            may_change.add("generations")
        # What a run has found is what "auto" means when it goes on.
        may_change |= set(self.open_questions())
        fixed = {name: value for name, value in found.items() if name not in may_change}
        # Runs that don't say it are older than this setting.
        fixed.setdefault("prompts_per_member", "shared")
        for name, theirs in convert_given(type(self), fixed).items():
            mine = getattr(self, name)
            if theirs != mine:
                raise BadValue(f"resume: the run has {name} {theirs!r:.200}, asked for is {mine!r:.200}")

    def open_questions(self) -> list[str]:
        """The settings that the run must find: of sigma, lr and groups those that are "auto". With sigma "auto" groups
        are too, unless some are named."""
        asked = [name for name in ("sigma", "lr", "groups") if getattr(self, name) in (AUTO, [AUTO])]
        return asked + (["groups"] if self.implies_groups else [])

    @property
    def implies_groups(self) -> bool:
        """Whether groups are to be found because sigma is. Weights that are elsewhere then have none."""
        return self.sigma == AUTO and self.groups is None

    @property
    def members_per_batch(self) -> int:
        """How many members answer the same prompts: all, or with prompts of a member's own 1, mirrored 2."""
        if self.prompts_per_member == "shared":
            return self.population_size
        return 2 if self.mirrored else 1

    def es_settings(self) -> dict[str, Any]:
        """Arguments of `esfast.ES`. sigma and lr are left out as long as they are "auto"."""
        same = {name: value for name in _OF_ES if (value := getattr(self, name)) != AUTO or name == "weights"}
        return same | {"optimizer": self.make_optimizer(), "groups": self.groups or ()}

    def make_optimizer(self) -> Optimizer:
        return self._optimizer(self.optimizer) if self.optimizer in _NUMBERS else check_optimizer(self.optimizer)

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
        """sigma and lr of a generation (0, 1, ...). They depend on its number alone, so a run can resume anywhere."""
        assert self.sigma != AUTO and self.lr != AUTO
        sigma = SCHEDULES[self.sigma_schedule](self.sigma, generation, self.generations, self.sigma_final_fraction)
        lr = SCHEDULES[self.lr_schedule](
            self.lr, generation, self.generations, self.lr_final_fraction, self.warmup_generations
        )
        return sigma, lr


def _listed(value) -> list:
    if value is None:
        return []
    return [value] if isinstance(value, (str, Group)) or not isinstance(value, Iterable) else list(value)
