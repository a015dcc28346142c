"""Ctrl-C, SIGTERM and SIGHUP save the last generation and say how to go on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from life import FEW, ROWS, bits, trainer, value

from esfast import Plan
from esfast.integrations import ray as fleet_of_ray
from esfast.journal.journal import read
from esfast.utils import interrupts
from esfast.utils.interrupts import Interrupted, stoppable

# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def default_signals():
    """What a shell starts in its background ignores SIGINT."""
    kinds = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in kinds.items()}
    yield kinds
    assert {signum: signal.getsignal(signum) for signum in kinds} == kinds
    for signum, handler in before.items():
        signal.signal(signum, handler)


def sends(signum, generation=2, swallow=False):
    def at(made):
        if made.es.generation == generation and made.es._inside is not None:
            try:
                os.kill(os.getpid(), signum)
                time.sleep(0.01)
            except BaseException:
                if not swallow:
                    raise

    return at


@pytest.mark.parametrize("swallow", [False, True], ids=["", "swallowed"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=str)
def test_a_signal_saves_the_last_generation(signum, swallow, tmp_path, whole, default_signals, caplog):
    made = trainer(tmp_path, at=sends(signum, swallow=swallow))
    with pytest.raises(Interrupted) as caught:
        made.train()
    assert caught.value.signum == signum and made.es.generation == 2 == made.summary["generations"]
    assert f"interrupted by {signal.Signals(signum).name}: saving the model after generation 2" in caplog.text
    assert "resume to go on (--resume" in caplog.text
    saved = type(made.model).from_pretrained(tmp_path / "model")
    assert Plan(saved).fingerprint() == bits(made)
    again = trainer(tmp_path, resume=True)
    again.train()
    assert bits(again) == whole[1]


def test_a_signal_in_the_first_generation_saves_nothing(tmp_path, default_signals, caplog):
    with pytest.raises(Interrupted):
        trainer(tmp_path / "run", at=sends(signal.SIGTERM, 0)).train()
    assert not (tmp_path / "run" / "model").exists() and "nothing is lost, start it again" in caplog.text


def test_handlers_of_the_caller_stay(tmp_path, default_signals):
    got = []
    signal.signal(signal.SIGTERM, lambda *received: got.append(received[0]))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        trainer(tmp_path / "run", at=sends(signal.SIGTERM)).train()
        trainer(tmp_path / "other", at=sends(signal.SIGHUP)).train()
        assert set(got) == {signal.SIGTERM}
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, lambda *received: sys.exit(7))
        made = trainer(tmp_path / "third", at=sends(signal.SIGTERM))
        with pytest.raises(SystemExit, match="7"):
            made.train()
        assert made.summary["generations"] == 2

        def scores(completions, **columns):
            sends(signal.SIGTERM)(made)
            return value(completions)

        # A SystemExit or KeyboardInterrupt that the reward function itself raises would count as its failure.
        made = trainer(tmp_path / "fourth", scores)
        with pytest.raises(Interrupted):
            made.train()
        assert made.summary["generations"] == 2
    finally:
        for signum, handler in default_signals.items():
            signal.signal(signum, handler)


def test_in_other_threads_signals_are_left_alone(tmp_path, default_signals):
    made, ends = trainer(tmp_path, generations=1), []
    thread = threading.Thread(target=lambda: ends.append(made.train()["generations"]))
    thread.start()
    thread.join()
    assert ends == [1]


SECOND = """
import os, signal, sys, time
from esfast.utils.interrupts import stoppable
with stoppable():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun and terminals do
        print("saving", flush=True)
        time.sleep(60)
"""


def test_a_second_signal_ends_it_at_once_and_an_echo_does_not():
    process = subprocess.Popen([sys.executable, "-c", SECOND], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    time.sleep(interrupts.REPEATED + 0.2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    process.communicate()


def test_an_error_that_the_same_signal_made_elsewhere_is_no_error(tmp_path, default_signals):
    """A scheduler's signal kills a worker process before it reaches this process."""

    def at(made):
        if made.es.generation == 2 and made.es._inside is not None:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            raise RuntimeError("an engine died")

    made = trainer(tmp_path, at=at)
    with pytest.raises(Interrupted):
        made.train()
    assert made.summary["generations"] == 2


def test_workers_outlive_the_signals_of_their_parent():
    import scoring

    from esfast.rewards.scorer import Scorer

    scorer = Scorer([scoring.length], workers=1)
    try:
        # The first time while the worker starts, the second time while it runs.
        for _ in range(2):
            scores = scorer.submit([scoring.length], ROWS[:1], ["abc"])
            for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                os.kill(scorer._running[0]._process.pid, signum)
            assert scores.result() == [[3.0]]
    finally:
        scorer.close()


def test_the_command_is_ended_by_a_scheduler_and_goes_on(tiny, tmp_path):
    """SIGTERM reaches the process and its reward workers at once: the run is saved, the exit status is 143, and a
    resume does the rest."""
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "esfast",
        "train",
        "--model",
        tiny,
        "--generations",
        "100000",
        "--out",
        out,
        *FEW,
        "--reward-workers",
        "2",
        "--eval-every",
        "0",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(map(str, command), stderr=subprocess.PIPE, text=True, env=environment)
    try:
        until = time.monotonic() + 120
        while not (out / "journal.jsonl").exists() or len(read(out / "journal.jsonl").records) < 3:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        for pid in (*map(int, children), process.pid):
            os.kill(pid, signal.SIGTERM)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and time.monotonic() - began < 30, errors
    assert "interrupted by SIGTERM: saving the model" in errors and "resume to go on (--resume" in errors, errors
    done = len(read(out / "journal.jsonl").records)
    assert json.loads((out / "summary.json").read_text())["generations"] == done
    assert not list(out.glob("*.lock"))


def test_nested_blocks_are_one(default_signals):
    with stoppable() as outer, stoppable() as inner:
        assert inner is outer
    assert fleet_of_ray.kept_handlers is interrupts.kept_handlers
    with interrupts.kept_handlers():
        signal.signal(signal.SIGTERM, lambda *received: sys.exit(15))
