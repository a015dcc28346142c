"""Reward functions in this process and in workers: values, failures, hangs, and what becomes of the processes."""

import logging
import math
import os
import signal
import sys
import threading
import time

import pytest
import scoring

from esfast.rewards.scorer import RewardError, Scorer, combine
from esfast.rewards.worker import Worker

ROWS = [{"prompt": "a", "target": 3, "note": "x"}, {"prompt": "b", "target": 4, "note": "x"}]
TEXTS = ["one", "three"]


@pytest.fixture
def scorer():
    made = []

    def make(*functions, **options):
        made.append(Scorer(functions, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def rows(note):
    return [row | {"note": str(note)} for row in ROWS]


@pytest.mark.parametrize("workers", [0, 1])
def test_values_in_the_order_asked(scorer, workers):
    s = scorer(scoring.length, scoring.target, scoring.prints, workers=workers)
    assert s.submit([scoring.target, scoring.length], ROWS, TEXTS).result() == [[3.0, 4.0], [3.0, 5.0]]
    assert s.submit([scoring.length], ROWS, ["", ""]).result() == [[0.0, 0.0]]  # empty completions
    assert s.submit([scoring.prints], ROWS, TEXTS).result() == [[0.0, 0.0]]
    assert all(isinstance(v, float) for v in s.submit([scoring.length], ROWS, TEXTS).result()[0])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("function", "note", "texts", "message"),
    [
        (scoring.raises, "x", ["a", ""], "reward function raises raised ZeroDivisionError: division by zero"),
        (scoring.wrong, "few", TEXTS, "reward function wrong: expected 2 rewards, got 1"),
        (scoring.wrong, "nan", TEXTS, "reward function wrong: its reward for completion 0 is nan, no finite number"),
        (scoring.wrong, "text", TEXTS, "reward function wrong: its reward for completion 0 is 'a', no finite number"),
        (scoring.wrong, "list", TEXTS, "reward function wrong: its reward for completion 0 is [1.0], no finite number"),
        (scoring.wrong, "unknown", TEXTS, "reward function wrong raised KeyError: 'unknown'"),
    ],
)
def test_failures_name_the_function_and_the_next_member_is_scored(scorer, workers, function, note, texts, message):
    s = scorer(scoring.length, function, workers=workers)
    future = s.submit([scoring.length, function, scoring.length], rows(note), texts)
    with pytest.raises(RewardError) as caught:
        future.result()
    assert str(caught.value).startswith(message) and isinstance(caught.value, ValueError)
    assert s.submit([scoring.length], ROWS, TEXTS).result() == [[3.0, 5.0]]


@pytest.mark.timeout(300)
def test_a_worker_that_hangs_is_killed_with_what_it_started(scorer, tmp_path, monkeypatch):
    """The clock stands still until the function hangs and was waited for, so that a busy machine kills nobody earlier.
    If `submit` waited, or if nobody was killed, the test would never end."""
    hung, asked, since = tmp_path / "pid", [], []

    def clock():
        if not since and asked and hung.exists() and hung.read_text():
            since.append(time.monotonic())
        return time.monotonic() - since[0] if since else 0.0

    for module in (sys.modules[Scorer.__module__], sys.modules[Worker.__module__]):
        monkeypatch.setattr(module, "now", clock)
    s = scorer(scoring.length, scoring.hangs, scoring.where, workers=1, timeout=1.0)
    first = s.submit([scoring.where], ROWS, TEXTS).result()[0][0]
    future = s.submit([scoring.length, scoring.hangs], rows(hung), ["hang", "b"])
    asked.append(future)
    with pytest.raises(RewardError, match="^reward function hangs gave no rewards in 1 s and was killed$"):
        future.result()
    assert time.monotonic() - since[0] > 1.0
    for pid in (int(first), int(hung.read_text())):
        while _runs(pid):  # a signal that was sent takes its time on a busy machine
            time.sleep(0.01)
    assert s.submit([scoring.where], ROWS, TEXTS).result()[0][0] not in (first, os.getpid())


def test_a_function_that_hangs_in_this_process_is_interrupted(scorer):
    def spins(prompts, completions, **columns):
        try:
            while True:
                pass
        except Exception:
            return [0.0] * len(completions)

    s = scorer(spins, timeout=0.2)
    with pytest.raises(RewardError, match="^reward function spins gave no rewards in 0.2 s$"):
        s.submit([spins], ROWS, TEXTS).result()
    caught = []
    alone = threading.Thread(
        target=lambda: caught.append(scorer(scoring.length, timeout=9).submit([scoring.length], ROWS, TEXTS).result())
    )
    alone.start()
    alone.join()
    assert caught == [[[3.0, 5.0]]], "in other threads, too"


@pytest.mark.parametrize(("theirs", "first"), [(0.4, "ours"), (0.1, "theirs")])
def test_a_limit_inside_somebody_else_s_alarm(scorer, theirs, first):
    """pytest-timeout, for example, has set an alarm already. The one that is due first must come first, and theirs must
    not be lost."""

    class Rang(BaseException):
        pass

    def ring(*received):
        raise Rang

    def spins(prompts, completions, **columns):
        while True:
            pass

    s = scorer(spins, timeout=0.2)
    outer, before = signal.getitimer(signal.ITIMER_REAL), signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, theirs)
    try:
        began = time.monotonic()
        with pytest.raises(Rang):
            if first == "ours":
                with pytest.raises(RewardError, match="in 0.2 s"):
                    s.submit([spins], ROWS, TEXTS).result()
                spins([], [])
            s.submit([spins], ROWS, TEXTS).result()
        assert theirs <= time.monotonic() - began < theirs + 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_a_worker_that_dies(scorer):
    s = scorer(scoring.dies, scoring.length, workers=1)
    with pytest.raises(RewardError, match="reward function dies ended its process with status -11"):
        s.submit([scoring.dies], ROWS, TEXTS).result()
    assert s.submit([scoring.length], ROWS, TEXTS).result() == [[3.0, 5.0]]


