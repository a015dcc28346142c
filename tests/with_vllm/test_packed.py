"""What vLLM does to weights on CPUs when esfast doesn't ask otherwise is refused, by name."""

import pytest

from esfast.integrations import vllm_layout

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests where it is")


def refusals(worker):
    """What is said of the engine's model: of its parameters, and of layers that keep them but compute with a copy."""
    model, said = worker.get_model(), []
    wholes = vllm_layout.hf_shapes(worker.vllm_config.model_config.hf_config)
    for check in (lambda: vllm_layout.pieces(model, wholes), lambda: vllm_layout.check_live(model)):
        try:
            check()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_an_engine_without_the_extension(start):
    engine = start("llama-untied", worker_extension_cls="")
    try:
        ((packed, stale),) = engine.llm.collective_rpc(refusals)
    finally:
        engine.close()
    if packed == stale == "nothing":
        pytest.skip("this vLLM build packs no weights on this processor")
    assert "'model.layers.0.self_attn.qkv_proj.weight' has no elements (shape (0,))" in packed
    assert "'lm_head' computes with a copy of its weights" in stale or "'model.embed_tokens' computes" in stale
