"""Random numbers that a run draws besides its noise: the order of its rows, and the problems that tasks make up.

They come from Philox, and are frozen, as the noise is: the same seed gives the same rows in the same order with any
version of Python and NumPy, whose own generators do not promise this. DRAWS_VERSION is the version of these draws. A
run folder holds it (identity.json), so that a resumed run notices if its rows would now be drawn differently.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from ..utils.errors import BadValue
from ..utils.settings import check_int
from .noise import DOMAINS, check_seed, philox

DRAWS_VERSION = 1

_T = TypeVar("_T")


class RandomStream:
    """A sequence of random uint32 words. Each method says how many words it takes.

    Word i is word i % 4 of Philox with the seed as its key and the counter (i // 4, `index`, DOMAINS[domain]).

    seed    0 <= seed < 2**64, or a text: then the first 8 bytes of its SHA-256, the lowest first
    domain  a key of esfast.core.noise.DOMAINS: what the numbers are for
    index   0 <= index < 2**32, tells streams of one seed and domain apart
    """

    def __init__(self, seed: int | str, domain: str, index: int = 0):
        seed = seed_of(seed) if isinstance(seed, str) else check_seed(seed)
        self._words = _words(seed, DOMAINS[domain], check_int("index", index, 0, 2**32))

    def below(self, n: int) -> int:
        """A uniform integer from 0 to n - 1. Takes one word if n <= 2**32, else several, the lowest first. Numbers
        above the largest multiple of n are drawn again."""
        if n < 1:
            raise BadValue(f"n: expected at least 1, got {n}")
        count = max(1, -(-(n - 1).bit_length() // 32))
        while True:
            value = 0
            for i in range(count):
                value |= next(self._words) << 32 * i
            if value < (1 << 32 * count) // n * n:
                return value % n

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, share: float) -> bool:
        """True with this probability, 0 to 1. Takes one word."""
        return next(self._words) < share * 2**32

    def choice(self, values: Sequence[_T]) -> _T:
        return values[self.below(len(values))]

    def sample(self, values: Sequence[_T], count: int) -> list[_T]:
        """`count` of the values, none twice, in random order: the first ones of a Fisher-Yates shuffle."""
        left = list(values)
        for i in range(count):
            j = i + self.below(len(left) - i)
            left[i], left[j] = left[j], left[i]
        return left[:count]


def _words(seed: int, domain: int, index: int) -> Iterator[int]:
    # The number of Philox calls made at once. It begins small, since many streams are short.
    block, blocks = 0, 16
    while True:
        drawn = philox(seed, np.arange(block, block + blocks), index, domain)
        yield from np.stack(drawn, axis=1).ravel().tolist()
        block, blocks = block + blocks, min(2 * blocks, 1024)


def seed_of(text: str) -> int:
    """64 bits for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


# Cached: every generation asks for the permutation of the present epoch.
@functools.lru_cache(2)
def permutation(size: int, seed: int, domain: str, index: int = 0) -> np.ndarray:
    """The numbers 0 to size - 1 in random order: int64, not to be written to.

    Number i stands where its key comes among all keys in ascending order (equal keys: by i). Its key is word 0 plus
    2**32 times word 1 of Philox with the counter (i, `index`, DOMAINS[domain]): whole arrays are drawn at once.
    """
    low, high, _, _ = philox(check_seed(seed), np.arange(size), check_int("index", index, 0, 2**32), DOMAINS[domain])
    order = np.argsort(low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32), kind="stable")
    order.flags.writeable = False
    return order
