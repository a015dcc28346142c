"""Several members in one batch give the texts, rewards, journal and weights of one after another."""

import json
import logging
import re

import pytest
import torch

import esfast
from esfast.bench.architectures import tiny_model
from esfast.rollout import dropping
from esfast.rollout.completion import decoded
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.evaluator import SequentialEvaluator
from esfast.rollout.member_tensor import Unsupported
from esfast.rollout.memory import peak_bytes
from esfast.rollout.population import PopulationEvaluator, asking
from esfast.rollout.sampling import LogitsError
from esfast.rollout.shared_batches import SharedBatches
from esfast.tasks import embedded

TOKENIZER = embedded.make_tokenizer()
PROMPTS = ["a", "12+3=", "Name a colour, please: ", "xyz xyz", "12+4=", "b"]


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


def make(name="qwen2", tokens=8, population=7, sigma=0.1, **options):
    """Of a tiny model that ends some texts early."""
    model = tiny_model(name, TOKENIZER)
    es = esfast.ES(model, sigma=sigma, population_size=population, mirrored=not population % 2)
    engine = TransformersEngine(model, TOKENIZER, tokens, **options)
    engine.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(0, 200, 3)]
    if engine._way is not None:
        engine._way._ends = torch.tensor(engine.generation_config.eos_token_id)
    return es, engine


def answers(evaluator, es, seeds=None, prompts=PROMPTS):
    return {member.index: texts for member, texts in evaluator.evaluate(es.population(), prompts, seeds)}


@pytest.mark.parametrize("at_once", [2, 3, 7, "auto"])
@pytest.mark.parametrize("seeds", [None, list(range(40, 46))], ids=["greedy", "sampled"])
def test_texts_are_those_of_one_after_another(at_once, seeds, same_bits):
    es, engine = make()
    weights = [p.clone() for p in es.plan.tensors]
    expected = answers(SequentialEvaluator(engine), es, seeds)
    counted = engine.tokens
    evaluator = PopulationEvaluator(engine, at_once)
    assert answers(evaluator, es, seeds) == expected
    assert evaluator.tokens == 2 * counted and evaluator.at_once == (7 if at_once == "auto" else at_once)
    assert len({tuple(texts) for texts in expected.values()}) == 7
    assert same_bits(es.plan.tensors, weights)
    es.sigma = 0.05
    assert answers(evaluator, es, seeds) == answers(SequentialEvaluator(engine), es, seeds) != expected


# any lengths, one length only; with experts, states in a cache that rows can and can't leave
@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe", "mamba", "jamba", "xlnet", "recurrent_gemma"])
def test_architectures(name):
    es, engine = make(name, population=3)
    evaluator = PopulationEvaluator(engine, 3)
    assert answers(evaluator, es) == answers(SequentialEvaluator(engine), es)
    assert evaluator.batches.way.drops == (name in ("gpt2", "qwen3_moe", "jamba"))


def test_rows_that_have_ended_leave_the_batch(monkeypatch):
    es, engine = make(tokens=16, population=4)
    expected, widths = answers(SequentialEvaluator(engine), es), []
    evaluator = PopulationEvaluator(engine, 4)
    forward = engine.model.forward
    monkeypatch.setattr(
        engine.model, "forward", lambda *args, **kw: (widths.append(len(kw["input_ids"])), forward(*args, **kw))[1]
    )
    assert answers(evaluator, es) == expected
    steps = widths[widths.index(24) :]
    assert steps == sorted(steps, reverse=True) and min(steps) < 24 and all(n % 4 == 0 for n in steps)
    monkeypatch.setattr(dropping, "SHARE", 0.0)
    widths.clear()
    assert answers(evaluator, es) == expected
    assert set(widths) == {24} and sum(steps) < sum(widths)


def test_mini_batches_are_cut_over_members_and_prompts(monkeypatch):
    es, engine = make(batch_size=6)
    expected, rows = answers(SequentialEvaluator(engine), es), []
    evaluator = PopulationEvaluator(engine, 3)
    generate = SharedBatches._generate
    monkeypatch.setattr(
        SharedBatches,
        "_generate",
        lambda self, some, count, *others: (
            rows.append((count, list(map(len, some)))),
            generate(self, some, count, *others),
        )[1],
    )
    assert answers(evaluator, es) == expected
    lengths = sorted((len(ids) for ids in engine.prompts(PROMPTS)), reverse=True)
    packet = [(3, lengths[i : i + 2] * 3) for i in (0, 2, 4)]
    assert rows == packet * 2 + [(1, lengths)]


def test_out_of_memory_halves_the_members(monkeypatch, caplog):
    es, engine = make()
    expected = answers(SequentialEvaluator(engine), es)
    evaluator, generate = PopulationEvaluator(engine, 7), SharedBatches._generate

    def scarce(self, some, count, *others):
        if count > 2:
            raise torch.OutOfMemoryError("no")
        return generate(self, some, count, *others)

    monkeypatch.setattr(SharedBatches, "_generate", scarce)
    with caplog.at_level(logging.WARNING):
        assert answers(evaluator, es) == expected
    assert "out of memory with 7 members at once: going on with 4" in caplog.text and evaluator.at_once == 2
    assert not any(type(p) is not torch.nn.Parameter for p in engine.model.parameters())


def test_a_member_without_numbers_is_named_and_costs_no_other(monkeypatch):
    es, engine = make(sigma=0.1)
    expected = answers(SequentialEvaluator(engine), es)
    evaluator = PopulationEvaluator(engine, 7)
    from esfast.rollout.stacked_model import StackedModel

    write = StackedModel.write

    def spoiled(self, members):
        write(self, members)
        if len(members) == 7:
            self._stacks[0][3].fill_(float("nan"))

    monkeypatch.setattr(StackedModel, "write", spoiled)
    found = answers(evaluator, es)
    assert isinstance(found.pop(3), LogitsError) and expected.pop(3) and found == expected


