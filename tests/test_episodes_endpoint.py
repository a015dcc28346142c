"""The endpoint that episodes ask: what it follows, what it refuses, tools, and the port for other programs."""

import asyncio
import json
import subprocess
import sys

import pytest
from playing import ROWS, fine, play, small_engine

from esfast.rollout.completion import Asked, complete
from esfast.rollout.episodes import Episodes
from esfast.rollout.episodes.protocol import tool_calls

openai = pytest.importorskip(
    "openai", reason="episodes ask through the package openai: pip install esfast[environments]"
)


@pytest.fixture(scope="module")
def engine():
    return small_engine()


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
    "streaming of a kind": ({"stream": "yes"}, 400, "stream: .*only false or true"),
    "options of a stream": ({"extra_body": {"stream_options": 1}}, 400, "stream_options: expected an object"),
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
    "a text among the messages": ({"messages": ["1"]}, 400, "messages: expected a list of messages"),
    "nothing among the messages": ({"messages": [None]}, 400, "messages: expected a list of messages"),
    "an empty message": ({"messages": [{}]}, 400, "role None"),
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


def test_a_stream_has_the_whole_answer(engine):
    async def episode(client, row):
        ask = {"model": "member", "messages": [{"role": "user", "content": "5"}], "max_tokens": 5}
        whole = await client.chat.completions.create(**ask)
        for options in ({}, {"stream_options": {"include_usage": True}}):
            pieces = [piece async for piece in await client.chat.completions.create(**ask, stream=True, **options)]
            (choice,) = pieces[0].choices
            assert (choice.delta.role, choice.delta.content) == ("assistant", whole.choices[0].message.content)
            assert choice.finish_reason == whole.choices[0].finish_reason == "length"
            assert [piece.usage for piece in pieces[1:]] == [whole.usage] * len(options)
        texts = [
            p.choices[0].text
            async for p in await client.completions.create(model="member", prompt="5=", max_tokens=5, stream=True)
        ]
        assert texts == [whole.choices[0].message.content]
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await client.chat.completions.create(**{**ask, "max_tokens": 99}, stream=True)
        return 1.0

    (done,) = play(engine, episode, ROWS[:1])
    assert done.error is None


def test_tools_reach_the_template_and_calls_come_back(engine):
    tokenizer = engine.tokenizer
    told, calls = [], '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'

    class Caller:
        max_new_tokens, tokens = 40, 0

        def generate(self, prompts, seeds=None):
            told.extend(prompts)
            return [calls if len(told) != 2 else "2"] * len(prompts)

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
        (streamed,) = [
            c
            async for c in await client.chat.completions.create(
                model="member", messages=messages[:1], tools=[tool], stream=True
            )
        ]
        (again,) = streamed.choices[0].delta.tool_calls
        assert (again.index, again.function) == (0, type(again.function)(**call.function.model_dump()))
        return float(last.choices[0].message.content)

    (done,) = Episodes(episode, Caller(), tokenizer).generate(ROWS[:1])
    assert (done.reward, done.error, done.turns) == (2.0, None, 3)
    assert '"name": "add"' in told[0] and "tool:2" in told[1] and "arguments" in told[1]
    assert [m["role"] for m in done.messages][:4] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    "text",
    ["<tool_call>{}</tool_call>", "<tool_call>{1}</tool_call>", '<tool_call>{"name": 1}</tool_call>', "__import__('os')",
     '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "<tool_call>" + '{"name":' * 20000 + "}</tool_call>"],
)  # fmt: skip
def test_what_is_no_call_stays_text(text):
    assert tool_calls(text, "1") == []


def test_an_engine_with_fixed_settings_refuses_others():
    class Fixed:
        max_new_tokens, temperature = 12, 1.0

        def generate(self, prompts, seeds=None):
            return ["12"] * len(prompts)

    assert [c.text for c in complete(Fixed(), ["1"], None, Asked(12, 0))] == ["12"]
    for asked in (Asked(5), Asked(12, 0.5), Asked(12, None, 0.5)):
        with pytest.raises(ValueError, match="Fixed answers all prompts alike"):
            complete(Fixed(), ["1"], [1], asked)


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
