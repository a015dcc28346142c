"""Fleets of vLLM engines on stand-ins for vLLM and Ray: fixtures, a tiny model in a folder, and a FleetTrainer of it."""

import pytest
import torch
import vllm_stand_in
from test_encoding import BOS, EOS, tokenizer_with
from transformers import Qwen2Config, Qwen2ForCausalLM

import esfast
from esfast import cli
from esfast.integrations.fleet import FleetTrainer

LIMIT = 48
ROWS = [{"prompt": f"{i}+{i}="} for i in range(6)]
PROMPTS = ["7", f"7{EOS}", f"{BOS}7"]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    return vllm_stand_in.install(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(template=, **special): a tiny model, with a tokenizer that puts tokens around a text as `template` says."""
    made = {}

    def make(template="$A", **special):
        if template not in made:
            torch.manual_seed(0)
            tokenizer, made[template] = tokenizer_with(template, **special), tmp_path_factory.mktemp("model")
            config = Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=LIMIT,
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                initializer_range=0.3,
            )
            for part in (Qwen2ForCausalLM(config), tokenizer):
                part.save_pretrained(made[template])
        return made[template]

    return make


SETTINGS = {
    "generations": 2,
    "population_size": 4,
    "sigma": 0.1,
    "lr": 0.1,
    "prompts_per_generation": 6,
    "max_completion_length": 4,
    "eval_every": 0,
    "progress": False,
}


def asked():
    """The token ids of all prompts that engines were given."""
    return [row for llm in vllm_stand_in.LLM.made for rows in llm.asked for row in rows]


def letters(prompts, completions, **columns):
    return [float(sum(map(ord, str(text))) % 101) for text in completions]


def trainer(
    path,
    model,
    train=ROWS,
    evaluated=None,
    engines=1,
    engine_options=None,
    processing_class=None,
    functions=letters,
    engine_timeout=None,
    **changes,
):
    config = esfast.ESConfig(output_dir=str(path), **SETTINGS | changes)
    return FleetTrainer(
        model,
        functions,
        config,
        engines,
        engine_options=engine_options,
        engine_timeout=engine_timeout,
        train_dataset=train,
        eval_dataset=evaluated,
        processing_class=processing_class,
    )


def train_a_fleet(model, tmp_path, *options):
    """`esfast train` on the prompts in p.jsonl, into the folder run."""
    places = ["--model", str(model), "--task", f"file:{tmp_path / 'p.jsonl'}", "--out", str(tmp_path / "run")]
    usual = "train --engine vllm --reward odd_scoring:length --max-completion-length 4".split()
    return cli.main([*usual, *places, *options])
