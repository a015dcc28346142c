"""Fitness shaping: how the rewards of a population become weights of its noise. Pure functions of lists of floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def zscore(rewards: Sequence[float]) -> list[float]:
    """(R - mean) / std for each of the N rewards, with the population's standard deviation (divided by N, not N - 1),
    as in the paper. N zeros if all rewards are equal."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    exponent = math.frexp(max(map(abs, rewards)))[1]
    # Scaling by a power of two is exact; afterwards squares neither overflow nor all become 0.
    rewards = [math.ldexp(r, -exponent) for r in rewards]
    # fsum gives the same bits everywhere, in any order.
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / len(rewards))
    return [(r - mean) / std for r in rewards]


def centered_rank(rewards: Sequence[float]) -> list[float]:
    """Ranks spread evenly over [-0.5, 0.5] (Salimans et al., arXiv 1703.03864); equal rewards share their mean rank."""
    ordered = sorted(rewards)
    first = {r: i for i, r in reversed(list(enumerate(ordered)))}
    last = {r: i for i, r in enumerate(ordered)}
    return [(first[r] + last[r]) / 2 / (len(rewards) - 1) - 0.5 for r in rewards]


def centred(rewards: Sequence[float], families: Sequence[int]) -> list[float]:
    """Each reward minus the mean of those with the same number in `families`. A family of one gets 0: nothing tells how
    hard its prompts are."""
    by_family: dict[int, list[float]] = {}
    for reward, family in zip(rewards, families, strict=True):
        by_family.setdefault(family, []).append(reward)
    means = {family: math.fsum(r / len(own) for r in own) for family, own in by_family.items()}
    return [reward - means[family] for reward, family in zip(rewards, families, strict=True)]


SHAPINGS: dict[str, Callable[[Sequence[float]], list[float]]] = {"zscore": zscore, "centered_rank": centered_rank}
