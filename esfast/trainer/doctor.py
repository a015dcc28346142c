"""Doctor: says in one plain line what is wrong with a run, and what to change.

Each rule looks at the metrics that a run records (metrics.jsonl). A trainer asks the doctor after every generation; a
report asks it about runs that are over. Rules look for illnesses, not for slow progress: they are silent about a run
that learns.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..utils.stats import mean

# Generations that a rule looks at: an illness must last that long.
WINDOW = 5
# Generations, at least, in which something must be learned; and a quarter of the run.
PATIENCE = 50
# Standard errors that count as a change.
SURE = 3.0
# Members "answer alike" if at least this fraction of them has one and the same reward.
ALIKE = 0.8
# Responses count as cut off if their mean length is at least this fraction of the limit.
CUT = 0.95
# The fraction of members without a reward from which on the doctor speaks.
FAILED = 0.1
# One member "dominates" if its z-score is at least this fraction of sqrt(N - 1), the largest possible one, which it has
# if all others are equal.
ALONE = 0.9
# Updates are "rounded away" if at most this fraction of their length is left after rounding.
LOST = 0.3
# Nats a token. At 1.0 the model gives the tokens that it writes on average e times the probability that the base model
# gives them.
FAR = 1.0


class Finding(NamedTuple):
    """An illness: the generation after which it was found, its name in RULES, and what to say."""

    generation: int
    name: str
    text: str

    def __str__(self) -> str:
        return f"generation {self.generation}: {self.text}"


class Doctor:
    """Looks at a run row by row, and names each illness once.

    doctor = Doctor(config)               # settings by name, as in config.yaml
    for row in rows:                      # as in metrics.jsonl
        findings = doctor(row)
    """

    def __init__(self, config: Mapping[str, Any]):
        self.seen = Seen(config)
        self._named: set[str] = set()

    def __call__(self, row: Mapping[str, Any]) -> list[Finding]:
        """The illnesses that this row shows for the first time."""
        self.seen.note(row)
        generation = int(_numbers(row).get("generation", 0))
        found = [Finding(generation, name, text) for name, rule in RULES.items() if (text := rule(self.seen))]
        new = [f for f in found if f.name not in self._named]
        self._named |= {f.name for f in new}
        return new


def diagnose(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[Finding]:
    """The findings of a whole run, in the order in which the run would have named them."""
    doctor = Doctor(config)
    return [finding for row in rows for finding in doctor(row)]


class Seen:
    """The metrics that rules look at.

    early, recent       rows of the first and of the last WINDOW generations
    lowest              the lowest reward of a member so far
    first, best, last   evaluations: of the base model, the one with the best reward, the newest; {} if there is none
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.lowest = math.inf
        self.early: list[dict[str, float]] = []
        self.recent: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self.first: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def note(self, row: Mapping[str, Any]) -> None:
        numbers = _numbers(row)
        if "reward_mean" in numbers:
            self.early += [numbers] if len(self.early) < WINDOW else []
            self.recent.append(numbers)
            self.lowest = min(self.lowest, numbers.get("reward_min", math.inf))
        if "eval_reward" in numbers:
            self.first = self.first or numbers
            self.best = numbers if numbers["eval_reward"] > self.best.get("eval_reward", -math.inf) else self.best
            self.last = numbers

    def all(self, *names: str) -> list[tuple[float, ...]]:
        """The values of these metrics in the recent generations. [] before WINDOW generations are done, or if a row
        lacks a metric."""
        rows = [tuple(row[name] for name in names) for row in self.recent if row.keys() >= set(names)]
        return rows if len(rows) == WINDOW else []

    def mean(self, name: str) -> float:
        """The metric's mean over the recent generations. NaN as long as it is unknown, so that any comparison is
        False."""
        return mean([value for (value,) in self.all(name)])

    def newest(self, name: str) -> float:
        """The metric in the last generation; NaN if it is unknown."""
        return self.recent[-1].get(name, math.nan) if self.recent else math.nan

    def number(self, name: str) -> float:
        """A setting that is a number; NaN if it is not set or something else."""
        return _numbers(self.config).get(name, math.nan)

    @property
    def learns(self) -> bool:
        """Whether training rewards have risen since the run began, by more than members differ."""
        spread = mean([row.get("reward_std", 0.0) for row in self.early])
        return self.mean("reward_mean") > mean([row["reward_mean"] for row in self.early]) + spread

    def change(self, before: Mapping[str, float], after: Mapping[str, float]) -> float:
        """The change of the held-out reward between two evaluations in standard errors; NaN without both."""
        rewards, errors = ([row.get(n, math.nan) for row in (before, after)] for n in ("eval_reward", "eval_reward_se"))
        difference, error = rewards[1] - rewards[0], math.hypot(*errors)
        return difference / error if error else math.copysign(math.inf, difference) if difference else 0.0


