"""Members whose episodes are played at the same time: everything is as with one member after another."""

import asyncio
import re
import time

import pytest
import torch
from playing import ROWS, blocks, fine, floods, overflows, small_model, three_turns
from test_episodes_training import Env, lines
from test_trainer import config

import esfast
from esfast.rollout import TransformersEngine
from esfast.rollout.completion import Completion
from esfast.rollout.episodes import Episodes, EpisodesEvaluator, Limits, Settings
from esfast.rollout.evaluator import SequentialEvaluator
from esfast.rollout.population import PopulationEvaluator
from esfast.rollout.sampling import LogitsError
from esfast.rollout.shared_batches import SharedBatches
from esfast.tasks import embedded
from esfast.utils.interrupts import stoppable

pytest.importorskip("openai", reason="episodes ask through the package openai: pip install esfast[environments]")


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def made():
    return small_model()


def players(made, episode, at_once=5, population=5, noise="gaussian", limits=None, **settings):
    """An ES, and the evaluators that play with one member after another and with several."""
    model, tokenizer = made
    es = esfast.ES(model, sigma=0.05, population_size=population, noise=noise)
    engine = TransformersEngine(model, tokenizer, 12)
    played = Settings(Limits(**{"seconds": 20.0, **(limits or {})}), **settings)
    return es, *(
        EpisodesEvaluator(Episodes(episode, engine, tokenizer, played), places)
        for places in (SequentialEvaluator(engine), PopulationEvaluator(engine, at_once))
    )


def told(evaluator, es, rows=ROWS, seeds=range(6)):
    """What each member's episodes come to, but for times."""
    return {
        member.index: found if isinstance(found, LogitsError) else [
            (e.reward, e.error, e.turns, e.tokens, e.messages) for e in found
        ]
        for member, found in evaluator.evaluate(es.population(), rows, None if seeds is None else list(seeds))
    }  # fmt: skip


def weights_are_there(es):
    return all(type(p) is torch.nn.Parameter for p in es.plan.module.parameters())


async def of_any_length(client, row):
    """One turn or many, as the model's own words decide; requests have settings of their own."""
    messages, turns = [{"role": "user", "content": row["prompt"]}], 0
    while turns < 2 + row["number"]:
        answer = await client.chat.completions.create(
            model=client.model, messages=messages, max_tokens=3 + turns % 2, **({"top_p": 0.9} if turns == 1 else {})
        )
        said, turns = answer.choices[0].message, turns + 1
        if sum(map(ord, said.content)) % 4 == 0:
            break
        messages += [said, {"role": "user", "content": "+"}]
    return turns + sum(map(ord, said.content)) % 101 / 101


async def two_at_once(client, row):
    ask = [client.completions.create(model="member", prompt=f"{row['prompt']}{c}", max_tokens=6) for c in "+-"]
    return float(sum(len(set(answer.choices[0].text)) for answer in await asyncio.gather(*ask)))


@pytest.mark.parametrize(
    ("episode", "temperature", "seeds"),
    [
        (of_any_length, 0.0, range(6)),
        (of_any_length, 1.0, range(6)),
        (two_at_once, 1.0, range(6)),
        (two_at_once, 1.0, None),
    ],
)
def test_episodes_are_those_of_one_member_after_another(made, episode, temperature, seeds, same_bits):
    es, alone, _ = players(made, episode, temperature=temperature)
    weights = [p.clone() for p in es.plan.tensors]
    expected = told(alone, es, seeds=seeds)
    assert [error for found in expected.values() for _, error, *_ in found] == [None] * 30
    assert len({str(found) for found in expected.values()}) == 5
    for at_once, running in ((2, 64), ("auto", 7)):
        _, _, together = players(made, episode, at_once, temperature=temperature, limits={"at_once": running})
        assert told(together, es, seeds=seeds) == expected
        assert same_bits(es.plan.tensors, weights) and weights_are_there(es)
    assert together.tokens == sum(tokens for found in expected.values() for *_, tokens, _ in found)


def test_low_rank_members_play_at_the_same_time(made):
    es, alone, together = players(made, of_any_length, "auto", noise="low_rank", temperature=1.0)
    assert told(together, es) == told(alone, es)