def test_a_module_that_cannot_be_imported_in_a_worker(scorer, monkeypatch):
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if not p.endswith("tests")])
    s = scorer(scoring.length, workers=1)
    with pytest.raises(
        RewardError,
        match="reward function length could not be called: importing it in a process raised ModuleNotFoundError: No module named 'scoring'",
    ):
        s.submit([scoring.length], ROWS, TEXTS).result()


def test_scoring_runs_beside_the_caller_and_workers_beside_each_other(scorer):
    s = scorer(scoring.slow, scoring.where, workers=2)
    pids = {f.result()[0][0] for f in [s.submit([scoring.slow, scoring.where], ROWS, TEXTS) for _ in range(2)]}
    began = time.monotonic()
    futures = [s.submit([scoring.slow], ROWS, TEXTS) for _ in range(4)]
    assert time.monotonic() - began < 0.2
    assert [f.result() for f in futures] == [[[1.0, 1.0]]] * 4
    assert 0.5 < time.monotonic() - began < 1.1, "four times 0.3 s by two workers"
    assert len(pids) <= 2 and os.getpid() not in pids


def test_each_function_gets_arguments_of_its_own_in_a_worker(scorer):
    s = scorer(scoring.changes, scoring.length, workers=1)
    assert s.submit([scoring.changes, scoring.length], ROWS, TEXTS).result() == [[0.0, 0.0], [3.0, 5.0]]


def test_what_cannot_be_imported_by_name_is_called_here_with_a_word(scorer, caplog):
    seen = []

    def closure(prompts, completions, **columns):
        seen.append(os.getpid())
        return [1.0] * len(completions)

    with caplog.at_level(logging.WARNING, "esfast.rewards.scorer"):
        s = scorer(scoring.length, closure, workers=2)
    assert "called in this process: closure can't be imported" in caplog.text
    assert s.submit([closure, scoring.length], ROWS, TEXTS).result() == [[1.0, 1.0], [3.0, 5.0]]
    assert seen == [os.getpid()]
    caplog.clear()
    scorer(closure, lambda prompts, completions: [0.0])
    assert not caplog.text, "not asked for, no word"


def test_rows_that_cannot_be_sent_are_scored_here_with_a_word(scorer, caplog):
    s = scorer(scoring.where, workers=1)
    with caplog.at_level(logging.WARNING, "esfast.rewards.scorer"):
        for _ in range(2):
            assert (
                s.submit([scoring.where], rows("x") and [r | {"f": lambda: 0} for r in ROWS], TEXTS).result()[0]
                == [os.getpid()] * 2
            )
    assert caplog.text.count("the rows can't be sent") == 1


def test_close_ends_the_processes_and_what_they_do(scorer, tmp_path):
    s = scorer(scoring.where, scoring.hangs, workers=1, timeout=math.inf)
    pid = int(s.submit([scoring.where], ROWS, TEXTS).result()[0][0])
    future = s.submit([scoring.hangs], rows(tmp_path / "pid"), ["hang", "b"])
    waiting = s.submit([scoring.where], ROWS, TEXTS)
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    s.close()
    assert not _runs(pid)
    for scores in (future, waiting):
        with pytest.raises(RewardError, match="the scorer was closed"):
            scores.result()
    assert s.submit([scoring.where], ROWS, TEXTS).result()[0][0] != pid  # it may be used again


def _runs(pid):
    """Whether the process runs. A zombie, which has ended but was not waited for, does not."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_rewards_are_weighed_and_none_leaves_a_completion_to_the_others():
    assert combine([[1.0, 2.0], [10.0, None]], [1.0, 0.5]) == [6.0, 2.0]
    assert combine([[None, 2.0]], [3.0]) == [6.0]  # the first is nobody's, and left out
    with pytest.raises(RewardError, match="anything but None"):
        combine([[None, None], [None, None]], [1.0, 1.0])
    scorer = Scorer([scoring.wrong])
    assert scorer.submit([scoring.wrong], [{"prompt": "", "note": "none"}] * 2, TEXTS).result() == [[None, None]]
