"""Models, tokenizers and rows in the forms that scripts have them in; the end of a GRPO script."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import esfast
from esfast.tasks import embedded
from esfast.utils.rows import check_rows
from esfast.utils.unwrap import named_parameters, unwrapped

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 2))


def compiled(module):
    return torch.compile(module, backend="eager")


def in_parts(module):
    module[0], module[2] = compiled(module[0]), nn.DataParallel(module[2])
    module[2].module[1] = compiled(module[2].module[1])
    return module


def checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module[2] = checkpoint_wrapper(module[2])
    return module


def in_ddp(module):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(module)
    finally:
        dist.destroy_process_group()


WRAPPERS = {
    "compiled": compiled,
    "compiled twice": lambda m: compiled(nn.DataParallel(compiled(m))),
    "parallel": nn.DataParallel,
    "distributed": in_ddp,
    "parts": in_parts,
    "parts in all": lambda m: compiled(in_parts(m)),
    "checkpointed": checkpointed,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_has_the_plain_models_names_and_members(wrap):
    plain, model = net(), WRAPPERS[wrap](net())
    assert esfast.Plan(model).names == esfast.Plan(plain).names
    assert esfast.Plan(model, include="2.*").names == ["2.0.weight", "2.0.bias", "2.1.weight", "2.1.bias"]
    for m in (plain, model):
        es = esfast.ES(m, sigma=0.1, lr=0.1, population_size=4)
        for member in es.population():
            member.reward = member.index
        es.step()
        with esfast.perturbed(m, 7, 0.1):
            m.seen = torch.cat([p.detach().flatten() for p in m.parameters()])
    assert torch.equal(plain.seen, model.seen)
    assert esfast.Plan(model).fingerprint() == esfast.Plan(plain).fingerprint()


def test_other_modules_called_so_keep_their_names():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self._orig_mod = nn.Linear(2, 2), nn.Linear(2, 2)

    own = Own()
    assert [n for n, _ in named_parameters(own)] == [n for n, _ in own.named_parameters()]


def test_parts_are_wrapped_again_after_saving():
    model = in_parts(net())
    before = [(n, id(m)) for n, m in model.named_modules()]
    with pytest.raises(KeyError), unwrapped(model) as plain:
        assert list(plain.state_dict()) == list(net().state_dict())
        raise KeyError
    assert [(n, id(m)) for n, m in model.named_modules()] == before


def language_model():
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    return embedded.make_model(tokenizer).eval(), tokenizer


def config(folder, **changes):
    settings = {
        "output_dir": folder,
        "generations": 2,
        "population_size": 2,
        "sigma": 0.05,
        "lr": 0.05,
        "prompts_per_generation": 2,
        "max_completion_length": 3,
        "progress": False,
    }
    return esfast.ESConfig(**{**settings, **changes})


def letters(completions, **columns):
    return [float(len(set(str(c)))) for c in completions]


def trained(folder, model, tokenizer, rows=("a", "b", "c"), **options):
    rows = [{"prompt": p} for p in rows] if isinstance(rows, tuple) else rows
    trainer = esfast.ESTrainer(model, letters, config(folder), rows, None, tokenizer, **options)
    trainer.train()
    return trainer


def compile_layers(model):
    model.model.layers[1].mlp = compiled(model.model.layers[1].mlp)
    return model


@pytest.fixture(scope="module")
def plainly_trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    trained(folder, *language_model())
    return folder


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, compiled, compile_layers, lambda m: nn.DataParallel(compiled(m))],
    ids=["parallel", "compiled", "layers", "both"],
)
def test_a_wrapped_language_model_is_trained_and_saved_as_the_plain_one(tmp_path, wrap, plainly_trained):
    model, tokenizer = language_model()
    trained(tmp_path / "run", wrap(model), tokenizer)
    for name in ("journal.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (plainly_trained / name).read_bytes(), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_a_model_by_its_path(tmp_path, plainly_trained):
    model, tokenizer = language_model()
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "base")
    trainer = trained(tmp_path / "run", tmp_path / "base", None)
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == (plainly_trained / "journal.jsonl").read_bytes()
    trained(tmp_path / "other", trainer.model, tmp_path / "base")


class Processor:
    """A processor, as multimodal models have one: it holds a tokenizer and more."""

    def __init__(self, tokenizer, chat_template=None):
        self.tokenizer, self.chat_template = tokenizer, chat_template

    def __call__(self, text, images=None):
        raise AssertionError("asked for images")


def test_a_processor_in_place_of_a_tokenizer(tmp_path, plainly_trained):
    model, tokenizer = language_model()
    trained(tmp_path / "run", model, Processor(tokenizer))
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == (plainly_trained / "journal.jsonl").read_bytes()
    model, tokenizer = language_model()
    chats = [{"prompt": [{"role": "user", "content": text}]} for text in "abc"]
    trained(tmp_path / "chats", model, Processor(tokenizer, TEMPLATE), chats)
    assert tokenizer.chat_template is None
    with pytest.raises(TypeError, match="processing_class: expected a tokenizer, or a processor that has one, got 5"):
        trained(tmp_path / "none", model, 5)
    with pytest.raises(TypeError, match="processing_class: the model was not loaded by a name .* give its tokenizer"):
        trained(tmp_path / "none", model, None)


def tables():
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    rows = [{"prompt": p, "n": i} for i, p in enumerate("abc")]
    columns = {"prompt": list("abc"), "n": [0, 1, 2]}
    return {
        "dataset": datasets.Dataset.from_list(rows),
        "frame": pandas.DataFrame(columns),
        "columns": columns,
        "arrow": datasets.Dataset.from_list(rows).data.table,
        "texts": list("abc"),
        "tuple": tuple("abc"),
        "series": pandas.Series(list("abc")),
        "array": pandas.Series(list("abc")).to_numpy(),
    }


def test_rows_in_every_form():
    for form, rows in tables().items():
        found = check_rows("train_dataset", rows)
        numbered = form in ("dataset", "frame", "columns", "arrow")
        assert [dict(row) for row in found] == [
            {"prompt": p} | ({"n": i} if numbered else {}) for i, p in enumerate("abc")
        ], form


def test_splits_and_streams_are_told_what_to_do(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "a"}])
    for data, message in (
        (datasets.DatasetDict(train=rows, test=rows), r"train, test\) name one, as dataset\[\"train\"\]"),
        (rows.to_iterable_dataset(), r"list\(\.\.\.\)"),
        ((row for row in rows), r"list\(\.\.\.\)"),
        ("prompts.jsonl", "expected rows"),
        ({"prompts": rows, "completions": rows}, "name one"),
    ):
        with pytest.raises(TypeError, match=message):
            trained(tmp_path / "run", *language_model(), rows=data)
    assert not (tmp_path / "run").exists()


def test_the_end_of_a_grpo_script(tmp_path):
    trainer = trained(tmp_path / "run", *language_model())
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    trainer.save_model(trainer.args.output_dir)
    trainer.save_model()
    trainer.save_model(tmp_path / "elsewhere" / "final", _internal_call=True)
    trainer.save_model(str(tmp_path / "elsewhere" / "final"))
    for folder in (tmp_path / "run" / "model", tmp_path / "elsewhere" / "final"):
        assert (folder / "model.safetensors").read_bytes() == weights and (folder / "README.md").exists()
    assert (tmp_path / "run" / "journal.jsonl").exists()
    with pytest.raises(FileExistsError, match="holds other things than a model"):
        trainer.save_model(tmp_path)
    with pytest.raises(AttributeError, match=r"ESTrainer has no push_to_hub: upload the folder .*run/model"):
        trainer.push_to_hub()
    with pytest.raises(AttributeError, match="'ESTrainer' object has no attribute 'fly'"):
        trainer.fly()


def test_a_model_may_be_saved_before_training_and_a_checkpoint_is_no_argument_of_train(tmp_path):
    model, tokenizer = language_model()
    trainer = esfast.ESTrainer(model, letters, config(tmp_path / "run"), ["a", "b"], None, tokenizer)
    trainer.save_model(tmp_path / "base")
    with pytest.raises(ValueError, match="resume_from_checkpoint=True: a run goes on in its own folder"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=None)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").num_parameters() == model.num_parameters()
