import os
import random
import zlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esfast import tasks
from esfast.rollout.engine import TransformersEngine
from esfast.tasks import base, countdown, embedded

CORPUS_CRC = (2711859176, 1418731004)


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch):
    monkeypatch.setattr(embedded, "CORPUS", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "CORPUS", 1)
        return embedded.build(tmp_path_factory.mktemp("embedded") / "model", seed=3, steps=40, progress=False)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_loads_through_the_auto_classes(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen2" and model.dtype == torch.float32 and not model.training
    assert 100_000 < sum(weight.numel() for weight in model.parameters()) < 150_000
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= set(os.listdir(folder))
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert len(TransformersEngine(model, tokenizer, 4).generate(["1 2 3=6\n<think>"])) == 1
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings


def test_pretraining_learns(folder):
    tokenizer = embedded.make_tokenizer()
    ids, labels = embedded._corpus(tokenizer, 9, countdown.RECIPE)  # examples of another seed
    torch.manual_seed(0)
    trained, untrained = AutoModelForCausalLM.from_pretrained(folder), embedded.make_model(tokenizer)
    with torch.no_grad():
        before, after = (m(input_ids=ids[:100], labels=labels[:100]).loss.item() for m in (untrained, trained))
    assert before > 5 and after < 2.5


def test_same_seed_same_bits(folder, tmp_path):
    expected = weights(folder)
    random.seed(11)
    # The model does not depend on the caller's random state, and leaves it as it is.
    torch.manual_seed(11)
    state = torch.get_rng_state()
    again = weights(embedded.build(tmp_path / "again", seed=3, steps=40, progress=False))
    assert torch.equal(torch.get_rng_state(), state)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())
    other = weights(embedded.build(tmp_path / "other", seed=4, steps=1, progress=False))
    assert not torch.equal(other["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


def test_leaves_the_number_of_threads_alone(tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        # The caller may have switched gradients off.
        with torch.no_grad():
            embedded.build(tmp_path / "model", steps=1, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "text",
    [
        *(countdown.problems(1, 0, style=style)[0]["prompt"] for style in countdown.PROMPTS),
        "".join(map(chr, range(32, 127))) + "\n\t",
        "  two  spaces , and .\n\n a \u2212 b \u00d7 \u00e9 \u4e2d \U0001f600 ",
        "<think>7*(1+2)</think>\n<answer>7*(1+2)</answer>",
        "<think<answer></answer></think>>",
    ],
)
def test_tokenizer_round_trip(folder, text):
    for tokenizer in (embedded.make_tokenizer(), AutoTokenizer.from_pretrained(folder)):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text


def test_ids_survive_the_auto_class(folder):
    made, loaded = embedded.make_tokenizer(), AutoTokenizer.from_pretrained(folder)
    text = "".join(map(chr, range(1, 256))) + "".join(embedded.TAGS) + "it's 12 345\n\n  <|pad|><|endoftext|>"
    assert made(text)["input_ids"] == loaded(text)["input_ids"]
    assert (made.pad_token_id, made.eos_token_id) == (loaded.pad_token_id, loaded.eos_token_id)
    assert loaded.padding_side == "left"


def test_tags_are_one_token_each_and_not_special():
    tokenizer = embedded.make_tokenizer()
    assert [len(tokenizer(tag)["input_ids"]) for tag in embedded.TAGS] == [1] * 4
    assert not set(tokenizer.all_special_ids) & {tokenizer(tag)["input_ids"][0] for tag in embedded.TAGS}
    ids = tokenizer("7<|endoftext|><|pad|>")["input_ids"]
    assert ids[1:] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "7"


def test_examples_are_right_partly_tagged_and_never_held_out():
    tokenizer = embedded.make_tokenizer()
    ids, labels = embedded._corpus(tokenizer, 0, countdown.RECIPE)
    assert int((labels != -100).sum(1).max()) <= 16, "a completion should fit the task's max_new_tokens"
    tagged = []
    for row_ids, row_labels in zip(ids, labels, strict=True):
        prompt = tokenizer.decode(row_ids[: int((row_labels == -100).long().argmin())], skip_special_tokens=True)
        completion = tokenizer.decode(row_labels[row_labels != -100])
        assert completion.endswith("<|endoftext|>") and prompt.endswith("\n<think>")
        problem, target = prompt.split("\n")[0].split("=")
        numbers = [int(n) for n in problem.split()]
        result = completion.removesuffix("<|endoftext|>").removeprefix("</think>\n")
        tagged.append(result.startswith("<answer>"))
        answer = f"<answer>{result.removeprefix('<answer>').removesuffix('</answer>')}</answer>"
        assert countdown.is_correct(answer, numbers, int(target))
        assert countdown.split_of(numbers, int(target)) == "train"
        assert tagged[-1] or numbers[0] > countdown.ALWAYS_TAGGED_UP_TO
    assert 0.25 < sum(tagged) / len(tagged) < 0.5


def test_the_countdown_model_is_taught_what_it_always_was():
    """The CRC-32 of 1000 examples of seed 0. If the examples change, the figures of the front page must be measured
    again."""
    ids, labels = embedded._corpus(embedded.make_tokenizer(), 0, countdown.RECIPE)
    assert (zlib.crc32(ids.numpy().tobytes()), zlib.crc32(labels.numpy().tobytes())) == CORPUS_CRC


@pytest.mark.parametrize("task", tasks.MODULES)
def test_examples_of_a_task_fit_it_earn_rewards_and_are_never_held_out(task):
    pytest.importorskip("math_verify", reason="the math task needs math-verify") if task == "math" else None
    made = tasks.get(task, style=embedded.STYLE)
    tokenizer, recipe = embedded.make_tokenizer(), tasks.MODULES[task].RECIPE
    pairs = recipe.examples(5, 1)
    assert pairs == recipe.examples(5, 1) != recipe.examples(6, 1)
    assert max(len(tokenizer(c)["input_ids"]) for _, c in pairs) < made.max_new_tokens
    assert not {row["prompt"] for row in made.eval_rows(300)} & {prompt for prompt, _ in pairs}
    rows = {r["prompt"]: r for r in base.thousands_of(tasks.MODULES[task].problems, 5, 1)}
    columns = {key: [rows[p][key] for p, _ in pairs] for key in next(iter(rows.values())) if key != "prompt"}
    right = made.accuracy(prompts=[p for p, _ in pairs], completions=[c for _, c in pairs], **columns)
    assert 0.2 < sum(right) / len(right) < 0.65  # rewarded ones are there to be brought out, and not the rule


def test_no_half_written_folder(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)  # the weights are written by then
    with pytest.raises(RuntimeError, match="disk full"):
        embedded.build(tmp_path / "model", steps=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_build_errors(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="remove it"):
        embedded.build(tmp_path / "mine", steps=1)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    with pytest.raises(ValueError, match="steps"):
        embedded.build(tmp_path / "model", steps=0)


def fake_build(folder, seed=0, steps=1, progress=True, task="countdown"):
    Path(folder).mkdir(parents=True)
    return Path(folder)


def test_cached_builds_once_per_seed(tmp_path, monkeypatch):
    built = []
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "build", lambda *a, **k: (built.append(a), fake_build(*a, **k))[1])
    first = embedded.cached()
    assert first == embedded.cached(seed=0) and first.parent == tmp_path / "cache" and len(built) == 1
    assert embedded.cached(seed=1) != first and len(built) == 2


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("", "# words beside the recipe\n", True),
        ('"""Countdown', '"""Other words on Countdown', True),
        ("ALWAYS_TAGGED_UP_TO = ", "ALWAYS_TAGGED_UP_TO = 1 + ", False),
        ("\n\n\ndef ", "\n\n\nMORE = 1\n\n\ndef ", False),
        ("TOLERANCE", "DISTANCE", False),
    ],
    ids=["comment", "docstring", "number", "line", "name"],
)
def test_cached_names_follow_the_recipe_and_not_what_is_said_of_it(old, new, same, tmp_path, monkeypatch):
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "build", fake_build)
    first, text = embedded.cached(), Path(countdown.__file__).read_text(encoding="utf-8")
    changed = tmp_path / "countdown.py"
    changed.write_text(new + text if not old else text.replace(old, new), encoding="utf-8")
    assert changed.read_text(encoding="utf-8") != text
    monkeypatch.setattr(countdown, "__file__", str(changed))
    assert (embedded.cached() == first) is same


def test_what_code_does_is_its_text_without_words():
    said = '"""A module."""\n\nclass A:\n    """A class."""\n\n    def f(self):  # a comment\n        """A method."""\n        return "a"'
    assert embedded.code_of(said) == embedded.code_of("class A:\n    def f(self):\n        return ('a')")
    assert embedded.code_of(said) != embedded.code_of(said.replace('return "a"', 'return "b"'))
    assert embedded.code_of("x = 1\n'a text amidst'") != embedded.code_of("x = 1")


def test_cached_when_another_process_was_faster(tmp_path, monkeypatch):
    def overtaken(folder, *args, **kwargs):
        fake_build(folder)
        raise OSError("Directory not empty")

    def unwritable(*args, **kwargs):
        raise PermissionError("read-only file system")

    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "build", overtaken)
    assert embedded.cached().is_dir()
    monkeypatch.setattr(embedded, "build", unwritable)
    with pytest.raises(PermissionError):
        embedded.cached(seed=5)
