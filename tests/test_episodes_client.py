"""The client of an episode: requests give the same through memory and through HTTP, whatever is asked, and one
episode's client does not change another's."""

import asyncio
import enum
import gc
import sys
import threading
import types
import weakref

import pytest
from playing import ROWS, fine, play, small_engine, three_turns

from esfast.rollout import chat
from esfast.rollout.completion import Asked
from esfast.rollout.episodes.session import Session

openai = pytest.importorskip(
    "openai", reason="episodes ask through the package openai: pip install esfast[environments]"
)
USER = [{"role": "user", "content": "5"}]
CHAT, TEXT = {"model": "member", "messages": USER}, {"model": "member", "prompt": "5="}


@pytest.fixture(scope="module")
def engine():
    return small_engine()


class Kind(str, enum.Enum):
    user = "user"


def said(text="5", **fields):
    return openai.types.chat.ChatCompletionMessage(role="assistant", content=text, **fields)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CIRCULAR: list = []
CIRCULAR.append(CIRCULAR)

REQUESTS = {
    "plain": CHAT,
    "settings": {**CHAT, "max_tokens": 3, "temperature": 0, "top_p": 0.5, "stop": ["7", "8"], "seed": 2**70},
    "max_completion_tokens": {**CHAT, "max_completion_tokens": 2, "max_tokens": 5},
    "left out": {**CHAT, "stop": None, "tools": openai.NOT_GIVEN, "temperature": openai.Omit(), "extra_body": None},
    "a timeout": {**CHAT, "timeout": 3.0},
    "headers": {**CHAT, "extra_headers": {"X-Trace": "1"}},
    "a query": {**CHAT, "extra_query": {"a": "1"}},
    "a body": {**CHAT, "extra_body": {"max_tokens": 2, "chat_template_kwargs": {"a": [1.5, None, True]}}},
    "a body that is none": {**CHAT, "extra_body": [1]},
    "a body that streams": {**CHAT, "extra_body": {"stream": "yes"}},
    "a tuple": {**CHAT, "messages": tuple(USER)},
    "the values of a dict": {**CHAT, "messages": {"a": USER[0]}.values()},
    "an answer sent back": {**CHAT, "messages": [*USER, said(), *USER]},
    "an answer in JSON": {**CHAT, "messages": [*USER, said().model_dump(), *USER]},
    "an answer with calls": {**CHAT, "messages": [*USER, said(None, tool_calls=[CALL]), *USER]},
    "an answer with more": {**CHAT, "messages": [*USER, said(reasoning_content="hm"), *USER]},
    "parts": {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": "5"}]}]},
    "an enum": {**CHAT, "messages": [{"role": Kind.user, "content": "5"}]},
    "letters": {**CHAT, "messages": [{"role": "user", "content": "5 ünï 漢字 🎉 \0"}]},
    "half a character": {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]},
    "half a character in a name": {**CHAT, "messages": [{"role": "user", "content": "5", "\ud800": "1"}]},
    "half a character in a name of a part": {
        **CHAT,
        "messages": [{"role": "user", "content": [{"type": "text", "\ud800": "1"}]}],
    },
    "a long prompt": {**CHAT, "messages": [{"role": "user", "content": "1" * 5000}]},
    "a role": {**CHAT, "messages": [{"role": "clown", "content": "1"}]},
    "no content": {**CHAT, "messages": [{"role": "user"}]},
    "content of None": {**CHAT, "messages": [{"role": "user", "content": None}]},
    "content of a number": {**CHAT, "messages": [{"role": "user", "content": 5}]},
    "bytes": {**CHAT, "messages": [{"role": "user", "content": b"5"}]},
    "a set": {**CHAT, "messages": [{"role": "user", "content": {"5"}}]},
    "an object": {**CHAT, "messages": [types.SimpleNamespace(role="user", content="5")]},
    "a number as a name": {**CHAT, "messages": [{"role": "user", "content": "5", 1: 2}]},
    "an object as a name": {**CHAT, "messages": [{"role": "user", "content": "5", (1,): 2}]},
    "a circle": {**CHAT, "messages": [{"role": "user", "content": "5", "x": CIRCULAR}]},
    "messages of None": {**CHAT, "messages": None},
    "messages that are a text": {**CHAT, "messages": "5"},
    "messages that are a dict": {**CHAT, "messages": USER[0]},
    "texts as messages": {**CHAT, "messages": ["5"]},
    "no messages": {"model": "member"},
    "empty messages": {**CHAT, "messages": []},
    "no model": {"messages": USER},
    "another model": {**CHAT, "model": "gpt-4"},
    "a model that is a list": {**CHAT, "model": ["member"]},
    "an argument that openai doesn't have": {**CHAT, "chat_template_kwargs": {}},
    "a field that nobody has": {**CHAT, "extra_body": {"beams": 4}},
    "several answers": {**CHAT, "n": 3},
    "too many tokens": {**CHAT, "max_tokens": 10**30},
    "no tokens": {**CHAT, "max_tokens": 0},
    "tokens that are true": {**CHAT, "max_tokens": True},
    "tokens that are a text": {**CHAT, "max_tokens": "3"},
    "a temperature that is no number": {**CHAT, "temperature": float("nan")},
    "a temperature without end": {**CHAT, "temperature": float("inf")},
    "a temperature that is a text": {**CHAT, "temperature": "hot"},
    "a class as a form": {**CHAT, "response_format": openai.BaseModel},
    "a tool that is a class": {**CHAT, "tools": [openai.BaseModel]},
    "no list of tools": {**CHAT, "tools": {"a": 1}},
}
TEXT_REQUESTS = {
    "a text": TEXT,
    "a text in a list": {**TEXT, "prompt": ["5="]},
    "several texts": {**TEXT, "prompt": ["5=", "6="]},
    "token ids": {**TEXT, "prompt": [1, 2]},
    "an empty text": {**TEXT, "prompt": ""},
    "no text": {"model": "member"},
    "messages as a text": {**TEXT, "prompt": USER},
    "a text with settings": {**TEXT, "max_tokens": 2, "stop": "7", "echo": True},
}


