"""MemberEvaluator: what ESTrainer asks of one, on evaluators that make and answer members in ways of their own."""

import json
import time

import pytest
import torch
from test_trainer import ROWS, config, count_digits, equal, weights

import esfast
from esfast.rollout import MemberEvaluator, SequentialEvaluator, TransformersEngine, as_engine
from esfast.rollout.sampling import LogitsError
from esfast.tasks import embedded


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    return embedded.make_model(tokenizer).eval(), tokenizer


class Elsewhere(MemberEvaluator):
    """Members of a second copy of the model, last one first; the trainer's own is never perturbed."""

    def __init__(self, net, tokenizer):
        self.engine, self.tokens, self.closed = TransformersEngine(net, tokenizer, 6), 0, 0
        self.net, self.other = net, embedded.make_model(tokenizer).eval()
        self.copy = TransformersEngine(self.other, tokenizer, 6)
        self.plan = esfast.Plan(self.other)

    def evaluate(self, members, prompts, seeds):
        self.other.load_state_dict(self.net.state_dict())
        for member in reversed(list(members.handed_out())):
            with esfast.perturbed(self.plan, member.seed, member.sign * members.sigma):
                yield member, self.copy.generate(prompts, seeds)

    def close(self):
        self.closed += 1


def run(folder, model, rewards=count_digits, **options):
    net, tokenizer = model
    settings = {k: options.pop(k) for k in ("on_reward_error", "generations") if k in options}
    trainer = esfast.ESTrainer(net, rewards, config(folder, **settings), ROWS, ROWS, tokenizer, **options)
    try:
        trainer.train()
    finally:
        trainer.folder.release()
    return trainer


def test_members_elsewhere_teach_the_same(tmp_path, model):
    """Weights and journal of a run do not depend on who asks the members, nor in what order."""
    net, tokenizer = model
    before = weights(net)
    run(tmp_path / "here", model)
    after = weights(net)
    net.load_state_dict(before, strict=False)
    evaluator = Elsewhere(net, tokenizer)
    perturbed = []

    class Watched(type(evaluator)):
        def evaluate(self, members, prompts, seeds):
            for pair in super().evaluate(members, prompts, seeds):
                perturbed.append(not equal(weights(net), at_generation[-1]))
                yield pair

    at_generation = [before]
    evaluator.__class__ = Watched
    trainer = esfast.ESTrainer(
        net, count_digits, config(tmp_path / "there"), ROWS, ROWS, tokenizer, evaluator=evaluator
    )
    step = trainer.es.step
    trainer.es.step = lambda **o: (step(**o), at_generation.append(weights(net)))[0]
    trainer.train()
    assert equal(weights(net), after) and not equal(before, after)
    assert perturbed == [False] * 12 and evaluator.closed == 1 and trainer.engine is evaluator.engine
    journals = [(tmp_path / name / "journal.jsonl").read_bytes() for name in ("here", "there")]
    assert journals[0] == journals[1]


def slowly(prompts):
    time.sleep(0.05)
    return [""] * len(prompts)


class HandedOut(SequentialEvaluator):
    def evaluate(self, members, prompts, seeds):
        for member in members.handed_out():
            yield member, self.engine.generate(prompts)


@pytest.mark.parametrize("kind", [SequentialEvaluator, HandedOut])
def test_phases(tmp_path, model, kind, monkeypatch):
    """Writing members counts as perturb, answering as generate; of members made elsewhere it is all generate."""
    enter = esfast.ES._enter
    monkeypatch.setattr(esfast.ES, "_enter", lambda es, member: (time.sleep(0.05), enter(es, member)))
    (row,) = run(tmp_path, model, generations=1, evaluator=kind(as_engine(slowly))).folder.read_metrics()[1:]
    assert row["seconds_generate"] > 0.2 and (row["seconds_perturb"] > 0.2) == (kind is SequentialEvaluator)
    assert "tokens_per_second" not in row


class Broken(SequentialEvaluator):
    """Member 2 of generation 1 gives no text."""

    generation = -1

    def evaluate(self, members, prompts, seeds):
        self.generation += 1
        for member, completions in super().evaluate(members, prompts, seeds):
            broken = (self.generation, member.index) == (1, 2)
            yield member, LogitsError("the model's logits are NaN or infinite") if broken else completions


def test_a_member_without_text_is_set_aside_or_stops_the_run(tmp_path, model, caplog):
    engine = TransformersEngine(*model, 6)
    trainer = run(tmp_path / "skip", model, evaluator=Broken(engine), on_reward_error="skip")
    records = [json.loads(line.rpartition(" ")[0]) for line in trainer.folder.journal.read_text().splitlines()]
    rewards = [r["rewards"] for r in records if "rewards" in r]
    assert [row.count(None) for row in rewards] == [0, 1, 0] and rewards[1][2] is None
    assert "member 2 of generation 1 is set aside" in caplog.text
    before = weights(model[0])
    with pytest.raises(LogitsError, match=r"member 2 of generation 1 \(sigma 0.05\) gives logits"):
        run(tmp_path / "stop", model, evaluator=Broken(engine))
    assert not equal(before, weights(model[0]))  # by generation 0 alone
    plan = esfast.Plan(model[0])
    after = weights(model[0])
    model[0].load_state_dict(before, strict=False)
    esfast.journal.replay(plan, tmp_path / "stop" / "journal.jsonl")
    assert equal(weights(model[0]), after)


class Forgetful(SequentialEvaluator):
    """Fails while member 1 is in place, and keeps the iterator alive, so that nothing closes it."""

    def evaluate(self, members, prompts, seeds):
        self.kept = iter(members)
        for member in self.kept:
            if member.index == 1:
                raise RuntimeError("the engine is gone")
            yield member, self.engine.generate(prompts)


def test_weights_come_back_whatever_an_evaluator_does(tmp_path, model):
    before, evaluator = weights(model[0]), Forgetful(TransformersEngine(*model, 6))
    with pytest.raises(RuntimeError, match="the engine is gone"):
        run(tmp_path / "run", model, evaluator=evaluator)
    assert evaluator.kept.gi_frame is not None and equal(weights(model[0]), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"evaluator": SequentialEvaluator(len), "engine": len}, "either an evaluator or an engine"),
        ({"evaluator": len}, r"expected an object with evaluate\(members, prompts, seeds\) and an engine"),
    ],
)
def test_what_is_no_evaluator(tmp_path, model, options, words):
    with pytest.raises(TypeError, match=words):
        run(tmp_path / "run", model, **options)
    assert not (tmp_path / "run").exists()


def test_a_population_of_the_past_hands_out_nothing():
    es = esfast.ES([("a", torch.zeros(4))], population_size=2)
    past = es.population().handed_out()
    for member in es.population():
        member.reward = float(member.index)
    es.step()
    with pytest.raises(RuntimeError, match="of the past"):
        next(past)
