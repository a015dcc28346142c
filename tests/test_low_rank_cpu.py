"""The C++ kernel of low-rank noise against the reference, to the bit."""

import itertools
import os

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_cpu_backend import COEFFS, DTYPES, SEEDS, strided, weights_of_all_sorts

from esfast import Plan, Slice, _cpu, add_noise_
from esfast.core.noise import DOMAINS
from esfast.core.ops import AdamStep

# ends inside, at and behind a vector, a strip of 8 rows, and a block of 64 rows by 256 columns
ROWS = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 17, 63, 64, 65, 67, 130)))
COLS = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 31, 32, 33, 63, 65, 127, 255, 256, 257, 300)))
SETS = list(itertools.product(_cpu.instruction_sets(), (1, 3)))


def run(
    plan, base, seeds, coeffs, rank, instruction_set, threads=1, rounding="nearest", decay=0.0, anchor=None, adam=None
):
    """add_noise_ by an instruction set of choice."""
    low = plan.low if plan.low is not None else base.low if base is not None else None
    _cpu.add_noise(
        plan.table(base, anchor, matrices=True).rows,
        np.array(seeds, dtype=np.uint64),
        np.array(coeffs, dtype=np.float32),
        DOMAINS["low_rank"],
        rounding == "stochastic",
        decay,
        low.data_ptr() if low is not None else 0,
        *((m.data_ptr() for m in adam.moments) if adam else (0, 0)),
        adam.numbers if adam else (0.0,) * 4,
        threads,
        instruction_set,
        rank,
    )


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    items, base_items, buffers = [], [], []
    based = draw(st.booleans())
    for t in range(draw(st.integers(1, 2))):
        shape = [*draw(st.sampled_from(((), (1,), (3,), (2, 2)))), draw(ROWS), draw(COLS)]
        while np.prod(shape) > 8000:
            shape[int(np.argmax(shape))] = 5
        before = [draw(st.sampled_from((0, 0, 1, 7, 2**9 + 3))) for _ in shape]
        after = [draw(st.sampled_from((0, 0, 2, 5))) for _ in shape]
        if draw(st.integers(0, 3)) == 0:
            # factors whose block numbers need their second words
            d = draw(st.integers(0, len(shape) - 1))
            before[d] = 2**36 // int(np.prod(shape))
        window = Slice(tuple(b + n + a for b, n, a in zip(before, shape, after, strict=True)), tuple(before))
        for into, use in ((items, True), (base_items, based)):
            if use:
                buffer, view = draw(strided(dtype, shape, rng))
                into.append((f"t{t}", view, window))
                buffers.append(buffer)
    rank = draw(st.sampled_from((1, 1, 2, 3, 4, 7, 16)))
    count = draw(st.one_of(st.integers(1, 4), st.sampled_from((31, 32, 33, 64))))
    if count * rank * sum(v.numel() for _, v, _ in items) > 120_000:
        rank, count = 1, min(count, 33)
    seeds = draw(st.lists(SEEDS, min_size=count, max_size=count))
    coeffs = draw(st.lists(COEFFS, min_size=count, max_size=count))
    return Plan(items), Plan(base_items) if based else None, buffers, seeds, coeffs, rank


@given(cases())
@settings(max_examples=300 if os.environ.get("ESFAST_LONG_TESTS") else 25)
def test_cpu_is_the_reference(bits, case):
    """Whole buffers are compared: canaries round the weights, the columns between them and the base are as they were."""
    plan, base, buffers, seeds, coeffs, rank = case
    start = [b.clone() for b in buffers]
    add_noise_(plan, seeds, coeffs, base=base, noise="low_rank", rank=rank, backend="reference")
    expected = [b.clone() for b in buffers]
    for instruction_set, threads in SETS:
        for buffer, before in zip(buffers, start, strict=True):
            buffer.copy_(before)
        run(plan, base, seeds, coeffs, rank, instruction_set, threads)
        for found, wanted in zip(buffers, expected, strict=True):
            # a NaN stays one, with whatever payload
            nan = found.isnan() & wanted.isnan()
            assert torch.equal(bits(found) * ~nan, bits(wanted) * ~nan), instruction_set


@pytest.mark.parametrize("instruction_set", _cpu.instruction_sets())
@pytest.mark.parametrize("shape", [(90, 3), (3, 90)], ids=str)
def test_numbers_that_need_a_second_word(shape, instruction_set, same_bits):
    """Rows, columns and elements to round, across the number 2**34, where a block's number grows into its second word."""
    long = shape.index(90)
    whole, offset = ([n, n] for n in (3, 0))
    whole[long], offset[long] = 2**34 + 200, 2**34 - 37
    plans = [Plan([("w", torch.zeros(shape).bfloat16(), Slice(tuple(whole), tuple(offset)))]) for _ in range(2)]
    add_noise_(plans[0], [5, 6], [1.0, 0.5], noise="low_rank", rank=2, rounding="stochastic", backend="reference")
    run(plans[1], None, [5, 6], [1.0, 0.5], 2, instruction_set, rounding="stochastic")
    assert same_bits(plans[0].tensors, plans[1].tensors)