async def outcome(create, asked):
    """What a caller sees of a request, whatever becomes of it."""
    try:
        answer = await create(**asked)
    except Exception as error:
        seen = {"error": type(error), "words": str(error)}
        if isinstance(error, openai.APIStatusError):
            fields = ("status_code", "code", "param", "type", "body", "message")
            seen |= {name: getattr(error, name) for name in fields}
            seen |= {"url": error.request.url, "json": error.response.json(), "method": error.request.method}
        return seen
    choice = answer.choices[0]
    parts = [answer, choice, answer.usage, getattr(choice, "message", choice)]
    return [
        (type(p), {k: v for k, v in vars(p).items() if k != "id"}, p.model_fields_set, p.model_extra) for p in parts
    ] + [answer.model_dump_json(exclude={"id"}, exclude_unset=True)]


@pytest.mark.parametrize("case", [*REQUESTS, *TEXT_REQUESTS])
def test_memory_and_http_give_the_same(engine, case):
    found = []

    async def episode(client, row):
        if row["number"]:
            client = client.with_options()
        if case in REQUESTS:
            found.append(await outcome(client.chat.completions.create, REQUESTS[case]))
        else:
            found.append(await outcome(client.completions.create, TEXT_REQUESTS[case]))
        return 1.0

    episodes = [play(engine, episode, [{"prompt": "5", "number": n}])[0] for n in (0, 1)]
    assert [e.error for e in episodes] == [None, None]
    assert found[0] == found[1]
    assert episodes[0].messages == episodes[1].messages
    # No request is asked twice.
    assert episodes[0].turns == episodes[1].turns <= 1


def test_a_client_that_is_closed_closes_no_other(engine):
    async def closes(client, row):
        if row["number"]:
            # its requests go through HTTP
            await asyncio.sleep(0.01)
            return await fine(client.with_options(max_retries=1), row)
        async with client:
            assert await fine(client, row) == 1.0 and not client.is_closed()
        assert client.is_closed()
        for own in (client, client.with_options()):
            with pytest.raises((RuntimeError, openai.APIConnectionError), match="closed|Connection"):
                await fine(own, row)
        return 1.0

    assert [e.error for e in play(engine, closes, ROWS[:3])] == [None] * 3


