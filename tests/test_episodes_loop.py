"""Runs of episodes one after another on one event loop, and what one run or request may do to the next."""

import asyncio
import gc
import os
import sys
import threading
import time
import warnings

import pytest
from playing import ROWS, fine, play, small_engine, three_turns

from esfast.rollout.episodes import Episodes, Limits, Settings
from esfast.rollout.episodes.loop import EpisodeLoop
from esfast.rollout.sampling import response_seeds, turn_seeds

openai = pytest.importorskip(
    "openai", reason="episodes ask through the package openai: pip install esfast[environments]"
)


@pytest.fixture(scope="module")
def engine():
    return small_engine()


def playing(engine, episode, seconds=5.0):
    return Episodes(episode, engine, engine.tokenizer, Settings(Limits(seconds=seconds)))


def test_what_an_environment_keeps_serves_in_the_next_run(engine):
    """A lock belongs to the event loop on which somebody first waited for it, and so do open connections."""

    class Env:
        def __init__(self):
            self.one_at_a_time, self.loops = asyncio.Lock(), []

        async def episode(self, client, row):
            self.loops.append(asyncio.get_running_loop())
            async with self.one_at_a_time:
                await asyncio.sleep(0)
                return await fine(client, row)

    env = Env()
    played = playing(engine, env)
    for _ in range(3):
        assert [e.error for e in played.generate(ROWS)] == [None] * 6
    assert len(set(env.loops)) == 1
    played.close()
    assert env.loops[0].is_closed()
    # It can be used again.
    env.one_at_a_time = asyncio.Lock()
    assert [e.error for e in played.generate(ROWS)] == [None] * 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del played
        gc.collect()
    assert env.loops[-1].is_closed()


async def leaves_a_timer(calls):
    asyncio.get_running_loop().call_later(0.001, calls.append, 1)


async def leaves_a_task(calls):
    async def work():
        await asyncio.sleep(0.001)
        calls.append(1)

    calls.task = asyncio.ensure_future(work())


async def leaves_a_task_that_goes_on(calls):
    async def work():
        while True:
            try:
                await asyncio.sleep(0.001)
            except asyncio.CancelledError:
                continue
            calls.append(1)

    calls.task = asyncio.ensure_future(work())


async def leaves_callbacks_without_an_end(calls):
    loop = asyncio.get_running_loop()

    def again():
        calls.append(1)
        loop.call_soon(again)

    again()


class Calls(list):
    task = None


@pytest.mark.parametrize(
    "leave", [leaves_a_timer, leaves_a_task, leaves_a_task_that_goes_on, leaves_callbacks_without_an_end]
)
def test_nothing_that_an_episode_leaves_goes_on_in_the_next_run(engine, leave):
    calls = Calls()

    async def episode(client, row):
        if row["number"] == 0:
            await leave(calls)
        elif row["number"] == 9:
            await asyncio.sleep(0.02)
        return 1.0

    played = playing(engine, episode)
    assert [e.error for e in played.generate(ROWS[:1])] == [None]
    before = len(calls)
    assert [e.error for e in played.generate([{"prompt": "", "number": 9}])] == [None]
    assert len(calls) == before
    played.close()


def test_an_answer_that_comes_late_changes_no_episode(engine, monkeypatch):
    """An episode may end while a request of it waits, in a task of its own."""

    async def episode(client, row):
        await client.completions.create(model="member", prompt="1")
        if row["number"] == 0:
            tasks.append(asyncio.ensure_future(client.completions.create(model="member", prompt="2")))
            await asyncio.sleep(0)
        else:
            await client.completions.create(model="member", prompt="3")
            await client.completions.create(model="member", prompt="4")
        return 1.0

    tasks, asked, complete = [], [], engine.complete_texts
    monkeypatch.setattr(engine, "complete_texts", lambda texts, *more: asked.extend(texts) or complete(texts, *more))
    first, second = play(engine, episode, ROWS[:2])
    assert (first.error, second.error) == (None, None)
    assert [m["content"] for m in first.messages[::2]] == ["1"] and len(second.messages) == 6
    # Nobody waits for it, so it is not asked for.
    assert "2" not in asked


@pytest.mark.parametrize("tokens, answered", [(12, 1), (13, 2), (24, 2), (60, 5)])
def test_requests_at_the_same_time_stay_within_the_tokens_of_their_episode(tokens, answered):
    engine = small_engine()
    # Every answer has all of its 12 tokens.
    engine.generation_config.eos_token_id = None

    async def episode(client, row):
        asks = [client.completions.create(model="member", prompt=str(i)) for i in range(5)]
        found = await asyncio.gather(*asks, return_exceptions=True)
        refused = [f for f in found if isinstance(f, openai.BadRequestError)]
        assert all("used its" in str(error) for error in refused)
        return len(found) - len(refused)

    for done in play(engine, episode, ROWS[:2], limits={"tokens": tokens}):
        assert (done.error, done.reward, done.tokens) == (None, answered, min(tokens, 60))


