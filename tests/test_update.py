"""Optimizers: against the textbook in float64, in every mode of the weights, and replayed to the bit."""

import numpy as np
import pytest
import torch

import esfast
from esfast import ES, Adam, Momentum, Plan
from esfast.core.noise import noise_at
from esfast.es.weights import MODES
from esfast.journal.journal import read, replay
from esfast.update.updater import Rule, Updater

OPTIONS = {
    "momentum": {"optimizer": Momentum(0.8, 3)},
    "adam": {"optimizer": Adam(0.9, 0.99, 1e-6)},
    "adam, decay": {"optimizer": "adam", "weight_decay": 2.0},
    "anchor": {"decay_to": "initial", "weight_decay": 5.0},
    "momentum, anchor, stochastic": {
        "optimizer": "momentum",
        "decay_to": "initial",
        "weight_decay": 5.0,
        "rounding": "stochastic",
    },
    "groups": {"groups": ["b:sigma=0.5,lr=3"], "optimizer": "adam", "decay_to": "initial", "weight_decay": 5.0},
}


def plan_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return Plan(
        [("a", (torch.randn(200, generator=generator) * 0.02).to(dtype)), ("b", torch.ones(5, 3).to(dtype).t())]
    )


def train(plan, generations=8, **options):
    options = {"sigma": 1e-3, "lr": 5e-3, "population_size": 4} | options
    es = ES(plan, **options)
    return es, [step(es) for _ in range(generations)]


def step(es):
    for member in es.population():
        member.reward = float(member.seed % 1000)
    return es.step()


def textbook(start, name, records, options):
    """The weights after `records`, in float64."""
    w, velocity, m, v = start.copy(), 0.0, 0.0, 0.0
    kind, decay_to = options.get("optimizer"), start if options.get("decay_to") == "initial" else 0.0
    history = []
    for t, r in enumerate(records, start=1):
        w = w + r.lr * options.get("weight_decay", 0.0) * (decay_to - w)
        rewards = np.array(r.rewards)
        z = (rewards - rewards.mean()) / rewards.std() / len(rewards)
        g = sum(a * noise_at(s, name, np.arange(start.size)).astype(float) for s, a in zip(r.seeds, z, strict=True))
        if isinstance(kind, Momentum):
            history.append(r.lr * g)
            velocity = sum(kind.beta**age * g for age, g in enumerate(reversed(history[-kind.window :])))
            w = w + velocity
        elif isinstance(kind, Adam):
            m, v = kind.beta1 * m + (1 - kind.beta1) * g, kind.beta2 * v + (1 - kind.beta2) * g**2
            w = w + r.lr * (m / (1 - kind.beta1**t)) / (np.sqrt(v / (1 - kind.beta2**t)) + kind.eps)
        else:
            w = w + r.lr * g
    return w


