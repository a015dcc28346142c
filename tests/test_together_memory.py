"""Members in one batch take the memory that was said, and no more after many generations."""

import ctypes
import gc
import os
import sys

import pytest
import torch

import esfast
from esfast.bench import resident
from esfast.bench.architectures import tiny_model
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.member_tensor import Unsupported
from esfast.rollout.memory import peak_bytes
from esfast.rollout.population import PopulationEvaluator
from esfast.rollout.sampling import LogitsError
from esfast.rollout.stacked_model import StackedModel
from esfast.tasks import embedded

TOKENIZER = embedded.make_tokenizer()
GENERATIONS = 200 if os.environ.get("ESFAST_LONG_TESTS") else 8


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


def alive():
    """Bytes of all tensors that exist, and how many objects there are."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values()), len(gc.get_objects())


def resident_set():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("error", [Unsupported("an operation"), LogitsError("no numbers")])
def test_the_trial_of_two_members_leaves_nothing_behind(monkeypatch, error):
    """Where it fails, members are asked one after another, in the memory of one."""

    def fails(stack):
        raise error

    es = esfast.ES(tiny_model("qwen2", TOKENIZER), sigma=0.1, lr=0.01, population_size=3)
    evaluator = PopulationEvaluator(TransformersEngine(es.plan.module, TOKENIZER, 6))
    monkeypatch.setattr(StackedModel, "check", fails)
    before, _ = alive()
    assert len(list(evaluator.evaluate(es.population(), ["1"], None))) == 3 and evaluator.at_once == 1
    error.__traceback__ = None
    after, _ = alive()
    assert after - before < sum(p.nbytes for p in es.plan.tensors)


@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
def test_nothing_grows_over_generations(noise):
    """8 generations; 200 with ESFAST_LONG_TESTS=1."""
    es = esfast.ES(tiny_model("qwen2", TOKENIZER), sigma=0.1, lr=0.01, population_size=6, noise=noise)
    engine = TransformersEngine(es.plan.module, TOKENIZER, 6)
    evaluator = PopulationEvaluator(engine, 4)
    after = []
    for generation in range(GENERATIONS + 2):
        # of the same length: the memory of the cache is kept for the longest so far
        prompts = [f"{100 + generation + i} = " for i in range(5)]
        for member, texts in evaluator.evaluate(es.population(), prompts, None):
            member.reward = float(len("".join(texts)) + member.index / 10)
        es.step()
        after.append((*alive(), resident_set()) if generation in (1, GENERATIONS + 1) else None)
    (tensors, objects, memory), (tensors_later, objects_later, memory_later) = after[1], after[-1]
    assert tensors_later <= tensors and objects_later <= objects + 100
    assert memory_later <= memory + 16 * 2**20


@pytest.mark.parametrize(
    ("noise", "rank", "digits", "tokens", "seeds"),
    [("gaussian", 1, 60, 3, None), ("low_rank", 2, 60, 3, range(10)), ("gaussian", 1, 1, 30, None)],
    ids=["long prompts", "low-rank, sampled", "long texts"],
)
def test_the_memory_that_is_said_holds_weights_and_texts(noise, rank, digits, tokens, seeds):
    """Of tensors: what operations allocate inside themselves is not in it."""
    model = tiny_model("qwen2", TOKENIZER)
    es = esfast.ES(model, sigma=0.01, population_size=8, noise=noise, rank=rank)
    engine = TransformersEngine(model, TOKENIZER, tokens)
    engine.generation_config.eos_token_id = None
    prompts = [f"{i}{'7' * digits} = " for i in range(10, 20)]
    evaluator = PopulationEvaluator(engine, 8)
    list(evaluator.evaluate(es.population(), prompts, seeds))
    evaluator._free()
    peak, said = (
        peak_bytes(lambda: list(evaluator.evaluate(es.population(), prompts, seeds))),
        evaluator.need - evaluator.beside_tensors,
    )
    assert 0.9 * said <= peak <= 1.1 * said, (peak, said)


LONG = pytest.mark.skipif("ESFAST_LONG_TESTS" not in os.environ, reason="takes minutes: ESFAST_LONG_TESTS=1")
GLIBC = pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="is of glibc")


@GLIBC
@pytest.mark.parametrize("job", [pytest.param(job, marks=[LONG] * (i > 1)) for i, job in enumerate(resident.JOBS)])
def test_a_process_takes_the_memory_that_is_said(job):
    said, taken = resident.said_and_taken(job)
    assert resident.within(said, taken), (taken / 1e6, said / 1e6)


def test_by_how_much_it_may_differ():
    assert resident.within(100_000_000, 110_000_000) and resident.within(100_000_000, 90_000_000)
    assert not resident.within(100_000_000, 111_000_000) and not resident.within(100_000_000, 89_000_000)
    # a tenth of little is less than a gap
    assert resident.within(20_000_000, 24_000_000) and not resident.within(20_000_000, 25_000_000)
