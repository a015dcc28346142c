"""Weights to measure on: tensors with the shapes of a language model, and odd ones for the check to the bit."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from ..core.ops import add_noise_
from ..core.plan import Plan, Slice
from . import BenchmarkError

# Of one layer, in units of the model's width: the attention, the MLP, the two norms.
LAYER = (
    ("self_attn.qkv_proj", (3, 1)),
    ("self_attn.o_proj", (1, 1)),
    ("mlp.gate_proj", (8 / 3, 1)),
    ("mlp.up_proj", (8 / 3, 1)),
    ("mlp.down_proj", (1, 8 / 3)),
    ("input_layernorm", (1,)),
    ("post_attention_layernorm", (1,)),
)
SIGMA = 1e-3


def model_shapes(numel: int, tensors: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `tensors` tensors with about `numel` weights in all: layers, and an embedding."""
    parts = [
        (f"model.layers.{i // len(LAYER)}.{LAYER[i % len(LAYER)][0]}.weight", LAYER[i % len(LAYER)][1])
        for i in range(tensors - 1)
    ]
    matrices = sum(math.prod(shape) for _, shape in parts if len(shape) == 2)
    # The embedding gets the rest, about a fifth of the weights.
    width = math.isqrt(int(0.8 * numel / max(matrices, 1)))
    width = min(max(1, width - width % 64 if width >= 64 else width), 8192)
    shapes = {name: tuple(max(1, round(n * width)) for n in shape) for name, shape in parts}
    rest = numel - sum(math.prod(shape) for shape in shapes.values())
    return {"model.embed_tokens.weight": (max(1, round(rest / width)), width), **shapes}


def make_plan(numel: int, tensors: int, dtype: torch.dtype, device: str = "cpu") -> Plan:
    generator = torch.Generator(device).manual_seed(0)
    return Plan(
        [
            (n, torch.empty(s, dtype=dtype, device=device).normal_(0, 0.02, generator=generator))
            for n, s in model_shapes(numel, tensors).items()
        ]
    )


def odd_plan(dtype: torch.dtype, device: str = "cpu") -> Plan:
    """A plan of sizes that no tile or vector divides, of a matrix that a tile of low-rank noise fits in, and of a slice
    of a larger matrix."""
    generator = torch.Generator().manual_seed(1)
    slices = {
        "one": ((1,), Slice((1,), (0,))),
        "vector": ((1031,), Slice((1031,), (0,))),
        "matrix": ((37, 67), Slice((37, 67), (0, 0))),
        "tiles": ((132, 136), Slice((132, 136), (0, 0))),
        "cube": ((3, 5, 131), Slice((3, 5, 131), (0, 0, 0))),
        "shard": ((33, 65), Slice((90001, 100003), (89900, 77777))),  # its element numbers exceed 2^32
    }
    return Plan(
        [
            (n, torch.empty(s, dtype=dtype).normal_(0, 0.02, generator=generator).to(device), w)
            for n, (s, w) in slices.items()
        ]
    )


def verify(backend: str, dtype: torch.dtype, kind: str, members: int, device: str = "cpu") -> None:
    """Compares the backend with the reference on odd sizes: from a base and in place, with one member and many.

    Raises BenchmarkError at the first weight that differs in a bit.
    """
    for count in sorted({1, members}):
        for from_base in (True, False):
            found = _on_odd_sizes(backend, dtype, kind, count, from_base, device)
            what = f"{count} member{'s' * (count > 1)} {'from a base' if from_base else 'in place'}"
            expected = _reference_on_odd_sizes(dtype, kind, count, from_base)
            require_equal(found, expected, f"backend {backend!r}, {kind}, {what}")


def _on_odd_sizes(backend: str, dtype: torch.dtype, kind: str, count: int, from_base: bool, device: str) -> Plan:
    plan = odd_plan(dtype, device)
    base = plan.clone() if from_base else None
    if base is not None:
        for p in plan.tensors:
            # A result that is written from a base must not depend on the old weights.
            p.fill_(math.nan)
    add_noise_(plan, *population(count), base=base, noise=kind, backend=backend)
    return plan


# Cached, since all backends and devices are compared with the same weights.
@functools.cache
def _reference_on_odd_sizes(dtype: torch.dtype, kind: str, count: int, from_base: bool) -> Plan:
    return _on_odd_sizes("reference", dtype, kind, count, from_base, "cpu")


def _ends(plan: Plan) -> list[tuple[str, torch.Tensor, Slice]]:
    """The first and last weights of every tensor."""
    parts = []
    for name, tensor in zip(plan.names, plan.tensors, strict=True):
        shape, places = tuple(tensor.shape), (0,) if tensor.numel() <= 122 else (0, 1)
        for last in places:
            part, offset = tensor, [0] * len(shape)
            # Low-rank noise depends on row and column, so a part must have as many dimensions as its tensor.
            for d, n in enumerate(shape if len(places) > 1 else ()):
                kept = max(1, min(n, 61 // math.prod(shape[d + 1 :])))
                offset[d] = last * (n - kept)
                part = part.narrow(d, offset[d], kept)
            parts.append((name, part, Slice(shape, tuple(offset))))
    return parts


def expected_ends(base: Plan, seed: int, kind: str) -> Plan:
    """The reference's result on both ends of every tensor."""
    expected = Plan([(name, part.to("cpu", copy=True), window) for name, part, window in _ends(base)])
    add_noise_(expected, [seed], [SIGMA], noise=kind, backend="reference")
    return expected


def verify_ends(plan: Plan, base: Plan, seed: int, kind: str, backend: str, expected: Plan | None = None) -> None:
    """Checks the call that is timed, on both ends of every tensor; `plan` stays perturbed. `expected` is the result of
    `expected_ends`, to share it between backends."""
    add_noise_(plan, [seed], [SIGMA], base=base, noise=kind, backend=backend)
    what = f"backend {backend!r}, {kind}, on the weights to be timed"
    require_equal(Plan(_ends(plan)), expected or expected_ends(base, seed, kind), what)


def require_equal(found: Plan, expected: Plan, what: str) -> None:
    for name, a, b in zip(found.names, found.tensors, expected.tensors, strict=True):
        a, b = a.cpu(), b.cpu()
        bits = torch.int32 if a.element_size() == 4 else torch.int16
        differ = (a.reshape(-1).view(bits) != b.reshape(-1).view(bits)).nonzero().view(-1)
        if len(differ):
            i = int(differ[0])
            raise BenchmarkError(
                f"{what}: {len(differ)} of {a.numel()} weights of {name!r} ({a.dtype}) differ from the reference, "
                f"first {i}: {a.reshape(-1)[i].item()!r} instead of {b.reshape(-1)[i].item()!r}. No figures are given"
            )


def population(count: int) -> tuple[list[int], list[float]]:
    """Seeds and coefficients like those of a generation of `count` members; for one member the coefficient is SIGMA."""
    if count == 1:
        return [2**63 + 1], [SIGMA]
    coeffs = np.linspace(-1.7, 1.7, count) * 5e-4 / count
    return [2**63 + 1 + 7919 * j for j in range(count)], [float(np.float32(c)) for c in coeffs]
