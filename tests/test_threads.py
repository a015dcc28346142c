"""How many threads a small model's batches get."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

import esfast
from esfast.bench.architectures import tiny_model
from esfast.cli import models
from esfast.rollout import threads
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.evaluator import SequentialEvaluator
from esfast.rollout.population import PopulationEvaluator
from esfast.rollout.threads import Threads
from esfast.tasks import embedded

TOKENIZER = embedded.make_tokenizer()
PROMPTS = ["a", "12+3=", "Name a colour, please: ", "xyz xyz"]


@pytest.fixture(autouse=True)
def three_threads(same_threads):
    torch.set_num_threads(3)


def chosen(threads: Threads, tokens: int) -> int:
    threads.choose(tokens)
    return torch.get_num_threads()


def test_the_work_of_a_forward_pass_decides():
    few = Threads(100_000)
    with few.at_most(3):
        assert [chosen(few, tokens) for tokens in (1, 199, 200, 299, 300, 10**6, 1)] == [1, 1, 2, 2, 3, 3, 1]
    assert torch.get_num_threads() == 3
    for most in (0, 1):
        with few.at_most(most):
            assert chosen(few, 10**6) == 1
    with pytest.raises(ZeroDivisionError), few.at_most(2):
        few.choose(1)
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 3


def test_beside_other_work_there_are_fewer(monkeypatch):
    """Half as many after threads have waited, for twice as long as that took, and longer each time."""
    clock = {"now": 100.0, "waited": 5.0}
    monkeypatch.setattr(threads, "now", lambda: clock["now"])
    monkeypatch.setattr(threads, "seconds_waited", lambda: clock["waited"])
    many = Threads(10**9)

    def after(seconds: float, waited: float) -> int:
        clock["now"] += seconds
        clock["waited"] += waited
        return chosen(many, 10)

    with many.at_most(4):
        assert [after(0, 0), after(0.1, 0.04), after(0.01, 0.01)] == [4, 4, 4], "the last is too short to tell"
        assert after(0.09, 0.06) == 2, "0.07 of 0.1 seconds"
        assert [after(0.1, 0), after(0.09, 0), after(0.02, 0)] == [2, 2, 4], "until 0.2 seconds have passed"
        assert after(0.1, 0.1) == 2
        assert [after(0.3, 0), after(0.2, 0)] == [2, 4], "0.4 seconds"
        assert after(0.1, 0) == 4, "nobody wants the cores any more"
        after(0.02, 0.02)
    # what is too short is looked at when the block ends
    with many.at_most(4):
        assert after(0.01, 0) == 2
        assert after(0.4, 0) == 4
        for _ in range(9):
            after(1.0, 1.0)
            last = many._few_until - clock["now"]
            clock["now"] = many._few_until
            after(0, 0)
        assert last == pytest.approx(32.0)


def test_what_a_block_does_not_do_is_not_counted(monkeypatch):
    clock = {"now": 0.0, "waited": 0.0}
    monkeypatch.setattr(threads, "now", lambda: clock["now"])
    monkeypatch.setattr(threads, "seconds_waited", lambda: clock["waited"])
    many = Threads(10**9)
    for _ in range(2):
        with many.at_most(2):
            assert chosen(many, 10) == 2
        clock["now"] += 1
        clock["waited"] += 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how long threads waited")
def test_seconds_waited_is_read_from_the_system():
    before = threads.seconds_waited()
    assert 0 < before <= threads.seconds_waited()


def test_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(threads.os, "listdir", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    assert threads.seconds_waited() == 0.0


def test_members_together_share_the_threads_that_there_are(monkeypatch):
    """And their texts stay those of one after another."""
    monkeypatch.setattr(threads, "WORK_OF_THREAD", 1)
    monkeypatch.setattr(threads, "seconds_waited", lambda: 0.0)  # this machine may have other work
    model = tiny_model("qwen2", TOKENIZER)
    es = esfast.ES(model, sigma=0.1, population_size=4)
    used = []
    model.model.register_forward_hook(lambda *_: used.append(torch.get_num_threads()))

    def answers(evaluator):
        used.clear()
        texts = {member.index: texts for member, texts in evaluator.evaluate(es.population(), PROMPTS, None)}
        assert torch.get_num_threads() == allowed
        return texts

    allowed = 3
    engine = TransformersEngine(model, TOKENIZER, 8)
    engine.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(0, 200, 3)]
    expected = answers(SequentialEvaluator(engine))
    assert set(used) == {1}
    together = PopulationEvaluator(engine, 4)
    answers(together)
    assert answers(together) == expected
    assert set(used) == {3}
    together.batches.processes = 2
    assert answers(together) == expected
    assert set(used) == {1}, "a team's processes share the cores"
    allowed = together.batches.processes = 1
    torch.set_num_threads(1)
    assert answers(together) == expected
    assert set(used) == {1}


def test_the_program_leaves_the_choice_to_the_engine():
    """`esfast train` set one thread for all it does, so that members together had no other."""
    base = Path(__file__).parent / "fixtures" / "d3e6f80" / "base"
    models.load(argparse.Namespace(model=str(base), device="cpu", dtype="auto"))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("members", "expected"), [(1, 1), (39, 1), (40, 3)])
def test_threads_share_noise_that_takes_milliseconds(monkeypatch, members, expected):
    extension = pytest.importorskip("esfast._cpu")
    given = []
    monkeypatch.setattr(extension, "add_noise", lambda *args: given.append(args[10]))
    plan = esfast.Plan([("w", torch.zeros(100_000))])
    esfast.add_noise_(plan, list(range(members)), [0.1] * members, base=plan, backend="cpu")
    assert given == [expected]
