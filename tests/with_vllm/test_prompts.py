"""Prompts as a real vLLM engine gets them: read by esfast, without an end behind them, and with room for a completion."""

import shutil

import pytest

import esfast

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests where it is")
OPTIONS = {"enforce_eager": True, "max_model_len": 64, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def ending(folder, tmp_path_factory):
    """The folder of a model whose tokenizer puts an end token behind every text."""
    from test_encoding import EOS, tokenizer_with

    path = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(folder("qwen2-tied"), path)
    tokenizer_with(f"$A {EOS}").save_pretrained(path)
    return path


def test_one_engine(folder, ending):
    from transformers import AutoTokenizer
    from vllm.distributed import cleanup_dist_env_and_memory

    from esfast.integrations.vllm_engine import VLLMEngine

    assert len(AutoTokenizer.from_pretrained(ending)("7")["input_ids"]) == 2
    texts = []
    for path in (folder("qwen2-tied"), ending):
        engine = VLLMEngine(path, 6, **OPTIONS)
        assert engine.limits() == {"vocabulary": 1000, "limit": 64}
        given, generate = [], engine.llm.generate
        engine.llm.generate = lambda prompts, *more, given=given, generate=generate, **options: (
            given.extend(prompts) or generate(prompts, *more, **options)
        )
        texts.append(engine.generate(["7", "12+3=", "a" * 58], seeds=[1, 2, 3]))
        assert [len(prompt["prompt_token_ids"]) for prompt in given] == [1, 5, 58]
        for ask in (engine.check, engine.generate):
            with pytest.raises(ValueError, match=r"has 59 tokens, which with 6 .* context of 64: .*max_new_tokens"):
                ask(["7", "a" * 59])
            with pytest.raises(ValueError, match="the prompt '' has no tokens"):
                ask(["7", ""])
        assert len(given) == 3
        engine.close()
        del engine.llm
        cleanup_dist_env_and_memory()
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("one_ray")
def test_a_fleet_s_prompts_are_looked_at_before_the_run_begins(ending, tmp_path):
    from esfast.integrations.fleet import FleetTrainer

    config = esfast.ESConfig(
        output_dir=str(tmp_path / "run"), generations=1, population_size=2, max_completion_length=6, progress=False
    )
    rows = [{"prompt": "7"}, {"prompt": "a" * 58}, {"prompt": "a" * 59}]

    def length(prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    words = "train_dataset: row 2: .* 59 tokens, .*model's context of 64: .* lower max_completion_length"
    with pytest.raises(ValueError, match=words):
        FleetTrainer(ending, length, config, train_dataset=rows, engine_options=OPTIONS)
    assert not (tmp_path / "run").exists()
    FleetTrainer(ending, length, config, train_dataset=rows[:2], engine_options=OPTIONS).train()
