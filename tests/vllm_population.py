"""What the tests of members in a real vLLM engine share, at one tensor-parallel rank and at several."""

import pytest

from esfast.es.weights import BaseWeights
from esfast.integrations import vllm_members
from esfast.update.updater import Group, Rule, UpdateRecord

# The first is long enough for the prefix cache.
ROWS = [[5, 6, 7, 8] * 80, [9, 10, 11], [300, 301, 302, 303, 304]]


def lora(rank, slots, **options):
    fits = vllm_members.least_slot_rank(rank)
    return {"enable_lora": True, "max_loras": slots, "max_lora_rank": fits, "dtype": "float32"} | options


def assert_members(engine, rank, count, generations=2):
    """Members of several generations, and the base among them, against the Hugging Face model that is perturbed and
    updated in the same way. Seeds and prompts are the same in each generation, so what is left of the one before would
    be taken."""
    assert len(set(engine.rpc("esfast_fingerprint"))) == 1 and engine.fingerprint() == engine.plan.fingerprint()
    frozen = tuple(Group.parse(text) for text in engine.rpc("esfast_adapters")[0]["frozen"])
    assert any("norm" in group.pattern for group in frozen)
    store = BaseWeights(engine.plan, Rule(noise="low_rank", rank=rank, groups=frozen))
    seeds, sigmas = [100 + i // 2 for i in range(count)], [0.05 * (1 - 2 * (i % 2)) for i in range(count)]
    texts = []
    for generation in range(generations):
        adapters = engine.members([*seeds, 0], [*sigmas, 0.0], rank)
        *answers, base = engine.ask(adapters, ROWS)
        engine.assert_greedy(ROWS, base)
        for seed, sigma, answer in zip(seeds, sigmas, answers, strict=True):
            store.perturb(seed, sigma)
            engine.assert_greedy(ROWS, answer)
            store.restore()
        assert len({str(answer) for answer in answers}) == count
        texts.append(answers)
        record = UpdateRecord(generation, seeds[::2], [0.02] * len(seeds[::2]), [], 0.05, 0.02)
        engine.rpc("esfast_update", vars(record))
        store.update(record)
        assert engine.fingerprint() == engine.plan.fingerprint()
        with pytest.raises(RuntimeError, match="is no member of now"):
            engine.ask([adapters[0]], ROWS)
    assert texts[0] != texts[1]