@pytest.mark.parametrize("names", [None, ["member-3"]], ids=["a member", "one of several"])
@pytest.mark.parametrize("levels", [200, 460, 600, 2000])
def test_what_is_too_deep_to_be_read_costs_its_own_request_alone(engine, levels, names):
    """Python reads deeper JSON than it can go through afterwards."""

    async def episode(client, row):
        if row["number"] == 0:
            url, key = str(client.base_url), {"Authorization": f"Bearer {client.api_key}"}
            more = "[" * levels + "]" * levels
            asked = f'{{"model": "member", "messages": [{{"role": "user", "content": "1", "more": {more}}}]}}'
            answer = await client._client.post(f"{url}chat/completions", content=asked, headers=key)
            assert answer.status_code in (200, 400), answer.text
        return (await three_turns(client, row)) * 0

    def complete(owners, texts, seeds, asked):
        return engine.complete_texts(texts, seeds, asked)

    played = playing(engine, episode)
    (episodes,) = played.of_members([ROWS[:3]], None, complete, names)
    assert [e.error for e in episodes] == [None] * 3
    played.close()


def test_a_second_thread_is_refused_while_episodes_are_played(engine):
    """The run that ends first would take the keys of the other one's clients, and leave standard output redirected."""
    began, go_on, found, out = threading.Event(), threading.Event(), [], sys.stdout

    async def episode(client, row):
        began.set()
        await asyncio.to_thread(go_on.wait)
        return await fine(client, row)

    played = playing(engine, episode, 20.0)
    first = threading.Thread(target=lambda: found.extend(played.generate(ROWS)))
    first.start()
    assert began.wait(20)
    try:
        with pytest.raises(RuntimeError, match="episodes are being played already, by another thread"):
            played.generate(ROWS)
    finally:
        go_on.set()
        first.join()
    assert [e.error for e in found] == [None] * 6 and sys.stdout is out
    assert [e.error for e in played.generate(ROWS)] == [None] * 6
    played.close()


def test_runs_in_two_threads_that_overlap_leave_standard_output_as_it_was(engine):
    """The first that begins ends first."""
    out, there, began, go_on = sys.stdout, os.fstat(1), [], [threading.Event(), threading.Event()]

    def run(number):
        async def episode(client, row):
            began.append(number)
            await asyncio.to_thread(go_on[number].wait, 20)
            return 1.0

        played = playing(engine, episode, 20.0)
        played.generate(ROWS[:1])
        played.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for number, thread in enumerate(threads):
        thread.start()
        while number not in began and thread.is_alive():
            time.sleep(0.01)
    assert sys.stdout is sys.stderr
    for event, thread in zip(go_on, threads, strict=True):
        event.set()
        thread.join()
    assert sys.stdout is out and os.path.samestat(os.fstat(1), there)


def test_an_episode_that_asks_for_more_of_them_is_told_so(engine):
    async def episode(client, row):
        if row["number"] == 0:
            played.generate(ROWS[1:2])
        return await fine(client, row)

    played = playing(engine, episode)
    first, *others = played.generate(ROWS)
    assert "BadState: episodes are being played already" in first.error
    assert [e.error for e in others] == [None] * 5
    played.close()


def test_a_callback_that_fails_keeps_no_task_from_its_answer():
    """An episode that is cancelled may wait for a future whose callback fails."""
    loop, called = EpisodeLoop(), []
    first, second = loop.create_future(), loop.create_future()
    first.add_done_callback(lambda future: 1 / 0)
    second.add_done_callback(called.append)
    with loop.together():
        first.cancel()
        second.set_result(1)
    loop.call_soon(loop.stop)
    loop.run_forever()
    assert called == [second]
    loop.close()


def test_seeds_of_a_batch_are_those_of_each_answer():
    seeds, turns = [0, 5, 2**64 - 1, 2**40], [0, 3, 2**20, 1]
    assert turn_seeds(seeds, turns) == [response_seeds(s, t, 1, 1)[0] for s, t in zip(seeds, turns, strict=True)]


def test_tasks_that_an_interruption_kept_from_beginning_end():
    """Ctrl-C in the first step of one of the tasks that begin in one callback."""
    loop, began = EpisodeLoop(), []

    async def step(i):
        began.append(i)
        if i == 1:
            raise KeyboardInterrupt
        await asyncio.sleep(60)

    with loop.together():
        tasks = [loop.create_task(step(i)) for i in range(4)]
    with pytest.raises(KeyboardInterrupt):
        loop.run_forever()
    assert began == [0, 1] and loop.stopped() and all(task.done() for task in tasks)
    loop.close()
