"""ES: members leave the weights as they were, and an update is the weighted sum of noise that the formula states."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import esfast
from esfast import ES, Plan, add_noise_
from esfast.es.es import Member, centered_rank, coefficients, member_seed, zscore
from esfast.update import UpdateRecord

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def small_plan(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    whole = torch.randn(9, 8).to(dtype) * 0.02
    return Plan([("a", torch.randn(37).to(dtype)), ("b", whole[:, :5]), ("c", whole[:, 5:].clone().t())])


def copies(plan):
    return [t.detach().clone() for t in plan.tensors]


def reward_all(es, function=lambda member: math.sin(member.seed % 1000 + member.sign)):
    for member in es.population():
        member.reward = function(member)


# ---- restoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_rounds_change_no_bit(dtype, same_bits):
    plan = small_plan(dtype)
    es, before = ES(plan, sigma=0.3, population_size=10, mirrored=True), copies(plan)
    rounds = 0
    for _ in range(100):
        for _ in es.population():
            assert not same_bits(plan.tensors, before)
            rounds += 1
        assert same_bits(plan.tensors, before)
    assert rounds == 1000


@pytest.mark.parametrize("weights", ("base", "inplace"))
@pytest.mark.parametrize("mirrored", (False, True))
def test_inside_the_body_the_model_is_the_member(weights, mirrored, same_bits):
    plan = small_plan()
    es = ES(plan, sigma=0.125, population_size=6, seed=11, mirrored=mirrored, weights=weights)
    before = Plan([(n, t.clone()) for n, t in zip(plan.names, plan.tensors, strict=True)])
    for member in es.population():
        pair, sign = (member.index // 2, (-1) ** member.index) if mirrored else (member.index, 1)
        assert (member.seed, member.sign) == (member_seed(11, 0, pair), sign)
        expected = before.clone()
        add_noise_(expected, [member.seed], [sign * 0.125], backend="reference")
        if weights == "base":
            assert same_bits(plan.tensors, expected.tensors)
        else:
            torch.testing.assert_close(plan.tensors, expected.tensors, rtol=0, atol=1e-6)


def test_an_old_population_is_refused(same_bits):
    plan = small_plan()
    es = ES(plan, sigma=0.3, population_size=3)
    old = es.population()
    reward_all(es)
    with pytest.raises(RuntimeError, match="of the past"):
        list(old)
    es.step()
    after = copies(plan)
    with pytest.raises(RuntimeError, match="of the past"):
        list(old)
    assert same_bits(plan.tensors, after)


def test_two_loops_at_once_are_refused(same_bits):
    plan = small_plan()
    es, before = ES(plan, sigma=0.3, population_size=3), copies(plan)
    population = es.population()
    for _ in population:
        inside = copies(plan)
        for call in (es.population, es.step, lambda: next(iter(population))):
            with pytest.raises(RuntimeError, match="in place"):
                call()
            assert same_bits(plan.tensors, inside)
        break
    assert same_bits(plan.tensors, before)
    with population:
        iterator = iter(population)
        next(iterator)
    with pytest.raises(RuntimeError, match="this loop was left"):
        next(iterator)
    assert same_bits(plan.tensors, before)


def test_a_population_asked_for_again_begins_anew():
    es = ES(small_plan(), population_size=4)
    first = [(m.seed, m.sign) for m in es.population()]
    reward_all(es)
    again = es.population()
    assert len(again) == 4 and [(m.seed, m.sign) for m in again] == first
    assert all(m.reward is None for m in es.members)


# ---- seeds, shaping, coefficients -----------------------------------------------------------------------------------


def test_member_seeds_differ():
    seeds = {member_seed(run, g, i) for run in (0, 1, 2**64 - 1) for g in (0, 1, 2**31) for i in range(200)}
    assert len(seeds) == 3 * 3 * 200 and max(seeds) < 2**64 and max(seeds) > 2**63


FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(FLOATS, min_size=2, max_size=40))
def test_zscore(rewards):
    found, r = zscore(rewards), np.array(rewards)
    if len(set(rewards)) == 1:
        assert found == [0.0] * len(rewards)
        return
    wanted = (r - r.mean()) / r.std() if 1e-30 < r.std() else None
    assert abs(math.fsum(found)) < 1e-6 * len(r) and abs(np.square(found).mean() - 1) < 1e-6 or r.std() < 1e-7 * max(r)
    if wanted is not None and r.std() > 1e-6 * np.abs(r).max():
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rewards", ([0.0, 5e-324], [1e308, -1e308], [1.7e308, 1.7e308, 0], [1e-200, 3e-200, 2e-200]))
def test_zscore_of_extremes(rewards):
    assert abs(np.square(zscore(rewards)).mean() - 1) < 1e-12


@given(st.lists(st.sampled_from((-3.0, -0.0, 0.0, 1.0, 2.5, 1e30)) | FLOATS, min_size=2, max_size=30))
def test_centered_rank(rewards):
    below = [sum(x < r for x in rewards) for r in rewards]
    ties = [sum(x == r for x in rewards) - 1 for r in rewards]
    wanted = [(b + t / 2) / (len(rewards) - 1) - 0.5 for b, t in zip(below, ties, strict=True)]
    np.testing.assert_allclose(centered_rank(rewards), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shaping", ("zscore", "centered_rank"))
@pytest.mark.parametrize("mirrored", (False, True))
def test_equal_rewards_change_nothing(shaping, mirrored, same_bits):
    plan = small_plan()
    es, before = ES(plan, population_size=4, shaping=shaping, mirrored=mirrored), copies(plan)
    reward_all(es, lambda member: 0.1)
    record = es.step()
    assert set(record.coeffs) == {0.0} and es.generation == 1 and same_bits(plan.tensors, before)


def test_coefficients_of_pairs_are_one_term():
    members = [Member(0, 7, 1), Member(1, 7, -1), Member(2, 9, 1), Member(3, 9, -1)]
    seeds, coeffs = coefficients(members, [1.0, -0.5, 0.25, 0.75], lr=0.8)
    assert seeds == [7, 9] and coeffs == [float(np.float32(0.3)), float(np.float32(-0.1))]


def test_a_shaping_function_sees_the_rewards(same_bits):
    seen = []
    plans = small_plan(), small_plan()
    for plan, shaping in zip(plans, ("zscore", lambda r: seen.append(list(r)) or zscore(r)), strict=True):
        es = ES(plan, sigma=0.1, lr=0.5, population_size=4, shaping=shaping)
        reward_all(es, lambda member: member.index**2)
        record = es.step()
    assert seen == [[0.0, 1.0, 4.0, 9.0]] == [record.rewards] and same_bits(plans[0].tensors, plans[1].tensors)


# ---- the update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ("gaussian", "rademacher", "low_rank"))
@pytest.mark.parametrize("mirrored", (False, True))
@pytest.mark.parametrize("weights", ("base", "inplace"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_update_is_the_weighted_sum(dtype, weights, mirrored, noise):
    """Compares the update with theta + lr / N * sum_n z_n eps_n, computed in float64 from the rewards and the seeds."""
    plan = small_plan(dtype)
    es = ES(plan, sigma=2.0**-10, lr=0.3, population_size=8, mirrored=mirrored, noise=noise, weights=weights)
    before = [t.double() for t in plan.tensors]
    reward_all(es)
    members = [(m.seed, m.sign, m.reward) for m in es.members]
    drifted = [t.double() for t in plan.tensors]  # as restored: in place with a rounding error
    record = es.step()
    r = np.array([reward for _, _, reward in members])
    z = (r - r.mean()) / r.std()
    for name, start, exact_start, found in zip(plan.names, drifted, before, plan.tensors, strict=True):
        noises = [sign * esfast.noise(seed, name, found.shape, noise).double() for seed, sign, _ in members]
        wanted = start + 0.3 / 8 * sum(c * e for c, e in zip(z, noises, strict=True))
        half_a_place = torch.finfo(dtype).eps / 2
        assert ((found.double() - wanted).abs() <= half_a_place * wanted.abs() + 1e-6).all()
        assert (found.double() - exact_start).abs().max() > 0.01
    assert record == UpdateRecord(0, record.seeds, record.coeffs, list(r), 2.0**-10, 0.3)
    assert len(record.seeds) == (4 if mirrored else 8) and es.generation == 1


def run_of(seed, generations=3, **options):
    plan = small_plan(torch.bfloat16)
    es = ES(plan, sigma=0.1, lr=0.1, population_size=6, seed=seed, **options)
    for _ in range(generations):
        reward_all(es, lambda member: float(sum(t.float().sum() for t in plan.tensors)))  # noqa: B023
        es.step()
    return plan.tensors


@pytest.mark.parametrize(
    "options",
    ({}, {"mirrored": True}, {"noise": "rademacher"}, {"noise": "low_rank", "rank": 2}, {"weights": "inplace"}),
    ids=str,
)
def test_the_seed_decides(options, same_bits):
    first = run_of(5, **options)
    assert same_bits(first, run_of(5, **options)) and same_bits(first, run_of(5, backend="reference", **options))
    assert not same_bits(first, run_of(6, **options))


def test_sigma_and_lr_may_change_between_generations():
    es = ES(small_plan(), sigma=0.1, lr=0.1, population_size=2)
    reward_all(es)
    es.step()
    es.sigma, es.lr = 0.5, 0.25
    reward_all(es)
    record = es.step()
    assert (record.sigma, record.lr, record.generation) == (0.5, 0.25, 1)


@pytest.mark.parametrize("reward", (None, float("nan"), float("inf"), -float("inf"), "7", torch.ones(2), 10**400, 1j))
def test_a_reward_that_is_none_is_refused_and_can_be_mended(reward, same_bits):
    plans = small_plan(), small_plan()
    for plan, faulty in zip(plans, (False, True), strict=True):
        es, before = ES(plan, population_size=4, lr=0.1), copies(plan)
        reward_all(es, lambda member: member.index)
        if faulty:
            es.members[2].reward = reward
            with pytest.raises(ValueError, match=r"step\(\): .*member 2\b"):
                es.step()
            assert same_bits(plan.tensors, before) and es.generation == 0
            es.members[2].reward = torch.tensor(2.0)
        es.step()
        assert es.generation == 1
    assert same_bits(plans[0].tensors, plans[1].tensors)


def test_in_place_drifts_little():
    plan = small_plan()
    es, before = ES(plan, sigma=0.01, population_size=100, weights="inplace"), copies(plan)
    reward_all(es)
    torch.testing.assert_close(plan.tensors, before, rtol=0, atol=1e-5)
    for _ in es.population():
        break
    torch.testing.assert_close(plan.tensors, before, rtol=0, atol=1e-5)


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ("gaussian", "rademacher"))
@pytest.mark.parametrize("mirrored", (False, True))
def test_es_finds_the_maximum_of_a_quadratic(noise, mirrored):
    """100 generations of 20 members take a distance of about 4.5 below 0.5; a wrong sign makes it grow."""
    theta, target = torch.zeros(20), torch.linspace(-1.5, 1.5, 20)
    es = ES([("theta", theta)], sigma=0.05, lr=0.15, population_size=20, noise=noise, mirrored=mirrored)
    start = float((theta - target).norm())
    for _ in range(100):
        reward_all(es, lambda member: -float((theta - target).square().sum()))
        es.step()
    assert float((theta - target).norm()) < 0.5 < start / 5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_es_learns_a_regression(dtype):
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a model this small, two threads mostly wait for each other
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    x = torch.randn(128, 3).to(dtype)
    y = x.float().sum(1, keepdim=True).sin()
    es = ES(model, sigma=0.05, lr=0.1, population_size=30, mirrored=True, shaping="centered_rank")
    with torch.no_grad():
        loss = [float((model(x).float() - y).square().mean())]
        for _ in range(80):
            for member in es.population():
                member.reward = -float((model(x).float() - y).square().mean())
            es.step()
        loss.append(float((model(x).float() - y).square().mean()))
    assert loss[1] < loss[0] / 2


def test_es_takes_modules_plans_and_pairs(same_bits):
    layers = [nn.Linear(4, 3) for _ in range(3)]
    for other in layers[1:]:
        other.load_state_dict(layers[0].state_dict())
    for model in (layers[0], Plan(layers[1]), ((n, p) for n, p in layers[2].named_parameters())):
        es = ES(model, sigma=0.1, lr=0.1, population_size=4)
        reward_all(es)
        es.step()
    states = [list(layer.parameters()) for layer in layers]
    assert same_bits(states[0], states[1]) and same_bits(states[0], states[2])
