"""The weight modes of ES: what comes back to the bit, what an update keeps, and what each mode takes."""

import logging
import os

import pytest
import torch

import esfast
from esfast import ES, Plan
from esfast.es import weights as w
from esfast.es.weights import MODES
from esfast.journal import journal
from esfast.update.updater import Rule

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXACT = ("base", "master", "host")


def tensors(dtype, numel=300):
    generator = torch.Generator().manual_seed(0)
    return [("a", (torch.randn(numel, generator=generator) * 0.02).to(dtype)), ("b", torch.ones(7, 3).to(dtype).t())]


def train(dtype, weights, generations=20, numel=300, **options):
    plan = Plan(tensors(dtype, numel))
    es = ES(plan, sigma=1e-3, lr=5e-4, population_size=4, weights=weights, **options)
    for _ in range(generations):
        for member in es.population():
            member.reward = float(member.seed % 1000)
        es.step()
    return es


def check_rounds(es, rounds, same_bits):
    before = [t.clone() for t in es.plan.tensors]
    for seed in range(rounds):
        es.store.perturb(seed, 1e-3)
        if seed % 7 == 0:
            assert not same_bits(es.plan.tensors, before)
        es.store.restore()
    assert same_bits(es.plan.tensors, before)


@pytest.mark.parametrize("weights", EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_thousand_rounds_change_no_bit(dtype, weights, same_bits):
    """Some updates come first, so that the low halves of a master are not all 0."""
    check_rounds(train(dtype, weights, 3), 10_000, same_bits)


@pytest.mark.slow
@pytest.mark.parametrize("weights", EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rounds_under_the_triton_interpreter(dtype, weights, same_bits, monkeypatch):
    """Ten thousand rounds take the interpreter minutes: ESFAST_LONG_TESTS=1."""
    triton_backend = pytest.importorskip("esfast.core.backends.triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: nothing is interpreted")
    monkeypatch.setattr(triton_backend, "CONFIGS", ((128, 4, 144),))
    plan = Plan([("a", (torch.randn(60) * 0.02).to(dtype))])  # one tile: each costs the interpreter 25 ms
    es = ES(plan, sigma=1e-3, lr=5e-4, population_size=2, weights=weights, backend="triton")
    for member in es.population():
        member.reward = float(member.index)
    es.step()
    check_rounds(es, 10_000 if os.environ.get("ESFAST_LONG_TESTS") else 20, same_bits)


# A call costs the interpreter most of a second for each tensor and member, so these are few, and not every mode has every
# dtype: what reads and writes the dtypes is held to the cpu backend in test_triton.py and test_formats.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [*((torch.bfloat16, weights) for weights in EXACT), (torch.float16, "master"), (torch.float32, "host")],
    ids=str,
)
def test_the_same_under_the_triton_interpreter(dtype, weights, same_bits):
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: nothing is interpreted")
    finals = []
    for backend in ("triton", "cpu"):
        options = {"backend": backend, "noise": "rademacher", "rounding": "stochastic", "weights": weights}
        es = ES(Plan(tensors(dtype, 40)[:1]), sigma=1e-3, lr=5e-4, population_size=2, **options)
        for member in es.population():
            member.reward = float(member.seed % 1000)
        es.step()
        before = [t.clone() for t in es.plan.tensors]
        for member in es.population():
            member.reward = 0.0
        assert same_bits(es.plan.tensors, before)
        finals.append(before)
    assert same_bits(*finals)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_master_is_float32_training_rounded_once(dtype, same_bits):
    """200 generations with the same rewards; and bfloat16 without a master ends elsewhere."""
    found = train(dtype, "master", 200)
    wide = Plan([(n, t.float()) for n, t in tensors(dtype)])
    es = ES(wide, sigma=1e-3, lr=5e-4, population_size=4)
    for _ in range(200):
        for member in es.population():
            member.reward = float(member.seed % 1000)
        es.step()
    rounded = [t.to(dtype) for t in wide.tensors]
    assert same_bits(found.plan.tensors, rounded)
    assert same_bits(train(dtype, "base", 200).plan.tensors, rounded) == (dtype is torch.float32)


def test_modes_differ_in_nothing_else(same_bits):
    finals = [train(torch.float32, weights, weight_decay=0.1).plan.tensors for weights in EXACT]
    assert same_bits(finals[0], finals[1]) and same_bits(finals[0], finals[2])


def test_base_and_host_agree_in_16_bits_too(same_bits):
    for options in ({}, {"rounding": "stochastic"}, {"weight_decay": 1.0}):
        base, host = (train(torch.bfloat16, mode, **options).plan.tensors for mode in ("base", "host"))
        assert same_bits(base, host)


def test_members_of_host_carry_the_rounding_of_their_moves():
    """bfloat16 at sigma 1e-3: moved 29 times in place, a member is off by a few times what one rounding makes."""
    plans = {mode: Plan([("a", (torch.randn(20000) * 0.02).bfloat16())]) for mode in ("base", "host")}
    plans["host"].tensors[0].copy_(plans["base"].tensors[0])
    exact = ES(plans["base"], sigma=1e-3), ES(plans["host"], sigma=1e-3, weights="host")
    apart = []
    for a, b in zip(exact[0].population(), exact[1].population(), strict=True):
        a.reward = b.reward = 0.0
        apart.append(
            (plans["base"].tensors[0].float() - plans["host"].tensors[0].float()).square().mean().sqrt().item()
        )
    assert apart[0] == 0 and 0 < apart[-1] < 2e-4 and apart[-1] > apart[1]
    assert torch.equal(plans["base"].tensors[0], plans["host"].tensors[0])


def test_a_host_copy_survives_an_exception(same_bits):
    es = train(torch.bfloat16, "host", 2)
    before = [t.clone() for t in es.plan.tensors]
    with pytest.raises(ZeroDivisionError):
        for member in es.population():
            if member.index == 2:
                raise ZeroDivisionError
    assert same_bits(es.plan.tensors, before)


def test_inplace_reports_its_drift():
    """Coarser dtypes drift farther from exact arithmetic. In bfloat16 the drift has the size of one rounding."""
    drifts = {dtype: train(dtype, "inplace", 5, numel=5000).drift() for dtype in DTYPES}
    assert drifts[torch.bfloat16] > 5 * drifts[torch.float16] > 5000 * drifts[torch.float32] > 0
    assert 2e-5 < drifts[torch.bfloat16] < 5e-4
    assert train(torch.bfloat16, "base", 1).drift() is None


@pytest.mark.parametrize(
    ("dtype", "share", "mode"),
    [
        (torch.bfloat16, 3.1, "master"),
        (torch.bfloat16, 2.1, "base"),
        (torch.bfloat16, 1.9, "inplace"),
        (torch.float32, 9, "base"),
        (torch.float32, 1.9, "inplace"),
    ],
)
def test_auto_takes_the_most_exact_that_fits(dtype, share, mode, monkeypatch, caplog):
    plan = Plan([("a", torch.zeros(1000, dtype=dtype))])
    memory = share * plan.nbytes / w.WEIGHTS_SHARE
    monkeypatch.setattr(w, "total_memory", lambda device: memory)
    with caplog.at_level(logging.INFO):
        es = ES(plan, weights="auto")
    assert type(es.store) is MODES[mode] and f"takes {mode!r}" in caplog.text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_extra_memory_is_as_stated(dtype, mode):
    """Adds up the memory of all tensors that the mode keeps, and compares it with the stated multiple of the
    weights."""
    plan = Plan([(f"t{i}", torch.zeros(512, 1000, dtype=dtype)) for i in range(2)])
    held = MODES[mode](plan, Rule())
    kept = {}
    for owner in (held, *vars(held).values(), *(p for p in vars(held).values() if isinstance(p, Plan))):
        for value in vars(owner).values() if hasattr(owner, "__dict__") else ():
            for t in value if isinstance(value, list) else [value]:
                if isinstance(t, torch.Tensor):
                    kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    for t in plan.tensors:
        kept.pop(t.untyped_storage().data_ptr(), None)
    cost = MODES[mode].cost(dtype)
    assert abs(sum(kept.values()) / plan.numel - cost.device - cost.host) < 0.02 * dtype.itemsize
    assert cost.device + cost.host == {"base": 2, "master": 4, "host": 2, "inplace": 0}[mode]


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "master"},
        {"rounding": "stochastic"},
        {"weight_decay": 2.0},
        {"weights": "host", "weight_decay": 2.0},
        {"weights": "master", "weight_decay": 2.0, "rounding": "stochastic"},
    ],
    ids=str,
)
def test_replay_gives_the_same_bits(options, tmp_path, same_bits):
    options = {"weights": "base"} | options
    es = train(torch.bfloat16, journal=tmp_path / "journal.jsonl", **options)
    plan = Plan(tensors(torch.bfloat16))
    journal.replay(plan, tmp_path / "journal.jsonl")
    assert same_bits(plan.tensors, es.plan.tensors)
    plain = train(torch.bfloat16, options["weights"]) if len(options) > 1 else train(torch.bfloat16, "base")
    assert not same_bits(plan.tensors, plain.plan.tensors)


def test_what_is_refused():
    for words, options in (
        ("weights: expected one of 'base', 'master', 'host', 'inplace', 'auto'", {"weights": "copy"}),
        ("rounding: expected one of", {"rounding": "down"}),
        ("weight_decay: expected a positive", {"weight_decay": -1.0}),
    ):
        with pytest.raises(ValueError, match=words):
            ES(Plan(tensors(torch.float32)), **options)
    with pytest.raises(ValueError, match="more than all of the weights"):
        train(torch.float32, "base", 1, weight_decay=1e4)
    assert esfast.ESConfig(weights="auto", rounding="stochastic").weight_decay == 0
