"""The strongest rivals of `esfast bench noise`: what anyone can write in an afternoon with plain PyTorch or NumPy.

All of them draw noise with the right distribution, different for each tensor (tests/test_bench_afternoon.py checks it),
round once, write a member from a copy of the weights in one pass, and sum an update in float32. They work in pieces
that stay in the cache, with as many threads as PyTorch has. None promises the same numbers on another machine, with
another number of threads, or for a shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

# Weights that are worked on at a time.
PIECE = 2**20
# Members whose signs one pass adds.
TOGETHER = 6
# The weights to start from; None: the same weights that are changed.
Tensors = Sequence[torch.Tensor] | None


class Drawn:
    """Draws noise into a buffer that is used again and again, each thread a part of it, and adds it with `alpha`."""

    def __init__(self, fill: Callable[[torch.Tensor, np.random.SeedSequence], None], in_weights_dtype: bool = False):
        self.fill, self.in_weights_dtype = fill, in_weights_dtype
        self._buffers: dict[torch.dtype, torch.Tensor] = {}
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)

    def perturb_(self, tensors: Sequence[torch.Tensor], seed: int, sigma: float, base: Tensors = None) -> None:
        for (key, piece), (_, source) in zip(_pieces(tensors), _pieces(base or tensors), strict=True):
            torch.add(source, self._noise(piece, (seed, *key)), alpha=sigma, out=piece)

    def update_(self, tensors: Sequence[torch.Tensor], seeds: Sequence[int], coeffs: Sequence[float]) -> None:
        for key, piece in _pieces(tensors):
            total = piece.float()
            for seed, coeff in zip(seeds, coeffs, strict=True):
                total.add_(self._noise(total, (seed, *key)), alpha=coeff)
            piece.copy_(total)

    def _noise(self, piece: torch.Tensor, key: tuple[int, ...]) -> torch.Tensor:
        dtype = piece.dtype if self.in_weights_dtype else torch.float32
        buffer = self._buffers.setdefault(dtype, torch.empty(PIECE, dtype=dtype))[: len(piece)]
        parts = buffer.split(-(-PIECE // self._threads))
        list(self._pool.map(self.fill, parts, (np.random.SeedSequence((*key, i)) for i in range(len(parts)))))
        return buffer


def _normal(part: torch.Tensor, seed: np.random.SeedSequence) -> None:
    part.normal_(generator=torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0])))


def _standard_normal(part: torch.Tensor, seed: np.random.SeedSequence) -> None:
    np.random.Generator(np.random.SFC64(seed)).standard_normal(out=part.numpy(), dtype=np.float32)


@functools.cache
def _signs_of(dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    """A table with the +1 and -1 of every word of bits, in 32 bytes: 16 signs of a 16-bit dtype, 8 of float32. A lookup
    is faster than np.unpackbits and converting its bytes to +1 and -1."""
    words = np.arange(2**8, dtype=np.uint8) if dtype == torch.float32 else np.arange(2**16, dtype=np.uint16)
    bits = np.unpackbits(words.view(np.uint8)).reshape(len(words), -1)
    signs = torch.from_numpy(bits).to(dtype).mul_(2).sub_(1)
    return signs, words[:0]


def _random_signs(part: torch.Tensor, seed: np.random.SeedSequence) -> None:
    signs, like = _signs_of(part.dtype)
    per_word = signs.shape[1]
    rows = -(-len(part) // per_word)
    raw = np.random.SFC64(seed).random_raw(-(-rows * like.itemsize // 8))
    words, whole = raw.view(like.dtype)[:rows], len(part) // per_word
    table, to = (_bits(t).numpy() for t in (signs, part[: whole * per_word].view(whole, per_word)))
    # mode="clip" avoids a range check; no word is out of range.
    np.take(table, words[:whole], axis=0, out=to, mode="clip")
    if rows > whole:
        part[whole * per_word :] = signs[int(words[-1])][: len(part) - whole * per_word]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the bits, since NumPy has no bfloat16."""
    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.int16)


