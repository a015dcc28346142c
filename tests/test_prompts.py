"""Prompts that no model can take are refused before anything is generated; the error names their rows and says what to
change."""

import json
import logging

import pytest
import torch

import esfast
from esfast import cli
from esfast.rollout.engine import TransformersEngine, as_engine
from esfast.rollout.prompts import check_prompts
from esfast.tasks import embedded
from esfast.utils.rows import check_rows

TEMPLATE = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no such role') }}{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    return embedded.make_model(tokenizer).eval(), tokenizer


def limit(model):
    return model[0].config.max_position_embeddings


def trainer(tmp_path, model, train, evaluated=None, engine=None, **changes):
    settings = {"generations": 2, "population_size": 2, "prompts_per_generation": 2, "max_completion_length": 4}
    config = esfast.ESConfig(output_dir=str(tmp_path / "run"), progress=False, **settings | changes)
    return esfast.ESTrainer(model[0], rewarded, config, train, evaluated, model[1], engine=engine)


def rewarded(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def long(model):
    return "x" * (limit(model) - 3)


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_a_prompt_that_is_too_long_is_told_with_its_row_and_the_setting(tmp_path, model, which):
    good = [{"prompt": f"{i}+1="} for i in range(20)]
    rows = [dict(row) for row in good]
    for i in (7, 9, 15):
        rows[i]["prompt"] = long(model)
    train, evaluated = (rows, good) if which == "train_dataset" else (good, rows)
    with pytest.raises(ValueError) as caught:
        trainer(tmp_path, model, train, evaluated)
    for part in (
        f"{which}: row 7: the prompt 'xxx",
        f"exceeds the model's context of {limit(model)}",
        "shorten the prompt, or lower max_completion_length",
        "(and 2 more rows: 9, 15)",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()
    trainer(tmp_path, model, train, evaluated, max_completion_length=3)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "row 2: the prompt '' has no tokens"),
        ("a\ud83d", ValueError, "row 2: prompt: .* lone surrogate"),
        (None, TypeError, "row 2: prompt: expected a text, or a chat .* got None"),
        (3, TypeError, "row 2: prompt: expected a text, or a chat .* got 3"),
        (float("nan"), TypeError, "row 2: prompt: expected a text"),
        (b"abc", TypeError, "row 2: prompt: expected a text"),
        ([], TypeError, "row 2: prompt: expected a text"),
        (["a"], TypeError, "row 2: prompt: expected a text"),
        ([{"role": "user", "content": "x"}], ValueError, "row 2: prompt: .* needs a tokenizer with a chat template"),
    ],
)
def test_other_prompts_that_no_model_takes(tmp_path, model, prompt, error, message):
    rows = [{"prompt": "1+1="}, {"prompt": "2+2="}, {"prompt": prompt}]
    for train, evaluated in ((rows, None), (rows[:2], rows)):
        with pytest.raises(error, match=message):
            trainer(tmp_path, model, train, evaluated)
    with pytest.raises(error, match=message.removeprefix("row 2: ")):
        trainer(tmp_path, model, lambda generation, count: rows[1:]).train()


