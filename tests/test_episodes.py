"""Episodes of environments: turns, batches and seeds, limits, and what becomes of episodes that misbehave."""

import asyncio
import re
import subprocess
import sys
import time

import pytest
import torch
from playing import ROWS, fine, play, small_engine, three_turns

from esfast.rollout import TransformersEngine
from esfast.tasks.steps import StepEnvironment, TextArena
from esfast.utils.interrupts import stoppable

pytest.importorskip("openai", reason="episodes ask through the package openai: pip install esfast[environments]")


@pytest.fixture(scope="module")
def engine():
    return small_engine()


def test_turns_are_what_the_engine_says_to_the_conversation_so_far(engine):
    episodes = play(engine, three_turns)
    told = [f"{row['prompt']}=" for row in ROWS]
    for turn in range(3):
        texts = engine.generate(told)
        assert [e.messages[2 * turn + 1] for e in episodes] == [{"role": "assistant", "content": t} for t in texts]
        told = [f"{t}{text}\n<{turn}=" for t, text in zip(told, texts, strict=True)]
    assert [(e.turns, e.error, len(e.messages)) for e in episodes] == [(3, None, 6)] * len(ROWS)
    assert [e.reward for e in episodes] == [float(len(t)) for t in texts]
    assert episodes[0].tokens == sum(
        len(engine.tokenizer(m["content"])["input_ids"]) for m in episodes[0].messages[1::2]
    )


def test_requests_of_all_episodes_share_batches(engine, monkeypatch):
    asked = []
    inner = engine.complete_texts
    monkeypatch.setattr(engine, "complete_texts", lambda texts, *a: asked.append(len(texts)) or inner(texts, *a))
    play(engine, three_turns)
    assert asked == [len(ROWS)] * 3
    asked.clear()
    play(engine, three_turns, limits={"at_once": 4})
    assert asked == [4, 4, 4, 2, 2, 2]

    async def slower(client, row):
        # a tool that takes its time: the others are answered meanwhile
        await asyncio.sleep(0.2 if row["number"] == 3 else 0)
        return await three_turns(client, row)

    asked.clear()
    play(engine, slower)
    assert asked[0] == len(ROWS) - 1


def test_texts_of_a_batch_are_encoded_together_and_once(engine, monkeypatch):
    encoded = []
    encode = engine.prompts.encode
    monkeypatch.setattr(engine.prompts, "encode", lambda texts: encoded.append(len(texts)) or encode(texts))
    rows = [{"prompt": f"{i}+", "number": i} for i in range(5)]
    assert [e.error for e in play(engine, three_turns, rows)] == [None] * 5
    assert encoded == [5] * 3


def test_a_sampled_response_is_decided_by_row_and_turn_alone(engine):
    def said(seeds, rows=ROWS, **options):
        return [
            [m["content"] for m in e.messages]
            for e in play(engine, three_turns, rows, seeds, temperature=1.0, **options)
        ]

    whole = said(list(range(6)))
    assert said(list(range(6)), limits={"at_once": 2}) == whole
    assert said([2, 3], ROWS[2:4]) == whole[2:4] and said([9, 3], ROWS[2:4])[0] != whole[2]
    # the turns of one episode have seeds of their own
    same = play(engine, lambda_turns, [{"prompt": "7"}], [5], temperature=1.0)[0]
    assert len(set(same.text.split("\n"))) > 1

    async def hot(client, row):
        answer = await client.chat.completions.create(
            model="member", messages=[{"role": "user", "content": "1"}], temperature=1.0, seed=row["number"]
        )
        return float(len(answer.choices[0].message.content))

    # an evaluation is greedy unless the request says otherwise, and repeatable in either case
    assert [e.text for e in play(engine, hot)] == [e.text for e in play(engine, hot)]
    assert len({e.text for e in play(engine, hot)}) > 1


async def lambda_turns(client, row):
    for _ in range(4):
        await client.completions.create(model="member", prompt=row["prompt"])
    return 0.0


# ---- hostile ---------------------------------------------------------------------------------------------------------


async def never_ends(client, row):
    await asyncio.sleep(1000)


async def never_ends_and_will_not_be_cancelled(client, row):
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass


async def spins(client, row):
    while True:
        try:
            await asyncio.sleep(0)
        except BaseException:
            pass


