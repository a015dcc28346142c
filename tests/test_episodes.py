"""Environments: episodes that talk with members through the OpenAI API, and what becomes of those that misbehave."""

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_trainer import config

import esfast
from esfast.cli import main
from esfast.report import load, page
from esfast.rollout import TransformersEngine
from esfast.rollout.completion import Asked, complete
from esfast.rollout.episodes import Episodes, Limits, Settings
from esfast.rollout.episodes.engine import check_environment
from esfast.rollout.episodes.protocol import tool_calls
from esfast.tasks import embedded, guess
from esfast.tasks.steps import StepEnvironment, TextArena
from esfast.utils.errors import BadType
from esfast.utils.interrupts import stoppable

openai = pytest.importorskip(
    "openai", reason="episodes ask through the package openai: pip install esfast[environments]"
)
ROWS = [{"prompt": f"{i}", "number": i} for i in range(6)]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    tokenizer.chat_template = guess.TEMPLATE
    return embedded.make_model(tokenizer).eval(), tokenizer


@pytest.fixture(scope="module")
def engine(made):
    return TransformersEngine(*made, 12)


def play(engine, episode, rows=ROWS, seeds=None, **options):
    limits = Limits(**{"seconds": 20.0, **options.pop("limits", {})})
    played = Episodes(episode, engine, engine.tokenizer, Settings(limits, **options))
    try:
        return played.generate(rows, seeds)
    finally:
        if played._port is not None:
            played._port.close()


async def three_turns(client, row):
    messages = [{"role": "user", "content": row["prompt"]}]
    for turn in range(3):
        answer = await client.chat.completions.create(model=client.model, messages=messages)
        messages += [answer.choices[0].message, {"role": "user", "content": f"<{turn}"}]
    return float(len(answer.choices[0].message.content))


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


def test_settings_of_a_request_are_followed(engine):
    found = {}

    async def episode(client, row):
        async def ask(**options):
            answer = await client.completions.create(model="member", prompt="12", **options)
            return answer.choices[0].text, answer.choices[0].finish_reason, answer.usage

        found["whole"], found["short"] = await ask(), await ask(max_tokens=3)
        found["stopped"] = await ask(stop=[found["whole"][0][2:4], "\0never"])
        found["cold"] = await ask(temperature=1.0, top_p=1e-9)
        return 1

    (done,) = play(engine, episode, ROWS[:1], [3])
    whole, reason, usage = found["whole"]
    assert done.error is None and whole == engine.generate(["12"])[0] and usage.prompt_tokens == 2
    assert found["short"][:2] == (whole[:3], "length") and found["short"][2].completion_tokens == 3
    assert found["stopped"][:2] == (whole[: whole.find(whole[2:4])], "stop")
    assert found["cold"][0] == whole, "top_p near 0 leaves the likeliest token"
    assert engine.max_new_tokens == 12 and engine.generation_config.max_new_tokens == 12 and engine.top_p == 1