class Hashed:
    """An integer hash of seed and index, made into noise and added in one compiled pass (torch.compile, so g++).

    Each round is a mixing hash of 32 bits: two multiplications, three shifts. Gaussian: two rounds and Box-Muller give
    two numbers, one for each half of the tensor. Rademacher: each bit of a word is a sign, for 32 parts of the tensor.
    An update passes over a float32 copy of some columns of the parts, which stays in the cache: once a member for
    gaussian noise (with all members inside the kernel it is slower, and takes minutes to compile), once for six members
    for signs.
    """

    def __init__(self, kind: str):
        self.parts = 2 if kind == "gaussian" else 32
        self._add = _add_gaussian if kind == "gaussian" else _add_signs

    def perturb_(self, tensors: Sequence[torch.Tensor], seed: int, sigma: float, base: Tensors = None) -> None:
        factors, start = torch.tensor([sigma], dtype=torch.float32), torch.tensor(0, dtype=torch.int32)
        for p, source, key in zip(tensors, base or tensors, _keys(seed, len(tensors)), strict=True):
            (parts, rest), (source, source_rest) = self._split(p), self._split(source)
            if parts.shape[1]:
                self._add(parts, source if base else parts, start, key[None], factors)
            self._add_rest(rest, source_rest, key[None], factors)

    def update_(self, tensors: Sequence[torch.Tensor], seeds: Sequence[int], coeffs: Sequence[float]) -> None:
        keys = torch.stack([_keys(seed, len(tensors)) for seed in seeds], dim=1)
        factors = torch.tensor(coeffs, dtype=torch.float32)
        for p, key in zip(tensors, keys, strict=True):
            parts, rest = self._split(p)
            for start in range(0, parts.shape[1], PIECE // self.parts):
                columns = parts[:, start : start + PIECE // self.parts]
                total = columns.float().contiguous()
                self._add(total, total, torch.tensor(start, dtype=torch.int32), key, factors)
                columns.copy_(total)
            self._add_rest(rest, rest, key, factors)

    def _split(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The parts as rows, and what is left over."""
        flat, width = p.view(-1), p.numel() // self.parts
        width = 0 if width < 16 else width
        return flat[: width * self.parts].view(self.parts, width), flat[width * self.parts :]

    def _add_rest(self, rest: torch.Tensor, source: torch.Tensor, keys: torch.Tensor, factors: torch.Tensor) -> None:
        if len(rest):
            few = torch.zeros(self.parts, 512 // self.parts)  # more than can be left over
            self._add(few, few, torch.tensor(2**30, dtype=torch.int32), keys, factors)  # numbers that no column has
            rest.copy_(source + few.view(-1)[: len(rest)])


def _add_gaussian(to: torch.Tensor, x: torch.Tensor, start: torch.Tensor, keys: torch.Tensor, factors: torch.Tensor):
    halves = [half.data for half in to]  # data: compiled once for tensors of any number of dimensions
    if x is not to:
        _compiled(_pairs)(*halves, *(half.data for half in x), start, keys[0], factors[0])
        keys, factors = keys[1:], factors[1:]
    for key, factor in zip(keys, factors, strict=True):
        _compiled(_pairs_in_place)(*halves, start, key, factor)


def _add_signs(to: torch.Tensor, x: torch.Tensor, start: torch.Tensor, keys: torch.Tensor, factors: torch.Tensor):
    missing = -len(keys) % TOGETHER if len(keys) > 1 else 0
    keys, factors = torch.cat((keys, keys.new_zeros(missing, 2))), torch.cat((factors, factors.new_zeros(missing)))
    words = torch.empty(len(keys), to.shape[1], dtype=torch.int32)
    _compiled(_words)(words, start, keys)
    if x is not to:
        _compiled(_signs)(to.data, x.data, words, factors)
    elif len(keys) == 1:
        _compiled(_signs_in_place)(to.data, words, factors)
    else:
        for some, their in zip(words.split(TOGETHER), factors.split(TOGETHER), strict=True):
            _compiled(_signs_of_several)(to.data, some.data, their.data)


@functools.cache
def _compiled(function: Callable) -> Callable:
    # PyTorch's cache of compiled graphs doesn't know ATEN_CPU_CAPABILITY. Code generated for AVX2 steps by 8 floats;
    # a later process with AVX-512 would find it, compile it with vectors of 16, and write beyond the end of tensors.
    return torch.compile(function, dynamic=True, fullgraph=True, options={"fx_graph_cache": False})


def _pairs_in_place(low, high, start, key, factor) -> None:
    _pairs(low, high, low, high, start, key, factor)


def _pairs(to_low, to_high, low, high, start, key, factor) -> None:
    word = _mixed((torch.arange(low.shape[0], dtype=torch.int32) + start) ^ key[0])
    other = _mixed(word ^ key[1])
    uniform = word.float() * 2**-32 + (0.5 + 2**-33)
    radius, angle = torch.sqrt(-2 * torch.log(uniform)) * factor, other.float() * (torch.pi * 2**-31)
    to_low.copy_(low + radius * torch.cos(angle))
    to_high.copy_(high + radius * torch.sin(angle))


def _words(to, start, keys) -> None:
    index = torch.arange(to.shape[1], dtype=torch.int32) + start
    to.copy_(_mixed(_mixed(index ^ keys[:, :1]) ^ keys[:, 1:]))


def _signs_in_place(x, words, factors) -> None:
    _signs(x, x, words, factors)


def _signs(to, x, words, factors) -> None:
    to.copy_(x + _signed(words[0], factors[0]))


def _signs_of_several(x, words, factors) -> None:
    total = x
    for j in range(TOGETHER):
        total = total + _signed(words[j], factors[j])
    x.copy_(total)


def _signed(word: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    bit = torch.arange(32, dtype=torch.int32)[:, None]
    return torch.where(((word >> bit) & 1) != 0, factor, -factor)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def _keys(seed: int, tensors: int) -> torch.Tensor:
    """Two words for each tensor."""
    words = np.random.SeedSequence(seed).generate_state(2 * tensors).view(np.int32)
    return torch.from_numpy(words.reshape(tensors, 2).copy())


def _pieces(tensors: Iterable[torch.Tensor]) -> Iterable[tuple[tuple[int, int], torch.Tensor]]:
    for i, p in enumerate(tensors):
        for number, piece in enumerate(p.view(-1).split(PIECE)):
            yield (i, number), piece


class Factored:
    """Low-rank noise of rank 1: torch.randn draws the factors, and one addmm for each tensor adds all members.

    In the weights' dtype, 16-bit factors are rounded, and the sums are the matrix library's. With `in_float32` weights
    are converted and back, some rows at a time.
    """

    def __init__(self, in_float32: bool):
        self.in_float32 = in_float32

    def perturb_(self, tensors: Sequence[torch.Tensor], seed: int, sigma: float, base: Tensors = None) -> None:
        self._add(tensors, base or tensors, [seed], [sigma])

    def update_(self, tensors: Sequence[torch.Tensor], seeds: Sequence[int], coeffs: Sequence[float]) -> None:
        self._add(tensors, tensors, seeds, coeffs)

    def _add(self, tensors, sources, seeds: Sequence[int], coeffs: Sequence[float]) -> None:
        for i, (p, source) in enumerate(zip(tensors, sources, strict=True)):
            generator = torch.Generator()
            drawn = []
            for seed, coeff in zip(seeds, coeffs, strict=True):
                generator.manual_seed(int(np.random.SeedSequence((seed, i)).generate_state(1)[0]))
                if p.dim() < 2:
                    drawn.append(coeff * torch.randn(p.shape, generator=generator))
                else:
                    rows, cols = (torch.randn(n, generator=generator) for n in p.flatten(1).shape)
                    drawn.append((coeff * rows, cols))
            if p.dim() < 2:
                p.copy_(source + torch.stack(drawn).sum(0))
                continue
            a, b = torch.stack([rows for rows, _ in drawn], 1), torch.stack([cols for _, cols in drawn])
            to, x = p.flatten(1), source.flatten(1)
            if not self.in_float32:
                torch.addmm(x, a.to(p.dtype), b.to(p.dtype), out=to)
                continue
            step = max(1, PIECE // to.shape[1])
            for at in range(0, len(to), step):
                to[at : at + step] = torch.addmm(x[at : at + step].float(), a[at : at + step], b)


Way = Drawn | Hashed | Factored
WAYS: dict[str, dict[str, Callable[[], Way]]] = {
    "gaussian": {
        "PyTorch's normal_ into a buffer": lambda: Drawn(_normal),
        "NumPy's standard_normal into a buffer": lambda: Drawn(_standard_normal),
        "compiled hash and Box-Muller": lambda: Hashed("gaussian"),
    },
    "rademacher": {
        "NumPy's bits and a table": lambda: Drawn(_random_signs, in_weights_dtype=True),
        "compiled hash": lambda: Hashed("rademacher"),
    },
    "low_rank": {
        "an addmm of all members in float32": lambda: Factored(True),
        "an addmm of all members in the weights' dtype": lambda: Factored(False),
    },
}


def ways(kind: str) -> dict[str, Way]:
    """Makes the contenders for a kind of noise, set up for PyTorch's present number of threads."""
    return {name: make() for name, make in WAYS[kind].items()}
