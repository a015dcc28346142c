"""Episodes that misbehave, and what goes wrong beside them: named, bounded, and at no cost to the others."""

import asyncio
import re
import subprocess
import sys
import time

import pytest
import torch
from playing import ROWS, blocks, fine, floods, overflows, play, small_engine

from esfast.utils.interrupts import stoppable

pytest.importorskip("openai", reason="episodes ask through the package openai: pip install esfast[environments]")


@pytest.fixture(scope="module")
def engine():
    return small_engine()


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


async def makes_steps_of_its_own(client, row):
    for _ in range(2):
        try:
            asyncio.current_task().get_coro().send(None)
        except ValueError:
            pass
        await asyncio.sleep(0.01)
    raise KeyError("board")


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
    makes_steps_of_its_own: "raised KeyError: 'board'",
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


def test_episodes_that_one_cancels_before_their_first_step_are_named(engine, monkeypatch):
    async def episode(client, row):
        if row["number"] == 0:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        return 1.0

    first, *others = play(engine, episode)
    assert first.reward == 1.0 and len(others) == 5
    assert all("raised CancelledError" in e.error for e in others)

    # and others take their places at once
    asked, inner = [], engine.complete_texts

    def counted(texts, *arguments):
        asked.append(len(texts))
        return inner(texts, *arguments)

    async def talks(client, row):
        await episode(client, row)
        return await fine(client, row)

    monkeypatch.setattr(engine, "complete_texts", counted)
    rows = [{"prompt": "1", "number": number} for number in range(9)]
    assert [e.error is None for e in play(engine, talks, rows, limits={"at_once": 4})] == [True] + [False] * 3 + [
        True
    ] * 5
    assert asked == [4, 2]


def test_what_ends_beside_others_costs_them_nothing(engine):
    class Slow(Exception):
        def __str__(self):
            time.sleep(0.7)
            return "slow"

    async def one_says_slowly_why(client, row):
        if row["number"] == 0:
            raise Slow
        return 1.0

    first, *others = play(engine, one_says_slowly_why, limits={"seconds": 0.5})
    assert "raised Slow: slow" in first.error and [e.reward for e in others] == [1.0] * 5


def test_one_is_too_late_while_others_end_without_a_pause(engine):
    ended = []

    async def episode(client, row):
        if row["number"] == 0:
            try:
                await asyncio.sleep(1000)
            finally:
                ended.append(row["number"])
        time.sleep(0.008)
        ended.append(row["number"])
        return 1.0

    rows = [{"prompt": "1", "number": number} for number in range(200)]
    first, *others = play(engine, episode, rows, limits={"seconds": 0.5, "at_once": 2})
    assert "took more than 0.5 s" in first.error and [e.reward for e in others] == [1.0] * 199
    assert ended.index(0) < 150


class Unspeakable(Exception):
    def __str__(self):
        raise asyncio.CancelledError


class Unwritable(Exception):
    def __str__(self):
        class Text(str):
            def __format__(self, form):
                raise ValueError

        return Text("1")


@pytest.mark.parametrize("error", [Unspeakable, Unwritable])
def test_errors_that_have_no_words_end_their_episodes_alone(engine, error):
    class Hidden:
        def __repr__(self):
            raise asyncio.CancelledError

    async def episode(client, row):
        if row["number"] == 2:
            raise error
        return 1.0

    found = play(engine, episode, [{**row, "more": Hidden()} for row in ROWS])
    assert [e.reward for e in found] == [1.0, 1.0, None, 1.0, 1.0, 1.0]
    assert found[2].error.startswith("row 2 (it can't be shown)")
    assert found[2].error.endswith(f"raised {error.__name__}: (its message can't be made)")


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
