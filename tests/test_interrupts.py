"""Ctrl-C during a step, or during a move between members: the step or move is done wholly or not at all."""

import os
import signal
import threading

import pytest
import torch

from esfast import ES, Plan
from esfast.core import ops
from esfast.journal import journal
from esfast.utils.interrupts import came_by_signal, defer_sigint, stoppable


@pytest.fixture(autouse=True)
def python_handles_sigint():
    """A shell starts what runs in its background with SIGINT ignored, and Python leaves that so."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


@pytest.fixture
def interrupted_call(monkeypatch):
    """The n-th call of the backend presses Ctrl-C, as a signal that arrives while the C++ code runs."""

    def at(n):
        calls, original = [], ops._BACKENDS["cpu"]

        def run(*arguments):
            original(*arguments)
            calls.append(arguments)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setitem(ops._BACKENDS, "cpu", run)

    return at


def rewarded(plan, **options):
    es = ES(plan, sigma=0.5, lr=1.0, population_size=2, **options)
    for member in es.population():
        member.reward = float(member.index)
    return es


@pytest.mark.parametrize("call", [1, 2])  # the update of the base, the copy to the live weights
def test_a_step_is_taken_whole(call, interrupted_call, tmp_path, same_bits):
    wanted = Plan([("w", torch.zeros(1000))])
    rewarded(wanted).step()
    plan = Plan([("w", torch.zeros(1000))])
    es = rewarded(plan, journal=tmp_path / "journal.jsonl")
    interrupted_call(call)
    with pytest.raises(KeyboardInterrupt):
        es.step()
    assert es.generation == 1 and same_bits(plan.tensors, wanted.tensors)
    assert len(journal.read(tmp_path / "journal.jsonl")[1]) == 1
    with pytest.raises(RuntimeError, match="no population to learn from"):
        es.step()


@pytest.mark.parametrize("call", [1, 2, 3])  # entering a member, moving to the next, restoring
def test_inplace_weights_lose_no_noise(call, interrupted_call):
    plan = Plan([("w", torch.zeros(1000))])
    es = ES(plan, sigma=0.5, population_size=2, weights="inplace")
    interrupted_call(call)
    with pytest.raises(KeyboardInterrupt):
        for _ in es.population():
            pass
    assert plan.tensors[0].abs().max() < 1e-6


def test_held_obeys_afterwards_and_only_once():
    reached = []
    with pytest.raises(KeyboardInterrupt), defer_sigint():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("end of the block")
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_held_keeps_out_of_other_threads_and_handlers():
    def body():
        with defer_sigint():
            seen.append(signal.getsignal(signal.SIGINT))

    seen = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        body()
    finally:
        signal.signal(signal.SIGINT, old)
    assert seen == [signal.default_int_handler, signal.SIG_IGN]


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN, signal.SIG_DFL])
def test_code_that_raises_keyboard_interrupt_is_not_taken_for_a_signal(handler):
    """Also in a job that a script began in its background, which ignores SIGINT."""
    signal.signal(signal.SIGINT, handler)
    with stoppable():
        assert not came_by_signal(KeyboardInterrupt())
