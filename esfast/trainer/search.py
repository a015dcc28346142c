"""Finds sigma, and how far the weights may wander, from how members answer: pure functions of rewards.

For each sigma of a ladder a few mirrored pairs answer the same prompts. Their rewards R[pair, sign, prompt] say:

loss     by how much the mean reward of members is below the unperturbed model's, as a fraction of what can be lost:
         the model's reward minus that of members whose weights are mostly noise. 0: nothing, 1: all
signal   d = (R+ - R-) / 2 is the derivative along a pair's noise, times sigma. Signal is the part of the variance of d
         over the pairs on which prompts agree: the mean of d(a) d(b) over all pairs of different prompts a, b
noise    the part of the variance of d that would change with other prompts
gain     signal / sqrt(signal + noise): what the reward gains by a step of a given length along the estimated gradient,
         up to a factor that does not depend on sigma. (The estimate from n pairs has a cosine to the gradient of
         sqrt(n / dimension * signal / (signal + noise)), and the slope along the gradient is sqrt(signal) / sigma.)

Members of every sigma have the same seeds, so that sigmas are compared on the same directions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# Two values of `loss`: members that lose more than BROKEN are broken; the noise of all updates together may cost
# TOLERATED.
BROKEN, TOLERATED = 0.5, 0.1
# Standard errors by which the model must be better than noise. With less, a fraction of the difference means nothing.
SURE = 2.0
# Standard errors of a signal that counts: beside what members lose, and alone.
SEEN, CLEAR = 1.0, 3.0
# The first, coarse ladder of sigmas: the factor between two, and how many at most.
FACTOR, STEPS = 4.0, 6
# Pairs at each sigma: of the coarse ladder, and at most and at least of the fine one.
COARSE_PAIRS, MOST_PAIRS, LEAST_PAIRS = 1, 12, 2
# Steps above the weights' scale, as long as members there lose nothing.
STEPS_UP = 2
# Sigmas of the fine ladder, in units of the largest sigma of the coarse one that does not break members.
FINE = (2.0, 1.0, 0.5, 0.25)
# With fewer pairs than ENOUGH_PAIRS signals are not compared. A larger sigma must have at least the fraction NEARLY of
# the largest gain.
ENOUGH_PAIRS, NEARLY = 6, 0.7


@dataclass(frozen=True, eq=False)
class Look:
    """The rewards of some pairs at one sigma: `rewards` has the shape (pairs, 2, prompts), `base` (prompts)."""

    sigma: float
    base: np.ndarray
    rewards: np.ndarray

    @property
    def pairs(self) -> int:
        return len(self.rewards)

    @property
    def dead(self) -> bool:
        """Whether a member gave no text, or there is no prompt for which all members got a reward."""
        missing = np.isnan(self.rewards)
        return bool(missing.all(2).any() or (np.isnan(self.base) | missing.any((0, 1))).all())

    def _told(self) -> tuple[np.ndarray, np.ndarray]:
        """The rewards (of the model, of the pairs) for the prompts for which the model and all members got a reward."""
        both = ~np.isnan(self.base) & ~np.isnan(self.rewards).any((0, 1))
        return self.base[both], self.rewards[:, :, both]

    @property
    def mean(self) -> float:
        return float(self._told()[1].mean()) if not self.dead else math.nan

    @property
    def lost(self) -> tuple[float, float]:
        """By how much the members' mean reward is below the model's, compared prompt by prompt, and the standard
        error."""
        base, rewards = self._told()
        apart = base - rewards.mean((0, 1))
        if self.dead:
            return math.inf, 0.0
        return float(apart.mean()), float(apart.std(ddof=1) / math.sqrt(len(apart))) if len(apart) > 1 else 0.0

    @property
    def by_chance(self) -> float:
        """The standard error that `lost` has if the model is no better than a member, so that any of them could be in
        its place (a permutation test). It holds, too, if the model succeeds on a few prompts of a dozen."""
        base, rewards = self._told()
        if self.dead:
            return 0.0
        everyone = np.concatenate([base[None], rewards.reshape(-1, len(base))])
        apart = everyone.std(0) * len(everyone) / (len(everyone) - 1)
        return math.sqrt((apart**2).sum()) / len(base)

    def _d(self) -> tuple[np.ndarray, np.ndarray]:
        """Each pair's mean of d over the prompts, and the variance of that mean."""
        rewards = self._told()[1]
        d = (rewards[:, 0] - rewards[:, 1]) / 2
        if d.shape[1] < 2:
            return d.sum(1), np.zeros(len(d))
        return d.mean(1), d.var(1, ddof=1) / d.shape[1]

    @property
    def slopes(self) -> np.ndarray:
        """Each pair's mean of d over the prompts."""
        return self._d()[0]

    @property
    def noise(self) -> float:
        return float(self._d()[1].mean()) if not self.dead else 0.0

    @property
    def signal(self) -> float:
        if self.dead:
            return 0.0
        mean, variance = self._d()
        return float((mean**2 - variance).mean())

    @property
    def gain(self) -> float:
        return self.signal / math.sqrt(self.signal + self.noise) if self.signal > 0 else 0.0

    def shows(self, errors: float) -> bool:
        """Whether the signal is more than so many of the standard errors that it has by chance alone."""
        return self.signal > errors * math.sqrt(2 / self.pairs) * self.noise

    @property
    def alike(self) -> bool:
        """Whether all members and the model got the same rewards."""
        base, rewards = self._told()
        return not self.dead and bool((rewards == base).all())