def test_chats_are_looked_at_as_they_are_rendered(tmp_path, model):
    tokenizer = embedded.make_tokenizer()
    tokenizer.chat_template = TEMPLATE

    def rows(role, content):
        return [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": [{"role": role, "content": content}]}]

    with pytest.raises(ValueError, match="train_dataset: row 1: .*no such role"):
        trainer(tmp_path, (model[0], tokenizer), rows("tool", "x"))
    with pytest.raises(ValueError, match="train_dataset: row 1: .* exceeds the model's context"):
        trainer(tmp_path, (model[0], tokenizer), rows("user", long(model)))


def test_the_first_batch_of_fresh_prompts_is_looked_at_and_is_the_one_that_is_used(tmp_path, model):
    asked, generated = [], []

    def fresh(generation, count):
        asked.append(generation)
        return [{"prompt": f"{len(asked)}"}, {"prompt": "1"}]

    class Engine:
        def generate(self, prompts):
            generated.append(prompts[0])
            return ["a"] * len(prompts)

        def check(self, prompts):
            if "9" in prompts:
                raise ValueError("nine")

    trainer(tmp_path, model, fresh, engine=Engine()).train()
    assert asked == [0, 1] and generated == ["1", "1", "2", "2"]
    with pytest.raises(ValueError, match="train_dataset: row 0: nine"):
        trainer(tmp_path / "b", model, lambda *_: [{"prompt": "9"}], [{"prompt": "1"}], Engine()).train()
    assert len(generated) == 4, "not even an evaluation"
    with pytest.raises(ValueError, match="eval_dataset: row 1: nine"):
        trainer(tmp_path / "c", model, fresh, [{"prompt": "1"}, {"prompt": "9"}], Engine())


def test_all_rows_are_looked_at_in_few_calls(model, monkeypatch):
    sizes = []
    engine = TransformersEngine(*model, 4)
    monkeypatch.setattr(
        engine.prompts,
        "encode",
        lambda prompts, inner=engine.prompts.encode: sizes.append(len(prompts)) or inner(prompts),
    )
    rows = [{"prompt": str(i)} for i in range(2500)]
    check_prompts("data", rows, lambda batch: [row["prompt"] for row in batch], engine)
    assert sizes == [1000, 1000, 500] and not engine.prompts._kept, "nothing piles up"
    rows[2400]["prompt"] = long(model) + "xx"
    with pytest.raises(ValueError, match="data: row 2400: the prompt 'xxx"):
        check_prompts("data", rows, lambda batch: [row["prompt"] for row in batch], engine)


def test_engines_without_a_check_are_asked_nothing():
    check_prompts("data", [{"prompt": ""}], lambda rows: [""], as_engine(lambda prompts: prompts))
    with pytest.raises(ValueError, match="lone surrogate"):
        check_prompts("data", [{"prompt": "\ud83d"}], lambda rows: ["\ud83d"], as_engine(lambda prompts: prompts))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "prompts": "b"}, "a column can't be called 'prompts'"),
        ({"prompt": "a", "completions": "b"}, "a column can't be called 'completions'"),
        ({"prompt": "a", 3: "b"}, "a column can't be called 3"),
    ],
)
def test_columns_that_reward_functions_could_not_get(tmp_path, model, row, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model, [row])


ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def test_tables_are_rows_too():
    datasets = pytest.importorskip("datasets", reason="needs the optional package datasets")
    pandas = pytest.importorskip("pandas", reason="needs pandas, which datasets brings")
    table = datasets.Dataset.from_list(ROWS)
    for rows in (ROWS, {"prompt": ["a", "b"], "n": (1, 2)}, pandas.DataFrame(ROWS), tuple(ROWS), table.to_dict()):
        assert list(check_rows("data", rows)) == ROWS
    assert check_rows("data", table) is table
    with pytest.raises(
        TypeError, match=r"data: .*of a dict of splits \(train, test\) name one, as dataset\[\"train\"\]"
    ):
        check_rows("data", datasets.DatasetDict({"train": table, "test": table}))
    with pytest.raises(TypeError, match="data: row 1: prompt: .* got nan"):
        check_rows("data", pandas.DataFrame({"prompt": ["a", float("nan")]}))


@pytest.mark.parametrize(
    "rows",
    [
        {"prompt": ["a"], "n": [1, 2]},
        {"prompt": "ab"},
        {"prompt": ["a"], "n": 1},
        iter(ROWS),
        "ab",
        3,
        [3],
        [[]],
        {},
        [],
    ],
)
def test_what_is_no_table_is_refused(rows):
    with pytest.raises((TypeError, ValueError), match="^data: ") as caught:
        check_rows("data", rows)
    assert "\n" not in str(caught.value)


def test_a_dict_of_columns_is_trained_on(tmp_path, model):
    columns = {"prompt": ["1", "2", "3"], "n": [1, 2, 3]}
    for rows in (columns, lambda generation, count: columns):
        made = trainer(
            tmp_path / str(callable(rows)), model, rows, columns, engine=lambda prompts: ["a"] * len(prompts)
        )
        assert made.train()["after"]["eval_length"] == 1.0


def test_an_evaluation_by_hand_looks_first(model, caplog):
    from esfast.tasks import Task
    from esfast.trainer.evaluation import respond

    task = Task("t", (rewarded,), lambda *a: [], lambda count: [], None, 4)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="exceeds the model's context"):
        respond(*model, task, [{"prompt": "1"}] * 70 + [{"prompt": long(model)}], 4, 8)


def test_a_file_s_prompts_are_looked_at_before_the_command_line_s_run_begins(tmp_path, model, capsys):
    for part in model:
        part.save_pretrained(tmp_path / "model")
    prompts = [*"abcdefgh", long(model)]
    lines = [json.dumps({"prompt": p, "split": "train"}) for p in prompts] + ['{"prompt": "x", "split": "test"}']
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    arguments = [
        "train",
        "--model",
        str(tmp_path / "model"),
        "--task",
        f"file:{tmp_path / 'p.jsonl'}",
        "--reward",
        "odd_scoring:length",
        "--out",
        str(tmp_path / "run"),
        "--prompts-per-generation",
        "2",
        "--generations",
        "1",
        "--population-size",
        "2",
    ]
    assert cli.main([*arguments, "--max-completion-length", "4"]) == 1
    assert "train_dataset: row 8: the prompt 'xxx" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert cli.main([*arguments, "--max-completion-length", "2"]) == 0
