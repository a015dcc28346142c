"""add_noise_: what it computes, what it leaves alone, what it costs, and the noise's statistics."""

import os
import re
import sys
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import esfast
from esfast import Plan, Slice, add_noise_
from esfast.core import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gaussian", "rademacher")


def plan_of(**tensors):
    return Plan(tensors.items())


def noise_by_cpu(numel, seed=0, name="w", kind="gaussian"):
    plan = Plan([(name, torch.zeros(numel))])
    add_noise_(plan, [seed], [1.0], noise=kind, backend="cpu")
    return plan.tensors[0]


# ---- the formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("kind", KINDS)
def test_sum_in_float32_rounded_once(kind, backend):
    """Exact rational arithmetic, rounded to float32 after every member and to the weight's dtype at the end."""
    seeds, coeffs = [7, 2**63 + 5, 12], [0.1, -2.5, 1e-3]
    noises = [esfast.noise(s, "w", 50, kind) for s in seeds]
    weights = torch.linspace(-1.5, 1.5, 50)
    for dtype in DTYPES:
        plan = plan_of(w=weights.to(dtype))
        start = plan.tensors[0].double().tolist()
        add_noise_(plan, seeds, coeffs, noise=kind, backend=backend)
        for i, value in enumerate(start):
            acc = Fraction(value)
            for c, z in zip(coeffs, noises, strict=True):
                exact = Fraction(float(np.float32(c))) * Fraction(float(z[i])) + acc
                exponent = Fraction(2) ** (int(np.floor(np.log2(float(abs(exact))))) - 23)
                acc = round(exact / exponent) * exponent
            assert plan.tensors[0][i] == torch.tensor(float(acc)).to(dtype)


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.floats(-2, 2, width=32)), max_size=64),
    st.sampled_from(KINDS),
    st.sampled_from(("cpu", "reference")),
)
def test_one_call_with_k_members_is_k_calls(same_bits, members, kind, backend):
    start = torch.linspace(-0.1, 0.1, 130)
    together, apart = plan_of(w=start.clone()), plan_of(w=start.clone())
    add_noise_(together, [s for s, _ in members], [c for _, c in members], noise=kind, backend=backend)
    for seed, coeff in members:
        add_noise_(apart, [seed], [coeff], noise=kind, backend=backend)
    assert same_bits(together.tensors, apart.tensors)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_members_copy_the_base(dtype, backend, same_bits):
    """A call without members copies every bit of the base, also the payload of a NaN. In place it changes nothing."""
    raw = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = raw.view(dtype) if dtype is not torch.float32 else (raw.to(torch.int32) * 65537).view(dtype)
    plan, base = plan_of(w=torch.zeros_like(values)), plan_of(w=values.clone())
    add_noise_(plan, [], [], base=base, backend=backend)
    assert same_bits(plan.tensors[0], values) and same_bits(base.tensors[0], values)
    add_noise_(plan, [], [], backend=backend)
    assert same_bits(plan.tensors[0], values)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_seeds_and_coefficients_come_in_many_shapes(backend, same_bits):
    expected = plan_of(w=torch.ones(9))
    add_noise_(expected, [1, 2], [0.5, -0.25], backend=backend)
    for seeds, coeffs in (
        ((1, 2), (0.5, -0.25)),
        (np.array([1, 2], dtype=np.uint64), np.array([0.5, -0.25])),
        (torch.tensor([1, 2]), torch.tensor([0.5, -0.25])),
        (iter((1, 2)), iter((np.float32(0.5), Fraction(-1, 4)))),
    ):
        plan = plan_of(w=torch.ones(9))
        add_noise_(plan, seeds, coeffs, backend=backend)
        assert same_bits(plan.tensors, expected.tensors)


def test_autograd_does_not_mind():
    layer = torch.nn.Linear(3, 3)
    add_noise_(Plan(layer), [1], [0.1])
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.requires_grad and layer.weight.grad is not None


# ---- nothing but seed, name and element counts ----------------------------------------------------------------------


def changed_by(items, seeds=(3,), coeffs=(1.0,), kind="gaussian", backend="cpu"):
    plan = Plan(items)
    add_noise_(plan, seeds, coeffs, noise=kind, backend=backend)
    return dict(zip(plan.names, plan.tensors, strict=True))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("kind", KINDS)
