"""Episodes of environments: turns, batches and seeds, and environments with `reset` and `step`."""

import asyncio

import pytest
from playing import ROWS, play, small_engine, three_turns

from esfast.rollout import TransformersEngine
from esfast.rollout.completion import Completion
from esfast.tasks.steps import StepEnvironment, TextArena

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


def test_an_engine_that_says_nothing_of_itself_is_asked_for_what_the_request_says():
    class Plain:
        tokenizer = None

        def generate(self, prompts, seeds=None):
            raise NotImplementedError

        def complete_texts(self, texts, seeds, how):
            asked.append(how.max_tokens)
            return [Completion("1", 1, True) for _ in texts]

    async def episode(client, row):
        await client.completions.create(model="member", prompt="1", **row["how"])
        return 1.0

    asked: list = []
    rows = [{"how": {}}, {"how": {"max_tokens": 3}}, {"how": {"max_tokens": 9}}]
    assert [e.error for e in play(Plain(), episode, rows, limits={"at_once": 1, "tokens": 5})] == [None] * 3
    assert asked == [None, 3, 5]


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
