"""A real vLLM engine in this process: its weights are the Hugging Face model's, perturbed and not, to the bit."""

import pytest
import torch
from safetensors.torch import load_file

import esfast

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests where it is")
MODELS = ("qwen2-tied", "qwen2-untied", "llama-tied", "llama-untied")


@pytest.fixture(scope="module", params=MODELS)
def engine(request, start):
    engine = start(request.param)
    assert engine.rpc("esfast_describe", verify=True) == [
        {"numel": engine.plan.numel, "layout": engine.plan.layout, "names": engine.plan.names}
    ]
    yield engine
    engine.close()


def test_members_are_those_of_the_hugging_face_model(engine, tmp_path, same_bits):
    before, tokens = engine.fingerprint(), engine.tokens()
    assert before == engine.plan.fingerprint()
    for negate in (False, True):
        engine.rpc("perturb_self_weights", 2**63 + 7, 0.05, negate)
        with esfast.perturbed(engine.plan, 2**63 + 7, -0.05 if negate else 0.05):
            assert engine.fingerprint() == engine.plan.fingerprint() != before
            assert engine.tokens() != tokens
            engine.rpc("save_self_weights_to_disk", str(tmp_path / "member"))
            saved, wanted = load_file(tmp_path / "member" / "model.safetensors"), dict(engine.hf.named_parameters())
            assert saved.keys() == wanted.keys()
            assert all(same_bits(saved[name], wanted[name]) for name in wanted)  # un-fused, un-padded
        engine.rpc("perturb_self_weights", 2**63 + 7, 0.05, not negate)  # es-at-scale takes it away so, or by restore
        assert engine.fingerprint() == before and engine.tokens() == tokens


def test_a_hundred_members_leave_no_drift(engine):
    before, tokens = engine.fingerprint(), engine.tokens()
    for seed in range(100):
        engine.rpc("perturb_self_weights", seed, 0.05)
        engine.rpc("restore_self_weights", seed, 0.05)
    assert engine.fingerprint() == before and engine.tokens() == tokens


def test_cached_keys_of_other_weights_are_not_used(engine, monkeypatch):
    core = engine.llm.llm_engine.engine_core.engine_core
    assert core.vllm_config.cache_config.enable_prefix_caching
    fresh = engine.assert_forgets_other_weights()

    # This test can fail: without the reset, the second member answers from the first one's keys and values.
    monkeypatch.setattr(type(core), "reset_prefix_cache", lambda *a, **k: True)
    engine.rpc("perturb_self_weights", 1, 0.05)
    engine.tokens()
    engine.rpc("restore_self_weights", 1, 0.05)
    engine.rpc("perturb_self_weights", 2, 0.05)
    assert engine.tokens() != fresh[2]
    monkeypatch.undo()
    engine.rpc("restore_self_weights", 2, 0.05)


def test_es_at_scale_s_driver(engine, tmp_path):
    """Five generations by the calls of its trainer, against ES on the Hugging Face model with the same rewards."""
    es = esfast.ES(engine.plan, sigma=0.02, lr=0.01, population_size=4, seed=5)
    start = engine.plan.fingerprint()
    engine.rpc("save_self_initial_weights")
    engine.rpc("init_inter_engine_group", "127.0.0.1", free_port(), 0, 1)
    for _ in range(5):
        for member in es.population():
            engine.rpc("perturb_self_weights", member.seed, es.sigma, False)
            assert engine.fingerprint() == engine.plan.fingerprint()
            member.reward = float(sum(map(sum, engine.tokens(4))) % 1000)
            engine.rpc("restore_self_weights", member.seed, es.sigma)
        seeds, z = [m.seed for m in es.members], esfast.es.zscore([m.reward for m in es.members])
        engine.rpc("update_weights_from_seeds", seeds, z, es.lr, es.population_size)
        es.step()
        engine.rpc("broadcast_all_weights", 0)
        assert engine.fingerprint() == engine.plan.fingerprint() != start
    tuned = engine.plan.fingerprint()

    engine.rpc("save_self_weights_to_disk", str(tmp_path / "tuned"))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert hf.dtype is torch.bfloat16 and esfast.Plan(hf).fingerprint() == tuned
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned").decode([104, 105]) != ""
    replayed = esfast.Plan(AutoModelForCausalLM.from_pretrained(engine.path))
    esfast.journal.replay(replayed, tmp_path / "tuned" / "journal.jsonl")
    assert replayed.fingerprint() == tuned

    engine.rpc("restore_self_initial_weights")
    assert engine.fingerprint() == start
    engine.rpc("load_weights_from_disk", str(tmp_path / "tuned"))
    assert engine.fingerprint() == tuned
    engine.rpc("load_weights_from_disk", str(engine.path))
    assert engine.fingerprint() == start
    with torch.no_grad():
        engine.hf.load_state_dict(AutoModelForCausalLM.from_pretrained(engine.path).state_dict())


def test_what_is_refused_changes_nothing(engine, tmp_path):
    before = engine.fingerprint()
    engine.rpc("perturb_self_weights", 1, 0.05)
    member = engine.fingerprint()
    for error, words, call in (
        (RuntimeError, "seed 1 is still in place", ("update_weights_from_seeds", [1], [1.0], 0.1, 1)),
        (RuntimeError, "still in place", ("load_weights_from_disk", str(engine.path))),
        (ValueError, "seed", ("perturb_self_weights", -1, 0.05)),
        (RuntimeError, "enable_lora=True, max_loras=", ("esfast_members", [1], [0.1], 1)),
        (ValueError, "finite", ("perturb_self_weights", 2, float("inf"))),
    ):
        with pytest.raises(error, match=words):
            engine.rpc(*call)
        assert engine.fingerprint() == member
    engine.rpc("esfast_restore")
    assert engine.fingerprint() == before
    (tmp_path / "weights.pth").write_bytes(b"\x80")
    for words, call in (
        ("a file of pickled weights is not loaded", ("load_weights_from_disk", str(tmp_path / "weights.pth"))),
        ("finite", ("update_weights_from_seeds", [1], [float("nan")], 0.1, 1)),
    ):
        with pytest.raises(ValueError, match=words):
            engine.rpc(*call)
        assert engine.fingerprint() == before


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
