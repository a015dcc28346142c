"""The reference: known answers, an independent re-derivation in exact arithmetic, and its distance from the truth."""

import struct
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

import esfast
from esfast import _cpu
from esfast.core.noise import DOMAINS, PHILOX_ROUNDS, fma, gaussian_pair, noise_at, philox, tensor_id

reference = sys.modules["esfast.core.noise"]  # the module: esfast.noise is the function
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def known_answers():
    for line in (Path(__file__).parent / "kat_philox.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, rounds, *words = line.split()
            assert (name, int(rounds)) == ("philox4x32", PHILOX_ROUNDS)
            w = [int(x, 16) for x in words]
            # counter = (block low, block high, tensor id, domain), key = (seed low, seed high)
            yield w[4] | w[5] << 32, w[0] | w[1] << 32, w[2], w[3], tuple(w[6:])


@pytest.mark.parametrize(("seed", "block", "tensor", "domain", "expected"), list(known_answers()))
def test_philox_known_answers(seed, block, tensor, domain, expected):
    assert tuple(int(x) for x in philox(seed, np.uint64(block), tensor, domain)) == expected
    assert _cpu.philox(seed, block, tensor, domain) == expected
    assert scalar_philox(seed, block, tensor, domain) == expected


@given(U64, U64, U32, U32)
def test_philox_of_all_words(seed, block, tensor, domain):
    expected = scalar_philox(seed, block, tensor, domain)
    assert tuple(int(x) for x in philox(seed, np.uint64(block), tensor, domain)) == expected
    assert _cpu.philox(seed, block, tensor, domain) == expected


def test_there_are_three_known_answers():
    assert len(list(known_answers())) == 3


# ---- the same definition again, one number at a time, in exact arithmetic -------------------------------------------


def scalar_philox(seed, block, tensor, domain, rounds=7):
    c = [block & 0xFFFFFFFF, block >> 32, tensor, domain]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(rounds):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [q >> 32 ^ c[1] ^ k[0], q & 0xFFFFFFFF, p >> 32 ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def round32(x) -> float:
    """The float32 nearest to an exact number, ties to even, as a Python float; subnormals and overflow as in IEEE."""
    x = Fraction(x)
    if x == 0:
        return 0.0
    n, d = abs(x.numerator), x.denominator
    exponent = n.bit_length() - d.bit_length()
    exponent -= Fraction(2) ** exponent > abs(x)
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    nearest = round(x / quantum) * quantum  # round of a Fraction takes ties to even
    if abs(nearest) >= Fraction(2) ** 128:
        return float("inf") if x > 0 else float("-inf")
    return float(nearest)


def exact_fma(a, b, c) -> float:
    return round32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def mul(a, b) -> float:
    return exact_fma(a, b, 0.0)


def to_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def from_bits(x: int) -> float:
    return struct.unpack("<f", struct.pack("<I", x & 0xFFFFFFFF))[0]


def polynomial(decimals, x) -> float:
    *rest, value = (round32(Fraction(d)) for d in decimals)
    for c in reversed(rest):
        value = exact_fma(value, x, c)
    return value


def scalar_pair(a: int, b: int) -> tuple[float, float]:
    u = to_bits(round32(a | 1))
    e = round32(u - 0x4F800000)
    f = from_bits(u & 0x7FFFFF | 0x3F800000) - 1
    q = polynomial(("-0.612627089", "0.370389313", "-0.205763012", "0.0625898615"), f)
    ln2 = Fraction("0.69314718055994530942")
    w = exact_fma(exact_fma(-f, f, f), q, mul(e, round32(-2 * ln2 / 2**23)))
    y = from_bits(0x5F375000 - (to_bits(w) >> 1))
    s = mul(w, y)
    d = exact_fma(-s, y, 1)
    r = exact_fma(mul(s, d), polynomial(("0.501085818", "0.37602824"), d), s)
    h = from_bits(b & 0x7FFFFF | 0x40000000) - 3
    t = mul(h, h)
    sin = polynomial(("1.57079351", "-0.645893872", "0.0794344693", "-0.00433310214"), t)
    cos = polynomial(("0.999994874", "-1.23348641", "0.252580702", "-0.0190958101"), t)
    return mul(mul(r, h), sin), from_bits(to_bits(mul(r, cos)) ^ b & 0x80000000)


def scalar_gaussian(seed, name, index) -> float:
    words = scalar_philox(seed, index // 4, zlib.crc32(name.encode()), 0)
    return scalar_pair(*(words[:2] if index % 4 < 2 else words[2:]))[index % 2]


def scalar_sign(seed, name, index) -> float:
    words = scalar_philox(seed, index // 128, zlib.crc32(name.encode()), 1)
    return -1.0 if words[index % 128 // 32] >> index % 32 & 1 else 1.0


@given(U64, st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), U64)
@example(2**64 - 1, "model.embed_tokens.weight", 2**64 - 1)
@example(0, "a", 0)
@settings(max_examples=200)
def test_noise_is_its_definition(seed, name, index):
    for kind, scalar in (("gaussian", scalar_gaussian), ("rademacher", scalar_sign)):
        found = noise_at(seed, name, np.array([index], dtype=np.uint64), kind)
        assert found.dtype == np.float32
        assert to_bits(float(found[0])) == to_bits(scalar(seed, name, index))


@given(U32, U32)
@example(2**32 - 1, 0x400000)
@example(0, 0)
def test_gaussian_pair_is_its_definition(a, b):
    found = gaussian_pair(np.array([a], dtype=np.uint32), np.array([b], dtype=np.uint32))
    assert [float(z[0]) for z in found] == list(scalar_pair(a, b))


FINITE = U32.map(from_bits).filter(lambda x: abs(x) < float("inf"))


@given(FINITE, FINITE, FINITE)
@settings(max_examples=500)
def test_fma_rounds_once(a, b, c):
    assert float(fma(np.float32(a), np.float32(b), np.float32(c))) == exact_fma(a, b, c)


@given(FINITE, st.integers(-1, 1), st.sampled_from((-1, 1)), st.integers(-1, 1), st.integers(0, 120))
@example(1.0, 0, 1, 1, 0)
@example(from_bits(1), 0, 1, -1, 0)  # between two subnormals
@settings(max_examples=500)
def test_fma_near_halfway(c, shift, sign, nudge, tiny):
    """A product within a hair of half a last place of c, and exactly there: two roundings would go wrong."""
    last_place = from_bits(to_bits(abs(c)) + 1) - abs(c)
    if not 0 < last_place < float("inf"):
        return
    a, b = np.float32(2.0**-20), np.float32(sign * last_place * 2.0 ** (19 + shift))
    if nudge:
        a = np.nextafter(a, np.float32(nudge))
    assert float(fma(a, b, np.float32(c))) == exact_fma(a, b, c)
    small = np.float32(sign * nudge * 2.0**-tiny)
    assert float(fma(small, b, np.float32(c))) == exact_fma(small, b, c)


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        (1 + 2.0**-11, (1 - 2.0**-11 + 2.0**-22) * 2.0**-24, 1.0),  # 1 + 2^-24 + 2^-57: just above a tie
        (1 + 2.0**-23, (1 - 2.0**-23) * 2.0**-24, 1 + 2.0**-23),  # just below a tie that would go up
    ],
)
def test_fma_beats_two_roundings(a, b, c):
    """The case that the reference's trick exists for: rounded to float64 first, the sum would become a tie."""
    assert float(fma(np.float32(a), np.float32(b), np.float32(c))) == exact_fma(a, b, c) != float(np.float32(a * b + c))


def test_fma_of_special_values():
    inf, nan, tiny, big = np.float32("inf"), np.float32("nan"), np.float32(1e-45), np.float32(3e38)
    assert fma(inf, np.float32(2), np.float32(1)) == inf and fma(big, np.float32(-10), big) == -inf
    assert np.isnan(fma(inf, np.float32(1), -inf)) and np.isnan(fma(nan, tiny, tiny)) and np.isnan(fma(inf, 0, 1))
    assert fma(np.float32(0.5), tiny, np.float32(0)) == 0 and fma(np.float32(0.75), tiny, np.float32(0)) == tiny
    for a, b, c, negative in ((-0.0, 1.0, -0.0, True), (1.0, 1.0, -1.0, False), (-0.0, 1.0, 0.0, False)):
        found = fma(np.float32(a), np.float32(b), np.float32(c))
        assert found == 0 and bool(np.signbit(found)) == negative


# ---- distance from exact Box-Muller of the same bits ----------------------------------------------------------------

POWERS = [(2**k + d) % 2**32 for k in range(33) for d in (-1, 0, 1)]


def box_muller(a, b):
    """In float64, from u = float32(a | 1) and the angle's 23 bits."""
    u = (a | np.uint32(1)).astype(np.float32).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u / 2**32))
    h = (b & np.uint32(0x7FFFFF)) / 2.0**22 - 1
    return radius * np.sin(np.pi / 2 * h), radius * np.cos(np.pi / 2 * h) * np.where(b >> np.uint32(31), -1, 1)


