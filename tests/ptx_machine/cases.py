"""Calls of add_noise_ that the machine makes beside the cpu backend, and how their results are compared."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import esfast
from esfast.core.ops import AdamStep, Call, check_members
from esfast.core.segments import BFLOAT16, FLOAT16, FLOAT32, SPLIT

from . import backends
from .backends import ADAM, ADD, ONE

KINDS = ("gaussian", "rademacher", "low_rank")
# Formats of what is read and of what is written: all that the kernels have.
PAIRS = {
    "float32": (FLOAT32, FLOAT32),
    "bfloat16": (BFLOAT16, BFLOAT16),
    "float16": (FLOAT16, FLOAT16),
    "split": (SPLIT, SPLIT),
    "split to bfloat16": (SPLIT, BFLOAT16),
    "float32 to bfloat16": (FLOAT32, BFLOAT16),
    "float32 to float16": (FLOAT32, FLOAT16),
}
DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, FLOAT16: torch.float16, SPLIT: torch.bfloat16}
SEEDS = [2**64 - 1 - 12345 * j for j in range(80)]
COEFFS = [0.01 * (-1) ** j / (j + 1) for j in range(64)]

needs_nvcc = pytest.mark.skipif(backends.why_no_nvcc() is not None, reason=str(backends.why_no_nvcc()))
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its kernels can't be compiled"
)


@functools.cache
def cuda_text() -> str:
    """PTX of all CUDA kernels: what the build has made of them, since nvcc takes half a minute to make it again."""
    if built := backends.built_ptx():
        return built
    with tempfile.TemporaryDirectory() as folder:
        sources = [backends.ROOT / "csrc" / f"{name}.cu" for name in ("cuda_kernel", "cuda_copy")]
        return "\n".join(backends.nvcc_to_ptx(source, Path(folder) / f"{source.stem}.ptx") for source in sources)


@functools.cache
def triton_compiler() -> backends.TritonCompiler:
    """The compiler process, started once. It ends with this process, since its stdin is then closed."""
    return backends.TritonCompiler()


# ---- weights --------------------------------------------------------------------------------------------------------


def entries(dtype: torch.dtype) -> list[tuple]:
    """Whole tiles and tails, odd starts, rows of slices that are aligned and not, numbers beyond 2^34, a scalar, a column,
    and weights of any bits: subnormals, zeros of both signs, infinities and NaNs with payloads."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(4, 8400, generator=generator).to(dtype)
    flat = torch.randn(16_000, generator=generator).to(dtype)
    return [
        ("whole", torch.randn(16384, generator=generator).to(dtype)),
        ("odd start", flat[7:8436]),
        ("slice", matrix[:2, 30:243], esfast.Slice((1000, 50_000), (3, 700))),
        ("shard", matrix[2:4, 104:4200], esfast.Slice((2, 16384), (0, 4096))),
        ("far", flat[8440:13_000], esfast.Slice((2**40,), (2**34 - 100,))),
        ("scalar", torch.tensor(3.0).to(dtype)),
        ("column", matrix[:4, 8300:8301]),
        ("any bits", any_bits(dtype, 8192, generator)),
    ]


def few_entries(dtype: torch.dtype) -> list[tuple]:
    """The fewest tensors that show a planted fault: whole tiles at an even and at an odd address, a tail, numbers
    beyond 2^34."""
    generator = torch.Generator().manual_seed(2)
    flat = torch.randn(12_000, generator=generator).to(dtype)
    return [
        ("whole", torch.randn(8192, generator=generator).to(dtype)),
        ("odd address", flat[1:8193]),
        ("tail", flat[8200:9001]),
        ("far", flat[9008:9500], esfast.Slice((2**40,), (2**34 - 100,))),
    ]