# ---- the rules: each returns what to say, or "" ----------------------------------------------------------------------


def _nothing(seen: Seen) -> str:
    if not _all_equal(seen) or seen.learns or seen.last.get("eval_reward_se", math.nan) != 0:
        return ""
    return (
        f"every member, and the model itself, gets the reward {seen.mean('reward_mean'):.4g} for every prompt: there "
        "is nothing to learn from. If a larger sigma changes nothing, take easier prompts, a reward that gives part "
        "marks, or a model that succeeds at times"
    )


def _alike(seen: Seen) -> str:
    alike = seen.mean("same_reward") >= ALIKE or _all_equal(seen)
    if not alike or seen.learns or _nothing(seen) or _dominated(seen) or _broken(seen):
        return ""
    return (
        "members answer alike: most of them get the same reward, so an update has little to go by. Raise sigma, to "
        f"{4 * seen.mean('sigma'):.2g} for example; or take more prompts a generation"
    )


def _broken(seen: Seen) -> str:
    bound = seen.last.get("eval_reward", math.nan) - SURE * seen.last.get("eval_reward_se", math.nan)
    best = max((reward for (reward,) in seen.all("reward_max")), default=math.nan)
    half = (seen.last.get("eval_reward", math.nan) + seen.lowest) / 2
    if not best < bound or not seen.mean("reward_mean") < half:
        return ""
    return (
        f"members are broken: the best of {WINDOW} generations gets {best:.4g}, and the unperturbed model "
        f"{seen.last['eval_reward']:.4g} on held-out prompts. Lower sigma, to {seen.mean('sigma') / 4:.2g} for example"
    )


def _rounded_away(seen: Seen) -> str:
    kept = [share for (share,) in seen.all("update_kept")]
    if not kept or max(kept) > LOST:
        return ""
    return (
        f"updates are lost: {mean(kept):.0%} of their length is left after rounding to the weights' 16 bits. Take "
        f"weights='master' or rounding='stochastic'; or raise lr, now {seen.mean('lr'):.2g}"
    )


def _step_too_long(seen: Seen) -> str:
    if not seen.change(seen.best, seen.last) < -SURE or _overfits(seen):
        return ""
    lr = seen.newest("lr")
    lower = f"Lower lr, to {lr / 3:.2g} for example" if lr > 0 else "Lower lr"
    return (
        f"the held-out reward has fallen from {seen.best['eval_reward']:.4g} to {seen.last['eval_reward']:.4g}: steps "
        f"are too long. {lower}, or let a schedule do it "
        "(lr_schedule='cosine'); the best model so far is in best/"
    )


def _overfits(seen: Seen) -> str:
    # Of members that are broken the reward may rise, too, far below the model's.
    rises = seen.learns and seen.mean("reward_mean") > seen.first.get("eval_reward", math.nan)
    if not seen.change(seen.first, seen.last) < -SURE or not rises:
        return ""
    return (
        "the training reward rises, and the held-out reward is below the base model's: the model learns its training "
        "prompts by heart. Take more of them, or fewer generations"
    )