def farthest(a, b) -> float:
    found, exact = gaussian_pair(a, b), box_muller(a, b)
    return max(float(np.abs(z - x).max()) for z, x in zip(found, exact, strict=True))  # a NaN stays a NaN


def test_distance_from_box_muller():
    words = np.random.default_rng(0).integers(0, 2**32, (2, 2**21), dtype=np.uint32)  # 2^22 numbers
    assert farthest(words[0], words[1]) <= 2e-4


def test_distance_from_box_muller_at_the_edges():
    near_one = np.arange(2**32 - 2**26, 2**32, 2**8 - 1, dtype=np.uint64)  # every float32 u there, and both neighbours
    a = np.unique(np.concatenate([POWERS, near_one, np.arange(2**12)]).astype(np.uint32))
    for b in (0, 1, 2**22 - 1, 2**22, 2**22 + 1, 2**23 - 1, 2**31, 2**31 + 2**22, 2**32 - 1):
        assert farthest(a, np.full_like(a, b)) <= 2e-4
    b = np.array(POWERS, dtype=np.uint32)
    grid = np.broadcast_arrays(np.array(POWERS, dtype=np.uint32)[:, None], b[None])
    assert farthest(*map(np.ascontiguousarray, grid)) <= 2e-4


def test_no_radius_is_nan():
    """-2 ln(u) must not come out below 0 for a u that rounds to just under 1."""
    a = np.arange(2**32 - 2**28, 2**32, 2**8, dtype=np.uint64).astype(np.uint32)  # the top 2^20 values of u
    radius = reference._radius(a)
    assert np.isfinite(radius).all() and (radius >= 0).all() and radius[-1] < 1e-3