@pytest.fixture
def streamed():
    """Any number of weights is written past the cache, as otherwise only those of large models."""
    _cpu.set_streamed_from(0)
    yield
    _cpu.set_streamed_from(2**26)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_past_the_cache_is_the_same(dtype, streamed, same_bits):
    """Of rows that begin on lines of the cache and that don't; what lies beside them is left alone."""
    rng = np.random.default_rng(0)
    places = [(0, 70, 288), (20_480, 33, 261), (32_769, 9, 512), (40_960, 1, 77), (49_152, 77, 1)]
    source, buffer = (weights_of_all_sorts(dtype, 2**16, rng).nan_to_num(0, 1, -1) for _ in range(2))

    def plan_of(memory):
        return Plan([(f"w{i}", memory[at : at + r * c].view(r, c)) for i, (at, r, c) in enumerate(places)])

    for members, rounding in ((1, "nearest"), (3, "stochastic"), (40, "nearest")):
        seeds, coeffs = list(range(members)), [1e-3 * (-1) ** j for j in range(members)]
        expected = buffer.clone()
        options = {"base": plan_of(source), "noise": "low_rank", "rounding": rounding}
        add_noise_(plan_of(expected), seeds, coeffs, backend="reference", **options)
        for instruction_set, threads in SETS:
            found = buffer.clone()
            run(plan_of(found), plan_of(source), seeds, coeffs, 1, instruction_set, threads, rounding)
            assert same_bits(found, expected), (instruction_set, members, rounding)


MODES = ("in place", "base", "master", "from master", "from high")


def weights(dtype):
    """Blocks that a tile does not fill, a slice, a transposed matrix, a batch, a convolution, and vectors beside them."""
    generator = torch.Generator().manual_seed(2)

    def randn(*shape):
        return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)

    return Plan(
        [
            ("plain", randn(66, 261)),
            ("slice", randn(8, 300)[2:5, 30:243], Slice((1000, 5000), (3, 700))),
            ("transposed", randn(5, 9).t()),
            ("batch", randn(4, 11, 37)[1:3, 2:], Slice((9, 20, 40), (4, 3, 1))),
            ("convolution", randn(6, 4, 3, 3)[:, 1:3]),
            ("vector", randn(700)),
            ("scalar", randn(())),
        ]
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_that_an_update_can_do(dtype, mode, same_bits):
    """Stochastic rounding, split masters, decay to zero and to anchors, Adam; one round of pairs and several."""
    for rounding, decay, anchored, adam, members, rank in (
        ("nearest", 0, False, False, 1, 1),
        ("stochastic", 0.1, True, False, 9, 4),
        ("stochastic", 0, False, True, 3, 2),
        ("nearest", 0.1, False, True, 11, 3),
        ("stochastic", 0.1, True, False, 0, 1),
    ):
        if adam and mode not in ("in place", "master"):
            continue
        found = []
        for backend in ("cpu", "reference", "baseline"):
            plan, base, step = weights(dtype), None, None
            if mode == "base":
                base = plan.clone()
            elif mode == "master":
                plan = plan.master()
            elif mode.startswith("from"):
                base = plan.master()
                # low halves that are not 0
                add_noise_(base, [9], [1e-3], backend="cpu")
                base = base.high() if mode == "from high" else base
            anchor = plan.high().clone() if anchored else None
            if adam:
                generator = torch.Generator().manual_seed(3)
                step = AdamStep.at(3, torch.rand(2, plan.flat_numel, generator=generator), 1e-2, 0.9, 0.99, 1e-8)
            seeds, coeffs = list(range(5, 5 + members)), [1e-3 * (-1) ** j for j in range(members)]
            if backend == "baseline":
                run(plan, base, seeds, coeffs, rank, backend, 1, rounding, decay, anchor, step)
            else:
                add_noise_(
                    plan,
                    seeds,
                    coeffs,
                    base,
                    "low_rank",
                    rounding,
                    backend,
                    decay=decay,
                    anchor=anchor,
                    adam=step,
                    rank=rank,
                )
            more = [plan.low.view(torch.bfloat16)] if plan.low is not None else []
            found.append(plan.tensors + more + ([step.moments] if adam else []))
        assert same_bits(found[0], found[1]) and same_bits(found[2], found[1]), (rounding, decay, adam, members, rank)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_call_with_k_members_is_k_calls(backend, same_bits):
    """The weights are float32, so nothing is rounded between calls. There are more members than the C++ kernel takes in
    one round."""
    start = torch.linspace(-0.1, 0.1, 9 * 70).reshape(9, 70)
    together, apart = (Plan([("w", start.clone()), ("v", start[0].clone())]) for _ in range(2))
    seeds, coeffs = list(range(70)), [0.1 * (-1) ** j for j in range(70)]
    add_noise_(together, seeds, coeffs, noise="low_rank", rank=2, backend=backend)
    for seed, coeff in zip(seeds, coeffs, strict=True):
        add_noise_(apart, [seed], [coeff], noise="low_rank", rank=2, backend=backend)
    assert same_bits(together.tensors, apart.tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_of_perturbing_and_restoring_change_no_bit(dtype, same_bits):
    """10,000 with ESFAST_LONG_TESTS, as many members as 300 generations of 30 have; fewer otherwise."""
    plan = weights(dtype)
    before, base = plan.clone(), plan.clone()
    for seed in range(10_000 if os.environ.get("ESFAST_LONG_TESTS") else 500):
        rank = 1 + seed % 3
        add_noise_(plan, [seed], [1e-2 if seed % 2 else -1e-2], base, "low_rank", rank=rank)
        if seed % 7 == 0:
            assert not same_bits(plan.tensors, before.tensors)
        add_noise_(plan, [], [], base, "low_rank", rank=rank)
    assert same_bits(plan.tensors, before.tensors) and same_bits(base.tensors, before.tensors)