def test_other_tensors_and_order_do_not_matter(kind, backend, same_bits):
    sizes = {"a": 700, "b": 1, "c": 1025, "d": 33}
    alone = {n: changed_by([(n, torch.zeros(k))], kind=kind, backend=backend)[n] for n, k in sizes.items()}
    for order in (list(sizes), list(sizes)[::-1], ["c", "a"]):
        together = changed_by([(n, torch.zeros(sizes[n])) for n in order], kind=kind, backend=backend)
        assert list(together) == order and all(same_bits(t, alone[n]) for n, t in together.items())
    for n, k in sizes.items():
        assert same_bits(alone[n], esfast.noise(3, n, k, kind))


@given(st.data())
def test_a_split_tensor_gets_the_noise_of_the_whole(same_bits, data):
    """Cut along every dimension at random places; the pieces are other memory, in another order."""
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    kind = data.draw(st.sampled_from(KINDS))
    backend = data.draw(st.sampled_from(("cpu", "reference")))
    whole = changed_by([("w", torch.zeros(shape))], kind=kind, backend=backend)["w"]
    pieces = [((), ())]
    for n in shape:
        cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=2))})
        pieces = [((*o, a), (*s, b - a)) for o, s in pieces for a, b in zip(cuts, cuts[1:], strict=False)]
    pieces = data.draw(st.permutations(pieces))
    plan = Plan([("w", torch.zeros(size), Slice(tuple(shape), offset)) for offset, size in pieces])
    add_noise_(plan, [3], [1.0], noise=kind, backend=backend)
    for (offset, size), found in zip(pieces, plan.tensors, strict=True):
        wanted = whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
        assert same_bits(found, wanted)


def test_a_fused_matrix_gets_the_noise_of_its_parts(same_bits):
    """As in inference engines: one tensor qkv, whose rows are q, k and v of the checkpoint."""
    qkv, sizes = torch.zeros(96, 20), {"q": 64, "k": 16, "v": 16}
    plan = Plan(zip(sizes, qkv.split(list(sizes.values())), strict=True))
    add_noise_(plan, [5], [1.0])
    assert same_bits(qkv, torch.cat([esfast.noise(5, n, (k, 20)) for n, k in sizes.items()]))


def test_dtype_changes_the_rounding_only():
    z = esfast.noise(8, "w", 1000)
    for dtype in DTYPES:
        found = changed_by([("w", torch.zeros(1000, dtype=dtype))], seeds=[8])["w"]
        assert torch.equal(found, z.to(dtype))


# ---- backends -------------------------------------------------------------------------------------------------------


def test_an_explicit_backend_that_can_not_run_raises(monkeypatch, same_bits):
    monkeypatch.setattr(ops, "_cpu_missing", lambda: "its C++ extension is not built")
    ops._why_not.cache_clear()
    plan = plan_of(w=torch.ones(3))
    with pytest.raises(RuntimeError, match="backend 'cpu' can't run: its C\\+\\+ extension is not built"):
        add_noise_(plan, [1], [1.0], backend="cpu")
    assert plan.tensors[0].tolist() == [1, 1, 1]
    for cache in (ops._why_not, ops.auto_backend):
        cache.cache_clear()
    monkeypatch.setattr(ops, "_triton_missing", lambda device: "Triton is not installed")
    try:
        with pytest.warns(RuntimeWarning, match="slow reference.*not built"):
            add_noise_(plan, [1], [1.0])
        assert ops.backend_report()["cpu"] == "its C++ extension is not built"
    finally:
        for cache in (ops._why_not, ops.auto_backend):
            cache.cache_clear()
    assert same_bits(plan.tensors[0], 1 + esfast.noise(1, "w", 3))


def test_auto_takes_the_extension():
    assert ops.auto_backend(torch.device("cpu")) == "cpu"
    report = ops.backend_report("cpu")
    assert report["cpu"] == report["reference"] == "ready"


# ---- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(run) -> int:
    """Bytes by which the process's resident memory rises above its level before, at the highest."""

    def status(field):
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", file.read(), re.MULTILINE)[1])

    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak
    except OSError as error:
        pytest.skip(f"the peak of resident memory can't be reset here: {error}")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("kind", KINDS)
