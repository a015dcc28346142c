"""The C++ backend against the reference, to the bit, over whatever a user may hand it."""

import itertools
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from esfast import Plan, Slice, _cpu, add_noise_
from esfast.core.noise import DOMAINS, noise_at

reference = sys.modules["esfast.core.noise"]  # the module: esfast.noise is the function
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gaussian", "rademacher")
CANARY = 77  # an exact value in every dtype, and no NaN

SEEDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from((0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1)))
COEFFS = st.one_of(
    st.sampled_from((0.0, -0.0, 1e-3, -1e-3, 1.0, 1e-45, -1e-38, 3e4, -1e38)),
    st.floats(-3.0, 3.0, width=32),
)
# sizes that end inside, at and behind a Philox block (4 or 128), a vector and a tile (1024)
SIZES = st.one_of(st.integers(1, 9), st.sampled_from((31, 32, 33, 63, 64, 65, 127, 129, 257)))


def run_cpu(plan, base, seeds, coeffs, kind, threads=1, instruction_set=None):
    _cpu.add_noise(
        plan.table(base).rows,
        np.array(seeds, dtype=np.uint64),
        np.array(coeffs, dtype=np.float32),
        DOMAINS[kind],
        False,
        0.0,
        0,
        0,
        0,
        (0.0,) * 4,
        threads,
        instruction_set or _cpu.instruction_sets()[0],
    )


def weights_of_all_sorts(dtype, numel, rng):
    """Ordinary weights, mixed with any bits at all: subnormals, zeros of both signs, infinities, NaN."""
    ordinary = torch.from_numpy(rng.standard_normal(numel)).to(dtype)
    width, integer = (32, torch.int32) if dtype is torch.float32 else (16, torch.int16)
    words = rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), numel)
    raw = torch.from_numpy(words).to(integer).view(dtype)
    small = (raw.view(integer) & (0x80000000 - 2**32 + 0x7FFFFF if width == 32 else -0x8000 + 0x7F)).view(dtype)
    limits = torch.finfo(dtype)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), limits.max, limits.tiny])
    special = special.to(dtype)[torch.from_numpy(rng.integers(0, len(special), numel))]
    choice = torch.from_numpy(rng.integers(0, 6, numel))
    mixed = torch.where(choice < 3, ordinary, torch.where(choice == 3, raw, torch.where(choice == 4, small, special)))
    return mixed.to(dtype)


