"""Rounding, float32 masters, weight decay and Adam: every backend is the reference, and the reference is right."""

import itertools
import os

import numpy as np
import pytest
import torch

from esfast import Plan, Slice, add_noise_
from esfast.core.backends.reference import round_stochastically
from esfast.core.noise import ELEMENTWISE, noise_at
from esfast.core.ops import AdamStep, Call, check_members

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# what is written from what: itself, a copy, the plan's float32 master itself, the plan from it, from its upper halves
MODES = ("in place", "base", "master", "from master", "from high")


def weights(dtype):
    """A tail and an odd start, subnormal halves, a slice, a scalar, a column, and weights that no tile divides."""
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(8, 300, generator=generator)
    flat = torch.randn(700, generator=generator)
    return Plan(
        [
            ("plain", (torch.randn(2, 300, generator=generator) * 0.02).to(dtype)),
            ("tiny", (flat * 1e-5).to(dtype)[7:536]),
            ("slice", matrix.to(dtype)[2:5, 30:243], Slice((1000, 5000), (3, 700))),
            ("scalar", torch.tensor(3.0).to(dtype)),
            ("column", torch.randn(5, 3, generator=generator).to(dtype).t()),
        ]
    )


def call(dtype, mode, kind, rounding, decay, anchored, adam, members, backend, tile=None):
    """Runs one case and returns all that it may have changed."""
    plan, base = weights(dtype), None
    if mode == "base":
        base = plan.clone()
    elif mode == "master":
        plan = plan.master()
    elif mode.startswith("from"):
        base = plan.master()
        add_noise_(base, [9], [1e-3], backend="reference")  # low halves that are not 0
        base = base.high() if mode == "from high" else base
    anchor = plan.high().clone() if anchored else None
    if adam:
        generator = torch.Generator().manual_seed(3)
        adam = AdamStep.at(3, torch.rand(2, plan.flat_numel, generator=generator), 1e-2, 0.9, 0.99, 1e-8)
    seeds, coeffs = list(range(5, 5 + members)), [1e-3 * (-1) ** j for j in range(members)]
    if tile is None:
        add_noise_(plan, seeds, coeffs, base, kind, rounding, backend, decay=decay, anchor=anchor, adam=adam or None)
    else:
        from esfast.core.backends import triton as triton_backend

        options = base, kind, rounding == "stochastic", np.float32(decay), anchor, adam or None
        triton_backend.run(Call(plan, *check_members(seeds, coeffs), *options), tile)
    return plan.tensors + [x for x in (plan.low, adam and adam.moments) if isinstance(x, torch.Tensor)]


def same(a, b):
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(raw(x), raw(y)) for x, y in zip(a, b, strict=True)
    )


def raw(x):
    return x if x.dtype is torch.int16 else x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_is_the_reference(dtype, mode):
    cases = itertools.product(
        ELEMENTWISE, ("nearest", "stochastic"), ((0, False), (0.1, False), (0.1, True)), (False, True), (0, 1, 3)
    )
    for kind, rounding, (decay, anchored), adam, members in cases:
        if adam and mode not in ("in place", "master"):
            continue
        case = dtype, mode, kind, rounding, decay, anchored, adam, members
        assert same(call(*case, "cpu"), call(*case, "reference")), case


TRITON = [
    # mode, kind, rounding, decay, anchored, adam, members
    ("in place", "rademacher", "stochastic", 0.1, True, False, 2),
    ("in place", "gaussian", "stochastic", 0, False, False, 1),
    ("in place", "gaussian", "nearest", 0.1, False, True, 2),
    ("in place", "rademacher", "stochastic", 0.1, True, True, 1),
    ("master", "gaussian", "nearest", 0.1, True, False, 2),
    ("master", "rademacher", "nearest", 0, False, True, 2),
    ("from master", "gaussian", "nearest", 0, False, False, 0),
    ("from master", "rademacher", "stochastic", 0, False, False, 1),
    ("from high", "gaussian", "nearest", 0, False, False, 1),
    ("base", "rademacher", "nearest", 0.1, False, False, 0),
]


# Every case with one dtype of 16 bits, which take turns, since the interpreter takes seconds; every other one with float32.
TRITON = [(DTYPES[i % 2], case) for i, case in enumerate(TRITON)] + [(torch.float32, case) for case in TRITON[::2]]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: nothing is interpreted")
@pytest.mark.parametrize(("dtype", "case"), TRITON, ids=str)
def test_triton_is_the_cpu(dtype, case):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    _, kind, _, decay, _, adam, _ = case
    uses_fma = kind == "gaussian" or decay or adam
    if uses_fma and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("the fma of this Triton's interpreter rounds twice")
    assert same(call(dtype, *case, None, tile=512), call(dtype, *case, "cpu"))