REFUSED = {
    "another model": ({"model": "gpt-4"}, 404, "model: expected 'member'"),
    "several answers": ({"n": 2}, 400, "n: .*only 1"),
    "streaming": ({"stream": True}, 400, "stream: .*only false"),
    "logprobs": ({"logprobs": True}, 400, "logprobs"),
    "penalties": ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    "a form": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "a forced tool": ({"tool_choice": "required"}, 400, "tool_choice"),
    "an unknown field": ({"extra_body": {"beams": 4}}, 400, "beams: .*doesn't know"),
    "too many tokens": ({"max_tokens": 99}, 400, "max_tokens: expected at most 12"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "cold": ({"temperature": -1}, 400, "temperature"),
    "no share": ({"top_p": 0}, 400, "top_p"),
    "an empty stop": ({"stop": ""}, 400, "stop"),
    "a role": ({"messages": [{"role": "clown", "content": "1"}]}, 400, "role 'clown'"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
    "no messages": ({"messages": []}, 400, "messages"),
    "a long prompt": ({"messages": [{"role": "user", "content": "1" * 5000}]}, 400, "context"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(engine, case):
    options, status, words = REFUSED[case]

    async def episode(client, row):
        with pytest.raises(openai.APIStatusError, match=words) as raised:
            await client.chat.completions.create(
                **{"model": "member", "messages": [{"role": "user", "content": "1"}], "max_tokens": 2, **options}
            )
        assert raised.value.status_code == status and raised.value.body["type"] == "invalid_request_error"
        return 1.0

    (done,) = play(engine, episode, ROWS[:1])
    assert (done.reward, done.error) == (1.0, None)


def test_the_long_way_gives_the_same(engine):
    async def episode(client, row):
        ask = {"model": "member", "messages": [{"role": "user", "content": "5"}], "max_tokens": 5}
        short = await client.chat.completions.create(**ask)
        long = (await client.chat.completions.with_raw_response.create(**ask)).parse()
        assert short.model_dump(exclude={"id"}) == long.model_dump(exclude={"id"})
        assert [m.id async for m in client.models.list()] == ["member"]
        assert (await client.models.retrieve("member")).owned_by == "esfast"
        other = client.with_options(api_key="guessed")
        with pytest.raises(openai.AuthenticationError, match="belongs to no episode"):
            await other.chat.completions.create(**ask)
        with pytest.raises(openai.NotFoundError, match="esfast's endpoint has"):
            await client.embeddings.create(model="member", input="1")
        return 1.0

    (done,) = play(engine, episode, ROWS[:1])
    assert done.error is None and done.turns == 2


def test_tools_reach_the_template_and_calls_come_back(made):
    model, tokenizer = made
    told, calls = [], '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'

    class Caller:
        max_new_tokens, tokens = 40, 0

        def generate(self, prompts, seeds=None):
            told.extend(prompts)
            return [calls if len(told) == 1 else "2"] * len(prompts)

        def close(self):
            pass

    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}|{% for m in messages %}{{ m.role }}:{{ m.content }};{{ m.tool_calls | tojson if m.tool_calls else '' }}{% endfor %}"
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

    async def episode(client, row):
        messages = [{"role": "user", "content": "1+1"}]
        first = await client.chat.completions.create(model="member", messages=messages, tools=[tool])
        (call,) = first.choices[0].message.tool_calls
        assert first.choices[0].finish_reason == "tool_calls" and first.choices[0].message.content is None
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
        messages += [first.choices[0].message, {"role": "tool", "content": "2", "tool_call_id": call.id}]
        last = await client.chat.completions.create(model="member", messages=messages, tools=[tool])
        return float(last.choices[0].message.content)

    (done,) = Episodes(episode, Caller(), tokenizer).generate(ROWS[:1])
    assert (done.reward, done.error, done.turns) == (2.0, None, 2)
    assert '"name": "add"' in told[0] and "tool:2" in told[1] and "arguments" in told[1]
    assert [m["role"] for m in done.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    "text",
    ["<tool_call>{}</tool_call>", "<tool_call>{1}</tool_call>", '<tool_call>{"name": 1}</tool_call>', "__import__('os')",
     '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "<tool_call>" + '{"name":' * 20000 + "}</tool_call>"],
)  # fmt: skip
def test_what_is_no_call_stays_text(text):
    assert tool_calls(text, "1") == []


# ---- hostile ---------------------------------------------------------------------------------------------------------


async def fine(client, row):
    await client.completions.create(model="member", prompt="1")
    return 1.0


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
    computes: "took more than 0.5 s",
    blocks_a_thread: "took more than 0.5 s",
    blocks_in_a_task_of_its_own: "took more than 0.5 s|TooSlow",
    floods: "used its 7 turns",
    floods_and_catches_all: "took more than 0.5 s",
    writes_too_much: "used its 10 tokens",
    raises: "raised KeyError: 'board'",
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

    monkeypatch.setattr(engine, "complete_texts", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        play(engine, fine)
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


# ---- a port ----------------------------------------------------------------------------------------------------------

AGENT = """
import json, sys, urllib.request
base, key = sys.argv[1:]
body = {"model": "member", "messages": [{"role": "user", "content": "3"}], "max_tokens": 4}
ask = urllib.request.Request(base + "/chat/completions", json.dumps(body).encode(), {"Authorization": "Bearer " + key})
print(json.load(urllib.request.urlopen(ask))["choices"][0]["message"]["content"], end="")
"""


def test_a_program_of_its_own_asks_on_a_port(engine):
    pytest.importorskip("uvicorn", reason="a port is served by uvicorn: pip install esfast[port]")

    async def agent(base, key):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", AGENT, base, key, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    async def episode(client, row):
        base = str(client.base_url).rstrip("/")
        assert base.startswith("http://127.0.0.1:")
        code, said, _ = await agent(base, client.api_key)
        assert (code, said) == (0, (await client.chat.completions.create(
            model="member", messages=[{"role": "user", "content": "3"}], max_tokens=4
        )).choices[0].message.content)  # fmt: skip
        code, _, words = await agent(base, "guessed")
        assert code == 1 and "401" in words
        return 1.0

    async def leaves(client, row):
        # asks and goes away before there is an answer
        host = client.base_url.port
        _, writer = await asyncio.open_connection("127.0.0.1", host)
        body = b'{"model": "member", "prompt": "1"}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.api_key}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()
        await asyncio.sleep(0.1)
        return await fine(client, row)

    async def either(client, row):
        return await (leaves if row["number"] else episode)(client, row)

    episodes = play(engine, either, ROWS[:2], port=0, limits={"seconds": 60.0})
    assert [e.error for e in episodes] == [None, None]


# ---- training --------------------------------------------------------------------------------------------------------


class Env:
    """Rewards answers that have digits; the second turn shows the first."""

    def rows(self, generation, count, seed):
        return [{"number": 10 * generation + i} for i in range(count)]

    def held_out(self, count):
        return [{"number": -i} for i in range(min(count, 4))]

    async def episode(self, client, row):
        messages, digits = [{"role": "user", "content": str(row["number"])}], 0
        for _ in range(2):
            answer = await client.chat.completions.create(model=client.model, messages=messages, max_tokens=6)
            said = answer.choices[0].message
            digits += sum(map(str.isdigit, said.content))
            messages += [said, {"role": "user", "content": "?"}]
        return digits / 12


def train(folder, made, environment=None, settings=None, **options):
    torch.manual_seed(0)
    tokenizer = made[1]
    model = embedded.make_model(tokenizer)
    options = {"environment": environment or Env(), "processing_class": tokenizer, **options}
    trainer = esfast.ESTrainer(
        model, args=config(folder, **{"max_completion_length": 8, **(settings or {})}), **options
    )
    try:
        trainer.train()
    finally:
        trainer.folder.release()
    return trainer


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_run_resumes_to_the_same_weights(tmp_path, made, temperature):
    settings = {"temperature": temperature, "eval_every": 2}
    whole = train(tmp_path / "whole", made, settings={**settings, "generations": 4})
    train(tmp_path / "run", made, settings={**settings, "generations": 2})
    again = train(tmp_path / "run", made, settings={**settings, "generations": 4, "resume": True})
    assert again.es.store.fingerprint() == whole.es.store.fingerprint()
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(row["episode_turns"] == 2 and row["episodes_failed"] == 0 for row in rows[1:])
    assert rows[-1]["eval_episode_turns"] == 2 and rows[-1]["eval_episodes_failed"] == 0
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert [m["role"] for m in samples[0]["messages"]] == ["user", "assistant", "user", "assistant"]
    html = page([load(tmp_path / "run")])
    assert html.count('<div class="turn"><i>assistant</i>') >= 4 and "episode_turns on held-out" in html


def test_a_failing_episode_stops_the_run_or_its_member_is_left_out(tmp_path, made, caplog):
    class Fails(Env):
        calls = 0

        async def episode(self, client, row):
            Fails.calls += 1
            if row["number"] == 1:
                raise ValueError("the sandbox is gone")
            return await super().episode(client, row)

    class FailsOnce(Fails):
        async def episode(self, client, row):
            if row["number"] == 1 and Fails.calls < 1:
                Fails.calls += 1
                raise ValueError("the sandbox is gone")
            return await Env.episode(self, client, row)

    with pytest.raises(ValueError, match=r"row 1 \(.*its episode raised ValueError: the sandbox is gone"):
        train(tmp_path / "stop", made, Fails())
    Fails.calls = 0
    trainer = train(tmp_path / "skip", made, FailsOnce(), {"on_reward_error": "skip", "generations": 1})
    assert trainer.es.generation == 1 and "is set aside: row 1" in caplog.text


def test_bad_arguments_are_errors_at_the_door(tmp_path, made):
    def sync(client, row):
        return 1.0

    async def one(client):
        return 1.0

    for wrong, words in [
        (sync, "async def"),
        (Env, "async def"),
        (one, "can't be called"),
        (object(), "async def"),
        (3, "async"),
    ]:
        with pytest.raises(BadType, match=words):
            check_environment(wrong)
    rows = [{"number": 1}]
    for options, words in [
        ({"reward_funcs": lambda **k: [0]}, "reward_funcs: an environment"),
        ({"metrics": {"x": lambda **k: [0]}}, "metrics"),
        ({"environment": three_turns}, "train_dataset: the environment has no method rows"),
        ({"settings": {"kl_to_base": True}}, "kl_to_base"),
        ({"settings": {"members_at_once": 2}}, "members_at_once"),
        ({"evaluator": object()}, "evaluator"),
        ({"settings": {"max_episode_turns": 0}}, "max_episode_turns"),
        ({"settings": {"episode_timeout": 0}}, "episode_timeout"),
        ({"settings": {"endpoint_port": 70000}}, "endpoint_port"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            train(tmp_path / "bad", made, **options)
    with pytest.raises(TypeError, match="reward_funcs: expected a function"):
        esfast.ESTrainer(embedded.make_model(made[1]), args=config(tmp_path / "bad"), train_dataset=rows)
    assert not (tmp_path / "bad").exists()


def test_an_engine_with_fixed_settings_refuses_others(made):
    class Fixed:
        max_new_tokens, temperature = 12, 1.0

        def generate(self, prompts, seeds=None):
            return ["12"] * len(prompts)

    assert [c.text for c in complete(Fixed(), ["1"], None, Asked(12, 0))] == ["12"]
    for asked in (Asked(5), Asked(12, 0.5), Asked(12, None, 0.5)):
        with pytest.raises(ValueError, match="Fixed answers all prompts alike"):
            complete(Fixed(), ["1"], [1], asked)


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


# ---- the command -----------------------------------------------------------------------------------------------------

MINE = """
import json


class Env:
    max_new_tokens = 6
    settings = {"population_size": 4, "generations": 2, "prompts_per_generation": 2}

    def rows(self, generation, count, seed):
        return [{"number": generation + i} for i in range(count)]

    def held_out(self, count):
        return [{"number": -1 - i} for i in range(3)]

    async def episode(self, client, row):
        print("noise on standard output")
        answer = await client.chat.completions.create(
            model=client.model, messages=[{"role": "user", "content": str(row["number"])}]
        )
        return sum(map(str.isdigit, answer.choices[0].message.content))


async def alone(client, row):
    return await Env().episode(client, row)


class Broken:
    def __init__(self):
        raise OSError("no sandbox")
"""


@pytest.fixture
def here(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_env.py").write_text(MINE)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"number": i}) + "\n" for i in range(20)))
    made[0].save_pretrained("model")
    made[1].save_pretrained("model")
    yield tmp_path
    sys.modules.pop("mine_env", None)


@pytest.mark.slow
def test_the_command_trains_evaluates_and_reports(here, capsys):
    base = ["--model", "model", "--no-progress"]
    assert main(["train", "--environment", "mine_env:Env", "--out", "run", *base]) in (None, 0)
    out = capsys.readouterr().out
    assert "reward" in out and "episode_turns" in out and "noise" not in out
    assert main(["train", "--out", "run", "--resume", "--generations", "3", *base]) in (None, 0)
    assert len(lines(here / "run" / "metrics.jsonl")) == 4
    capsys.readouterr()
    assert main(["eval", "--model", "run", "--samples", "3", "--json", "--save", "said.jsonl"]) in (None, 0)
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    assert [len(line["messages"]) for line in lines(here / "said.jsonl")] == [2] * 3
    assert main(["train", "--environment", "mine_env:alone", "--data", "rows.jsonl", "--out", "other", "--generations", "1",
                 "--population-size", "2", "--prompts-per-generation", "2", "--max-completion-length", "4", *base]) in (None, 0)  # fmt: skip
    assert lines(here / "other" / "metrics.jsonl")[-1]["eval_episodes_failed"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--environment", "mine_env:Nothing"], "no function 'Nothing'"),
        (["--environment", "mine_env"], "MODULE:CLASS"),
        (["--environment", "nowhere:Env"], "no module 'nowhere'"),
        (["--environment", "mine_env:Broken"], "raised OSError: no sandbox"),
        (["--environment", "mine_env:alone"], "rows(generation, count, seed)"),
        (["--environment", "mine_env:json"], "no function"),
        (["--environment", "mine_env:Env", "--task", "sudoku"], "leave --task sudoku out"),
        (["--environment", "mine_env:Env", "--reward", "mine_env:alone"], "reward"),
        (["--environment", "textarena:NoGame-v0"], "textarena"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else None,
)
def test_bad_options_are_errors_at_the_door(here, capsys, options, words):
    assert main(["train", *options, "--model", "model", "--out", "bad"]) == 1
    assert words in capsys.readouterr().err
    assert not (here / "bad" / "journal.jsonl").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_does(here):
    command = ["-m", "esfast", "train", "--environment", "mine_env:Env", "--model", "model", "--no-progress"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    started = [
        subprocess.Popen([sys.executable, *launch, *command, "--out", "team"], stderr=subprocess.PIPE, text=True),
        subprocess.Popen([sys.executable, *command, "--out", "alone"], stderr=subprocess.PIPE, text=True),
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    files = "model/model.safetensors", "journal.jsonl", "samples.jsonl"
    for name in files:
        assert (here / "team" / name).read_bytes() == (here / "alone" / name).read_bytes(), name


def test_the_page_on_environments_runs(here):
    text = (Path(__file__).parent.parent / "docs" / "how-to" / "environments.md").read_text(encoding="utf-8")
    environment, trainer, steps = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    trainer = trainer.replace("Qwen/Qwen2.5-0.5B-Instruct", "model").replace("generations=50", "generations=1")
    trainer = trainer.replace("population_size=30", "population_size=2, prompts_per_generation=2, eval_prompts=2")
    exec(environment + trainer + steps, scope := {"__name__": "page"})
    assert scope["trainer"].es.generation == 1 and "eval_reward" in lines(here / "runs" / "sums" / "metrics.jsonl")[-1]
    (done,) = play(scope["trainer"].engine.engine, scope["environment"], [{"seed": 1}])
    assert done.error is None and done.turns == 2