def test_what_cannot_be_shared_is_asked_one_after_another_or_refused(caplog):
    es, engine = make("rwkv")
    with pytest.raises(Unsupported, match="RwkvForCausalLM"):
        answers(PopulationEvaluator(engine, 3), es)
    with caplog.at_level(logging.INFO):
        assert answers(PopulationEvaluator(engine), es) == answers(SequentialEvaluator(engine), es)
    assert "members are asked one after another" in caplog.text


def test_a_model_in_train_mode():
    """Members share it in eval mode, and it has its mode again afterwards."""
    es, engine = make(population=3)
    engine.model.train()
    assert answers(PopulationEvaluator(engine, 3), es) == answers(SequentialEvaluator(engine), es)
    assert engine.model.training


def test_who_asks(monkeypatch):
    _, engine = make()
    assert type(asking(engine)) is type(asking(engine, "3")) is PopulationEvaluator
    assert type(asking(engine, 1)) is SequentialEvaluator
    monkeypatch.setattr("esfast.rollout.population.is_small", lambda model: False)
    assert type(asking(engine)) is SequentialEvaluator and type(asking(engine, 2)) is PopulationEvaluator
    engine.decoding = "continuous"
    with pytest.raises(ValueError, match="decoding='plain' or 'static', not 'continuous'"):
        asking(engine, 2)


def test_peak_bytes_counts_what_exists_at_once():
    def work():
        a = torch.zeros(1000)
        b = a + 1
        del a
        return (b * 2).sum()

    assert 8000 <= peak_bytes(work) <= 8100
    weight = torch.randn(100, 100)
    assert peak_bytes(lambda: torch.ones(2, 100) @ weight.t()) == 2 * 2 * 100 * 4, "a view of a weight is no memory"


def different_letters(completions, **columns):
    return [len(set(text)) + len(text) / 100 + (sum(map(ord, text)) % 97) / 1000 for text in completions]


def train(folder, **settings):
    model = tiny_model("qwen2", TOKENIZER)
    settings = {"temperature": 0.0, "reward_workers": 0, "generations": 3} | settings
    config = esfast.ESConfig(
        output_dir=str(folder),
        population_size=6,
        sigma=0.2,
        lr=0.05,
        prompts_per_generation=4,
        max_completion_length=6,
        progress=False,
        eval_every=2,
        **settings,
    )
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    trainer = esfast.ESTrainer(model, different_letters, config, rows, rows, TOKENIZER)
    trainer.train()
    lines = (folder / "journal.jsonl").read_text()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return trainer, lines, metrics


def told(metrics):
    """What of the metrics doesn't tell of time."""
    return [{k: v for k, v in row.items() if not re.search("seconds|per_second|ratio|time", k)} for row in metrics]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "num_generations": 2}], ids=["greedy", "sampled"])
def test_a_run_is_the_same_whatever_is_asked_at_once(settings, tmp_path):
    runs = {k: train(tmp_path / str(k), members_at_once=k, **settings) for k in (1, 4, "auto")}
    (one, journal, metrics), *others = runs.values()
    assert type(one.evaluator) is SequentialEvaluator
    for trainer, lines, rows in others:
        assert type(trainer.evaluator) is PopulationEvaluator
        assert lines == journal and told(rows) == told(metrics)
        assert trainer.es.plan.fingerprint() == one.es.plan.fingerprint()
        assert all(row["seconds_generate"] > 0 and row["seconds_perturb"] > 0 for row in rows if "seconds" in row)


def test_a_run_goes_on_with_another_number_at_once(tmp_path):
    whole, journal, _ = train(tmp_path / "whole", members_at_once=1, generations=4)
    train(tmp_path / "run", members_at_once=3, generations=2)
    again, lines, _ = train(tmp_path / "run", members_at_once="auto", generations=4, resume=True)
    generations = [line for line in lines.splitlines() if line.startswith('{"generation"')]
    assert len(generations) == 4 and set(generations) <= set(journal.splitlines())
    assert again.es.plan.fingerprint() == whole.es.plan.fingerprint()


def test_settings():
    assert [esfast.ESConfig(members_at_once=k).members_at_once for k in ("auto", 3, "1")] == ["auto", "3", "1"]
    for wrong in (0, -1, "many", 1.5, None):
        with pytest.raises((TypeError, ValueError), match="members_at_once"):
            esfast.ESConfig(members_at_once=wrong)
    with pytest.raises(ValueError, match="members_at_once: an engine of yours"):
        esfast.ESTrainer(
            tiny_model("qwen2", TOKENIZER),
            different_letters,
            esfast.ESConfig(members_at_once=2),
            [{"prompt": "a"}],
            None,
            TOKENIZER,
            engine=lambda prompts: list(prompts),
        )


def test_equal_rows_of_tokens_are_decoded_once(monkeypatch):
    asked, decode = [], TOKENIZER.batch_decode
    monkeypatch.setattr(
        TOKENIZER, "batch_decode", lambda rows, **options: asked.extend(rows) or decode(rows, **options)
    )
    end = TOKENIZER.eos_token_id
    assert decoded(TOKENIZER, [[65, 66], [67, end], [65, 66], [], [66, 65]]) == [
        TOKENIZER.decode(ids) for ids in ([65, 66], [67], [65, 66], [], [66, 65])
    ]
    assert asked == [[65, 66], [67, end], [], [66, 65]]