def test_a_wrong_constant_is_seen_by_box_muller(monkeypatch):
    words = np.random.default_rng(1).integers(0, 2**32, (2, 2**16), dtype=np.uint32)
    assert farthest(*words) <= 2e-4
    for name, wrong in (("_MAGIC", np.uint32(0x5F400000)), ("_SB", np.float32(0.3)), ("_LN", np.float32(-1.65e-7))):
        with monkeypatch.context() as patch:
            patch.setattr(reference, name, wrong)
            assert not farthest(*words) <= 2e-4, name


# ---- esfast.noise ---------------------------------------------------------------------------------------------------


FROZEN = {  # CRC-32 of 10,000 numbers
    ("gaussian", 0): 0x447E880C,
    ("gaussian", 0x0123456789ABCDEF): 0xA0A7118D,
    ("rademacher", 0): 0x5D77D3A5,
    ("rademacher", 0x0123456789ABCDEF): 0x47E738F9,
}


@pytest.mark.parametrize(("kind", "seed"), FROZEN)
def test_noise_version_one_is_frozen(kind, seed):
    """Journals depend on these bits: a change here is a new NOISE_VERSION, not a new number in this table."""
    assert esfast.NOISE_VERSION == _cpu.NOISE_VERSION == 1
    z = esfast.noise(seed, "model.norm.weight", 10_000, kind)
    assert zlib.crc32(z.numpy().astype("<f4").tobytes()) == FROZEN[kind, seed]


def test_noise_is_a_float32_tensor_of_the_shape():
    for shape in (5, (5,), (), (2, 3), (0, 4), [4, 1], torch.Size((2, 2))):
        z = esfast.noise(1, "w", shape)
        assert z.dtype == torch.float32 and z.device.type == "cpu"
        assert tuple(z.shape) == ((shape,) if isinstance(shape, int) else tuple(shape))


@given(U64, st.integers(1, 300), st.integers(1, 300), st.sampled_from(("gaussian", "rademacher")))
def test_noise_depends_on_the_element_alone(seed, short, long, kind):
    short, long = sorted((short, long))
    whole = esfast.noise(seed, "w", (long, 2), kind)
    assert torch.equal(esfast.noise(seed, "w", short, kind), whole.reshape(-1)[:short])
    index = np.random.default_rng(seed).permutation(2 * long)[:short]
    assert np.array_equal(noise_at(seed, "w", index, kind), whole.reshape(-1).numpy()[index])


def test_signs_are_signs():
    z = esfast.noise(3, "w", 4096, "rademacher")
    assert set(z.tolist()) == {-1.0, 1.0}


def test_tensor_ids():
    assert tensor_id("123456789") == 0xCBF43926  # the check value of CRC-32
    names = [f"model.layers.{i}.{part}" for i in range(1000) for part in ("q_proj.weight", "k_proj.weight", "bias")]
    assert len({tensor_id(n) for n in names}) == len(names)


def test_domains_differ():
    assert len(set(DOMAINS.values())) == len(DOMAINS)
