"""The ask-tell adapter: the same generations as ES, whatever the order of evaluation."""

import pytest
import torch

from esfast import ES, Plan
from esfast.integrations.ask_tell import AskTell

OPTIONS = {"sigma": 0.1, "lr": 0.1, "population_size": 6, "seed": 3}


def weights():
    return Plan([("w", torch.linspace(-1, 1, 50)), ("b", torch.ones(7))])


def loss(plan):
    return sum(float((t - 0.3).square().sum()) for t in plan.tensors)


@pytest.mark.parametrize("mirrored", [False, True])
def test_equals_es_in_any_order(mirrored, same_bits):
    wanted = ES(weights(), mirrored=mirrored, **OPTIONS)
    for _ in range(4):
        for member in wanted.population():
            member.reward = -loss(wanted.plan)
        wanted.step()

    plan = weights()
    es = AskTell(plan, maximize=False, mirrored=mirrored, **OPTIONS)
    for generation in range(4):
        candidates = es.ask()
        candidates = candidates[generation:] + candidates[:generation]
        losses = []
        for candidate in candidates:
            before = plan.fingerprint()
            with candidate:
                losses.append(loss(plan))
                assert plan.fingerprint() != before
            assert plan.fingerprint() == before
        record = es.tell(candidates, torch.tensor(losses, dtype=torch.float64))
        assert record.generation == generation
    assert same_bits(plan.tensors, wanted.plan.tensors)


def test_the_loss_falls():
    plan = weights()
    es, first = AskTell(plan, maximize=False, **OPTIONS | {"population_size": 20}), loss(plan)
    for _ in range(60):
        values = []
        for candidate in (asked := es.ask()):
            with candidate:
                values.append(loss(plan))
        es.tell(asked, values)
    assert loss(plan) < 0.5 * first


def test_what_is_refused_changes_nothing(same_bits):
    plan = weights()
    es, before = AskTell(plan, **OPTIONS), [t.clone() for t in plan.tensors]
    with pytest.raises(ValueError, match=r"tell\(\): expected the 0 candidates"):
        es.tell([], [])
    old = es.ask()
    values = [float(c.index) for c in old]
    for words, candidates, fitness in (
        ("expected 6 numbers", old, values[:-1]),
        ("each once", old[:-1], values[:-1]),
        ("each once", [*old[:-1], old[0]], values),
        ("candidate 2 is nan", old, [0, 1, float("nan"), 3, 4, 5]),
        ("expected a number", old, [*values[:-1], None]),
        ("expected a number", old, [*values[:-1], torch.zeros(2)]),
    ):
        with pytest.raises(ValueError, match=words):
            es.tell(candidates, fitness)
    with old[0], pytest.raises(RuntimeError, match="candidate 0 is still in place"), old[1]:
        pass
    assert same_bits(plan.tensors, before)
    es.tell(old, values)
    es.ask()
    with pytest.raises(RuntimeError, match="of the past"), old[0]:
        pass