# ---- the reference itself -------------------------------------------------------------------------------------------


def neighbours(x, dtype):
    """The weights of dtype at or towards zero from float64 x, and next away from it."""
    near = torch.tensor(x, dtype=torch.float64).to(dtype)
    bits = near.view(torch.int16)
    toward = bits - (near.double().abs() > abs(x)).to(torch.int16)
    return toward.view(dtype).double().item(), (toward + 1).view(dtype).double().item()


@pytest.mark.parametrize("x", [0.0123456, -1.00001, 3.3e-6, -5e-8, 2.0**-14 * 0.9999, 65000.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_unbiased(dtype, x):
    """The results are x's two neighbours and no other numbers. Over 2^20 draws their mean is x within 5 standard
    errors."""
    x, count = float(np.float32(x)), 2**20
    plan = Plan([("w", torch.zeros(count, dtype=dtype))])
    base = Plan([("w", torch.full((count,), x))])
    add_noise_(plan, [11], [0.0], base=base, rounding="stochastic")
    values = plan.tensors[0].double()
    low, high = neighbours(x, dtype)
    assert set(values.unique().tolist()) <= {low, high}
    error = values.mean().item() - x
    share = (x - low) / (high - low)
    assert abs(error) < 5 * abs(high - low) * (share * (1 - share) / count) ** 0.5 + abs(high - low) * 2**-17


def test_stochastic_rounding_of_an_update_is_unbiased():
    """Weights of bfloat16 that an update is too small to move, by nearest: the mean update arrives all the same."""
    count, seeds, coeffs = 2**20, [3, 4], [2e-5, -1e-5]
    start = torch.full((count,), 0.0251).bfloat16()
    exact = sum(c * noise_at(s, "w", np.arange(count)).astype(np.float64) for s, c in zip(seeds, coeffs, strict=True))
    moved = {}
    for rounding in ("nearest", "stochastic"):
        plan = Plan([("w", start.clone())])
        add_noise_(plan, seeds, coeffs, rounding=rounding)
        moved[rounding] = (plan.tensors[0].double() - start.double()).numpy()
    assert np.abs(moved["nearest"]).max() < 2e-4 and (moved["nearest"] != 0).mean() < 0.02
    slope = (moved["stochastic"] * exact).sum() / (exact**2).sum()
    residual = moved["stochastic"] - exact
    assert abs(residual.mean()) < 5 * residual.std() / count**0.5
    assert abs(slope - 1) < 5 * residual.std() / exact.std() / count**0.5


def test_stochastic_rounding_is_of_the_first_seed_and_not_its_noise():
    base = Plan([("w", torch.full((4096,), 0.0123456))])
    found = []
    for seeds in ([1], [2], [1, 2]):
        plan = Plan([("w", torch.zeros(4096, dtype=torch.bfloat16))])
        add_noise_(plan, seeds, [0.0] * len(seeds), base=base, rounding="stochastic")
        found.append(plan.tensors[0])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    up = (found[0] > 0.0123456).double()
    sign = torch.from_numpy(noise_at(1, "w", np.arange(4096))).double().sign()
    assert abs(torch.corrcoef(torch.stack([up, sign]))[0, 1]) < 5 / 64


@pytest.mark.parametrize("fmt", [1, 2])
def test_special_values_round_to_themselves(fmt):
    x = np.array([0.0, -0.0, np.inf, -np.inf, 1.0, -2.0], dtype=np.float32)
    for random in (0, 0xFFFFFFFF):
        found = torch.from_numpy(round_stochastically(x, np.full(6, random, np.uint32), fmt).view(np.int16))
        values = found.view(torch.bfloat16 if fmt == 1 else torch.float16).float().numpy()
        assert np.array_equal(values.view(np.uint32), x.view(np.uint32))
    nan = round_stochastically(np.array([np.nan], np.float32), np.array([0xFFFFFFFF], np.uint32), fmt)
    assert torch.from_numpy(nan.view(np.int16)).view(torch.bfloat16 if fmt == 1 else torch.float16).isnan().all()


def test_a_split_master_holds_every_float32():
    """A split master gives back every float32 to the bit, NaNs aside. The live weights are these rounded to nearest
    even."""
    rng = np.random.default_rng(0)
    bits = np.concatenate([rng.integers(0, 2**32, 2**18), np.arange(0x3F7F0000, 0x3F830001), [0x7F800000, 0xFF800000]])
    x = torch.from_numpy(bits.astype(np.uint32).view(np.int32)).view(torch.float32)
    x = x[~x.isnan()]
    master = Plan([("w", torch.zeros(len(x), dtype=torch.bfloat16))]).master()
    words = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    master.tensors[0].view(torch.int16).copy_(((words + 0x8000) >> 16).to(torch.int16))
    master.low[: len(x)] = words.to(torch.int16)
    add_noise_(master, [1], [0.0])  # through load and store
    live = Plan([("w", torch.zeros(len(x), dtype=torch.bfloat16))])
    add_noise_(live, [], [], base=master)
    assert torch.equal(live.tensors[0].view(torch.int16), x.bfloat16().view(torch.int16))
    back = (master.tensors[0].view(torch.int16).to(torch.int64) << 16) + master.low[: len(x)]
    assert torch.equal((back & 0xFFFFFFFF)[x != 0], words[x != 0])  # -0 + 0 is 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_master_calculates_as_float32_weights_do(dtype):
    start = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    live, wide = Plan([("w", start.clone())]), Plan([("w", start.float())])
    master = live.master()
    for g in range(200):
        for plan in (master, wide):
            add_noise_(plan, [g, g + 1000], [1e-5, -2e-5], noise="rademacher" if g % 2 else "gaussian")
    add_noise_(live, [], [], base=master)
    assert same(live.tensors, [wide.tensors[0].to(dtype)])


def test_decay_and_adam_are_the_textbooks():
    """Compares ten steps with the textbooks' formulas in float64."""
    start = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 0.1
    plan, anchor = Plan([("w", start.clone())]), Plan([("w", start.clone() * 0.5)])
    moments = torch.zeros(2, plan.flat_numel)
    w, m, v = start.double().numpy(), np.zeros(300), np.zeros(300)
    lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.99, 1e-6, 0.05
    for t in range(1, 11):
        adam = AdamStep.at(t, moments, lr, beta1, beta2, eps)
        add_noise_(plan, [t, t + 100], [0.5, -0.25], adam=adam, decay=decay, anchor=anchor)
        g = sum(c * noise_at(s, "w", np.arange(300)).astype(float) for s, c in ((t, 0.5), (t + 100, -0.25)))
        w = w + decay * (anchor.tensors[0].double().numpy() - w)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        w = w + lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    assert np.abs(plan.tensors[0].double().numpy() - w).max() < 1e-6


def test_what_can_not_be_asked_for():
    plan = Plan([("w", torch.zeros(40, dtype=torch.bfloat16))])
    before = plan.tensors[0].clone()
    moments = torch.zeros(2, plan.flat_numel)
    longer = torch.zeros(moments.numel() + 8)
    add_noise_(plan.clone(), [1], [1.0], adam=AdamStep.at(1, longer[4:-4].view_as(moments), 1e-3, 0.9, 0.99, 1e-8))
    good = AdamStep.at(1, moments, 1e-3, 0.9, 0.99, 1e-8)
    for error, words, options in (
        (ValueError, "rounding: expected", {"rounding": "up"}),
        (ValueError, "decay: expected a number from 0 to 1", {"decay": 1.5}),
        (ValueError, "decay: expected", {"decay": float("nan")}),
        (TypeError, "anchor: expected a Plan", {"anchor": plan.tensors}),
        (ValueError, "anchor: its 'v'", {"anchor": Plan([("v", torch.zeros(40, dtype=torch.bfloat16))])}),
        (ValueError, "anchor: its 'w'", {"anchor": Plan([("w", torch.zeros(40))])}),
        (ValueError, "base: its 'w'", {"base": Plan([("w", torch.zeros(40, dtype=torch.float16))])}),
        (ValueError, "adam: works in place", {"adam": good, "base": plan.clone()}),
        (
            TypeError,
            "adam: expected an esfast.core.ops.AdamStep",
            {"adam": AdamStep.at(1, moments[:1], 1e-3, 0.9, 0.99, 1e-8)},
        ),
        # contiguous and of the right shape, but not where kernels can read 128 bits at once
        *(
            (
                ValueError,
                "adam: the moments begin at address 0x.*, no multiple of 16 bytes",
                {"adam": AdamStep.at(1, longer[at : at + moments.numel()].view_as(moments), 1e-3, 0.9, 0.99, 1e-8)},
            )
            for at in (1, 2, 3, 5)
        ),
    ):
        with pytest.raises(error, match=words):
            add_noise_(plan, [1], [1.0], **options)
    assert torch.equal(plan.tensors[0], before)
    master = plan.master()
    with pytest.raises(ValueError, match="base: its 'w'"):
        add_noise_(master, [1], [1.0], base=plan)
