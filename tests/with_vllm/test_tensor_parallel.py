"""Two ranks in processes of their own: the same perturbed weights as the Hugging Face model's, and so as one rank's."""

import os

import pytest
import torch
from safetensors.torch import load_file
from vllm_population import assert_members, lora

import esfast
from esfast.update.updater import Group, Rule

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests where it is")


# An engine of several processes takes a while to start. These two are of both kinds, tied and not, with LoRA slots.
USUAL, FURTHER = ["llama-tied", "qwen2-untied"], ["qwen2-tied", "llama-untied"]
# Rank of the members, slots, and options.
RANKS = {"llama-tied": 8, "qwen2-untied": 1, "qwen2-tied": 8, "llama-untied": 1}
SLOTS = {
    "llama-tied": lora(8, 4, fully_sharded_loras=True),
    "qwen2-untied": lora(1, 8),
    "qwen2-tied": lora(8, 8),
    "llama-untied": lora(1, 3),
}


@pytest.fixture(scope="module", params=USUAL + (FURTHER if os.environ.get("ESFAST_LONG_TESTS") else []))
def engine(request, start):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        if request.param == "qwen2-untied":
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # the engine in a process too: vLLM's default
        engine = start(request.param, tensor_parallel_size=2, **SLOTS[request.param])
        yield engine
        engine.close()


def test_two_ranks_are_one_model(engine, tmp_path, same_bits):
    stated = {"numel": engine.plan.numel, "layout": engine.plan.layout, "names": engine.plan.names}
    assert engine.rpc("esfast_describe", verify=True) == [stated] * 2
    before, tokens = engine.fingerprint(), engine.tokens()
    assert before == engine.plan.fingerprint()
    engine.rpc("perturb_self_weights", 2**63 + 7, 0.05, False)
    with esfast.perturbed(engine.plan, 2**63 + 7, 0.05):
        assert engine.fingerprint() == engine.plan.fingerprint() != before
        assert engine.tokens() != tokens
        engine.rpc("save_self_weights_to_disk", str(tmp_path / "member"))
        saved, wanted = load_file(tmp_path / "member" / "model.safetensors"), dict(engine.hf.named_parameters())
        assert saved.keys() == wanted.keys()
        assert all(same_bits(saved[name], wanted[name]) for name in wanted)
    engine.rpc("restore_self_weights", 2**63 + 7, 0.05)
    assert engine.fingerprint() == before and engine.tokens() == tokens
    for seed in range(100):
        engine.rpc("perturb_self_weights", seed, 0.05)
        engine.rpc("restore_self_weights", seed, 0.05)
    assert engine.fingerprint() == before


def test_cached_keys_of_other_weights_are_not_used(engine):
    engine.assert_forgets_other_weights()


def test_updates_from_a_master_save_and_load(engine, tmp_path):
    """Adam on a float32 master, member by member and update by update as ES does it on the Hugging Face model."""
    start = engine.plan.fingerprint()
    es = esfast.ES(
        engine.plan,
        sigma=0.02,
        lr=0.01,
        population_size=4,
        seed=5,
        weights="master",
        optimizer="adam",
        groups=["*norm*:lr=0.5", "*.q_proj.*:sigma=0.5,lr=2", "*up_proj*:sigma=2"],  # parts of what vLLM has fused
    )
    engine.rpc("esfast_begin", es.rule.to_json(), "master")
    for _ in range(3):
        for member in es.population():
            engine.rpc("perturb_self_weights", member.seed, es.sigma)
            assert engine.fingerprint() == engine.plan.fingerprint()
            member.reward = float(sum(map(sum, engine.tokens(4))) % 1000)
            engine.rpc("restore_self_weights", member.seed, es.sigma)
        record = es.step()
        engine.rpc("esfast_update", vars(record))
        assert engine.fingerprint() == engine.plan.fingerprint() != start
    tuned = engine.plan.fingerprint()
    engine.rpc("save_self_weights_to_disk", str(tmp_path / "tuned"))
    from transformers import AutoModelForCausalLM

    assert esfast.Plan(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")).fingerprint() == tuned
    engine.rpc("load_weights_from_disk", str(engine.path))
    assert engine.fingerprint() == start
    with torch.no_grad():
        engine.hf.load_state_dict(AutoModelForCausalLM.from_pretrained(engine.path).state_dict())


def test_members_in_lora_slots(engine):
    """Of layers that are divided by rows, by columns, fused, and fully sharded."""
    rank = RANKS[engine.path.name]
    groups = engine.rpc("esfast_adapters")[0]["frozen"]
    rule = Rule(noise="low_rank", rank=rank, groups=tuple(map(Group.parse, groups)))
    engine.rpc("esfast_begin", rule.to_json())
    assert_members(engine, rank, 6)