def test_an_http_client_of_ones_own_gets_the_requests(engine):
    sent = []

    async def episode(client, row):
        # httpx, or httpx2, whatever openai is made with
        library = sys.modules[type(client.base_url).__module__.partition(".")[0]]

        def answer(request):
            sent.append(request.url.path)
            return library.Response(418, json={"error": {"message": "mine"}})

        own = openai.DefaultAsyncHttpxClient(transport=library.MockTransport(answer))
        with pytest.raises(openai.APIStatusError, match="mine"):
            await client.with_options(http_client=own).chat.completions.create(**CHAT)
        return 1.0

    (done,) = play(engine, episode, ROWS[:1])
    assert (done.error, done.turns, sent) == (None, 0, ["/v1/chat/completions"])


def test_other_ways_to_ask_and_copies_of_the_client(engine):
    async def episode(client, row):
        import copy
        import inspect
        import pickle

        completions = client.chat.completions
        short = await completions.create(**CHAT)
        raw = await completions.with_raw_response.create(**CHAT)
        assert raw.headers["content-type"] == "application/json" and raw.http_request.url.path.endswith("completions")
        async with completions.with_streaming_response.create(**CHAT) as response:
            streamed = await response.parse()
        with pytest.raises(openai.LengthFinishReasonError):
            async with completions.stream(**CHAT) as stream:
                await stream.get_final_completion()
        copied = await copy.copy(client).chat.completions.create(**CHAT)
        whole = [a.choices[0].message.content for a in (raw.parse(), streamed, copied)]
        assert whole == [short.choices[0].message.content] * 3
        with pytest.raises(openai.LengthFinishReasonError):
            await completions.parse(**CHAT)
        parsed = openai.types.chat.ParsedChatCompletionMessage(role="assistant", content="5", parsed={"a": 1})
        await completions.create(model="member", messages=[*USER, parsed, *USER])
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
            pickle.dumps(client)
        assert "max_completion_tokens" in inspect.signature(completions.create).parameters
        assert inspect.iscoroutinefunction(completions.create) and isinstance(client, openai.AsyncOpenAI)
        with pytest.raises(TypeError):
            await completions.create(USER, "member")
        return 1.0

    (done,) = play(engine, episode, ROWS[:1])
    assert (done.error, done.turns) == (None, 7)


def test_requests_of_one_episode_at_the_same_time_and_cancelled_ones(engine):
    async def episode(client, row):
        def ask(text):
            return client.completions.create(model="member", prompt=text)

        both = await asyncio.gather(ask("1="), ask("2="), ask("3" * 5000), return_exceptions=True)
        alone = [(await ask(text)).choices[0].text for text in ("1=", "2=")]
        assert [a.choices[0].text for a in both[:2]] == alone and isinstance(both[2], openai.BadRequestError)
        left = asyncio.ensure_future(ask("4="))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ask("4="), 0)
        mutable = [{"role": "user", "content": "5"}]
        pending = asyncio.ensure_future(client.chat.completions.create(model="member", messages=mutable))
        await asyncio.sleep(0)
        mutable[0]["content"] = "6"
        return float((await pending).usage.prompt_tokens)

    episodes = play(engine, episode, ROWS[:2])
    assert [e.error for e in episodes] == [None, None]
    assert all(e.messages[-2] == {"role": "user", "content": "5"} for e in episodes)


def test_an_episode_asks_from_a_thread_with_a_loop_of_its_own(engine):
    """Agents that are no coroutines run in threads, and some begin an event loop there."""
    threads = []

    def agent(client, row):
        threads.append(threading.current_thread())
        return asyncio.run(three_turns(client, row))

    async def in_a_thread(client, row):
        return await asyncio.to_thread(agent, client, row)

    inside = play(engine, in_a_thread, ROWS[:3], limits={"seconds": 10.0})
    assert len(set(threads)) == 3
    assert [(e.error, e.messages) for e in inside] == [(None, e.messages) for e in play(engine, three_turns, ROWS[:3])]


def test_the_synchronous_client_on_a_port(engine):
    pytest.importorskip("uvicorn", reason="a port is served by uvicorn: pip install esfast[port]")

    def agent(client):
        with openai.OpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0) as own:
            with pytest.raises(openai.BadRequestError, match="n: .*only 1"):
                own.chat.completions.create(**CHAT, n=2)
            return own.chat.completions.create(**CHAT).choices[0].message.content

    async def episode(client, row):
        said = await asyncio.to_thread(agent, client)
        return float(said == (await client.chat.completions.create(**CHAT)).choices[0].message.content)

    (done,) = play(engine, episode, ROWS[:1], port=0)
    assert (done.error, done.reward, done.turns) == (None, 1.0, 2)


