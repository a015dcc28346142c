"""Low-rank noise: the definition against exact arithmetic and against plain torch, and what holds for all backends."""

import itertools
import math
import re
import zlib
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_noise import exact_fma, mul, round32, scalar_gaussian

import esfast
from esfast import Plan, Slice, _cpu, add_noise_
from esfast.core.noise import DOMAINS, KINDS, USES, fma, noise_at

BACKENDS = ["cpu", "reference"]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)


def places(shape):
    """For each element in row-major order (matrix, row, column), and rows and columns of all matrices."""
    matrices, rows, cols = shape if len(shape) == 3 else (1, shape[0], math.prod(shape[1:]))
    return list(itertools.product(range(matrices), range(rows), range(cols))), matrices * rows, matrices * cols


def exact(shape, members, rank, start):
    """float32 weights after the members, one number at a time in exact arithmetic."""
    found = []
    of, all_rows, all_cols = places(shape)
    rows, cols = all_rows // max(1, of[-1][0] + 1), all_cols // max(1, of[-1][0] + 1)
    for (e, i, k), acc in zip(of, start, strict=True):
        for seed, coeff in members:
            c = mul(coeff, round32(1 / math.sqrt(rank)))
            for q in range(rank):
                a = scalar_gaussian(seed, "w/A", q * all_rows + e * rows + i)
                b = scalar_gaussian(seed, "w/B", q * all_cols + e * cols + k)
                acc = exact_fma(mul(c, a), b, acc)
        found.append(acc)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    SHAPES,
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.floats(-2, 2, width=32)), max_size=3),
    st.integers(1, 5),
)
@settings(max_examples=12)
def test_low_rank_is_its_definition(backend, shape, members, rank):
    start = torch.linspace(-1, 1, math.prod(shape))
    plan = Plan([("w", start.reshape(shape).clone())])
    seeds, coeffs = [s for s, _ in members], [c for _, c in members]
    add_noise_(plan, seeds, coeffs, noise="low_rank", rank=rank, backend=backend)
    assert plan.tensors[0].reshape(-1).tolist() == exact(shape, members, rank, start.tolist())


@given(SHAPES, st.integers(0, 2**64 - 1), st.integers(1, 16))
@settings(max_examples=40)
def test_noise_is_the_product_of_its_factors(shape, seed, rank):
    """Against plain torch in float64: one einsum, of factors that are noise of virtual tensors."""
    matrices, rows, cols = shape if len(shape) == 3 else (1, shape[0], math.prod(shape[1:]))
    a = esfast.noise(seed, "m/A", (rank, matrices, rows)).double()
    b = esfast.noise(seed, "m/B", (rank, matrices, cols)).double()
    wanted = torch.einsum("qei,qek->eik", a, b).reshape(shape) / math.sqrt(rank)
    torch.testing.assert_close(esfast.noise(seed, "m", shape, "low_rank", rank).double(), wanted, rtol=2e-6, atol=1e-5)


def test_rank_one_is_the_first_row_of_rank_two():
    for name in ("A", "B"):
        two, one = esfast.noise(5, f"w/{name}", (2, 40)), esfast.noise(5, f"w/{name}", (1, 40))
        assert torch.equal(two[:1], one)
    a, b = esfast.noise(5, "w/A", 6), esfast.noise(5, "w/B", 40)
    assert torch.equal(esfast.noise(5, "w", (6, 40), "low_rank"), a[:, None] * b)