def test_requests_of_all_members_share_batches(made, monkeypatch):
    es, _, together = players(made, three_turns)
    batches, generate = [], SharedBatches._generate

    def noted(self, rows, members, seeds, counts):
        batches.append((members, len(rows), sum(counts)))
        return generate(self, rows, members, seeds, counts)

    monkeypatch.setattr(SharedBatches, "_generate", noted)
    told(together, es)
    assert batches == [(5, 30, 30)] * 3
    batches.clear()
    # where only some episodes run at once, members have equally many of them
    _, _, few = players(made, three_turns, limits={"at_once": 10})
    told(few, es)
    assert batches == [(5, 10, 10)] * 9

    async def as_many_as_its_number(client, row):
        names = [model.id async for model in client.models.list()]
        for _ in range(1 + int(names[-1].removeprefix("member-"))):
            await client.completions.create(model="member", prompt=row["prompt"], max_tokens=2)
        return 1.0

    batches.clear()
    _, _, together = players(made, as_many_as_its_number)
    told(together, es)
    assert batches == [(k, 6 * k, 6 * k) for k in (5, 4, 3, 2, 1)]


def test_members_have_names(made):
    heard = []

    async def names(client, row):
        listed = [model.id async for model in client.models.list()]
        (own,) = [name for name in listed if name != "member"]
        texts = [
            (await client.completions.create(model=name, prompt="1", max_tokens=6)).choices[0].text
            for name in ("member", own)
        ]
        assert texts[0] == texts[1]
        other = f"member-{(int(own.removeprefix('member-')) + 1) % 5}"
        try:
            await client.completions.create(model=other, prompt="1")
        except Exception as error:
            heard.append((own, type(error).__name__, f"expected 'member', '{own}', got '{other}'" in str(error)))
        return 1.0

    es, alone, together = players(made, names)
    for evaluator in (alone, together):
        heard.clear()
        assert {error for found in told(evaluator, es, ROWS[:1], [0]).values() for _, error, *_ in found} == {None}
        assert sorted(heard) == [(f"member-{k}", "NotFoundError", True) for k in range(5)]


# ---- episodes that misbehave -----------------------------------------------------------------------------------------


async def raises(client, row):
    await client.completions.create(model="member", prompt="1")
    raise KeyError("board")


async def never_ends(client, row):
    await client.completions.create(model="member", prompt="1")
    await asyncio.sleep(1000)


async def sleeps(client, row):
    await asyncio.sleep(0.1)
    return await fine(client, row)


MISBEHAVE = {
    raises: "row 2 .*raised KeyError: 'board'",
    never_ends: "row 2 .*took more than 0.4 s",
    blocks: "row 2 .*took more than 0.4 s",
    floods: "row 2 .*used its 5 turns",
    overflows: "row 2 .*leaves no room",
    sleeps: None,
}


@pytest.mark.parametrize("hostile", MISBEHAVE, ids=lambda f: f.__name__)
def test_one_that_misbehaves_costs_no_other(made, hostile):
    async def episode(client, row):
        return await (hostile if row["number"] == 2 else fine)(client, row)

    es, _, together = players(made, episode, 3, 3, limits={"seconds": 0.4, "turns": 5, "tokens": 40})
    began = time.perf_counter()
    with stoppable():
        found = told(together, es)
    assert time.perf_counter() - began < 15
    for episodes in found.values():
        assert [(reward, error) for reward, error, *_ in episodes[:2] + episodes[3:]] == [(1.0, None)] * 5
        error = episodes[2][1]
        assert error is None if MISBEHAVE[hostile] is None else re.search(MISBEHAVE[hostile], error), error


@pytest.mark.parametrize("turn", [0, 2])
@pytest.mark.parametrize("running", [64, 4])
def test_a_member_without_numbers_is_named_and_costs_no_other(made, monkeypatch, turn, running):
    """Its episodes end, also those that catch everything and those that have not begun."""
    left = []

    async def stubborn(client, row):
        for _ in range(4):
            try:
                asked = [client.completions.create(model="member", prompt=p, max_tokens=4) for p in "12"]
                await asyncio.gather(*asked)
            except BaseException as error:
                left.append(type(error).__name__)
                raise
        return 1.0

    es, alone, together = players(made, stubborn, limits={"at_once": running})
    expected = told(alone, es)
    assert not left
    call, calls = SharedBatches.__call__, []

    def spoiled(self, stack, owners, *others):
        calls.append(1)
        if len(calls) > turn:
            for tensor in stack._stacks:
                tensor[stack._order.index(3)] = float("nan")
        return call(self, stack, owners, *others)

    monkeypatch.setattr(SharedBatches, "__call__", spoiled)
    found = told(together, es)
    assert isinstance(found.pop(3), LogitsError) and expected.pop(3) and found == expected
    assert left and set(left) == {"CancelledError"} and weights_are_there(es)
    assert len(together.engine._done) == 24, "the figures are of the others' episodes"