CHANGES = {
    "nothing": lambda messages: None,
    "the content of an answer": lambda messages: setattr(messages[1], "content", "7"),
    "a field of an answer": lambda messages: setattr(
        messages[1], "tool_calls", said(None, tool_calls=[CALL]).tool_calls
    ),
    "a further field": lambda messages: setattr(messages[1], "reasoning_content", "hm"),
    "a message of the user": lambda messages: messages[0].update(content="9"),
    "a field of a message": lambda messages: messages[0].update(name="a"),
    "an answer that is a dict": lambda messages: messages.__setitem__(1, {"role": "assistant", "content": "8"}),
    "the same answer as a dict": lambda messages: messages.__setitem__(1, messages[1].model_dump()),
    "parts of a message": lambda messages: messages[2]["content"][0].update(text="6"),
    "a number that equals another": lambda messages: messages[2].update(weight=True),
    "fewer messages": lambda messages: messages.__delitem__(slice(2)),
    "their order": lambda messages: messages.reverse(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_chat_that_goes_on_is_read_as_it_is_now(engine, change):
    """Messages that a client sent before are not read again, unless something about them has changed."""
    found = []

    async def episode(client, row):
        if row["number"]:
            client = client.with_options()
        parts = [{"type": "text", "text": "5"}]
        messages = [{"role": "user", "content": "5"}, None, {"role": "user", "content": parts, "weight": 1}]
        for ask in (1, 3, 3):
            answer = await outcome(client.chat.completions.create, {**CHAT, "messages": messages[:ask]})
            if ask == 1:
                messages[1] = (await client.chat.completions.create(**CHAT)).choices[0].message
            found.append(answer)
        CHANGES[change](messages)
        found.append(await outcome(client.chat.completions.create, {**CHAT, "messages": messages}))
        return 1.0

    episodes = [play(engine, episode, [{"prompt": "5", "number": n}])[0] for n in (0, 1)]
    assert [e.error for e in episodes] == [None, None]
    assert found[:4] == found[4:]
    assert str(episodes[0].messages) == str(episodes[1].messages)


def test_an_episode_leaves_no_cycles_and_seldom_looks_for_them(engine):
    """What an episode made is freed when it ends, and not when Python happens to look for garbage in cycles."""
    clients, before, seen = [], gc.get_threshold(), []

    async def episode(client, row):
        clients.append(weakref.ref(client))
        seen.append(gc.get_threshold())
        await client.completions.create(model="member", prompt="1")
        return await three_turns(client, row)

    def sessions():
        return sum(type(kept) is Session for kept in gc.get_objects())

    gc.disable()
    try:
        others = sessions()
        assert [e.error for e in play(engine, episode, ROWS * 3)] == [None] * 18
        assert [client() for client in clients] == [None] * 18
        assert sessions() == others
    finally:
        gc.enable()
    # Python 3.13 begins with 2000, others with 700.
    assert gc.get_threshold() == before and set(seen) == {(max(1800, before[0]), *before[1:])}
    gc.set_threshold(0)
    try:
        seen.clear()
        play(engine, episode, ROWS[:1])
        assert {first for first, *_ in seen} == {0} and gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


# Functions that a request may call besides those of a loop that asks the engine itself. It calls about 116, those of
# beginning and ending a third of an episode among them.
CALLS = 125


def test_a_request_costs_few_calls_of_functions(engine):
    def direct(rows):
        talks = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        for turn in range(3):
            texts = chat.render([{"prompt": talk} for talk in talks], engine.tokenizer)
            for talk, answer in zip(talks, engine.complete_texts(texts, None, Asked(12, 0)), strict=True):
                talk += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": f"<{turn}"}]

    def calls(function, episodes):
        rows, count = [{"prompt": f"{10 + i}"} for i in range(episodes)], 0
        function(rows)

        def count_calls(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(count_calls)
        try:
            function(rows)
        finally:
            sys.setprofile(None)
        return count

    def of_a_request(function):
        # without what a run costs whatever it plays
        return (calls(function, 16) - calls(function, 8)) / (8 * 3)

    extra = of_a_request(lambda rows: play(engine, three_turns, rows)) - of_a_request(direct)
    assert extra < CALLS, extra
