"""sigma="auto", lr="auto" and groups="auto": finds the numbers before the first generation.

The search (esfast.trainer.search) says how large sigma may be, and how far noise may carry the weights. lr follows from
the latter: the noise in the updates of the whole run, added up like a random walk, carries the weights that far. Steps
along the measured gradient are tried out, and taken back to the bit.

Everything that is found is a function of the run's settings, data, model and seed. In a team all processes ask members,
and process 0 decides.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.plan import Plan
from ..distributed.team import Team
from ..es.es import ES
from ..es.population import Member, member_seed
from ..es.shaping import SHAPINGS
from ..es.store import WeightStore
from ..rollout.engine import Engine
from ..rollout.sampling import LogitsError
from ..utils.errors import BadValue
from ..utils.interrupts import Stops
from ..utils.stats import mean
from . import scales
from .batches import Batch, Batches
from .config import AUTO, ESConfig
from .run_folder import RunFolder
from .schedules import SCHEDULES
from .scoring import Scoring
from .search import BROKEN, ENOUGH, Found, Look, search, share

log = logging.getLogger(__name__)

# The fraction of the run's responses that the search may take.
BUDGET = 0.05
# Prompts of a member, at most; and at least, if the run is so short that with more there would be too few members.
PROMPTS, LEAST_PROMPTS = 64, 8
# The search uses the seeds of the generation with this number, which no run reaches.
GENERATION = 2**32 - 1
# The assumed scale of weights that are not in this process. It is large, since the search goes down from it.
UNKNOWN_SCALE = 0.1
# A schedule of more generations than this is sampled, not added up generation by generation.
MOST_STEPS = 10_000
# The longest step of one generation, in units of the distance of its members.
LONGEST = 0.25
# Trial steps at most.
TRIALS = 2
# Characters of the longest bar of a table.
BAR = 12


@dataclass(frozen=True)
class Tuning:
    """What was found.

    settings   by name, the numbers to run with
    groups     that they were found with, as ESConfig.groups
    rows       a dict for each sigma that was tried, for `table`
    responses  that the search asked for, and `run` those of the whole run
    why        how sigma, and how lr was decided
    learns     False if members said nothing about sigma, so that the numbers are guesses
    """

    settings: dict[str, Any]
    groups: list[str] | None
    rows: list[dict[str, float]]
    responses: int
    run: int
    scale: float
    why: list[str]
    learns: bool

    def to_json(self) -> dict[str, Any]:
        return vars(self)

    def lines(self) -> list[str]:
        """The result in words."""
        found = ", ".join(f"{name} {value:.3g}" for name, value in self.settings.items())
        asked = f"{self.responses} responses, {self.responses / self.run:.1%} of the run's"
        return [f"found {found} ({asked})", *self.why]

    def table(self) -> str:
        """The evidence: what members answered at each sigma, and bars of what they keep and of the gain."""
        head = f"{'sigma':>9} {'of RMS':>7} {'pairs':>5} {'mean':>9} {'lost':>6} {'signal':>9} {'noise':>9} {'gain':>9}"
        most = max((row["gain"] for row in self.rows), default=0.0)
        return "\n".join([f"{head}  {'kept':{BAR}}  gain", *(_line(row, most) for row in self.rows)])


def _line(row: Mapping[str, float], most: float) -> str:
    numbers = [f"{row['sigma']:9.3g} {row['of_rms']:7.3f} {row['pairs']:5.0f} {row['mean']:9.4g} {row['lost']:6.0%}"]
    numbers += [f"{row[name]:9.2e}" for name in ("signal", "noise", "gain")]
    bars = [_bar(1 - row["lost"]), _bar(row["gain"] / most if most else 0.0)]
    return f"{' '.join(numbers)}  {bars[0]:{BAR}}  {bars[1]}".rstrip()


def _bar(share: float) -> str:
    return "#" * round(BAR * min(1.0, max(0.0, share)))


class Tuner:
    """Asks members, and tries steps. ES must be at its first generation."""

    def __init__(self, es: ES, scoring: Scoring, batches: Batches, config: ESConfig, engine: Engine, stops: Stops):
        self.es, self.scoring, self.config, self.engine, self.stops = es, scoring, config, engine, stops
        self._prefix, self._told = es.team.unique_prefix(), 0
        self.run = config.generations * config.population_size * batches(0).answered
        each = int(BUDGET * self.run / (ENOUGH + TRIALS)) // config.num_generations
        self.batch: Batch = batches.first(min(PROMPTS, max(LEAST_PROMPTS, each)) * config.num_generations)
        self.members = int(BUDGET * self.run / len(self.batch.texts))
        self.responses = 0
        self._base: np.ndarray | None = None

    def __call__(self) -> Tuning:
        es = self.es
        es.team.at_work = True
        scale = self._from_process_0(lambda: UNKNOWN_SCALE if es.plan is None else scales.rms(es.plan) or 1.0)
        found = search(self._ask, scale, self.members - TRIALS)
        tolerated, tried = self._tried(found)
        sigma = _short(found.sigma) if self.config.sigma == AUTO else self.config.sigma
        lr = _short(min(tolerated / self._walk(found), LONGEST * sigma / self._step(found)))
        if self.config.weight_decay:
            # More would be more than all of the weights.
            lr = min(lr, _short(0.9 / self.config.weight_decay))
        settings = {n: v for n, v in (("sigma", sigma), ("lr", lr)) if getattr(self.config, n) == AUTO}
        given = "" if "sigma" in settings else f"{sigma:g} is given; the search would take {found.sigma:.2g}: "
        why = [f"sigma: {given}{found.why}"]
        if "lr" in settings:
            why += [f"lr: the noise of all updates moves the weights as far as sigma {tolerated:.2g} does", *tried]
        why += self._of_groups()
        groups = self.config.groups
        tuned = Tuning(settings, groups, _rows(found, scale), self.responses, self.run, scale, why, found.learns)
        return Tuning(**self._from_process_0(tuned.to_json))

    def _of_groups(self) -> list[str]:
        factors = [group.sigma for group in self.es.rule.groups]
        span = " to ".join(f"{factor:g}" for factor in sorted({min(factors), max(factors)})) if factors else ""
        return [f"groups: {len(factors)}, whose weights have {span} times the run's sigma"] if factors else []

    def _from_process_0(self, value: Callable[[], Any]) -> Any:
        """The value that process 0 has, which JSON can hold."""
        self._told += 1
        key = f"{self._prefix}: search {self._told}"
        return json.loads(self.es.team.broadcast_from_rank0(key, lambda: json.dumps(value()).encode()))

    # ---- asking ------------------------------------------------------------------------------------------------------

    def _ask(self, sigma: float, pairs: int) -> Look:
        """Asks `pairs` mirrored pairs. The first call also asks the model itself, as a member without noise."""
        es, width = self.es, len(self.batch.texts)
        first = [] if self._base is not None else [Member(0, self._seed(0), 0)]
        members = first + [Member(len(first) + i, self._seed(i // 2), 1 - 2 * (i % 2)) for i in range(2 * pairs)]
        with es.trial(members, sigma) as population:
            mine = self.scoring.by_prompt(es, population, self.batch, self.stops)
            sent = {index * width + i: r for index, rewards in mine.items() for i, r in enumerate(rewards)}
            told = es.collect(sent, len(members) * width)
        rewards = np.array([math.nan if r is None else r for r in told]).reshape(len(members), width)
        self.responses += rewards.size
        if self._base is None:
            self._base, rewards = rewards[0], rewards[1:]
            if np.isnan(self._base).all():
                raise BadValue(
                    "sigma: the model itself gives no text that a reward function judges, so nothing can be found; "
                    "look at the reward function, or give sigma and lr as numbers"
                )
        return Look(sigma, self._base, rewards.reshape(pairs, 2, width))

    def _seed(self, pair: int) -> int:
        return member_seed(self.es.seed, GENERATION, pair)

    # ---- lr ----------------------------------------------------------------------------------------------------------

    def _step(self, found: Found) -> float:
        """How far the noise of one generation's update carries the weights, for an lr of 1 and in the units of
        sigma."""
        optimizer = self.es.rule.optimizer
        if not optimizer.lr_in_coeffs:
            return optimizer.travel
        return optimizer.travel * self._shaped(found) / math.sqrt(self.es.population_size)

    def _walk(self, found: Found) -> float:
        """How far the noise of all updates together carries the weights. The noise of generations is independent, so
        squares add up."""
        c = self.config
        every = max(1, c.generations // MOST_STEPS)
        shares = [
            SCHEDULES[c.lr_schedule](1.0, g, c.generations, c.lr_final_fraction, c.warmup_generations)
            for g in range(0, c.generations, every)
        ]
        return self._step(found) * math.sqrt(math.fsum(s * s for s in shares) * every)

    def _shaped(self, found: Found) -> float:
        """Root mean square of the weights that shaping gives to the rewards of a population: 1 with zscore."""
        rewards = [float(r) for look in found.looks for r in np.nanmean(look.rewards, 2).ravel() if math.isfinite(r)]
        shaped = SHAPINGS[self.config.shaping](rewards) if len(rewards) > 1 else []
        return math.sqrt(mean([z * z for z in shaped])) or 1.0 if shaped else 1.0

    def _tried(self, found: Found) -> tuple[float, list[str]]:
        """Steps of the length `tolerated` along the measured gradient must not break the model: halves it, if one
        does."""
        look = max(found.looks, key=lambda each: (each.pairs, each.sigma <= found.sigma, each.sigma), default=None)
        tolerated, words = found.tolerated, []
        if look is None or look.dead or not found.learns or not self.es.store.tries_steps:
            return tolerated, []
        along = look.slopes
        length = float(np.sqrt((along**2).sum()))
        floor = found.looks[-1]
        for _ in range(TRIALS):
            if not length or floor.sigma <= look.sigma:
                break
            terms = {self._seed(i): float(tolerated * d / length) for i, d in enumerate(along)}
            lost = share(Look(tolerated, look.base, self._after(terms)), floor)
            words.append(f"a step of that length along the gradient: {lost:.0%} lost, and taken back")
            if lost <= BROKEN:
                break
            tolerated /= 2
        return tolerated, words

    def _after(self, terms: Mapping[int, float]) -> np.ndarray:
        """The rewards after a step, as those of a pair. The processes that evaluate generate, process 0 scores."""
        es, team, batch = self.es, self.es.team, self.batch
        completions: list[str] | None = None
        if team.rank < team.shards:
            with team.working(), es.stepped(terms), contextlib.suppress(LogitsError):
                completions = self.engine.generate(batch.texts, *([] if batch.seeds is None else [batch.seeds]))
        self.responses += len(batch.texts)
        told = self._from_process_0(lambda: self.scoring.of(batch, completions))
        rewards = np.array(told, dtype=float)
        return np.stack([rewards, rewards])[None]


def _rows(found: Found, scale: float) -> list[dict[str, float]]:
    return [
        {
            "sigma": look.sigma,
            "of_rms": look.sigma / scale,
            "pairs": look.pairs,
            "mean": 0.0 if look.dead else look.mean,
            "lost": lost,
            "signal": look.signal,
            "noise": look.noise,
            "gain": look.gain,
        }
        for look, lost in zip(found.looks, found.losses, strict=True)
    ]


def _short(value: float) -> float:
    """Rounds to two digits: the search is no more precise than that, and two digits are easy to type."""
    return float(f"{value:.2g}")


def adopt(config: ESConfig, folder: RunFolder, team: Team, weights: Plan | WeightStore) -> None:
    """Fills in what is known before a run begins: of a run that goes on, the numbers that it found; of a new one its
    groups, which the journal's header holds. With sigma "auto", weights that are not in this process have no groups.
    ValueError if a number can't be known. All processes call it."""
    asked = config.open_questions()
    if not asked:
        return
    plan, implied = weights if isinstance(weights, Plan) else weights.plan, config.implies_groups
    if "groups" in asked and plan is None and not implied:
        raise BadValue("groups: 'auto' needs the weights in this process; name the groups, or leave them out")

    def known() -> bytes:
        found = folder.read_config() if folder.begun() else {}
        values = {name: found[name] for name in asked if name in found}
        # Weights of an older run, and those that were elsewhere, are alike.
        numbers = [name for name in asked if name != "groups" or not implied]
        if folder.begun() and (missing := [name for name in numbers if values.get(name) in (None, AUTO, [AUTO])]):
            raise BadValue(f"resume: {folder.config} does not say what {missing[0]} was found to be; give the number")
        if "groups" in asked and not folder.begun() and plan is not None:
            values["groups"] = scales.groups(plan)
        return json.dumps(values).encode()

    told = json.loads(team.broadcast_from_rank0(f"{team.unique_prefix()}: found before", known))
    for name, value in told.items():
        setattr(config, name, value)
    config.check()
