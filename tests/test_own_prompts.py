"""Members with prompts of their own: who gets which, how rewards are compared, and that a resumed run must agree."""

import pytest
import torch
from test_population import PROMPTS, TOKENIZER, answers, make, train

import esfast
from esfast.es.population import Member
from esfast.es.shaping import centred
from esfast.journal.journal import read, replay
from esfast.rollout.evaluator import SequentialEvaluator
from esfast.rollout.population import PopulationEvaluator
from esfast.tasks import embedded
from esfast.trainer.batches import Batches


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


MEMBERS = [Member(i, 0, 1) for i in range(6)]
ROWS = [{"prompt": f"{i} + {i}", "answer": i} for i in range(60)]


@pytest.mark.parametrize("mirrored", [False, True])
def test_each_member_or_pair_has_prompts_of_its_own(mirrored):
    config = esfast.ESConfig(
        population_size=6,
        prompts_per_generation=3,
        mirrored=mirrored,
        prompts_per_member="own",
        temperature=1.0,
        num_generations=2,
    )
    batch = Batches(ROWS, config, TOKENIZER)(4)
    found = [batch.of(member) for member in MEMBERS]
    batches = 3 if mirrored else 6
    assert len(batch.rows) == len(batch.texts) == len(batch.seeds) == batches * 3 * 2
    assert len(set(batch.texts)) == batches * 3 and len(set(batch.seeds)) == len(batch.seeds)
    assert [own.start for own in found] == ([0, 0, 6, 6, 12, 12] if mirrored else [0, 6, 12, 18, 24, 30])
    assert all(len(batch.rows[own]) == 6 for own in found)
    assert batch.families(6) == ([0, 0, 1, 1, 2, 2] if mirrored else None)
    shared = Batches(ROWS, esfast.ESConfig(population_size=6, prompts_per_generation=3), TOKENIZER)(4)
    few = Batches(ROWS[:2], config, TOKENIZER)(1)
    assert few.each == 4 and {len(few.rows[few.of(m)]) for m in MEMBERS} == {4}
    fresh = Batches(lambda generation, count: ROWS[:7], config, TOKENIZER)(1)
    assert fresh.each == 6 and {len(fresh.rows[fresh.of(m)]) for m in MEMBERS} == {6}
    assert shared.families(6) is None and {str(shared.of(member)) for member in MEMBERS} == {"slice(None, None, None)"}


def test_rewards_are_compared_within_a_family():
    assert centred([1.0, 3.0, 10.0, 5.0, 5.0], [7, 7, 1, 0, 0]) == [-1.0, 1.0, 0.0, 0.0, 0.0]
    model = torch.nn.Linear(3, 2)
    es = esfast.ES(model, sigma=0.1, population_size=4, mirrored=True)
    records = []
    for easy in (0.0, 100.0):
        es.generation = 0
        for member in es.population():
            member.reward = (0.5, 1.5, easy + 2.0, easy + 1.0)[member.index]
        records.append(es.step(families=[0, 0, 1, 1]))
    assert records[0].coeffs == records[1].coeffs and records[1].rewards == [0.5, 1.5, 102.0, 101.0]
    assert [c > 0 for c in records[0].coeffs] == [False, True]
    for member in es.population():
        member.reward = float(member.index)
    with pytest.raises(ValueError, match="families: expected a number for each of 4 members, got \\[0, 1\\]"):
        es.step(families=[0, 1])


@pytest.mark.parametrize("at_once", [2, 5, "auto"])
@pytest.mark.parametrize("seeds", [None, list(range(40, 40 + 14))], ids=["greedy", "sampled"])
def test_members_together_answer_their_own_prompts(at_once, seeds):
    es, engine = make()
    prompts = [f"{prompt}{i}" for i in range(7) for prompt in PROMPTS[i % 5 : i % 5 + 2]]

    def own_answers(evaluator):
        members = es.population()
        members.prompts_of = lambda member: slice(2 * member.index, 2 * member.index + 2)
        return {member.index: texts for member, texts in evaluator.evaluate(members, prompts, seeds)}

    expected = own_answers(SequentialEvaluator(engine))
    assert own_answers(PopulationEvaluator(engine, at_once)) == expected
    whole = answers(SequentialEvaluator(engine), es, seeds, prompts)
    assert expected == {i: texts[2 * i : 2 * i + 2] for i, texts in whole.items()}


def test_models_that_take_one_length_at_a_time_answer_own_prompts_together():
    es, engine = make("xlnet", population=3)

    def own_answers(evaluator):
        members = es.population()
        members.prompts_of = lambda member: slice(2 * member.index, 2 * member.index + 2)
        return {m.index: texts for m, texts in evaluator.evaluate(members, ["a", "12+3=", "b", "xyz", "c", "d"], None)}

    assert own_answers(PopulationEvaluator(engine, 3)) == own_answers(SequentialEvaluator(engine))


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_run_with_prompts_of_a_member_s_own(mirrored, tmp_path):
    settings = {"prompts_per_member": "own", "mirrored": mirrored}
    whole, journal, metrics = train(tmp_path / "one", members_at_once=1, **settings)
    _, lines, _ = train(tmp_path / "many", members_at_once=4, **settings)
    assert lines == journal and "prompts_per_member: own" in (tmp_path / "one" / "config.yaml").read_text()
    _, shared, _ = train(tmp_path / "shared", members_at_once=1, mirrored=mirrored)
    assert shared != journal
    records = read(tmp_path / "one" / "journal.jsonl").records
    assert len(records) == 3 and max(records[0].rewards) > 1, "rewards are written as they are, not centred"
    plan = esfast.Plan(make()[1].model)
    replay(plan, tmp_path / "one" / "journal.jsonl")
    assert plan.fingerprint() == whole.es.plan.fingerprint()
    assert [row["generation"] for row in metrics][-1] == 3
    with pytest.raises(ValueError, match="the run has prompts_per_member 'own', asked for is 'shared'"):
        train(tmp_path / "one", mirrored=mirrored, generations=4, resume=True)


def test_a_run_of_before_had_shared_prompts(tmp_path):
    train(tmp_path / "run", generations=1)
    path = tmp_path / "run" / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "prompts_per_member" not in line))
    with pytest.raises(ValueError, match="the run has prompts_per_member 'shared', asked for is 'own'"):
        train(tmp_path / "run", generations=2, resume=True, prompts_per_member="own")
    train(tmp_path / "run", generations=2, resume=True)


def test_an_evaluator_that_knows_no_own_prompts_is_refused(tmp_path):
    class Plain(SequentialEvaluator):
        own_prompts = False

    config = esfast.ESConfig(output_dir=str(tmp_path / "run"), prompts_per_member="own")
    model = embedded.make_model(TOKENIZER)
    with pytest.raises(ValueError, match="prompts_per_member: a Plain asks all members the same prompts"):
        esfast.ESTrainer(model, len, config, ROWS, None, TOKENIZER, evaluator=Plain(lambda prompts: prompts))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="prompts_per_member: expected one of 'shared', 'own'|prompts_per_member"):
        esfast.ESConfig(prompts_per_member="mine")


def test_the_command_line_has_it(capsys):
    from esfast.cli import main

    assert main(["train", "--prompts-per-member", "own", "--print-config"]) == 0
    assert "prompts_per_member: own" in capsys.readouterr().out