def matrices(dtype: torch.dtype) -> list[tuple]:
    """Tensors for low-rank noise: whole tiles and parts of one, rows that are not aligned, factors with numbers
    beyond 2^34, a batch of odd matrices, filters, a vector, a scalar, and weights of any bits."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(8, 600, generator=generator).to(dtype)
    return [
        ("matrix", torch.randn(132, 136, generator=generator).to(dtype)),
        ("odd", torch.randn(131, 53, generator=generator).to(dtype)),
        ("far", wide[:, 30:170], esfast.Slice((2**36, 2**20), (2**34 - 3, 2**19 + 1))),
        ("experts", torch.randn(3, 5, 7, generator=generator).to(dtype)),
        ("filters", wide[:4, 200:260].view(4, 5, 3, 4), esfast.Slice((9, 5, 7, 4), (3, 0, 1, 0))),
        ("vector", wide[0, 301:471]),
        ("scalar", torch.tensor(3.0).to(dtype)),
        ("any bits", any_bits(dtype, 128 * 128, generator).view(128, 128)),
    ]


def few_matrices(dtype: torch.dtype) -> list[tuple]:
    """The fewest matrices that show a planted fault."""
    return [e for e in matrices(dtype) if e[0] in ("matrix", "far", "vector")]


WEIGHTS = {
    "gaussian": (entries, few_entries),
    "rademacher": (entries, few_entries),
    "low_rank": (matrices, few_matrices),
}


def any_bits(dtype: torch.dtype, count: int, generator: torch.Generator) -> torch.Tensor:
    whole = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    special = torch.tensor([0, -(2**31), 1, 0x7F800000, -0x800000, 0x7F800001, 0x7FFFFFFF, -1, 0x00800000, 0x38800000])
    whole[: len(special)] = special.to(torch.int32)
    return whole.view(torch.float32) if dtype is torch.float32 else (whole >> 16).to(torch.int16).view(dtype)


class Side:
    """A plan whose weights have the format dst, what it may read, and moments of its own."""

    def __init__(self, src: int, dst: int, weights: Callable[[torch.dtype], list[tuple]]):
        plan = esfast.Plan(weights(DTYPES[dst]))
        self.anchor, self.base = plan.clone(), esfast.Plan(weights(DTYPES[dst]))
        self.plan = plan.master() if src == dst == SPLIT else plan
        if src != dst:
            wide = [(e.name, e.tensor.float(), e.window) for e in plan.entries]
            self.base = plan.master() if src == SPLIT else esfast.Plan(wide)
        self.moments = torch.zeros(2, plan.flat_numel)

    def add_noise(self, backend, kind: str, rule: int, step: int, *, members, in_place, stochastic, decay) -> None:
        """Changes the plan by the backend, or for None by the cpu backend."""
        # perturbing has kernels of its own for one factor
        rank = 1 if kind != "low_rank" or rule == ONE else 1 + members % 3
        seeds, coeffs = SEEDS[step : step + members], COEFFS[:members]
        adam = AdamStep.at(step + 1, self.moments, 0.1, 0.9, 0.99, 1e-8) if rule == ADAM else None
        base, anchor = None if in_place else self.base, self.anchor if decay == 2 else None
        fraction = 0.1 if decay else 0.0
        if backend:
            arrays = check_members(seeds, coeffs)
            return backend.run(
                Call(self.plan, *arrays, base, kind, stochastic, np.float32(fraction), anchor, adam, rank)
            )
        esfast.add_noise_(
            self.plan,
            seeds,
            coeffs,
            base=base,
            noise=kind,
            rounding="stochastic" if stochastic else "nearest",
            backend="cpu",
            decay=fraction,
            anchor=anchor,
            adam=adam,
            rank=rank,
        )


# ---- calls ----------------------------------------------------------------------------------------------------------


def one_call(members: int = 1, in_place: bool = True, stochastic: bool = False, decay: int = 0) -> dict:
    """`decay`: 0 for none, 1 towards zero, 2 towards an anchor."""
    return {"members": members, "in_place": in_place, "stochastic": stochastic, "decay": decay}


def calls_of(src: int, dst: int, kind: str, rule: int, every: bool) -> list[dict]:
    """The calls that a kernel is tested with: every rounding with every decay, or each decay with one rounding, so that
    the kernels for two kinds of noise, which share this code, have every pair."""
    in_place = src == dst
    if rule == ONE:
        # the plan of a split master has no other one of its kind to read from
        return [one_call(in_place=i) for i in ([False, True] if in_place and dst != SPLIT else [in_place])]
    counts = {ADD: (2, 7, 3), ADAM: (3, 2, 1)}[rule]
    roundings = (False, True) if dst in (BFLOAT16, FLOAT16) else (False,)
    pairs = list(itertools.product(roundings, (0, 1, 2)))
    if not every:
        pairs = [(roundings[(d + KINDS.index(kind)) % len(roundings)], d) for d in (0, 1, 2)]
    found = [one_call(counts[d], in_place, s, d) for s, d in pairs]
    return found + ([one_call(0, in_place, decay=1)] if rule == ADD else [])


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Asserts that the weights are equal to the bit. Of a NaN only that it is one: its payload may differ."""
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    same = a.contiguous().view(integers) == b.contiguous().view(integers)
    return bool((same | (a.isnan() & b.isnan())).all())


def hold(backend, pair: str, kind: str, rule: int, calls: list[dict], few: bool = False) -> None:
    """Makes the calls by the backend and by the cpu backend, one after another, and compares all that they wrote. `few`:
    of what is enough for a fault to show."""
    weights = WEIGHTS[kind][few]
    ours, theirs = Side(*PAIRS[pair], weights), Side(*PAIRS[pair], weights)
    for step, options in enumerate(calls):
        ours.add_noise(backend, kind, rule, step, **options)
        theirs.add_noise(None, kind, rule, step, **options)
        for name, a, b in zip(ours.plan.names, ours.plan.tensors, theirs.plan.tensors, strict=True):
            assert agree(a.detach(), b.detach()), (name, options)
        if ours.plan.low is not None:
            assert torch.equal(ours.plan.low, theirs.plan.low), ("low halves", options)
        assert agree(ours.moments, theirs.moments), ("moments", options)