@dataclass(frozen=True)
class Found:
    """The result of a search.

    sigma      the sigma for members
    tolerated  how far noise may move the weights without harm, as a sigma
    looks      all measurements, in the order of sigma
    losses     the `loss` at each of them
    why        the reason for this sigma, in words
    learns     False if the members said nothing about sigma, which is then a guess
    """

    sigma: float
    tolerated: float
    looks: tuple[Look, ...]
    losses: tuple[float, ...]
    why: str
    learns: bool = True


def search(ask: Callable[[float, int], Look], scale: float, members: int) -> Found:
    """Searches for sigma with at most `members` members.

    ask      (sigma, pairs) -> Look: asks two members for each pair, and in the first call also the unperturbed model,
             which counts as a member
    scale    root mean square of the weights; members of this sigma are mostly noise
    """
    guess, least = scale / 10, 2 * LEAST_PAIRS * len(FINE)
    if members < 1 + 2 * COARSE_PAIRS * 3 + least:
        return Found(guess, guess, (), (), f"{_TOO_SHORT}: {_GUESSED}", False)
    left = members - 1

    def look(sigma: float, pairs: int) -> Look:
        nonlocal left
        left -= 2 * pairs
        looks.append(ask(sigma, pairs))
        return looks[-1]

    looks: list[Look] = []
    near, floor = look(scale / 8, COARSE_PAIRS), look(scale, COARSE_PAIRS)
    if near.alike and floor.alike and len(set(floor.base[~np.isnan(floor.base)])) <= 1:
        return _found(looks, floor, guess, guess, f"{_NOTHING}: {_GUESSED}", False)
    # Of adapters the RMS says little, since half of their weights are zeros: members there are as good as the model. If
    # they are better, as where a reward pays for short text, larger sigmas tell no more.
    for _ in range(STEPS_UP):
        if not _is_floor(floor) and not _gains(floor) and left >= 4 * COARSE_PAIRS + least:
            floor = look(FACTOR * floor.sigma, COARSE_PAIRS)
    if all(each.alike for each in looks):
        return _found(looks, floor, guess, guess, f"{_NOTHING}: {_GUESSED}", False)
    if not _is_floor(floor):
        return _without_floor(look, looks, floor, scale, left)
    sigma = floor.sigma / FACTOR
    for _ in range(STEPS):
        tried = look(sigma, COARSE_PAIRS)
        if share(tried, floor) < BROKEN or left < 2 * COARSE_PAIRS + least:
            break
        sigma /= FACTOR
    pairs = min(MOST_PAIRS, left // (2 * len(FINE)))
    fine = [look(sigma * factor, pairs) for factor in FINE]
    tolerated = _tolerated(looks, floor)
    whole = [each for each in fine if share(each, floor) <= BROKEN]
    if not whole:
        sigma, why = min(each.sigma for each in looks), "members are broken at every sigma: the smallest that was tried"
        return _found(looks, floor, sigma, tolerated, why)
    best = max((each.gain for each in whole if each.shows(SEEN)), default=0.0)
    if not best or pairs < ENOUGH_PAIRS:
        # Without signal the updates' steps are noise. Members may then be as far from the model as these may lead.
        sigma = min(max(each.sigma for each in whole), tolerated)
        why = (
            "too few pairs to compare signals" if pairs < ENOUGH_PAIRS else "no signal beside the noise of the prompts"
        )
        return _found(looks, floor, sigma, tolerated, f"{why}: the largest sigma at which members lose a tenth at most")
    sigma = max(each.sigma for each in whole if each.gain >= NEARLY * best)
    return _found(looks, floor, sigma, tolerated, "the largest sigma with most of the gain that does not break members")


_GUESSED = "sigma is a guess, a tenth of the weights' root mean square"
_LEAST_GUESSED = "sigma is a guess, the smallest one at which members got other rewards than the model"
_TOO_SHORT = "the run is too short: the part of its responses that a search may take is too few members"
_NOTHING = "members get the same rewards as the model at every sigma, so there is nothing to learn from"
# Members that let a search compare signals.
ENOUGH = 1 + 2 * COARSE_PAIRS * (2 + STEPS_UP + 2) + 2 * ENOUGH_PAIRS * len(FINE)


def _without_floor(
    look: Callable[[float, int], Look], looks: list[Look], floor: Look, scale: float, left: int
) -> Found:
    """The search if the model gets no more than noise gets. No loss then says which sigmas are too large, so only a
    clear signal counts."""
    pairs = min(MOST_PAIRS, left // (2 * len(FINE)))
    fine = [look(scale / FACTOR * factor, pairs) for factor in FINE]
    clear = [each for each in fine if each.shows(CLEAR)] if pairs >= ENOUGH_PAIRS else []
    if not clear:
        why = "the model gets no more reward than noise does, and members differ by no more than chance"
        # Where all members get the model's rewards, no update has a direction.
        least = min((each.sigma for each in looks if not each.alike), default=0.0)
        guess, from_where = (least, _LEAST_GUESSED) if least > scale / 10 else (scale / 10, _GUESSED)
        return _found(looks, floor, guess, guess, f"{why}: {from_where}", False)
    best = max(each.gain for each in clear)
    sigma = max(each.sigma for each in clear if each.gain >= NEARLY * best)
    why = "the largest sigma with most of the gain; the model gets no more reward than noise does"
    return _found(looks, floor, sigma, sigma, why)


def share(look: Look, floor: Look) -> float:
    """The `loss` of members: the fraction that they lose of what the model gets above noise. 0 if that is nothing."""
    if look.dead:
        return 1.0
    if not _is_floor(floor):
        return 0.0
    # Members at the floor may have given no text at all. What can be lost is then measured from the lowest reward.
    most = floor.lost[0] if math.isfinite(floor.lost[0]) else float(np.nanmean(look.base) - np.nanmin(look.base))
    return look.lost[0] / most if most > 0 else float(look.lost[0] > 0)


def _is_floor(floor: Look) -> bool:
    return floor.lost[0] > max(0.0, SURE * floor.by_chance)


def _gains(look: Look) -> bool:
    """Whether members get surely more than the model."""
    lost, error = look.lost
    return lost < -SURE * error and lost < 0


def _tolerated(looks: Sequence[Look], floor: Look) -> float:
    """The sigma at which the loss becomes TOLERATED, interpolated between measurements over the logarithm of sigma.
    First the losses are made to rise with sigma (pool adjacent violators), weighted by their numbers of pairs."""
    ordered = sorted(looks, key=lambda each: each.sigma)
    blocks: list[list[float]] = []
    for each in ordered:
        blocks.append([share(each, floor), each.pairs, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            loss, weight, count = blocks.pop()
            other = blocks[-1]
            total = other[1] + weight
            blocks[-1] = [(other[0] * other[1] + loss * weight) / total, total, other[2] + count]
    rising = [loss for loss, _, count in blocks for _ in range(int(count))]
    below = [i for i, loss in enumerate(rising) if loss <= TOLERATED]
    if not below:
        # For small displacements the loss is proportional to sigma squared.
        return ordered[0].sigma * math.sqrt(TOLERATED / rising[0])
    # The last of them, the floor, has lost all.
    i = below[-1]
    part = (TOLERATED - rising[i]) / (rising[i + 1] - rising[i])
    return ordered[i].sigma * (ordered[i + 1].sigma / ordered[i].sigma) ** part


def _found(looks: Sequence[Look], floor: Look, sigma: float, tolerated: float, why: str, learns: bool = True) -> Found:
    ordered = sorted(looks, key=lambda each: (each.sigma, each.pairs))
    return Found(sigma, tolerated, tuple(ordered), tuple(share(each, floor) for each in ordered), why, learns)
