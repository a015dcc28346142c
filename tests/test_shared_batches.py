"""Requests of several members, some of which have more of them than others, are answered in shared batches."""

import random

import pytest
import torch
from test_population import make

import esfast
from esfast.bench.architectures import tiny_model
from esfast.rollout import dropping
from esfast.rollout.completion import Asked
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.low_rank_model import LowRankModel
from esfast.rollout.population import PopulationEvaluator
from esfast.rollout.sampling import LogitsError
from esfast.rollout.shared_batches import SharedBatches
from esfast.rollout.stacked_model import StackedModel
from esfast.tasks import embedded

TOKENIZER = embedded.make_tokenizer()
# (numbers of members, of five, texts)
REQUESTS = {
    "one each": ([0, 1, 2, 3, 4], ["a", "12+3=", "xyz", "a", "b"]),
    "unequal": ([4, 4, 1, 4, 1, 0], ["a", "12+3=", "xyz xyz", "b", "a", "Name a colour: "]),
    "one member": ([3, 3], ["a", "12+3="]),
    "the last two": ([4, 3], ["a", "12+3="]),
}


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["qwen2", "xlnet"])
@pytest.mark.parametrize("asked", [Asked(), Asked(3, 0.7, 0.8), Asked(5, 0)], ids=["run's", "own", "greedy"])
def test_a_text_is_that_of_its_member_alone(name, asked):
    es, engine = make(name, population=5)
    evaluator = PopulationEvaluator(engine, 5)
    ((members, complete),) = evaluator.placed(es.population(), True)
    assert [member.index for member in members] == [0, 1, 2, 3, 4]
    found = []
    for owners, texts in [*REQUESTS.values(), *reversed(REQUESTS.values())]:
        seeds = list(range(70, 70 + len(texts)))
        found.append(
            dict(zip(zip(owners, texts, seeds, strict=True), complete(owners, texts, seeds, asked), strict=True))
        )
    for member in es.population():
        for answers in found:
            for (k, text, seed), completion in answers.items():
                if k == member.index:
                    assert [completion] == engine.complete_texts([text], [seed], asked)
    assert evaluator.tokens == 2 * engine.tokens


def test_rows_are_bounded_and_members_without_requests_are_not_in_a_batch(monkeypatch):
    es, engine = make(population=5)
    shapes, generate = [], SharedBatches._generate
    monkeypatch.setattr(
        SharedBatches,
        "_generate",
        lambda self, rows, members, seeds, counts: (
            shapes.append((members, len(rows), sum(counts))),
            generate(self, rows, members, seeds, counts),
        )[1],
    )
    ((_, complete),) = PopulationEvaluator(engine, 5).placed(es.population(), False)
    owners, texts = REQUESTS["unequal"]
    whole = complete(owners, texts, None, Asked())
    assert shapes == [(3, 9, 6)]
    for most, expected in ((6, [(3, 6, 5), (1, 1, 1)]), (2, [(2, 2, 2), (2, 2, 2), (1, 2, 2)]), (1, [(1, 1, 1)] * 6)):
        shapes.clear()
        engine.batch_size = most
        assert complete(owners, texts, None, Asked()) == whole
        assert shapes == expected


def test_out_of_memory_halves_the_rows(monkeypatch, caplog):
    es, engine = make(population=5)
    ((_, complete),) = PopulationEvaluator(engine, 5).placed(es.population(), False)
    owners, texts = REQUESTS["unequal"]
    whole, generate = complete(owners, texts, None, Asked()), SharedBatches._generate

    def scarce(self, rows, *others):
        if len(rows) > room:
            raise torch.OutOfMemoryError("no")
        return generate(self, rows, *others)

    monkeypatch.setattr(SharedBatches, "_generate", scarce)
    room = 3
    assert complete(owners, texts, None, Asked()) == whole
    assert "out of memory with 9 rows at once: going on with 4" in caplog.text and engine.batch_size in (1, 2)
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        complete(owners, texts, None, Asked())


def test_a_member_without_numbers_costs_no_other():
    es, engine = make(population=5)
    ((_, complete),) = PopulationEvaluator(engine, 5).placed(es.population(), False)
    owners, texts = REQUESTS["unequal"]
    whole = complete(owners, texts, None, Asked())
    for tensor in complete.args[0]._stacks:
        tensor[complete.args[0]._order.index(1)] = float("nan")
    found = complete(owners, texts, None, Asked())
    assert [isinstance(answer, LogitsError) for answer in found] == [k == 1 for k in owners]
    assert [a for a, k in zip(found, owners, strict=True) if k != 1] == [
        a for a, k in zip(whole, owners, strict=True) if k != 1
    ]


@pytest.mark.parametrize("kind", [StackedModel, LowRankModel])
def test_any_members_are_chosen_in_any_order(kind):
    model = tiny_model("qwen2", TOKENIZER)
    stack = kind(model, 6)
    members = [(seed, 0.1) for seed in range(6)]
    ids, rng = torch.tensor([[5, 6, 7]]), random.Random(0)
    stack.write(members)
    stack.check()
    with torch.no_grad():
        alone = []
        for member in members:
            with esfast.perturbed(model, *member, noise=kind.noise):
                alone.append(model(ids).logits)
        for _ in range(12):
            some = rng.sample(range(6), rng.randint(1, 6))
            order = stack.choose(some)
            assert sorted(order) == sorted(some)
            with stack.in_place() as together:
                found = together(ids.repeat(len(order), 1)).logits
            torch.testing.assert_close(found, torch.cat([alone[k] for k in order]), rtol=1e-4, atol=1e-5)
        stack.write(members[::-1])
        assert stack.choose([0, 5]) in ([0, 5], [5, 0])


@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
@pytest.mark.parametrize("sampled", [False, True])
def test_prompts_read_by_parts_give_the_same_texts(noise, sampled, monkeypatch):
    """Two rows of each member at once, some of which end with their first token or leave later."""
    prompts, answers = ["a", "12+3=", "Name a colour, please: ", "xyz xyz", "12+4="], []
    for tokens in (24 * 3 * 2, 4096):
        monkeypatch.setattr(dropping, "READ_AT_ONCE", tokens)
        torch.manual_seed(0)
        es = esfast.ES(tiny_model("qwen2", TOKENIZER), sigma=0.1, population_size=3, noise=noise)
        engine = TransformersEngine(es.plan.module, TOKENIZER, 8)
        engine.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(0, 200, 3)]
        evaluator = PopulationEvaluator(engine, 3)
        seeds = range(5) if sampled else None
        answers.append({m.index: texts for m, texts in evaluator.evaluate(es.population(), prompts, seeds)})
        width = max(map(len, engine.prompts(prompts)))
        parts = dropping.read_at_once(torch.device("cpu"), 3, width) < 15
        assert parts == (tokens < 4096) and evaluator.batches.way.room
    assert answers[0] == answers[1]
