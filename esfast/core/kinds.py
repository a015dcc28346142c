"""The version of the noise, its kinds, and every other use of random numbers.

esfast.core.noise makes the numbers. This module is separate from it, so that settings can be checked without NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..utils.errors import BadValue
from ..utils.settings import check_int
from ..utils.suggest import did_you_mean

if TYPE_CHECKING:
    import numpy as np

NOISE_VERSION = 1


class Use(NamedTuple):
    """A use of random numbers: its `domain`, how many `numbers` one Philox call gives, and what they are."""

    domain: int
    numbers: int
    what: str


# Every use of random numbers. `domain` is the fourth counter word of Philox: one per use, so that no two uses share
# a number; kernels are told the kind of noise by it. csrc/noise.h and kernels/noise.py are tested against this table.
USES = {
    "gaussian": Use(0, 4, "noise: standard normal numbers"),
    "rademacher": Use(1, 128, "noise: signs, a bit each"),
    "stochastic_rounding": Use(2, 4, "words whose upper 16 bits decide which neighbour a weight is rounded to"),
    "member_seeds": Use(3, 1, "seeds of a generation's members"),
    "response_seeds": Use(4, 1, "seeds of a prompt's responses"),
    "tokens": Use(5, 4, "numbers that tokens are sampled with"),
    "low_rank": Use(6, 0, "noise: it draws none of its own, its factors are gaussian noise of virtual tensors"),
    "row_order": Use(7, 1, "the order in which a run takes its rows"),
    "problems": Use(8, 4, "what made-up problems are drawn from"),
}
DOMAINS = {name: use.domain for name, use in USES.items()}
NUMBERS_PER_BLOCK = {name: use.numbers for name, use in USES.items()}
# Kinds whose noise of an element depends on the element's number, and not on the tensor's shape.
ELEMENTWISE = ["gaussian", "rademacher"]
# All kinds of noise.
KINDS = [*ELEMENTWISE, "low_rank"]
MAX_RANK = 256
# Kinds that `add_kind` added: (the four words of each element's block, its place in the block) -> its noise.
ADDED: dict[str, Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]] = {}
FIRST_OF_OTHERS = 2**16


def add_kind(
    name: str, domain: int, numbers: int, draw: Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
) -> None:
    """Adds a kind of noise, for `noise=` everywhere. It runs on the reference backend, until kernels have it too.

    Args:
        name: what journals call it.
        domain: a number of its own from 2**16 to 2**32 - 1; smaller ones are esfast's.
        numbers: how many elements one Philox call serves, at least 1.
        draw: (words, place) -> noise, float32 of the same shape. `words` are four uint32 arrays, each element's Philox
            call; `place`, an int64 array of 0 to numbers - 1, says which of the call's elements it is.

    Raises ValueError if the name or the domain is taken by another kind. To add the same kind again replaces `draw`.
    """
    check_int("domain", domain, FIRST_OF_OTHERS, 2**32)
    check_int("numbers", numbers, 1, 2**31)
    use = Use(domain, numbers, "noise: added")
    if USES.get(name, use) != use or any(u.domain == domain for n, u in USES.items() if n != name):
        raise BadValue(f"noise: the name {name!r} or the domain {domain} is taken; choose others")
    USES[name], ADDED[name], DOMAINS[name], NUMBERS_PER_BLOCK[name] = use, draw, domain, numbers
    for kinds in (ELEMENTWISE, KINDS):
        if name not in kinds:
            kinds.append(name)


def check_seed(seed) -> int:
    return check_int("seed", seed, 0, 2**64)


def check_kind(kind: str) -> str:
    if not isinstance(kind, str) or kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise BadValue(f"noise: expected one of {', '.join(map(repr, KINDS))}, got {kind!r:.80}{hint and '.' + hint}")
    return kind


def check_rank(kind: str, rank: int, what: str = "rank") -> int:
    """Returns the rank: 1 to MAX_RANK, or 1 for a kind of noise without a rank. TypeError or ValueError, which names
    `what`, for anything else."""
    rank = check_int(what, rank, 1, MAX_RANK + 1)
    if rank != 1 and kind != "low_rank":
        raise BadValue(f"{what}: {kind!r} noise has no rank, got {rank}; take 'low_rank' noise or leave the rank out")
    return rank