@pytest.mark.parametrize("name", ["momentum", "adam", "anchor"])
def test_the_textbook(name):
    plan = plan_of()
    start = plan.tensors[0].double().numpy().copy()
    es, records = train(plan, **OPTIONS[name])
    expected = textbook(start, "a", records, OPTIONS[name])
    found = plan.tensors[0].double().numpy()
    assert np.abs(found - expected).max() < 2e-6 < np.abs(found - start).max() / 100
    for other in OPTIONS.values():  # and it is not that of another rule
        if other is not OPTIONS[name] and other.get("optimizer") not in ("adam", "momentum"):
            assert np.abs(found - textbook(start, "a", records, other)).max() > 1e-4


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("weights", ("base", "master", "host"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_replay_gives_the_same_bits(dtype, weights, name, tmp_path, same_bits):
    plan, again, plain = plan_of(dtype), plan_of(dtype), plan_of(dtype)
    train(plan, weights=weights, journal=tmp_path / "journal.jsonl", **OPTIONS[name])
    replay(again, tmp_path / "journal.jsonl")
    assert same_bits(plan.tensors, again.tensors)
    train(plain, weights=weights)
    assert not same_bits(plan.tensors, plain.tensors)


@pytest.mark.parametrize("name", OPTIONS)
def test_exact_modes_differ_in_nothing_else(name, same_bits):
    plans = [plan_of() for _ in range(3)]
    for plan, weights in zip(plans, ("base", "master", "host"), strict=True):
        train(plan, weights=weights, **OPTIONS[name])
    assert same_bits(plans[0].tensors, plans[1].tensors) and same_bits(plans[0].tensors, plans[2].tensors)


@pytest.mark.parametrize("name", OPTIONS)
def test_master_is_float32_training_rounded_once(name, same_bits):
    if "stochastic" in name:
        pytest.skip("a master is never rounded, so there is nothing to round stochastically")
    found, wide = plan_of(torch.bfloat16), Plan([(n, t.float()) for n, t in tensors_of(plan_of(torch.bfloat16))])
    train(found, 50, weights="master", **OPTIONS[name])
    train(wide, 50, **OPTIONS[name])
    assert same_bits(found.tensors, [t.bfloat16() for t in wide.tensors])


def tensors_of(plan):
    return list(zip(plan.names, plan.tensors, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_drift_is_measured_against_the_same_rule(name):
    """In float32 rounding loses almost nothing, so a large drift would mean that the exact copy follows another
    rule."""
    es, _ = train(plan_of(), weights="inplace", **(OPTIONS[name] | {"rounding": "nearest"}))
    assert 0 < es.drift() < 1e-7


def test_a_journal_holds_a_generation_once(tmp_path):
    """Momentum replays earlier seeds; they are not written down again."""
    _, records = train(plan_of(), journal=tmp_path / "journal.jsonl", **OPTIONS["momentum"])
    header, found, _ = read(tmp_path / "journal.jsonl")
    assert found == records and all(len(r.seeds) == 4 for r in found)
    assert header["optimizer"] == {"name": "momentum", "beta": 0.8, "window": 3}


@pytest.mark.parametrize("optimizer", [Momentum(0.5, 4), Adam(0.8, 0.9, 1e-3), esfast.SGD()])
def test_a_rule_survives_json(optimizer):
    rule = Rule("rademacher", "stochastic", optimizer, "initial")
    assert Rule.from_json(rule.to_json() | {"seed": 0}) == rule


def test_recalling_is_as_good_as_applying(same_bits):
    """An updater that only noted the first 5 generations, for the velocity, gives the same bits for the rest."""
    plan, early = plan_of(), plan_of()
    _, records = train(plan, **OPTIONS["momentum"])
    first = Updater(early, Rule(**{"optimizer": Momentum(0.8, 3)}))
    for r in records[:5]:
        first(r)
    late = Updater(early, first.rule)
    for r in records[:5]:
        late.note_applied(r)
    for r in records[5:]:
        late(r)
    assert same_bits(plan.tensors, early.tensors)


@pytest.mark.parametrize("weights", MODES)
def test_members_set_aside_are_as_if_never_drawn(weights, same_bits, tmp_path):
    """The update of 4 members of which 2 have no reward is that of the other two alone."""
    plan, expected = plan_of(), plan_of()
    es = ES(plan, sigma=1e-3, lr=5e-3, population_size=4, weights=weights, journal=tmp_path / "journal.jsonl")
    for member in es.population():
        member.reward = [None, 2.0, None, 1.0][member.index]
    with pytest.raises(ValueError, match="member 0 has no reward"):
        es.step()
    record = es.step(set_aside=True)
    assert record.rewards == [None, 2.0, None, 1.0]
    assert record.coeffs == [0.0025, -0.0025] or record.coeffs == pytest.approx([0.0025, -0.0025])
    members = [m for m in ES(expected, population_size=4).population().members if m.index in (1, 3)]
    esfast.add_noise_(expected, [m.seed for m in members], record.coeffs)
    if weights != "inplace":
        assert same_bits(plan.tensors, expected.tensors)
        again = plan_of()
        replay(again, tmp_path / "journal.jsonl")
        assert same_bits(again.tensors, plan.tensors)


def test_one_member_teaches_nothing():
    es = ES(plan_of(), population_size=3)
    for member in es.population():
        member.reward = 1.0 if member.index == 1 else None
    with pytest.raises(ValueError, match="only 1 of 3 members have a reward"):
        es.step(set_aside=True)


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "optimizer: expected one of 'sgd', 'momentum', 'adam'", {"optimizer": "adamw"}),
        (TypeError, "optimizer: expected 'sgd'", {"optimizer": 3}),
        (ValueError, "decay_to: expected one of 'zero', 'initial'", {"decay_to": "base"}),
        (ValueError, "perturb_rounding: expected one of", {"perturb_rounding": "up"}),
    ],
)
def test_what_is_refused(error, words, options):
    with pytest.raises(error, match=words):
        ES(plan_of(), **options)


@pytest.mark.parametrize(
    "make", [lambda: Momentum(1.0), lambda: Momentum(0.9, 1), lambda: Adam(0.0), lambda: Adam(eps=0)]
)
def test_numbers_out_of_range(make):
    with pytest.raises((ValueError, TypeError), match="expected"):
        make()


def test_config_makes_the_optimizer():
    config = esfast.ESConfig(optimizer="momentum", momentum=0.7, momentum_window=4)
    assert config.make_optimizer() == Momentum(0.7, 4)
    assert esfast.ESConfig(optimizer="adam", adam_eps=1e-6).make_optimizer() == Adam(eps=1e-6)
    with pytest.raises(ValueError, match="ESConfig.momentum: expected a number between 0 and 1"):
        esfast.ESConfig(optimizer="momentum", momentum=1.5)


def test_stochastic_members_are_unbiased(same_bits):
    """perturb_rounding: members of one weight, over many tensors' places, have the mean of float32."""
    plan = Plan([("a", torch.full((2**20,), 0.02, dtype=torch.bfloat16))])
    es = ES(plan, sigma=1e-5, population_size=2, noise="rademacher", perturb_rounding="stochastic")
    unit = 2.0**-13  # of bfloat16 near 0.02
    wanted = 1e-5 * esfast.noise(es.population().members[0].seed, "a", 2**20, "rademacher").double()
    base = plan.tensors[0].double().clone()
    for member in es.population():
        if member.index == 0:
            moved = plan.tensors[0].double() - base
        member.reward = 0.0
    for sign in (1, -1):
        kept = torch.sign(wanted) == sign
        error = (
            1e-5 * unit / kept.sum()
        ) ** 0.5  # of the mean of so many steps of one unit, each of chance 1e-5 / unit
        assert abs(moved[kept].mean() - sign * 1e-5) < 5 * error and (moved[kept] == 0).any()
