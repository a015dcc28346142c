"""What prompts vLLM engines take, one and a fleet, on stand-ins for vLLM and Ray: those that Transformers takes."""

import pytest
import vllm_stand_in
from fleets import LIMIT, PROMPTS, ROWS, asked, train_a_fleet, trainer
from fleets import folder as folder  # noqa: PLC0414  a fixture
from fleets import vllm as vllm  # noqa: PLC0414  a fixture
from test_encoding import BOS, EOS, tokenizer_with
from transformers import Qwen2ForCausalLM

from esfast.integrations.ray import Fleet
from esfast.integrations.vllm_engine import VLLMEngine
from esfast.rollout.engine import TransformersEngine
from esfast.tasks import embedded

TURNS = f"{{{{ '{BOS}' }}}}{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{{% endfor %}}"
ENGINES = pytest.mark.parametrize("kind", [VLLMEngine, Fleet])


@ENGINES
@pytest.mark.parametrize(
    ("template", "special", "read"),
    [
        (f"$A {EOS}", {}, ["7", f"7{EOS}", f"{BOS}7"]),
        (f"{BOS} $A", {"bos_token": BOS}, [f"{BOS}7", f"{BOS}7{EOS}", f"{BOS}7"]),
        (f"{BOS} $A {EOS}", {"bos_token": BOS}, [f"{BOS}7", f"{BOS}7{EOS}", f"{BOS}7"]),
        ("[CLS] $A [SEP]", {"cls_token": "[CLS]", "sep_token": "[SEP]"}, ["[CLS]7", f"[CLS]7{EOS}", f"[CLS]{BOS}7"]),
        ("$A", {}, ["7", f"7{EOS}", f"{BOS}7"]),
    ],
)
def test_engines_read_prompts_as_transformers_engine_does(folder, kind, template, special, read):
    model = folder(template, **special)
    tokenizer = tokenizer_with(template, **special)
    theirs = TransformersEngine(Qwen2ForCausalLM.from_pretrained(model), tokenizer, 3)
    engine = kind(model, 3)
    assert engine.generate(PROMPTS) == theirs.generate(PROMPTS)
    assert [tokenizer.decode(row) for row in asked()] == read and asked() == theirs.prompts(PROMPTS)
    engine.close()


def test_members_of_a_fleet_get_the_same_prompts(folder, tmp_path):
    """A chat whose template begins with bos, of a tokenizer that puts one before every text, and an end behind."""
    template = f"{BOS} $A {EOS}"
    tokenizer = tokenizer_with(template, bos_token=BOS)
    tokenizer.chat_template = TURNS
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in "ab"]
    made = trainer(tmp_path / "run", folder(template, bos_token=BOS), rows, rows[:1], processing_class=tokenizer)
    made.train()
    shown = {tokenizer.decode(row) for row in asked()}
    assert shown == {f"{BOS}<user>a", f"{BOS}<user>b"} and len(asked()) == 2 + 2 * 4 * 2


def test_the_tokenizer_that_is_given_reads(folder, tmp_path):
    """Prompts are read with the given tokenizer; the engines write completions with the one in the model's folder."""
    given, model = tokenizer_with(f"$A {EOS}"), folder(f"{BOS} $A", bos_token=BOS)
    fleet = Fleet(model, 3, processing_class=given)
    fleet.generate(["7"])
    assert asked() == [given("7", add_special_tokens=False)["input_ids"]]
    other = folder(f"$A {EOS}")
    Fleet(model, 3, tokenizer=str(other)).generate(["8"])
    assert asked()[1:] == [given("8", add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("limit", [None, 20])
def test_a_prompt_that_is_too_long_is_told_before_anything_is_generated(folder, tmp_path, which, limit):
    """The limit is the model's context, or the shorter `max_model_len` of the engines."""
    rows = [dict(row) for row in ROWS]
    for i in (2, 4):
        rows[i]["prompt"] = "x" * ((limit or LIMIT) - 3)
    data = (rows, ROWS) if which == "train_dataset" else (ROWS, rows)
    options = {} if limit is None else {"max_model_len": limit}
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path / "run", folder(), *data, engines=2, engine_options=options)
    for part in (
        f"{which}: row 2: the prompt 'xxx",
        f"exceeds the model's context of {limit or LIMIT}",
        "shorten the prompt, or lower max_completion_length",
        "(and 1 more rows: 4)",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists() and not asked()
    assert [llm.running for llm in vllm_stand_in.LLM.made] == [False, False]
    trainer(tmp_path / "run", folder(), *data, engine_options=options, max_completion_length=3).train()


def test_fresh_rows_are_looked_at_before_the_first_evaluation(folder, tmp_path):
    made = trainer(tmp_path / "run", folder(), lambda *_: [{"prompt": "x" * LIMIT}], ROWS)
    with pytest.raises(ValueError, match="train_dataset: row 0: the prompt 'xxx"):
        made.train()
    assert not asked()


@ENGINES
def test_what_no_engine_takes(folder, kind):
    tokenizer = embedded.make_tokenizer()
    tokenizer.add_tokens(["<more>"])
    fleet = {"processing_class": tokenizer} if kind is Fleet else {}
    engine = kind(folder(), 4, **fleet)
    engine.prompts.tokenizer, engine.prompts.encode.tokenizer = tokenizer, tokenizer
    for error, words, prompts in (
        (ValueError, "the prompt '' has no tokens", ["a", ""]),
        (ValueError, "lone surrogate", ["\ud83d"]),
        (ValueError, "has the token '<more>'", ["a<more>"]),
        (ValueError, r"has 45 tokens, which with 4 .*context of 48.*lower max_new_tokens", ["a" * 45]),
        (TypeError, "a list of strings", "abc"),
        (TypeError, "a list of strings", [["a"]]),
    ):
        with pytest.raises(error, match=words):
            engine.generate(prompts)
        if error is ValueError:
            with pytest.raises(error, match=words):
                engine.check(prompts)
    assert not asked() and engine.generate([]) == []
    engine.check(["a" * 44])
    (text,) = engine.generate(["a" * 44])
    assert len(asked()[0]) == 44
    engine.close()


def test_a_file_s_prompts_are_looked_at_by_the_command_line(folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "%s"}\n' % ("x" * LIMIT))
    assert train_a_fleet(folder(), tmp_path) == 1
    said = capsys.readouterr().err
    assert "row 1: the prompt 'xxx" in said and "or lower --max-completion-length" in said and not asked()