@pytest.mark.parametrize("shape", [(), 7, (7,), [0]], ids=str)
def test_vectors_get_gaussian_noise(shape):
    assert torch.equal(esfast.noise(3, "norm", shape, "low_rank", 9), esfast.noise(3, "norm", shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_get_it_beside_matrices_without_the_factor(backend, same_bits):
    plan, wanted = (Plan([("v", torch.ones(9)), ("m", torch.ones(3, 5)), ("s", torch.tensor(1.0))]) for _ in range(2))
    add_noise_(plan, [3, 4], [0.5, 0.25], noise="low_rank", rank=4, backend=backend)
    add_noise_(wanted, [3, 4], [0.5, 0.25], backend=backend)
    assert same_bits(plan.tensors[0], wanted.tensors[0]) and same_bits(plan.tensors[2], wanted.tensors[2])
    assert not same_bits(plan.tensors[1], wanted.tensors[1])


FROZEN = {  # CRC-32 of the numbers
    ((97, 103), 1, 0): 0x75A3DE18,
    ((97, 103), 4, 0x0123456789ABCDEF): 0x50636555,
    ((5, 31, 67), 3, 0): 0xFE270CC6,
    ((30, 7, 3, 5), 16, 2**64 - 1): 0x26850AFA,
}


@pytest.mark.parametrize(("shape", "rank", "seed"), FROZEN)
def test_low_rank_of_version_one_is_frozen(shape, rank, seed):
    """Journals depend on these bits: a change here is a new NOISE_VERSION, not a new number in this table."""
    assert esfast.NOISE_VERSION == 1
    z = esfast.noise(seed, "model.layers.0.mlp.up_proj.weight", shape, "low_rank", rank)
    assert zlib.crc32(z.numpy().astype("<f4").tobytes()) == FROZEN[shape, rank, seed]


@pytest.mark.parametrize("backend", BACKENDS)
@given(st.data())
@settings(max_examples=30)
def test_a_slice_gets_the_noise_of_the_whole(backend, same_bits, data):
    """Cut along every dimension at random places, in memory of any order; the pieces come in another order."""
    shape = data.draw(st.lists(st.integers(1, 11), min_size=2, max_size=5))
    rank = data.draw(st.integers(1, 3))
    pieces = [((), ())]
    for n in shape:
        cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))})
        pieces = [((*o, a), (*s, b - a)) for o, s in pieces for a, b in zip(cuts, cuts[1:], strict=False)]
    pieces = data.draw(st.permutations(pieces))
    order = data.draw(st.permutations(range(len(shape))))
    back = [order.index(d) for d in range(len(shape))]

    def memory(size):
        return torch.zeros([size[d] for d in order]).permute(back)

    plan = Plan([("w", memory(size), Slice(tuple(shape), offset)) for offset, size in pieces])
    add_noise_(plan, [3], [1.0], noise="low_rank", rank=rank, backend=backend)
    whole = esfast.noise(3, "w", shape, "low_rank", rank)
    for (offset, size), found in zip(pieces, plan.tensors, strict=True):
        assert same_bits(found + 0, whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))])


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_beyond_32_bits(backend):
    """Factors whose element numbers, and blocks, need their second words; at the end of the whole."""
    whole = (2**27, 2**26)
    offset = (2**27 - 3, 2**26 - 5)
    plan = Plan([("w", torch.zeros(3, 5), Slice(whole, offset))])
    add_noise_(plan, [9], [1.0], noise="low_rank", rank=256, backend=backend)
    acc = np.zeros((3, 5), np.float32)
    for q in range(256):
        a = noise_at(9, "w/A", np.uint64(q * whole[0] + offset[0]) + np.arange(3, dtype=np.uint64))
        b = noise_at(9, "w/B", np.uint64(q * whole[1] + offset[1]) + np.arange(5, dtype=np.uint64))
        acc = fma((np.float32(1 / 16) * a)[:, None], b[None], acc)
    assert plan.tensors[0].tolist() == acc.tolist()


def test_a_whole_with_too_many_numbers_is_refused():
    plan = Plan([("w", torch.zeros(1, 1), Slice((2**55, 2), (0, 0)))])
    with pytest.raises(ValueError, match=r"factors of more than 2\*\*62 numbers, too many for low-rank noise"):
        add_noise_(plan, [1], [1.0], noise="low_rank", backend="reference")


# ---- ids of virtual tensors -----------------------------------------------------------------------------------------