def test_no_memory_is_taken_for_noise(kind):
    weights = torch.ones(50_000_000, dtype=torch.bfloat16)
    parts = weights.split(50_000_000 // 300 + 1)  # as many tensors as a 7B model has
    plan = Plan([(f"layer.{i}", part) for i, part in enumerate(parts)])
    base = plan.clone()
    add_noise_(plan_of(w=torch.zeros(10**6)), [1, 2], [0.1, 0.1], noise=kind)  # threads and their stacks
    taken = peak_memory(lambda: add_noise_(plan, [1, 2], [1e-3, -1e-3], noise=kind))
    assert taken < weights.nbytes / 100
    taken = peak_memory(lambda: add_noise_(plan, [1], [1e-3], base=base, noise=kind))
    assert taken < weights.nbytes / 100
    assert peak_memory(lambda: weights.clone()) > weights.nbytes * 0.9  # the measure does see memory


# ---- statistics -----------------------------------------------------------------------------------------------------

N = 2**24  # numbers; a standard error (SE) below is that of N independent draws from the exact distribution


def correlation_errors(pairs):
    """For pairs of samples of mean 0 and variance 1: their mean products in standard errors, SE = 1 / sqrt(n)."""
    return {what: float((x * y).mean()) * len(x) ** 0.5 for what, (x, y) in pairs.items()}


@pytest.fixture(scope="module")
def sample():
    return {kind: noise_by_cpu(N, seed=1, kind=kind).double() for kind in KINDS}


def test_moments_of_the_gaussian(sample):
    """SE of mean 1/sqrt(N), variance sqrt(2/N), skewness sqrt(6/N), kurtosis sqrt(24/N)."""
    z = sample["gaussian"]
    mean = z.mean()
    centred = z - mean
    variance = (centred**2).mean()
    errors = {
        "mean": mean * N**0.5,
        "variance": (variance - 1) * (N / 2) ** 0.5,
        "skewness": (centred**3).mean() / variance**1.5 * (N / 6) ** 0.5,
        "kurtosis": ((centred**4).mean() / variance**2 - 3) * (N / 24) ** 0.5,
    }
    assert all(abs(float(e)) < 5 for e in errors.values()), errors
    assert 5 < float(z.abs().max()) <= 6.7  # sqrt(-2 ln 2^-32) = 6.66: the largest that there is


def test_moments_of_the_signs(sample):
    """The mean is all there is: SE 1/sqrt(N). So for every bit position of the words, SE sqrt(32/N)."""
    z = sample["rademacher"]
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(z.mean())) * N**0.5 < 5
    assert float((z.reshape(-1, 128).mean(0).abs() * (N / 128) ** 0.5).max()) < 5


@pytest.mark.parametrize("kind", KINDS)
def test_correlations(kind, sample):
    z = sample[kind]
    pairs = {f"lag {k}": (z[:-k], z[k:]) for k in (*range(1, 9), 31, 32, 64, 127, 128, 1024)}
    pairs["pair"] = (z[0::2], z[1::2])
    pairs["pairs of a block"] = (z.reshape(-1, 4)[:, :2].reshape(-1), z.reshape(-1, 4)[:, 2:].reshape(-1))
    n = N // 8
    for what, other in {
        "next seed": {"seed": 2},
        "next high half of the seed": {"seed": 1 + 2**32},
        "another name": {"name": "v"},
    }.items():
        pairs[what] = (z[:n], noise_by_cpu(n, **{"seed": 1, "kind": kind, **other}).double())
    pairs["another kind"] = (sample["gaussian"][:n], sample["rademacher"][:n])
    errors = correlation_errors(pairs)
    errors["squares of a pair"] = 0.0
    if kind == "gaussian":  # z^2 - 1 has variance 2: SE 2 / sqrt(n)
        x, y = z[0::2] ** 2 - 1, z[1::2] ** 2 - 1
        errors["squares of a pair"] = float((x * y).mean()) * len(x) ** 0.5 / 2
    assert all(abs(e) < 5 for e in errors.values()), errors


def test_the_statistics_see_a_fault(monkeypatch):
    """One Philox round leaves correlations that the test above must see."""
    monkeypatch.setattr(sys.modules["esfast.core.noise"], "PHILOX_ROUNDS", 1)
    weak = [esfast.noise(1, name, 2**16).double() for name in ("v", "w")]
    assert max(abs(e) for e in correlation_errors({k: (weak[1][:-k], weak[1][k:]) for k in range(1, 9)}).values()) > 5