def test_a_member_may_give_no_text_to_some_requests_alone(made):
    """Requests with other settings are answered after its episodes have ended, and some of them have text."""

    async def of_two_lengths(client, row):
        asked = [client.completions.create(model="member", prompt="1", max_tokens=n) for n in (2, 3)]
        return float(sum(len(answer.choices[0].text) for answer in await asyncio.gather(*asked)))

    _, _, together = players(made, of_two_lengths)

    def complete(owners, texts, seeds, asked):
        broken = {1} if asked.max_tokens == 2 else set()
        return [LogitsError("no numbers") if k in broken else Completion("x", 1, True) for k in owners]

    first, second, third = together.engine.of_members([ROWS[:2]] * 3, None, complete)
    assert isinstance(second, LogitsError)
    assert [(e.reward, e.error) for e in first + third] == [(2.0, None)] * 4


def test_what_the_engine_raises_leaves_the_weights_as_they_were(made, monkeypatch, same_bits):
    es, _, together = players(made, three_turns)
    weights = [p.clone() for p in es.plan.tensors]
    forward, calls = es.plan.module.forward, []

    def interrupted(*args, **kw):
        calls.append(len(kw["input_ids"]))
        if calls.count(30) > 15:
            raise KeyboardInterrupt
        return forward(*args, **kw)

    monkeypatch.setattr(es.plan.module, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt), es.population() as members:
        list(together.evaluate(members, ROWS, list(range(6))))
    monkeypatch.undo()
    assert same_bits(es.plan.tensors, weights) and weights_are_there(es)
    assert len(told(together, es)) == 5


# ---- runs ------------------------------------------------------------------------------------------------------------


class Wanders(Env):
    """Of one turn to four, as the model's words decide; some rows fail for some members."""

    fails = False

    async def episode(self, client, row):
        messages, told = [{"role": "user", "content": str(row["number"])}], 0
        for _ in range(4):
            answer = await client.chat.completions.create(model=client.model, messages=messages, max_tokens=6)
            told += sum(map(ord, answer.choices[0].message.content))
            if told % 5 == 0:
                break
            messages += [answer.choices[0].message, {"role": "user", "content": "?"}]
        if self.fails and told % 23 == 0:
            raise ValueError("lost")
        return told % 101 / 101


def run(folder, made, environment, **settings):
    torch.manual_seed(0)
    settings = {"max_completion_length": 8, "population_size": 6, "generations": 2, "sigma": 0.05, "eval_every": 1,
                "prompts_per_generation": 4, **settings}  # fmt: skip
    model = embedded.make_model(made[1])
    args = config(folder, **settings)
    trainer = esfast.ESTrainer(model, args=args, environment=environment, processing_class=made[1])
    trainer.train()
    metrics = [
        {k: v for k, v in row.items() if not re.search("seconds|per_second|ratio|time", k)}
        for row in lines(folder / "metrics.jsonl")
    ]
    bytes_ = [(folder / name).read_bytes() for name in ("journal.jsonl", "samples.jsonl")]
    return trainer, (*bytes_, metrics, trainer.es.store.fingerprint())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "num_generations": 2, "mirrored": True},
        {"prompts_per_member": "own", "episodes_at_once": 5},
    ],
    ids=["greedy", "sampled", "own"],
)
def test_a_run_is_the_same_whatever_plays_at_once(tmp_path, made, settings):
    runs = {k: run(tmp_path / str(k), made, Wanders(), members_at_once=k, **settings) for k in (1, 4, "auto")}
    (one, expected), *others = runs.values()
    assert one.es.generation == 2 and expected[0].count(b'"generation"') == 2 and len(expected[1].splitlines()) > 3
    for trainer, found in others:
        assert trainer.evaluator._places.at_once in (4, 6)
        assert found == expected


def test_members_whose_episodes_fail_are_set_aside_alike(tmp_path, made, caplog):
    environment = Wanders()
    environment.fails = True
    found = {}
    for k in (1, "auto"):
        caplog.clear()
        _, found[k] = run(tmp_path / str(k), made, environment, members_at_once=k, on_reward_error="skip")
        found[k] += ([r.getMessage() for r in caplog.records if "is set aside" in r.getMessage()],)
    assert found[1] == found["auto"] and found[1][-1], "some are"
    with pytest.raises(ValueError, match=r"row \d \(.*its episode raised ValueError: lost"):
        run(tmp_path / "stop", made, environment)


def test_a_run_goes_on_with_another_number_at_once(tmp_path, made):
    _, whole = run(tmp_path / "whole", made, Wanders(), members_at_once=1, generations=3)
    run(tmp_path / "run", made, Wanders(), members_at_once=3, generations=2)
    _, again = run(tmp_path / "run", made, Wanders(), generations=3, resume=True)
    assert again[-1] == whole[-1]