def forge(target: int) -> str:
    """An ASCII name whose CRC-32 is `target`. Any prefix has four last bytes that give this CRC; the function tries
    prefixes until these bytes are ASCII characters."""
    entries = []
    for c in range(256):
        for _ in range(8):
            c = c >> 1 ^ (0xEDB88320 if c & 1 else 0)
        entries.append(c)
    by_top = {c >> 24: i for i, c in enumerate(entries)}
    for n in itertools.count():
        prefix = f"forged.{n}.".encode()
        state, want = zlib.crc32(prefix) ^ 0xFFFFFFFF, target ^ 0xFFFFFFFF
        indices = []
        for _ in range(4):
            indices.append(by_top[want >> 24])
            want = (want ^ entries[indices[-1]]) << 8
        suffix = []
        for index in reversed(indices):
            suffix.append((state ^ index) & 0xFF)
            state = state >> 8 ^ entries[index]
        name = prefix + bytes(suffix)
        if zlib.crc32(name) == target and all(33 <= c < 127 for c in suffix):
            return name.decode()


@pytest.mark.parametrize("factor", ["w/A", "w/B"])
def test_factors_that_collide_are_refused(factor):
    forged = forge(zlib.crc32(factor.encode()))
    for name, shape in ((factor, 3), (factor, (2, 2)), (forged, 3), (forged, (2, 2))):
        for items in ([("w", (2, 3)), (name, shape)], [(name, shape), ("w", (2, 3))]):
            plan = Plan([(n, torch.ones(s)) for n, s in items])
            # as ever
            add_noise_(plan, [1], [0.5])
            before = [t.clone() for t in plan.tensors]
            with pytest.raises(
                ValueError, match=re.escape(f"have the same 32-bit id {zlib.crc32(factor.encode()):08x}")
            ):
                add_noise_(plan, [1], [0.5], noise="low_rank", backend="reference")
            assert all(map(torch.equal, plan.tensors, before))
    plan = Plan([("w", torch.ones(3)), (factor, torch.ones(3))])
    # a vector has no factors
    add_noise_(plan, [1], [0.5], noise="low_rank", backend="reference")


# ---- one table of uses ----------------------------------------------------------------------------------------------


def test_every_use_of_random_numbers_is_in_one_table():
    """What C++ and Triton call a domain has the number that the table gives it."""
    csrc = (Path(__file__).parents[1] / "csrc" / "noise.h").read_text()
    listed = re.search(r"enum Domain : uint32_t \{(.*?)\}", csrc, re.DOTALL)[1]
    domains = {name.lower(): int(number) for name, number in re.findall(r"(\w+) = (\d+)", listed)}
    assert {"gaussian", "rademacher", "stochastic_rounding", "low_rank"} <= domains.keys()
    assert domains == {name: USES[name].domain for name in domains}
    for name, constant in (("gaussian", "GAUSSIANS_PER_BLOCK"), ("rademacher", "SIGNS_PER_BLOCK")):
        assert int(re.search(rf"{constant} = (\d+);", csrc)[1]) == USES[name].numbers
    assert tuple(KINDS) == ("gaussian", "rademacher", "low_rank")
    kernels = pytest.importorskip("esfast.kernels.noise")
    for name in ("GAUSSIAN", "RADEMACHER", "STOCHASTIC_ROUNDING"):
        assert getattr(kernels, name).value == DOMAINS[name.lower()]


@pytest.mark.parametrize("kind", [DOMAINS["stochastic_rounding"], DOMAINS["tokens"], -1, 77])
def test_the_extension_refuses_an_unknown_kind(kind):
    plan = Plan([("w", torch.ones(3))])
    with pytest.raises(ValueError, match=f"kind: no noise has the number {kind}"):
        _cpu.add_noise(
            plan.table().rows,
            np.zeros(1, np.uint64),
            np.ones(1, np.float32),
            kind,
            False,
            0.0,
            0,
            0,
            0,
            (0.0,) * 4,
            1,
            "baseline",
        )
    assert plan.tensors[0].tolist() == [1, 1, 1]
