"""PEFT adapters of every kind: what they train is tuned, saved whole, resumed and replayed to the bit."""

import json
import os

import pytest
import torch
from transformers import GenerationConfig

import esfast
from esfast.cli import main
from esfast.journal.journal import replay
from esfast.rollout import adapters
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.models import load_model, load_tokenizer
from esfast.tasks import embedded

peft = pytest.importorskip("peft", reason="needs peft, an optional package")

ROWS = [{"prompt": f"{i}+1="} for i in range(2)]
Q = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
LORA = {**Q, "r": 2}
SOFT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}

KINDS = {
    "LoRA": ("LoraConfig", LORA),
    "without a task": ("LoraConfig", {**LORA, "task_type": None}),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True}),
    "modules_to_save": ("LoraConfig", {**LORA, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "all biases": ("LoraConfig", {**LORA, "bias": "all"}),
    "biases of LoRA": ("LoraConfig", {**LORA, "bias": "lora_only"}),
    "tokens": ("LoraConfig", {**LORA, "trainable_token_indices": [1, 2]}),
    "embeddings": ("LoraConfig", {**LORA, "target_modules": ["embed_tokens", "lm_head"]}),
    "IA3": ("IA3Config", {**Q, "feedforward_modules": []}),
    "VeRA": ("VeraConfig", {**Q, "r": 2}),
    "LoHa": ("LoHaConfig", LORA),
    "LoKr": ("LoKrConfig", LORA),
    "OFT": ("OFTConfig", {**Q, "r": 0, "oft_block_size": 4}),
    "AdaLoRA": ("AdaLoraConfig", {**Q, "target_r": 2, "init_r": 4, "total_step": 9}),
    "LN tuning": ("LNTuningConfig", {"task_type": "CAUSAL_LM"}),
    "prompt": ("PromptTuningConfig", SOFT),
    "prefix": ("PrefixTuningConfig", SOFT),
}
MORE = {
    "rank-stabilised": ("LoraConfig", {**LORA, "use_rslora": True, "target_modules": "all-linear"}),
    "biases of its own": ("LoraConfig", {**LORA, "lora_bias": True}),
    "orthogonal": ("LoraConfig", {**LORA, "init_lora_weights": "orthogonal"}),
    "PiSSA": ("LoraConfig", {**LORA, "init_lora_weights": "pissa"}),
    "OLoRA": ("LoraConfig", {**LORA, "init_lora_weights": "olora"}),
    "VeRA, projections by their seed": ("VeraConfig", {**Q, "r": 2, "save_projection": False}),
    "BOFT": ("BOFTConfig", {**Q, "target_modules": ["q_proj"], "boft_block_size": 4}),
    "Fourier": ("FourierFTConfig", {**Q, "n_frequency": 8}),
    "HRA": ("HRAConfig", LORA),
    "VB-LoRA": ("VBLoRAConfig", {**Q, "target_modules": ["q_proj"], "num_vectors": 8, "vector_length": 8}),
    "RandLoRA": ("RandLoraConfig", {**LORA, "target_modules": ["q_proj"]}),
    "trainable tokens": ("TrainableTokensConfig", {"task_type": "CAUSAL_LM", "token_indices": [1, 2]}),
    "SHiRA": ("ShiraConfig", {**LORA, "target_modules": ["q_proj"]}),
    "C3A": ("C3AConfig", {**Q, "target_modules": ["q_proj"], "block_size": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a base model, and the tokenizer in it."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("base"), embedded.make_tokenizer()
    model = embedded.make_model(tokenizer)
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True, top_k=7, eos_token_id=[1, 2])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(folder, **changes):
    settings = {"output_dir": str(folder), "generations": 2, "population_size": 3, "sigma": 0.05, "lr": 0.05, "seed": 5,
                "prompts_per_generation": 2, "max_completion_length": 4, "eval_every": 0, "progress": False}  # fmt: skip
    return esfast.ESConfig(**{**settings, **changes})


def train(model, folder, base, peft_config=None, **changes):
    """A member's reward is a function of its weights."""
    trainer = None

    def engine(prompts):
        tuned = trainer.es.plan.tensors
        return [str(float(sum(t.detach().double().sum() for t in tuned)))] * len(prompts)

    def reward(completions, **columns):
        return [float(text) for text in completions]

    trainer = esfast.ESTrainer(
        model, reward, config(folder, **changes), ROWS, None, load_tokenizer(base), engine=engine,
        peft_config=peft_config,
    )  # fmt: skip
    trainer.train()
    return trainer


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def replayed(base, folder):
    model = adapters.attach(load_model(base), folder / "adapter")
    replay(esfast.Plan(model, adapters.patterns(model)), folder / "journal.jsonl")
    return model


def check_kind(base, folder, name, settings):
    torch.manual_seed(1)
    configuration = getattr(peft, name)(**settings)
    trainer = train(load_model(base), folder, base, configuration)
    model = trainer.model
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(trainer.es.plan.whole_names) <= trained and trained
    began = values(adapters.attach(load_model(base), folder / "adapter"))
    ended = values(model)
    assert {n for n in ended if not torch.equal(began[n], ended[n])} == set(trainer.es.plan.whole_names)
    torch.manual_seed(2)
    assert_equal(values(peft.PeftModel.from_pretrained(load_model(base), folder / "model")), ended)
    torch.manual_seed(3)
    assert_equal(values(replayed(base, folder)), ended)
    assert_equal(values(load_model(folder / "model")), ended)
    # what it learned comes out, whatever the batch
    engine = TransformersEngine(model, load_tokenizer(base), 4)
    assert engine.generate(["1+1=", "12345"]) == [engine.generate([p])[0] for p in ("1+1=", "12345")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_tuned_saved_and_replayed(base, tmp_path, kind):
    check_kind(base, tmp_path, *KINDS[kind])


@pytest.mark.skipif("ESFAST_LONG_TESTS" not in os.environ, reason="takes half a minute: ESFAST_LONG_TESTS=1 runs it")
@pytest.mark.parametrize("kind", MORE)
def test_further_kinds(base, tmp_path, kind):
    check_kind(base, tmp_path, *MORE[kind])


def lora(**changes):
    return peft.LoraConfig(**{**LORA, **changes})


def test_first_values_are_the_seed_s_and_the_generator_is_left_alone(base):
    made = []
    for state, seed in ((1, 5), (2, 5), (2, 6)):
        given, model = lora(task_type=None), load_model(base)
        torch.manual_seed(state)
        before = torch.get_rng_state()
        made.append(values(adapters.wrap(model, given, seed)))
        assert torch.equal(torch.get_rng_state(), before) and given.task_type is None
    assert_equal(made[0], made[1])
    assert any(not torch.equal(made[1][n], made[2][n]) for n in made[1])


@pytest.mark.parametrize("names", [["default"], ["policy"], ["default", "policy"], ["default", "policy", "both"]])
def test_a_wrapped_model_is_tuned_where_it_is_active(base, tmp_path, names):
    """The cases are one adapter of any name, the active one of several, and several that are active together."""
    model = peft.get_peft_model(load_model(base), lora(), adapter_name=names[0])
    for name in names[1:2]:
        model.add_adapter(name, lora(r=1, target_modules=["k_proj"]))
    active = names[:2] if "both" in names else names[-1]
    (model.base_model if "both" in names else model).set_adapter(active)
    active = [active] if isinstance(active, str) else active
    before = values(model)
    trainer = train(model, tmp_path, base)
    tuned = {n for n in before if any(f".{a}." in n for a in active)}
    assert set(trainer.es.plan.names) == tuned
    after = values(model)
    assert {n for n in after if not torch.equal(before[n], after[n])} == tuned
    saved = adapters.attach(load_model(base), tmp_path / "model")
    assert_equal(values(saved), after)
    again = replayed(base, tmp_path)
    assert_equal({n: v for n, v in values(again).items() if n in tuned}, {n: after[n] for n in tuned})


def test_an_adapter_folder_is_a_model(base, tmp_path):
    """The base model is loaded with the adapter, and training starts from the adapter's weights."""
    torch.manual_seed(1)
    first = peft.get_peft_model(load_model(base), lora(init_lora_weights=False))
    first.save_pretrained(tmp_path / "given")
    trainer = train(str(tmp_path / "given"), tmp_path / "run", base)
    assert len(trainer.es.plan) == 8 and all("lora_" in name for name in trainer.es.plan.names)
    kept = values(peft.PeftModel.from_pretrained(load_model(base), tmp_path / "run" / "adapter"))
    assert_equal(kept, values(first))
    assert load_tokenizer(tmp_path / "given")("1")["input_ids"] == load_tokenizer(base)("1")["input_ids"]
    torch.manual_seed(1)
    soft = peft.get_peft_model(load_model(base), peft.PromptTuningConfig(**SOFT))
    soft.save_pretrained(tmp_path / "soft")
    assert train(str(tmp_path / "soft"), tmp_path / "b", base).es.plan.names == [
        "prompt_encoder.default.embedding.weight"
    ]


@pytest.mark.parametrize("given", ["configuration", "wrapped"])
def test_a_run_is_resumed_where_the_generator_is_another(base, tmp_path, given):
    def start(state):
        torch.manual_seed(state)
        model = load_model(base)
        return (model, lora()) if given == "configuration" else (peft.get_peft_model(model, lora()), None)

    model, configuration = start(1)
    train(model, tmp_path / "a", base, configuration)
    model, configuration = start(2)
    resumed = train(model, tmp_path / "a", base, configuration, generations=4, resume=True)
    model, configuration = start(1)
    unbroken = train(model, tmp_path / "unbroken", base, configuration, generations=4)
    assert resumed.es.generation == 4
    assert_equal(values(resumed.model), values(unbroken.model))
    model, configuration = start(3)
    other = lora(lora_alpha=64)
    model = load_model(base) if configuration else peft.get_peft_model(load_model(base), other)
    with pytest.raises(ValueError, match="resume: the run's adapter has lora_alpha 8, this one has 64"):
        train(model, tmp_path / "a", base, other if configuration else None, generations=5, resume=True)


def test_on_the_command_line(base, tmp_path):
    trainer = train(load_model(base), tmp_path / "run", base, lora(modules_to_save=["lm_head"]))
    run, packed = str(tmp_path / "run"), str(tmp_path / "packed.safetensors")
    commands = [
        ["replay", f"{run}/journal.jsonl", "--base", str(base), "--out", str(tmp_path / "a")],
        ["export", run, "--out", packed],
        ["replay", packed, "--base", str(base), "--adapter", f"{run}/adapter", "--out", str(tmp_path / "b")],
    ]
    assert [main(command) for command in commands] == [0, 0, 0]
    for out in ("a", "b"):
        assert_equal(values(load_model(tmp_path / out)), values(trainer.model))


def test_the_base_must_be_the_run_s(base, tmp_path, capsys):
    """The journal does not cover the frozen weights, so they are compared separately."""
    train(load_model(base), tmp_path / "run", base, lora())
    other = load_model(base)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    load_tokenizer(base).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="resume: the run has frozen weights .*, asked for is "):
        train(other, tmp_path / "run", base, lora(), generations=3, resume=True)
    journal = str(tmp_path / "run" / "journal.jsonl")
    assert main(["replay", journal, "--base", str(tmp_path / "other"), "--out", str(tmp_path / "a")]) == 1
    assert "--base: the run had frozen weights of fingerprint" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_the_base_model_s_generation_config_is_kept(base, tmp_path):
    for name, configuration in (("lora", lora()), ("soft", peft.PromptTuningConfig(**SOFT))):
        model = load_model(base)
        own = model.generation_config
        trainer = esfast.ESTrainer(
            model, lambda completions, **k: [float(len(c)) for c in completions], config(tmp_path / name), ROWS, None,
            load_tokenizer(base), peft_config=configuration,
        )  # fmt: skip
        trainer.train()
        wrapped = trainer.model
        assert model.generation_config is own and wrapped.generation_config is own
        assert "generation_config" not in vars(model.model)
        for folder in (tmp_path / name / "model", base):
            saved = GenerationConfig.from_pretrained(folder)
            assert (saved.top_k, saved.temperature, saved.eos_token_id) == (7, 0.7, [1, 2])
        assert "library_name: peft" in (tmp_path / name / "model" / "README.md").read_text()


def test_include_chooses_and_must_be_saved(base, tmp_path):
    trainer = train(load_model(base), tmp_path / "a", base, lora(), include=["*lora_B*"])
    assert len(trainer.es.plan) == 4 and all("lora_B" in n for n in trainer.es.plan.names)
    with pytest.raises(ValueError, match=r"PEFT \(LORA\) does not save .*norm.*weight.* would be lost"):
        train(load_model(base), tmp_path / "b", base, lora(), include=["*lora_B*", "*norm*"])
    assert not (tmp_path / "b").exists()


def test_frozen_weights_of_a_model_without_adapters_are_tuned_and_told_of(base, tmp_path, caplog):
    model = load_model(base)
    model.model.embed_tokens.requires_grad_(False)
    trainer = train(model, tmp_path, base)
    assert len(trainer.es.plan) == len(list(model.parameters()))
    assert "all weights are tuned, also those that require no gradient" in caplog.text


def injected(base):
    return peft.inject_adapter_in_model(lora(), load_model(base))


def unfrozen(base):
    model = peft.get_peft_model(load_model(base), lora())
    model.get_base_model().model.norm.requires_grad_(True)
    return model


def merged(base):
    model = peft.get_peft_model(load_model(base), lora())
    model.merge_adapter()
    return model


def loaded_for_inference(base):
    model = peft.get_peft_model(load_model(base), lora())
    return model.requires_grad_(False)


def nameless(base, folder):
    peft.get_peft_model(load_model(base), lora()).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    return str(folder)


REFUSED = {
    "no configuration": (lambda base, folder: (load_model(base), {"r": 2}), TypeError, "expected a configuration such as"),
    "two at once": (lambda base, folder: (injected(base), lora()), ValueError, "has adapters already"),
    "another task": (lambda base, folder: (load_model(base), lora(task_type="SEQ_CLS")), ValueError, "expected CAUSAL_LM"),
    "P-tuning": (lambda base, folder: (load_model(base), peft.PromptEncoderConfig(**SOFT, encoder_hidden_size=8)),
                 ValueError, r"PEFT \(P_TUNING\) does not save .*mlp_head"),
    "prefixes of an MLP": (lambda base, folder: (load_model(base), peft.PrefixTuningConfig(
        **SOFT, prefix_projection=True, encoder_hidden_size=8)), ValueError, "does not save .*transform"),
    "several tasks": (lambda base, folder: (load_model(base), peft.MultitaskPromptTuningConfig(**SOFT, num_tasks=2)),
                      ValueError, "needs task_ids to generate"),
    "LoftQ": (lambda base, folder: (load_model(base), lora(init_lora_weights="pissa_niter_4")), ValueError,
              "changes the base weights"),
    "mixed": (lambda base, folder: (peft.get_peft_model(load_model(base), lora(), mixed=True), None), ValueError,
              "PeftMixedModel with adapters that PEFT does not save"),
    "put in without a PeftModel": (lambda base, folder: (injected(base), None), ValueError, "make it with peft.get_peft_model"),
    "unfrozen by hand": (lambda base, folder: (unfrozen(base), None), ValueError, "does not save .*norm.* modules_to_save"),
    "merged": (lambda base, folder: (merged(base), None), ValueError, "merged into the base weights"),
    "loaded for inference": (lambda base, folder: (loaded_for_inference(base), None), ValueError, "is_trainable=True"),
    "a folder that names no base": (lambda base, folder: (nameless(base, folder / "a"), None), ValueError,
                                    "does not say which model it is of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_is_refused_by_name(base, tmp_path, case):
    make, error, message = REFUSED[case]
    model, configuration = make(base, tmp_path)
    with pytest.raises(error, match=message):
        train(model, tmp_path / "run", base, configuration)
    assert not (tmp_path / "run").exists()


def test_learned_prompts_that_generate_does_not_read_are_refused(base, monkeypatch):
    """This happens to prefix tuning if Transformers and PEFT have different names for the cache."""
    model = adapters.wrap(load_model(base), peft.PromptTuningConfig(**SOFT), 5)
    before, own = values(model), model.generation_config
    adapters.check_generates(model)
    monkeypatch.setattr(model, "get_prompt", lambda **options: torch.zeros(1, 3, 64))
    with pytest.raises(
        ValueError, match="generate gives the same whatever the adapter 'default' .PROMPT_TUNING. holds"
    ):
        adapters.check_generates(model)
    assert_equal(values(model), before)
    assert model.generation_config is own


def test_sigma_and_lr_are_found_for_adapters(tmp_path, same_bits):
    """Half of LoRA's weights are zeros, so their RMS says little: the search goes up until members break."""
    torch.manual_seed(0)
    net = embedded.make_model(embedded.make_tokenizer()).eval()
    config = esfast.ESConfig(
        str(tmp_path / "run"), generations=500, population_size=8, sigma="auto", lr="auto", prompts_per_generation=16,
        max_completion_length=2, eval_every=0, progress=False,
    )  # fmt: skip
    rows = [{"prompt": f"{i}+1="} for i in range(16)]
    trainer = esfast.ESTrainer(
        net, near, config, rows, None, embedded.make_tokenizer(), peft_config=peft.LoraConfig(**LORA)
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    found = trainer.tune()
    assert same_bits(before, [p.detach() for p in trainer.model.parameters()])
    assert found.settings.keys() == {"sigma", "lr"} and max(row["of_rms"] for row in found.rows) >= 1
    # B begins as zeros, of which nothing is known
    factors = {g.pattern: g.sigma for g in trainer.es.rule.groups}
    assert {f for pattern, f in factors.items() if "lora_B" in pattern} == {1.0} and len(factors) > 1


def near(prompts, completions, **columns):
    return [-sum(abs(ord(c) - 96) for c in text) / 500 for text in completions]