def _cut_off(seen: Seen) -> str:
    limit = seen.number("max_completion_length")
    # More than the limit is an episode of several responses.
    if not CUT * limit <= seen.mean("response_tokens") <= limit:
        return ""
    return (
        f"nearly all responses are cut off at the limit of {limit:.0f} tokens. Raise max_completion_length; if the "
        "model never ends its answers, check its chat template and its end token"
    )


def _hacked(seen: Seen) -> str:
    accuracy = [row.get("eval_accuracy", math.nan) for row in (seen.first, seen.last)]
    sample = max(seen.number("eval_prompts"), 1)
    error = math.sqrt(sum(max(0.0, a * (1 - a)) for a in accuracy) / sample)
    if not accuracy[0] - accuracy[1] > max(0.05, SURE * error) or not seen.change(seen.first, seen.last) > SURE:
        return ""
    return (
        f"the reward rises while accuracy falls, from {accuracy[0]:.3f} to {accuracy[1]:.3f}: the model games the "
        "reward. Read samples.jsonl, and change the reward function so that wrong answers don't pay"
    )


def _far(seen: Seen) -> str:
    apart = seen.last.get("eval_kl_to_base", math.nan)
    if not apart > FAR:
        return ""
    return (
        f"the model is far from the base model, {apart:.2g} nats a token: look in samples.jsonl whether its text is "
        "still language. Lower lr, or pull it back: weight_decay with decay_to='initial'"
    )


def _fails(seen: Seen) -> str:
    aside = sum(row.get("set_aside", 0.0) for row in seen.recent)
    members = len(seen.recent) * seen.number("population_size")
    if len(seen.recent) < WINDOW or not aside >= FAILED * members:
        return ""
    return (
        f"{aside / members:.0%} of the members got no reward: the warnings of this log say why. Mend the reward "
        "function; or lower sigma, if logits were not finite"
    )


def _dominated(seen: Seen) -> str:
    rows = seen.all("reward_mean", "reward_max", "reward_min", "reward_std")
    most = math.sqrt(max(seen.number("population_size") - 1, 0.0))
    # Among few members one is always far from the others.
    if not rows or not most > 2.5:
        return ""
    if not all(std > 0 and max(top - m, m - low) >= ALONE * most * std for m, top, low, std in rows):
        return ""
    return (
        "one member decides the updates: it alone has another reward than the rest. Take shaping='centered_rank', more "
        "prompts a generation, or a reward that gives part marks"
    )


def _silent(seen: Seen) -> str:
    if not (seen.last.get("eval_length", math.nan) < 1 <= seen.first.get("eval_length", math.nan)):
        return ""
    return (
        "the model has stopped answering: held-out responses are empty. Lower lr; and if the reward pays for short "
        "text, let it pay for nothing less than an answer"
    )


def _stands_still(seen: Seen) -> str:
    done = seen.recent[-1].get("generation", 0.0) if seen.recent else 0.0
    if not done >= max(PATIENCE, seen.number("generations") / 4) or seen.learns or seen.last is seen.first:
        return ""
    if not abs(seen.change(seen.first, seen.last)) < SURE:
        return ""
    return (
        f"in {done:.0f} generations neither the training reward nor the held-out reward has risen. Let the run "
        "find sigma and lr (sigma='auto', lr='auto'); if it did, raise them; with few members or prompts take more"
    )


# The rules by name, in the order in which illnesses of one generation are reported.
RULES: dict[str, Callable[[Seen], str]] = {
    "nothing to learn from": _nothing,
    "members answer alike": _alike,
    "members are broken": _broken,
    "updates rounded away": _rounded_away,
    "steps too long": _step_too_long,
    "overfitting": _overfits,
    "responses cut off": _cut_off,
    "reward gamed": _hacked,
    "far from the base model": _far,
    "rewards fail": _fails,
    "one member dominates": _dominated,
    "empty responses": _silent,
    "no progress": _stands_still,
}


def _all_equal(seen: Seen) -> bool:
    rows = seen.all("reward_min", "reward_max")
    return bool(rows) and all(low == high for low, high in rows)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row. Rows of old runs may hold anything."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