async def blocks(client, row):
    time.sleep(1000)


async def blocks_and_catches_all(client, row):
    for _ in range(6):
        try:
            time.sleep(1000)
        except BaseException:
            pass


async def blocks_catches_all_and_returns(client, row):
    try:
        time.sleep(1000)
    except BaseException:
        return 1.0


async def computes(client, row):
    while True:
        pass


async def blocks_a_thread(client, row):
    await asyncio.to_thread(time.sleep, 30)


async def blocks_in_a_task_of_its_own(client, row):
    async def work():
        time.sleep(1000)

    await asyncio.gather(work())


async def floods(client, row):
    while True:
        await client.completions.create(model="member", prompt="1", max_tokens=1)


async def floods_and_catches_all(client, row):
    while True:
        try:
            await client.completions.create(model="member", prompt="1", max_tokens=1)
        except Exception:
            pass


async def writes_too_much(client, row):
    await client.completions.create(model="member", prompt="1")
    await client.completions.create(model="member", prompt="1")


async def raises(client, row):
    raise KeyError("board")


class Exits(Exception):
    def __str__(self):
        sys.exit(3)


async def raises_what_exits(client, row):
    raise Exits


async def exits(client, row):
    sys.exit(3)


async def interrupts(client, row):
    raise KeyboardInterrupt


async def gives_text(client, row):
    return "1.0"


async def gives_nan(client, row):
    return float("nan")


async def cancels_itself(client, row):
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


async def overflows(client, row):
    await client.completions.create(model="member", prompt="1" * 5000)


HOSTILE = {
    never_ends: "took more than 0.5 s",
    never_ends_and_will_not_be_cancelled: "took more than 0.5 s",
    spins: "took more than 0.5 s",
    blocks: "took more than 0.5 s",
    blocks_and_catches_all: "took more than 0.5 s",
    blocks_catches_all_and_returns: "took more than 0.5 s",
    computes: "took more than 0.5 s",
    blocks_a_thread: "took more than 0.5 s",
    blocks_in_a_task_of_its_own: "took more than 0.5 s|TooSlow",
    floods: "used its 7 turns",
    floods_and_catches_all: "took more than 0.5 s",
    writes_too_much: "used its 10 tokens",
    raises: "raised KeyError: 'board'",
    raises_what_exits: "raised Exits: .its message can't be made",
    exits: "SystemExit: 3",
    interrupts: "KeyboardInterrupt",
    gives_text: "expected a finite number as its reward, got '1.0'",
    gives_nan: "got nan",
    cancels_itself: "raised CancelledError",
    overflows: "leaves no room",
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda f: f.__name__)
def test_hostile_episodes_are_named_and_bounded_and_the_others_go_on(engine, hostile):
    async def episode(client, row):
        return await (hostile if row["number"] == 2 else fine)(client, row)

    began = time.perf_counter()
    # as in a run, where it is known which KeyboardInterrupt came by a signal
    with stoppable():
        episodes = play(engine, episode, limits={"seconds": 0.5, "turns": 7, "tokens": 10})
    assert time.perf_counter() - began < 15
    assert [(e.reward, e.error) for e in episodes if e is not episodes[2]] == [(1.0, None)] * 5
    assert episodes[2].reward is None and episodes[2].error.startswith("row 2 ({'prompt': '2'")
    assert re.search(HOSTILE[hostile], episodes[2].error), episodes[2].error
    # and afterwards everything is as it was
    assert [e.error for e in play(engine, fine)] == [None] * 6


def test_episodes_that_one_cancels_before_their_first_step_are_named(engine):
    async def episode(client, row):
        if row["number"] == 0:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        return 1.0

    began = time.perf_counter()
    first, *others = play(engine, episode)
    assert first.reward == 1.0 and len(others) == 5
    assert all("raised CancelledError" in e.error for e in others)
    assert time.perf_counter() - began < 5


def test_an_episode_waits_for_the_engine_as_long_as_it_takes(engine, monkeypatch):
    inner = engine.complete_texts
    monkeypatch.setattr(engine, "complete_texts", lambda *a: time.sleep(0.6) or inner(*a))
    assert [e.error for e in play(engine, fine, ROWS[:2], limits={"seconds": 0.5})] == [None] * 2


