"""Models that are whole and finite are accepted; any other is refused, with a reason, before anything is written."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import esfast
from esfast.cli import main
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.models import load_model, load_tokenizer
from esfast.tasks import embedded

BERT = dict(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
LLAMA = BERT | {"num_key_value_heads": 2, "pad_token_id": 0}
T5 = dict(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
BART = dict(
    vocab_size=50,
    d_model=8,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=8,
    decoder_ffn_dim=8,
)
GPT2 = dict(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a model that is as it should be, of untied weights."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    embedded.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """copied(change): another such folder, whose tensors the function has changed, in a dict, in place."""

    def make(change=lambda tensors: None):
        folder = tmp_path / "copy"
        shutil.copytree(whole, folder)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


REFUSED = {
    "T5": (
        lambda: T5ForConditionalGeneration(T5Config(**T5)),
        "sequence-to-sequence model .T5ForConditionalGeneration",
    ),
    "BART": (lambda: BartForConditionalGeneration(BartConfig(**BART)), "sequence-to-sequence model .BartFor"),
    "BERT": (lambda: BertForMaskedLM(BertConfig(**BERT)), "an encoder, which reads the text on both sides.*BertForM"),
    "BERT's LM head": (lambda: BertLMHeadModel(BertConfig(**BERT)), "an encoder"),
    "ViT": (
        lambda: ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
        "a vit model, of which Transformers has no causal language model .ViTModel",
    ),
    "classifier": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA)),
        r"1 of 12 weights are not in the checkpoint.*'lm_head.weight'.*LlamaForSequenceClassification",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_of_other_kinds(name, tmp_path):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        load_model(saved(make(), tmp_path / "model"))


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(**GPT2)),  # tied
        GPT2Model(GPT2Config(**GPT2)),  # without the head, which is the embedding
        BertLMHeadModel(BertConfig(**BERT, is_decoder=True)),
        LlamaForCausalLM(LlamaConfig(**LLAMA)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_whole_models_are_loaded(model, tmp_path):
    loaded = load_model(saved(model, tmp_path / "model"), dtype=torch.float32)
    assert all(
        torch.equal(loaded.state_dict()[f"transformer.{n}" if isinstance(model, GPT2Model) else n], p)
        for n, p in model.named_parameters()
    )


def test_weights_that_are_missing_or_of_another_shape(copied):
    for change in (
        lambda t: t.pop("model.layers.0.mlp.up_proj.weight"),
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}),
    ):
        folder = copied(change)
        with pytest.raises(ValueError, match="up_proj"):
            load_model(folder)
        shutil.rmtree(folder)


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder):
    class Evil:
        def __reduce__(self):
            return (print, ("run by the unpickler",))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")


def with_code(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text("print('run by the loader')")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncated, ValueError, "SafetensorError|incomplete"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), ValueError, "can't be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), OSError, "no file named"),
        (pickled, (ValueError, OSError), "[Uu]npickl|weights_only|[Ww]eights only|from pytorch checkpoint"),
        (with_code, ValueError, "code of its own"),
        (lambda folder: (folder / "config.json").unlink(), (OSError, ValueError), "config.json|model_type"),
        (lambda folder: (folder / "config.json").write_text("{"), (OSError, ValueError), "config"),
        (shutil.rmtree, OSError, "copy"),
    ],
    ids=["truncated", "empty", "no weights", "pickled", "own code", "no config", "broken config", "no folder"],
)
def test_damaged_folders(copied, damage, error, message, capfd):
    folder = copied()
    damage(folder)
    with pytest.raises(error, match=message) as raised:
        load_model(folder)
    assert str(folder) in str(raised.value) and len(str(raised.value)) < 700
    assert "run by the" not in "".join(capfd.readouterr())


def test_pickled_tensors_alone_are_loaded(copied):
    folder = copied()
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(load_model(folder).lm_head.weight, tensors["lm_head.weight"])


def test_a_folder_without_a_tokenizer(tmp_path):
    saved(GPT2LMHeadModel(GPT2Config(**GPT2)), tmp_path / "model")
    with pytest.raises((OSError, ValueError), match="the tokenizer of .*model"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers(value, dtype, tmp_path):
    tokenizer = embedded.make_tokenizer()
    model = embedded.make_model(tokenizer).to(dtype)
    with torch.no_grad():
        model.model.norm.weight[5] = value
        model.model.layers[1].mlp.up_proj.weight[7, 3] = value
    before = {name: p.clone() for name, p in model.named_parameters()}
    message = "2 of .* tensors hold NaN or infinite weights: 'model.layers.1.mlp.up_proj.weight', 'model.norm.weight'"
    with pytest.raises(ValueError, match=message):
        esfast.ES(model)
    args = esfast.ESConfig(output_dir=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=message):
        esfast.ESTrainer(
            model,
            lambda completions, **_: [0.0] * len(completions),
            args,
            [{"prompt": "a"}],
            processing_class=tokenizer,
        )
    assert not (tmp_path / "run").exists()
    assert all(p.equal(before[n]) or "up_proj" in n or "norm" in n for n, p in model.named_parameters())


def test_large_weights_are_numbers():
    esfast.ES([("w", torch.full((1000,), 6e4, dtype=torch.float16)), ("v", torch.full((1000,), 3e38))])


@pytest.mark.parametrize(
    "model",
    [T5ForConditionalGeneration(T5Config(**T5)), GPT2Model(GPT2Config(**GPT2)), BertForMaskedLM(BertConfig(**BERT))],
    ids=lambda model: type(model).__name__,
)
def test_models_that_are_handed_over_but_continue_no_text(model):
    with pytest.raises(ValueError, match=f"model: a {type(model).__name__}"):
        TransformersEngine(model, embedded.make_tokenizer(), 4)


def test_the_commands_refuse_them_too(copied, tmp_path, capsys):
    folder = str(copied(lambda tensors: tensors.pop("lm_head.weight")))
    for command in (
        ["train", "--model", folder, "--task", "countdown", "--out", str(tmp_path / "run")],
        ["eval", "--model", folder],
        ["replay", "journal.jsonl", "--base", folder, "--out", str(tmp_path / "tuned")],
    ):
        assert main(command) == 1
        assert "'lm_head.weight'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "tuned").exists()
