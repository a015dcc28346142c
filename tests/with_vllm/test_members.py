"""A population in a real vLLM engine: members in LoRA slots answer in one batch, as the perturbed Hugging Face model."""

import os

import numpy as np
import pytest
from vllm_population import ROWS, assert_members, lora

from esfast.es.weights import BaseWeights
from esfast.integrations import vllm_patches
from esfast.update.updater import Group, Rule, UpdateRecord

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests where it is")
# model, rank, members, slots
USUAL = [("qwen2-tied", 1, 12, 4), ("llama-tied", 8, 8, 8), ("llama-untied", 1, 64, 64)]
FURTHER = [("qwen2-untied", 8, 8, 8), ("qwen2-tied", 3, 64, 16), ("llama-tied", 1, 64, 64), ("llama-untied", 8, 12, 4)]


@pytest.fixture(scope="module", params=USUAL + (FURTHER if os.environ.get("ESFAST_LONG_TESTS") else []), ids=str)
def population(request, start):
    name, rank, count, slots = request.param
    engine = start(name, max_num_seqs=64, **lora(rank, slots))
    yield engine, rank, count
    engine.close()


def test_members_answer_as_the_perturbed_hugging_face_model(population):
    engine, rank, count = population
    assert_members(engine, rank, count)
    # and one after another in place, in the same engine
    engine.rpc("perturb_self_weights", 7, 0.05)
    ((texts,)) = engine.ask(engine.members([0], [0.0], None), ROWS)
    engine.rpc("restore_self_weights", 7, 0.05)
    ((same,)) = engine.ask(engine.members([7], [0.05], None), ROWS)
    assert texts == same


def test_other_slots_and_weights_under_an_old_name(population, monkeypatch):
    """Names are never used twice. If they were, answers would come from the keys of another member: the test before
    would see it."""
    engine, rank, _ = population
    if engine.llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size > 1:
        pytest.skip("the worker is in another process")
    fresh = [engine.ask(engine.members([seed], [0.05], rank), ROWS)[0] for seed in (1, 2)]
    assert fresh[0] != fresh[1]
    (first,) = engine.members([1], [0.05], rank)
    (second,) = engine.members([2], [0.05], rank)
    assert first.lora_name != second.lora_name and first.lora_int_id != second.lora_int_id
    assert engine.ask([first, second], ROWS) == fresh
    core = engine.llm.llm_engine.engine_core.engine_core
    drawn = core.model_executor.driver_worker.worker._esfast_adapters._drawn
    drawn[second.lora_int_id] = drawn[second.lora_int_id]._replace(name=first.lora_name)
    for door in (core, engine.llm.llm_engine):
        door._esfast_members[second.lora_int_id] = first.lora_name
    second.lora_name = second.lora_path = first.lora_name
    assert engine.ask([second], ROWS)[0] != fresh[1]


def test_requests_without_an_adapter_are_the_base(population):
    """Beside members in a batch, too, where vLLM's CPU kernels take the last slot for them; and after members."""
    engine, rank, count = population
    alone = engine.ask([None], ROWS)
    engine.assert_greedy(ROWS, alone[0])
    adapters = engine.members(list(range(count)), [0.05] * count, rank)
    assert engine.ask([*adapters, None], ROWS)[-1] == alone[0] == engine.ask([None], ROWS)[0]
    engine.rpc("esfast_restore")
    assert engine.ask([None], ROWS) == alone


def test_requests_that_no_member_answers(population):
    """They are refused before they are scheduled, so the engine goes on."""
    from vllm.lora.request import LoRARequest

    engine, rank, _ = population
    (member,) = engine.members([1], [0.05], rank)
    answers = engine.ask([member], ROWS)
    name, number = member.lora_name, member.lora_int_id
    for fields, words in (
        ((name, 5, name), "is no member of now"),
        ((f"{name}0", number, f"{name}0"), "is no member of now"),
        (("mine", number, name), "is no member of now"),
        (("mine", number, "/nowhere"), f"'mine': lora_int_id {number} is that of a member"),
    ):
        with pytest.raises(RuntimeError, match=words):
            engine.ask([LoRARequest(*fields)], ROWS)
    assert engine.ask([member], ROWS) == answers


def test_weights_do_not_change_under_requests(population):
    """Neither under one that runs nor under one that waits, which would then find its member gone."""
    from vllm import SamplingParams

    engine, rank, _ = population
    (member,) = engine.members([1], [0.05], rank)
    wanted, before = engine.ask([member], ROWS)[0][1], engine.fingerprint()
    requests = engine.llm.llm_engine
    for steps in (0, 1):
        settings = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        requests.add_request(f"of {steps}", {"prompt_token_ids": ROWS[1]}, settings, lora_request=member)
        done = [output for _ in range(steps) for output in requests.step()]
        with pytest.raises(RuntimeError, match="esfast_update: requests are not finished, .* None has changed"):
            engine.rpc("esfast_update", vars(UpdateRecord(0, [1], [0.1], [], 0.05, 0.02)))
        while requests.has_unfinished_requests():
            done += requests.step()
        assert list(done[-1].outputs[0].token_ids) == wanted and engine.fingerprint() == before
        # It is still a member, but the engine has forgotten it.
        (member,) = engine.members([1], [0.05], rank)


def test_es_at_scale_s_driver_in_population_batches(population):
    """docs/how-to/coming-from.md: its update uses the noise that the members had."""
    engine, rank, _ = population
    groups = tuple(Group.parse(text) for text in engine.rpc("esfast_adapters")[0]["frozen"])
    store = BaseWeights(engine.plan, Rule(noise="low_rank", rank=rank, groups=groups))
    seeds, z, before = [11, 12, 13], [1.0, -0.5, 0.25], engine.fingerprint()
    answers = engine.ask(engine.members(seeds, [0.05] * 3, rank), ROWS)
    engine.rpc("update_weights_from_seeds", seeds, z, 0.03, 3)
    store.update(UpdateRecord(0, seeds, [float(np.float32(0.03 / 3 * c)) for c in z], [], 0.05, 0.03))
    assert engine.fingerprint() == engine.plan.fingerprint() != before
    assert engine.ask(engine.members(seeds, [0.05] * 3, rank), ROWS) != answers


def test_an_adapter_that_is_in_its_slot_costs_nothing(population, monkeypatch):
    """vLLM would go over all adapters for each adapter of a batch, at every step."""
    engine, rank, _ = population
    worker = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    manager, calls = worker.model_runner.lora_manager, []
    original = manager.list_adapters
    monkeypatch.setattr(manager, "list_adapters", lambda: calls.append(1) or original())
    adapters = engine.members([1, 2, 3], [0.05] * 3, rank)
    engine.ask(adapters, ROWS, 1)
    began = len(calls)
    assert began >= 3
    engine.ask(adapters, ROWS, 8)
    assert len(calls) == began


def test_vllm_is_the_one_that_the_patches_were_written_for():
    """If this fails, vLLM has changed under esfast: read what is new in the functions named, adapt vllm_patches.py, run
    these tests, and add the digest."""
    import vllm

    version = vllm.__version__.split("+")[0]
    changed = [p.target for p in vllm_patches.PATCHES if p.digest() != p.digests.get(version)]
    assert not changed, (version, changed)
