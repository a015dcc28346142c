"""Weights with a sigma and an lr of their own: those that a run over them alone, with these numbers, would have."""

import pytest
import torch

import esfast
from esfast import ES, Group, Plan
from esfast.cli.run_options import dump, read_yaml
from esfast.update.updater import Rule

OPTIONS = {
    "sgd": {},
    "low rank": {"noise": "low_rank", "rank": 3},
    "momentum": {"optimizer": esfast.Momentum(0.5, 3)},
    "adam": {"optimizer": "adam", "weight_decay": 2.0},
    "anchor, stochastic": {"decay_to": "initial", "weight_decay": 5.0, "rounding": "stochastic"},
}


def model(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        n: (torch.randn(s, generator=generator) * 0.02).to(dtype)
        for n, s in {"a": (7, 30), "norm.a": (33,), "b": (40,), "norm.b": (5, 3)}.items()
    }


@pytest.mark.parametrize("weights", ["base", "master", "host"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_group_is_a_run_of_its_own(name, dtype, weights, same_bits):
    """The factors are powers of two, so that multiplying before and after the rounding to float32 gives the same."""
    options = {"seed": 3, "population_size": 4, "weights": weights, **OPTIONS[name]}
    together, apart = model(dtype), model(dtype)
    es = ES(together.items(), 1e-3, 5e-3, groups=["norm.b:sigma=8", Group("norm*", sigma=0.5, lr=4)], **options)
    alone = [
        ES([(n, t)], 1e-3 * sigma, 5e-3 * lr, **options)
        for (n, t), sigma, lr in zip(apart.items(), (1, 0.5, 1, 8), (1, 4, 1, 1), strict=True)
    ]
    for _ in range(5):
        for members in zip(es.population(), *(one.population() for one in alone), strict=True):
            assert same_bits(together.values(), apart.values())
            for member in members:
                member.reward = float(member.seed % 1000)
        for each in (es, *alone):
            each.step()
        assert same_bits(together.values(), apart.values())
    assert not same_bits(together.values(), model(dtype).values())


def test_without_groups_it_is_one_pass_over_the_plan_itself():
    plan = Plan(model().items())
    assert [p for _, p in Rule().by_group(plan)] == [plan]
    parts = Rule(groups=(Group("norm*", lr=2), Group("b"))).by_group(plan, None)
    assert [(g.lr, p.names, other) for g, p, other in parts] == [
        (1, ["a"], None),
        (2, ["norm.a", "norm.b"], None),
        (1, ["b"], None),
    ]


@pytest.mark.parametrize("weights", ["base", "master", "host", "inplace"])
@pytest.mark.parametrize("name", OPTIONS)
def test_frozen_weights_stay_as_they_are(name, weights, same_bits, tmp_path):
    """No member and no update changes them, not even the sign of a zero; the others are those of a run without them.
    The journal says so: its replay needs no option."""
    options = {"seed": 3, "population_size": 4, "weights": weights, **OPTIONS[name]}
    together, alone = model(torch.bfloat16), model(torch.bfloat16)
    for tensors in (together, alone):
        for t in tensors.values():
            t.view(-1)[::7] = -0.0
    frozen = {n: t.clone() for n, t in together.items() if "norm" in n}
    start = {n: t.clone() for n, t in together.items()}
    tuned = [(n, t) for n, t in alone.items() if "norm" not in n]
    es = ES(together.items(), 1e-3, 5e-3, groups=["norm*:sigma=0,lr=0"], journal=tmp_path / "j", **options)
    other = ES(tuned, 1e-3, 5e-3, **options)
    for _ in range(3):
        for members in zip(es.population(), other.population(), strict=True):
            assert same_bits([together[n] for n in frozen], frozen.values())
            assert same_bits([together[n] for n, _ in tuned], [t for _, t in tuned])
            for member in members:
                member.reward = float(member.seed % 1000)
        es.step(), other.step()
    assert same_bits([together[n] for n in frozen], frozen.values())
    assert same_bits([together[n] for n, _ in tuned], [t for _, t in tuned])
    if weights != "inplace":
        esfast.journal.replay(Plan(start.items()), tmp_path / "j")
        assert same_bits(start.values(), together.values())


def test_frozen_weights_of_stacked_members(same_bits):
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.bias.fill_(-0.0)
    x = torch.randn(4, 3)
    with esfast.stacked(module, [(1, 0.5), (2, 0.5)], groups=["bias:sigma=0,lr=0"]) as both:
        found = both(x.repeat(2, 1))
    for k, seed in enumerate((1, 2)):
        with esfast.perturbed([("weight", module.weight)], seed, 0.5):
            assert torch.allclose(found[4 * k : 4 * k + 4], module(x))


def test_a_group_may_have_no_weights_on_this_rank():
    held = [("a", torch.ones(4)), ("bias", torch.empty(0), esfast.Slice((2,), (0,)))]
    es = ES(held, population_size=2, groups=["bias:lr=2"])
    for member in es.population():
        member.reward = float(member.index)
    es.step()
    with pytest.raises(ValueError, match="'norm' matches no tensor"):
        ES(held, groups=["norm:lr=2"])


def test_memory_that_moved_is_seen_through_a_part():
    module = torch.nn.Linear(3, 2)
    es = ES(module, groups=["bias:lr=2"])
    module.bias.data = module.bias.data.clone()
    with pytest.raises(RuntimeError, match="the memory of 'bias' moved"):
        next(iter(es.population()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("norm*", "expected PATTERN:sigma=X,lr=Y"),
        ("norm*:", "expected PATTERN:sigma=X,lr=Y"),
        ("norm*:sigma", "expected PATTERN:sigma=X,lr=Y"),
        ("norm*:lr=1,lr=2", "expected PATTERN:sigma=X,lr=Y"),
        ("norm*:lr=fast", "expected PATTERN:sigma=X,lr=Y"),
        ("norm*:sigm=1", "unknown factor 'sigm'. Did you mean 'sigma'?"),
        ("norm*:lr=0", "Group.lr of 'norm*': expected a positive factor"),
        ("norm*:sigma=0", "leaves weights as they are"),
        ("norm*:sigma=0,lr=2", "Group.sigma of 'norm*': expected a positive factor, got 0.0; sigma=0,lr=0 (both)"),
        ("*:sigma=0,lr=0", "groups: they freeze every tensor (sigma=0,lr=0), such as 'a'"),
        ("norm*:sigma=inf", "Group.sigma of 'norm*': expected a positive factor"),
        (":lr=1", "Group.pattern: expected a pattern"),
        ("bias:lr=1", "groups: the pattern 'bias' matches no tensor; a name here is 'a'"),
    ],
)
def test_what_is_refused(text, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        ES(model().items(), groups=[text])
    assert words in str(caught.value)


@pytest.mark.parametrize("groups", ["norm*:lr=2", 3, [3]])
def test_a_list_is_expected(groups):
    with pytest.raises((TypeError, ValueError), match="group"):
        ES(model().items(), groups=groups)


@pytest.mark.parametrize("weights", ["base", "master", "host", "inplace"])
def test_what_a_group_can_not_take_changes_no_weight(weights, same_bits):
    tensors = model()
    es = ES(
        tensors.items(),
        1e-3,
        0.1,
        population_size=2,
        weight_decay=5.0,
        weights=weights,
        groups=["norm*:sigma=1e30,lr=3"],
    )
    for member in es.population():
        member.reward = float(member.index)
        es.sigma = 1e-3
    bits = {n: t.clone() for n, t in tensors.items()}
    with pytest.raises(ValueError, match="more than all of the weights"):
        es.step()
    es.weight_decay, es.lr = 0.0, 3e38
    with pytest.raises(ValueError, match="coefficients that are not finite"):
        es.step()
    es.sigma = 1e20
    with pytest.raises(ValueError, match="sigma, times the largest factor of a group"):
        next(iter(es.population()))
    assert same_bits(tensors.values(), bits.values())


def test_settings_of_a_run(tmp_path):
    config = esfast.ESConfig(groups="*norm*:sigma=0.5")
    (tmp_path / "run.yaml").write_text(dump(config))
    assert read_yaml(tmp_path / "run.yaml")["groups"] == ["*norm*:sigma=0.5"]
    with pytest.raises(ValueError, match="group: expected PATTERN"):
        esfast.ESConfig(groups=["*norm*"])
