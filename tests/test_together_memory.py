"""Members in one batch take the memory that was said, and no more after many generations."""

import gc
import os

import pytest
import torch

import esfast
from esfast.bench.architectures import tiny_model
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.population import PopulationEvaluator
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


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
def test_nothing_grows_over_generations(noise):
    """8 generations; 200 with ESFAST_LONG_TESTS=1."""
    es = esfast.ES(tiny_model("qwen2", TOKENIZER), sigma=0.1, lr=0.01, population_size=6, noise=noise)
    engine = TransformersEngine(es.plan.module, TOKENIZER, 6)
    evaluator = PopulationEvaluator(engine, 4)
    after = []
    for generation in range(GENERATIONS + 2):
        prompts = [f"{generation + i} = " for i in range(5)]
        for member, texts in evaluator.evaluate(es.population(), prompts, None):
            member.reward = float(len("".join(texts)) + member.index / 10)
        es.step()
        after.append((*alive(), resident()) if generation in (1, GENERATIONS + 1) else None)
    (tensors, objects, memory), (tensors_later, objects_later, memory_later) = after[1], after[-1]
    assert tensors_later <= tensors and objects_later <= objects + 100
    assert memory_later <= memory + 16 * 2**20


@pytest.mark.parametrize(("noise", "rank"), [("gaussian", 1), ("low_rank", 2)])
def test_the_memory_that_is_said_holds_weights_and_texts(noise, rank):
    """Of tensors: what operations allocate inside themselves is not in it."""
    from esfast.rollout.memory import peak_bytes

    model = tiny_model("qwen2", TOKENIZER)
    es = esfast.ES(model, sigma=0.01, population_size=8, noise=noise, rank=rank)
    engine = TransformersEngine(model, TOKENIZER, 3)
    engine.generation_config.eos_token_id = None
    prompts = [f"{i}{'7' * 60} = " for i in range(10, 20)]
    evaluator = PopulationEvaluator(engine, 8)
    list(evaluator.evaluate(es.population(), prompts, None))
    evaluator._stack = None
    peak = peak_bytes(lambda: list(evaluator.evaluate(es.population(), prompts, None)))
    assert 0.9 * evaluator.need <= peak <= 1.1 * evaluator.need, (peak, evaluator.need)