@st.composite
def strided(draw, dtype, shape, rng):
    """A buffer of canaries, and a view of that shape into it: margins, steps and permuted dimensions."""
    order = draw(st.permutations(range(len(shape))))
    plain = draw(st.booleans())
    margins = [(0, 0) if plain else draw(st.tuples(st.integers(0, 3), st.integers(0, 3))) for _ in shape]
    steps = [1 if plain else draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in shape]
    full = [m0 + n * s + m1 for (m0, m1), n, s in zip(margins, shape, steps, strict=True)]
    buffer = torch.full([1 + np.prod(full, dtype=int) + 1], CANARY, dtype=dtype)
    whole = buffer[1:-1].reshape([full[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    cuts = tuple(slice(m[0], m[0] + n * s, s) for m, n, s in zip(margins, shape, steps, strict=True))
    view = whole[cuts]
    assert view.shape == torch.Size(shape) and view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    view.copy_(weights_of_all_sorts(dtype, view.numel(), rng).reshape(shape))
    return buffer, view


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    items, base_items, buffers = [], [], []
    based = draw(st.booleans())
    for t in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(SIZES, min_size=0, max_size=4))
        while np.prod(shape) > 3000:
            shape[int(np.argmax(shape))] = 3
        buffer, view = draw(strided(dtype, shape, rng))
        before = [draw(st.sampled_from((0, 0, 1, 7, 2**9 + 3))) for _ in shape]
        after = [draw(st.sampled_from((0, 0, 2, 5))) for _ in shape]
        if shape and draw(st.booleans()):  # past 2^34, where the block number needs its second word
            before[0] = 2**35 // max(1, int(np.prod(shape[1:]))) + 1
        window = Slice(tuple(b + n + a for b, n, a in zip(before, shape, after, strict=True)), tuple(before))
        items.append((f"t{t}", view, window))
        buffers.append(buffer)
        if based:
            buffer, view = draw(strided(dtype, shape, rng))
            base_items.append((f"t{t}", view, window))
            buffers.append(buffer)
    count = draw(st.one_of(st.integers(0, 4), st.sampled_from((17, 64))))
    if count > 4 and sum(v.numel() for _, v, _ in items) > 500:
        count = 4
    seeds = draw(st.lists(SEEDS, min_size=count, max_size=count))
    coeffs = draw(st.lists(COEFFS, min_size=count, max_size=count))
    return Plan(items), Plan(base_items) if based else None, buffers, seeds, coeffs, draw(st.sampled_from(KINDS))


@given(cases())
@settings(max_examples=250)
def test_cpu_is_the_reference(bits, case):
    """Every instruction set, against the reference. Whole buffers are compared: canaries round the weights, the
    columns between them and the base must be as they were."""
    plan, base, buffers, seeds, coeffs, kind = case
    start = [b.clone() for b in buffers]
    add_noise_(plan, seeds, coeffs, base=base, noise=kind, backend="reference")
    expected = [b.clone() for b in buffers]
    for instruction_set, threads in itertools.product(_cpu.instruction_sets(), (1, 2)):
        for buffer, before in zip(buffers, start, strict=True):
            buffer.copy_(before)
        run_cpu(plan, base, seeds, coeffs, kind, threads, instruction_set)
        for found, wanted in zip(buffers, expected, strict=True):
            nan = found.isnan() & wanted.isnan()  # a NaN stays one, with whatever payload
            assert torch.equal(bits(found) * ~nan, bits(wanted) * ~nan), instruction_set


@pytest.fixture
def streamed():
    """Any number of weights is written past the cache, as otherwise only those of large models."""
    _cpu.set_streamed_from(0)
    yield
    _cpu.set_streamed_from(2**26)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_past_the_cache_is_the_same(dtype, kind, streamed, same_bits):
    """Members and restored weights get the same bits past the cache. Tensors begin at cache lines or not, and are cut
    by tiles or not; the memory beside them stays unchanged."""
    rng = np.random.default_rng(0)
    places = [(0, 4096), (8192, 5000), (16385, 4096), (32768, 1), (40960, 10_241)]
    source, buffer = (weights_of_all_sorts(dtype, 2**16, rng) for _ in range(2))

    def plan_of(memory):
        return Plan([(f"w{i}", memory[start : start + n]) for i, (start, n) in enumerate(places)])

    expected = buffer.clone()
    for seeds, coeffs in (([3, 4], [1e-3, -0.5]), ([], [])):
        add_noise_(plan_of(expected), seeds, coeffs, base=plan_of(source), noise=kind, backend="reference")
        for threads, instruction_set in itertools.product((1, 2), _cpu.instruction_sets()):
            found = buffer.clone()
            run_cpu(plan_of(found), plan_of(source), seeds, coeffs, kind, threads, instruction_set)
            nan = found.isnan() & expected.isnan()  # a NaN stays one, with whatever payload
            assert same_bits([found.masked_fill(nan, 0)], [expected.masked_fill(nan, 0)]), instruction_set


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_members_of_a_master_are_the_same_past_the_cache(dtype, streamed, same_bits):
    plan = Plan([("w", weights_of_all_sorts(dtype, 5000, np.random.default_rng(0)).nan_to_num(0, 1, -1))])
    master = plan.master()
    found = {}
    for backend in ("reference", "cpu"):
        for rounding in ("nearest", "stochastic"):
            add_noise_(plan, [7], [1e-3], base=master, rounding=rounding, backend=backend)
            found[backend, rounding] = plan.tensors[0].clone()
    for rounding in ("nearest", "stochastic"):
        assert same_bits([found["cpu", rounding]], [found["reference", rounding]])


# The reference knows one tensor of the plan at a time; these are large enough for threads to share the work.


@pytest.fixture(scope="module")
def large():
    torch.manual_seed(0)
    return {dtype: (torch.randn(150_001) * 0.02).to(dtype) for dtype in DTYPES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_instruction_sets_change_no_bit(dtype, kind, large, same_bits):
    seeds, coeffs = [5, 2**64 - 1], [1e-3, -0.5]
    expected = Plan([("w", large[dtype].clone())])
    add_noise_(expected, seeds, coeffs, noise=kind, backend="reference")
    for threads, instruction_set in itertools.product((1, 2, 3, 4), _cpu.instruction_sets()):
        found = Plan([("w", large[dtype].clone())])
        run_cpu(found, None, seeds, coeffs, kind, threads, instruction_set)
        assert same_bits(found.tensors, expected.tensors), (threads, instruction_set)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found = Plan([("w", large[dtype].clone())])
        add_noise_(found, seeds, coeffs, noise=kind, backend="cpu")
        assert same_bits(found.tensors, expected.tensors)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_16_bit_weight(dtype, same_bits):
    """All 65,536 bit patterns through load and store, alone and with noise; rounding is PyTorch's."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    number = ~every.isnan()
    for coeff in (0.0, 1e-30, 1e-3, 1.0, 1e4):
        for instruction_set in _cpu.instruction_sets():
            plan = Plan([("w", every.clone())])
            run_cpu(plan, None, [1], [coeff], "rademacher", 1, instruction_set)
            signs = torch.from_numpy(noise_at(1, "w", np.arange(len(every)), "rademacher"))
            exact = every.double() + float(np.float32(coeff)) * signs.double()
            wanted = exact.to(torch.float32).to(dtype)
            assert same_bits(plan.tensors[0][number] + 0, wanted[number] + 0)  # + 0: -0 and 0 alike
            assert plan.tensors[0][~number].isnan().all()


def test_a_half_that_overflows_becomes_infinite():
    assert noise_at(10, "w", np.arange(5), "rademacher").tolist() == [1, -1, -1, 1, 1]
    largest, infinite = 65504.0, float("inf")
    plan = Plan([("w", torch.tensor([largest, -largest, largest, -largest, infinite], dtype=torch.float16))])
    add_noise_(plan, [10], [100.0], noise="rademacher", backend="cpu")
    assert plan.tensors[0].tolist() == [infinite, -infinite, 65408, -65408, infinite]


SUBNORMAL = {
    torch.float32: torch.arange(1, 9000, dtype=torch.int32),
    torch.bfloat16: torch.arange(1, 128, dtype=torch.int16),
    torch.float16: torch.arange(1, 1024, dtype=torch.int16),
}


@pytest.mark.parametrize("coeff", (0.0, 1e-40, 1e-7))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flush_denormal_changes_no_bit(dtype, kind, coeff, same_bits):
    """Subnormal weights and coefficients count in full, whatever torch.set_flush_denormal says; in the extension
    too, whose threads may have the mode from elsewhere."""
    weights = SUBNORMAL[dtype].view(dtype)
    coeffs = np.array([coeff, -coeff], dtype=np.float32)
    runs = {}
    for flush in (False, True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor can't flush subnormal numbers")
        try:
            for backend in ("cpu", "reference"):
                runs[flush, backend] = Plan([("w", weights.clone())])
                add_noise_(runs[flush, backend], [9, 8], [coeff, -coeff], noise=kind, backend=backend)
            runs[flush, "extension"] = Plan([("w", weights.clone())])
            run_cpu(runs[flush, "extension"], None, [9, 8], coeffs, kind)
            flushes = float(torch.tensor([1.2e-38]) * torch.tensor([0.5])) == 0
        finally:
            torch.set_flush_denormal(False)
        assert flushes == flush  # the process keeps the mode that it chose
    for plan in runs.values():
        assert same_bits(plan.tensors, runs[False, "reference"].tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", (2**62 - 3000, 2**34 - 1500, 2**40 - 1))
def test_large_element_numbers(start, kind, same_bits):
    """Element numbers up to the largest that a tensor may have, and across those at which the number of a Philox block
    needs its second word."""
    count = min(3000, 2**62 - start)
    found, wanted = (Plan([("w", torch.zeros(count), Slice((2**62,), (start,)))]) for _ in range(2))
    add_noise_(found, [3], [1.0], noise=kind, backend="cpu")
    add_noise_(wanted, [3], [1.0], noise=kind, backend="reference")
    assert same_bits(found.tensors, wanted.tensors)
    index = np.arange(start, start + count, dtype=np.uint64)
    assert np.array_equal(found.tensors[0].numpy(), noise_at(3, "w", index, kind))


def test_extension_refuses_a_table_it_can_not_read():
    plan, none = Plan([("w", torch.zeros(3))]), np.zeros(0, dtype=np.uint64)
    one = np.zeros(1, dtype=np.float32)
    for table, coeffs, name, words in (
        (plan.table().rows[:, :9], one[:0], "baseline", "segments"),
        (plan.table().rows, one, "baseline", "differ in length"),
        (plan.table().rows, one[:0], "mmx", "no instruction set mmx"),
    ):
        with pytest.raises(ValueError, match=words):
            _cpu.add_noise(np.ascontiguousarray(table), none, coeffs, 0, False, 0.0, 0, 0, 0, (0.0,) * 4, 1, name)


# ---- each constant of the definition matters: changed by one last place, the two twins part --------------------------

CONSTANTS = [("_Q", i) for i in range(4)] + [("_S", i) for i in range(4)] + [("_C", i) for i in range(4)]
CONSTANTS += [("_LN", None), ("_MAGIC", None), ("_SA", None), ("_SB", None)]


def nudged(value):
    return value + np.uint32(1) if isinstance(value, np.uint32) else np.nextafter(value, np.float32(2))


def twins_agree(kind, bits) -> bool:
    found, wanted = (Plan([("w", torch.zeros(2**17))]) for _ in range(2))
    add_noise_(found, [2**40 + 1], [1.0], noise=kind, backend="cpu")
    add_noise_(wanted, [2**40 + 1], [1.0], noise=kind, backend="reference")
    return torch.equal(bits(found.tensors[0]), bits(wanted.tensors[0]))


@pytest.mark.parametrize(("name", "place"), CONSTANTS)
def test_a_wrong_constant_is_seen(name, place, monkeypatch, bits):
    value = getattr(reference, name)
    wrong = nudged(value) if place is None else tuple(nudged(v) if i == place else v for i, v in enumerate(value))
    monkeypatch.setattr(reference, name, wrong)
    assert not twins_agree("gaussian", bits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_bit_source_is_seen(kind, monkeypatch, bits):
    assert twins_agree(kind, bits)
    for name, wrong in (
        ("PHILOX_ROUNDS", 10),
        ("DOMAINS", {"gaussian": 1, "rademacher": 0}),
        ("NUMBERS_PER_BLOCK", {"gaussian": 2, "rademacher": 64}),
        ("tensor_id", lambda name: 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(reference, name, wrong)
            assert not twins_agree(kind, bits), name