def test_standard_output_stays_the_commands_own(engine, capfd):
    async def loud(client, row):
        print("from python")
        subprocess.run(["echo", "from a tool"], check=True)
        return 1.0

    print("before", flush=True)
    play(engine, loud, ROWS[:1])
    print("after", flush=True)
    out, err = capfd.readouterr()
    assert out == "before\nafter\n" and "from python" in err and "from a tool" in err


def test_what_the_engine_raises_comes_through(engine, monkeypatch):
    def fail(*arguments):
        raise torch.OutOfMemoryError("no memory")

    async def some_clean_up(client, row):
        try:
            return await fine(client, row)
        finally:
            if row["number"]:
                await asyncio.sleep(0)

    monkeypatch.setattr(engine, "complete_texts", fail)
    for environment in (fine, some_clean_up):
        with pytest.raises(torch.OutOfMemoryError, match="no memory"):
            play(engine, environment)
    monkeypatch.undo()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "complete_texts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        play(engine, fine)


def test_it_runs_where_a_loop_runs_already(engine):
    async def notebook():
        return play(engine, fine)

    assert [e.reward for e in asyncio.run(notebook())] == [1.0] * 6


# ---- reset and step --------------------------------------------------------------------------------------------------


class Walk:
    """Ends after three steps; each earns 1 if the action is not empty."""

    def __init__(self, form):
        self.form, self.left, self.closed = form, 3, False

    def reset(self, seed=None):
        self.place = seed
        return {"gymnasium": (f"at {seed}", {}), "gym": f"at {seed}", "openenv": Result(f"at {seed}", None, False)}[
            self.form
        ]

    def step(self, action):
        self.left -= 1
        seen, reward, done = f"{self.left} left", float(bool(action)), self.left == 0
        return {
            "gymnasium": (seen, reward, done, False, {}),
            "gym": (seen, reward, done, {}),
            "openenv": Result(seen, reward, done),
        }[self.form]

    def close(self):
        self.closed = True


class Result:
    def __init__(self, observation, reward, done):
        self.observation, self.reward, self.done = observation, reward, done


class Later(Walk):
    async def reset(self, seed=None):
        return super().reset(seed)

    async def step(self, action):
        return super().step(action)


@pytest.mark.parametrize("kind", [Walk, Later])
@pytest.mark.parametrize("form", ["gymnasium", "gym", "openenv"])
def test_reset_and_step(engine, kind, form):
    walks = []
    environment = StepEnvironment(lambda row: walks.append(kind(form)) or walks[-1])
    episodes = play(engine, environment, [{"seed": 4}, {"seed": 5}])
    assert [(e.error, e.reward, e.turns) for e in episodes] == [(None, 3.0, 3)] * 2
    assert [m["content"] for m in episodes[1].messages[::2]] == ["at 5", "2 left", "1 left"]
    assert all(walk.closed for walk in walks)


def test_actions_that_are_none_end_the_episode_and_strange_steps_are_named(engine):
    (done,) = play(engine, StepEnvironment(lambda row: Walk("gym"), action=int), [{"seed": 1}])
    assert (done.error, done.reward, done.turns) == (None, 0.0, 1)
    walk = Walk("gym")
    walk.step = lambda action: None
    (done,) = play(engine, StepEnvironment(lambda row: walk), [{"seed": 1}])
    assert "step() returned neither" in done.error and walk.closed


def test_a_game_of_textarena(engine):
    pytest.importorskip("textarena", reason="an unmodified game of TextArena: pip install textarena")
    environment = TextArena("GuessTheNumber-v0")
    rows = environment.rows(0, 3, 7)
    assert rows == environment.rows(0, 3, 7) != environment.rows(1, 3, 7)
    assert not {r["seed"] % 2 for r in rows} & {r["seed"] % 2 for r in environment.held_out(3)}
    wide = TransformersEngine(engine.model, engine.tokenizer, 4)
    episodes = play(wide, environment, rows, [1, 2, 3], temperature=1.0)
    assert [e.error for e in episodes] == [None] * 3 and all(e.turns >= 2 for e in episodes)
    assert "Guess The Number" in episodes[0].messages[0]["content"]
    again = play(wide, environment, rows[1:2], [2], temperature=1.0)
    assert again[0].messages == episodes[1].messages
    with pytest.raises(ValueError, match="no game 'Chess-v99'"):
        TextArena("Chess-v99")
