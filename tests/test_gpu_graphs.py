"""On a GPU: steps of several members, captured as CUDA graphs, give the texts of plain decoding and follow the members
that are written next."""

import pytest
import torch

import esfast
from esfast.rollout.dropping import Dropping
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.population import PopulationEvaluator, asking
from esfast.rollout.static_steps import StaticSteps
from esfast.tasks import embedded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device: test_static_capture.py has a stand-in"
    ),
]
PROMPTS = ["1 2 3=6\n<think>", "a", "12 34 56 78=90\n<think>", "1 2 3=7\n<think>", "no tags here", "a b c"]
SEEDS = list(range(len(PROMPTS)))


@pytest.fixture(autouse=True)
def as_in_a_run(poisoned_memory):
    """Switches PyTorch's deterministic mode off, which chooses other operations."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(5)
    tokenizer = embedded.make_tokenizer()
    model = embedded.make_model(tokenizer).cuda().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 3.0
    return model, tokenizer


def answers(evaluator, es, seeds):
    return [text for _, texts in evaluator.evaluate(es.population(), PROMPTS, seeds) for text in texts]


def same(one, other):
    """The share of equal texts: on a GPU other shapes may sum in another order."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
@pytest.mark.parametrize("seeds", [None, SEEDS], ids=["greedy", "sampled"])
def test_members_from_graphs_answer_as_they_do_plainly(tiny, noise, seeds):
    model, tokenizer = tiny
    es = esfast.ES(model, sigma=0.05, population_size=6, noise=noise)
    plain, static = (
        PopulationEvaluator(TransformersEngine(model, tokenizer, 24, decoding=way), 4) for way in ("plain", "static")
    )
    found = []
    for sigma in (0.05, 0.02, 0.05):
        es.sigma = sigma
        found.append(answers(static, es, seeds))
        assert same(found[-1], answers(plain, es, seeds)) >= 0.95
    assert found[0] == found[2] and same(found[0], found[1]) < 0.7, "the second population's weights were seen"
    way = static.batches.way
    assert way._graphs and not way.failed
    before, allocated = len(way._graphs), torch.cuda.memory_allocated()
    for _ in range(5):
        answers(static, es, seeds)
    assert len(way._graphs) == before and torch.cuda.memory_allocated() <= allocated * 1.02
    static.close()


def test_auto_takes_graphs(tiny):
    model, tokenizer = tiny
    es = esfast.ES(model, sigma=0.05, population_size=6)
    auto = asking(TransformersEngine(model, tokenizer, 24))
    plain = PopulationEvaluator(TransformersEngine(model, tokenizer, 24, decoding="plain"), 6)
    assert same(answers(auto, es, None), answers(plain, es, None)) >= 0.95
    assert auto.at_once == 6 and auto.batches.way._graphs and auto.batches.way.failed is None
    auto.close()


def test_frozen_weights_and_one_member(tiny):
    model, tokenizer = tiny
    engine = TransformersEngine(model, tokenizer, 24)
    plain = Dropping(model, engine.generation_config)
    static, rows = StaticSteps.instead_of(plain), engine.prompts(PROMPTS)
    weight = model.model.layers[0].mlp.up_proj.weight
    original, texts = weight.detach().clone(), []
    try:
        for shift in (0, 1, 0):
            with torch.no_grad():
                weight.copy_(original.roll(shift, 0))
            with engine.own_settings():
                found, fine = static(rows, 1)
                texts.append(list(map(tuple, found)))
                assert same(found, plain(rows, 1)[0]) >= 5 / 6 and fine == [True]
    finally:
        weight.data.copy_(original)
    assert texts[0] == texts[2] != texts[1] and len(static._graphs) >= 1


def test_a_step_that_waits_for_the_device_goes_on_plainly(tiny, caplog, monkeypatch):
    """After the failed capture the device works as before, and another graph can be captured."""
    model, tokenizer = tiny
    engine = TransformersEngine(model, tokenizer, 12)
    plain, rows = Dropping(model, engine.generation_config), engine.prompts(PROMPTS)
    waits = StaticSteps.instead_of(plain)
    norm = model.model.norm.forward
    with engine.own_settings():
        expected = plain(rows, 2)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.norm, "forward", lambda x: norm(x) if x.sum().item() < 1e30 else x)
            assert waits(rows, 2) == expected
        assert "static decoding doesn't work here for several members, going on plainly" in caplog.text
        assert waits.failed and not waits._graphs
        works = StaticSteps.instead_of(plain)
        assert same(works(rows, 2)[0], expected[0]) >= 5 / 6 and works._graphs
    torch.cuda.synchronize()
