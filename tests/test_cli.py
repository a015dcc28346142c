"""The command line, in process, on an embedded model of a few training steps."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import small_model
import torch
import yaml
from transformers import Qwen2Config

import esfast
from esfast import cli
from esfast.bench import BENCHMARKS, parser_of
from esfast.cli.models import task_of
from esfast.cli.parser import parser_of_all
from esfast.cli.presets import PRESETS
from esfast.cli.run_options import FIELDS, TRAIN_DEFAULTS, RunOptions
from esfast.tasks import embedded

FEW = [
    "--generations",
    "2",
    "--population-size",
    "4",
    "--prompts-per-generation",
    "4",
    "--eval-prompts",
    "6",
    "--max-completion-length",
    "4",
    "--no-progress",
]


def test_train_then_eval(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "--model", tiny, "--out", str(out), *FEW]) == 0
    printed = capsys.readouterr().out
    assert "after 2 generations, on 6 held-out prompts" in printed and str(out / "model") in printed
    assert (out / "model" / "model.safetensors").exists() and (out / "journal.jsonl").exists()
    assert cli.main(["eval", "--model", str(out / "model"), "--samples", "6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == 6 and 0 <= result["accuracy"] <= 1 and result["task"] == "countdown"


def test_a_tuned_model_is_asked_as_the_model_it_came_from(tiny, tmp_path):
    run = RunOptions(model=tiny)
    assert task_of(run).eval_rows(1)[0]["prompt"].count(" ") == 2  # compact: three numbers, no words
    assert (run.task, run.style) == ("countdown", "compact")
    config = Qwen2Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.save_pretrained(tmp_path)
    run = RunOptions(model=str(tmp_path))
    assert "Reason step by step" in task_of(run).eval_rows(1)[0]["prompt"] and run.style == "paper"


def test_without_a_model_the_embedded_one_is_trained_with_its_own_settings(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "cached", lambda task: tiny)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *FEW]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("countdown-")
    config = (run / "config.yaml").read_text()
    assert f"sigma: {embedded.settings('countdown')['sigma']}" in config and "generations: 2\n" in config


def test_every_setting_is_an_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert "--" + name.replace("_", "-") in text
        default = TRAIN_DEFAULTS.get(name, field.default)
        if isinstance(default, (int, float, str)) and not isinstance(default, bool):
            assert f"default: {default})" in text or f"{default}:" in text, name


def helps():
    """Name and parser of every command that has a help of its own."""
    yield "esfast", parser_of_all()
    for name, parser in subparsers(parser_of_all()):
        if name != "esfast bench":
            yield name, parser
    yield "esfast bench", parser_of([])
    for name in BENCHMARKS:
        yield f"esfast bench {name}", dict(subparsers(parser_of([name])))[f"esfast bench {name}"]


def subparsers(parser):
    (action,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [(f"{parser.prog} {name}", p) for name, p in action.choices.items()]


HELPS = dict(helps())


@pytest.mark.parametrize("command", HELPS)
def test_help_shows_defaults_and_ends_with_examples_that_parse(command):
    parser = HELPS[command]
    text = parser.format_help()
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            shown = parser._get_formatter()._expand_help(action)
            assert len(shown.partition("(default:")[0]) > 3 and "".join(shown.split()) in "".join(text.split())
            assert action.default in (None, False, argparse.SUPPRESS) or "default:" in shown, action.option_strings
    examples = commands.in_help(text)
    assert len(examples) >= 2 or command == "esfast info"
    for example in examples:
        assert example.startswith((f"{command} ", "esfast --debug ")) or example == command
        try:
            commands.parse(example)
        except SystemExit as stop:
            assert stop.code == 0 and example.endswith("--help")


def test_helps_are_all_there(capsys):
    assert len(HELPS) == 1 + 7 + 1 + len(BENCHMARKS)
    with pytest.raises(SystemExit):
        cli.main(["bench", "noise", "--help"])
    assert capsys.readouterr().out == HELPS["esfast bench noise"].format_help()


def config_of(arguments, capsys):
    assert cli.main(["train", *arguments, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_presets_are_the_papers_settings_and_options_override_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config_of(["--preset", "paper/countdown-qwen2.5-3b", "--seed", "7"], capsys)
    assert settings.keys() == FIELDS.keys() and settings["seed"] == 7 and settings["train_prompts"] == 200
    assert settings["model"] == "Qwen/Qwen2.5-3B-Instruct" and settings["max_completion_length"] == 1024
    for name in PRESETS:
        settings = (
            config_of(["--preset", name, "--style", "paper", "--data", DATA], capsys)
            if "math" in name
            else (config_of(["--preset", name], capsys))
        )
        arc = "arc-agi" in name
        assert settings["sigma"] == 1e-3 and settings["lr"] == (3e-4 if arc else 5e-4)
        assert settings["population_size"] in ((50,) if arc else (30, 32))
        assert not arc or (settings["generations"], settings["train_prompts"], settings["eval_prompts"]) == (
            1500,
            200,
            200,
        )
    assert not list(tmp_path.iterdir())


DATA = str(Path(__file__).parent / "math_problems.jsonl")


def test_yaml_goes_in_and_comes_out_the_same(capsys, tmp_path):
    settings = config_of(["--task", "sudoku", "--sigma", "0.5", "--exclude", "*norm*", "*embed*"], capsys)
    assert settings["exclude"] == ["*norm*", "*embed*"] and settings["task"] == "sudoku" and settings["lr"] == 0.01
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert config_of(["--config", str(tmp_path / "run.yaml")], capsys) == settings
    assert config_of(["--config", str(tmp_path / "run.yaml"), "--sigma", "2"], capsys) == settings | {"sigma": 2.0}


def test_a_run_can_be_repeated_from_its_config(tiny, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main(["train", "--model", tiny, "--out", str(first), "--weights", "inplace", *FEW]) == 0
    assert cli.main(["train", "--config", str(first / "config.yaml"), "--out", str(second)]) == 0
    names = ["journal.jsonl", "model/model.safetensors"]
    assert [(first / n).read_bytes() for n in names] == [(second / n).read_bytes() for n in names]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sigmma: 0.1", "unknown setting 'sigmma'. Did you mean 'sigma'?"),
        ("- sigma", "expected lines of the form NAME: VALUE, got list"),
        ("sigma: [1", "no YAML"),
        ("sigma: -1", "sigma: expected a positive finite number, got -1"),
    ],
)
def test_bad_yaml(text, message, tmp_path, capsys, tiny):
    (tmp_path / "run.yaml").write_text(text)
    out = tmp_path / "run"
    assert cli.main(["train", "--model", tiny, "--config", str(tmp_path / "run.yaml"), "--out", str(out), *FEW]) == 1
    assert message in capsys.readouterr().err and not out.exists()


def test_models_side_by_side_and_their_responses(tiny, tmp_path, capsys):
    other = str(small_model.build(tmp_path / "other", seed=1))
    path = tmp_path / "responses.jsonl"
    arguments = ["eval", "--model", tiny, other, "--samples", "5", "--max-completion-length", "4", "--save", str(path)]
    assert cli.main([*arguments, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["model"] for r in lines] == [tiny] * 5 + [other] * 5
    assert [r["prompt"] for r in lines[:5]] == [r["prompt"] for r in lines[5:]]
    for result, mine in ((first, lines[:5]), (second, lines[5:])):
        assert result["reward"] == pytest.approx(sum(r["reward"] for r in mine) / 5)
        assert result["mean_length"] == pytest.approx(sum(len(r["completion"]) for r in mine) / 5)
    assert second["reward_difference"] == pytest.approx(second["reward"] - first["reward"])
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert tiny in shown and other in shown and "standard error" in shown and "prompt by prompt" in shown


def test_a_task_of_ones_own_from_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cli_rewards.py").write_text(
        "def brevity(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}"}) for i in range(40)))
    task = ["--task", "file:p.jsonl", "--reward", "cli_rewards:brevity", "--model", tiny]
    assert cli.main(["train", *task, "--out", "run", *FEW]) == 0
    assert "reward" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval_reward"] <= 0 and "eval_accuracy" not in rows[0]
    assert cli.main(["eval", *task, "--samples", "5", "--max-completion-length", "4"]) == 0
    assert "accuracy" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "--task", "countdow"], 1, "Did you mean 'countdown'?"),
        (["train", "--preset", "paper/countdown-qwen2.5-3"], 1, "Did you mean 'paper/countdown-qwen2.5-3b'?"),
        (["train", "--preset", "paper/math-qwen2.5-math-7b"], 1, "name a file of MATH's problems"),
        (["train", "--config", "none.yaml"], 1, "none.yaml"),
        (["train", "--task", "file:none.jsonl", "--reward", "math:gcd"], 1, "none.jsonl"),
        (["train", "--model", "no/such/folder/here"], 1, "no/such/folder/here"),
        (["train", "--sigma", "0"], 1, "--sigma: expected a positive finite number, got 0.0"),
        (["train", "--population-size", "1"], 1, "--population-size: expected 2 <="),
        (["train", "--mirrored", "--population-size", "7"], 1, "mirrored sampling needs an even number, got 7"),
        (["train", "--device", "warp"], 1, "warp"),
        (["eval", "--samples", "0"], 1, "samples"),
        (["eval", "--model", "no such", "--batch-size", "0"], 1, "--batch-size: expected 1 <="),
        (["eval", "--model", "no such", "--max-completion-length", "0"], 1, "--max-completion-length: expected 1 <="),
        (["eval", "--sampels", "5"], 2, "Did you mean '--samples'?"),
        (["train", "--noise", "cauchy"], 2, "invalid choice: 'cauchy'"),
        (["train", "--generations", "many"], 2, "invalid int value: 'many'"),
        (["fly"], 2, "invalid choice: 'fly'"),
        ([], 2, "required"),
    ],
)
def test_errors_are_one_line_and_no_traceback(arguments, status, message, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "cached", lambda task: tiny)
    monkeypatch.chdir(tmp_path)
    try:
        got = cli.main(arguments)
    except SystemExit as error:
        got = error.code
    printed = capsys.readouterr().err
    assert got == status and message in printed and "Traceback" not in printed
    assert not (tmp_path / "runs").exists()


def test_an_existing_run_is_refused_before_the_model_is_loaded(tiny, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"generation": 0}\n{"generation": 1}\n')
    assert cli.main(["train", "--model", "no-such-model", "--out", str(tmp_path), *FEW]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_info_names_backends_and_reasons(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert esfast.__version__ in printed and "takes 'cpu'" in printed and "reference  ready" in printed


HEAVY = (
    "numpy",
    "torch",
    "transformers",
    "datasets",
    "matplotlib",
    "safetensors",
    "tokenizers",
    "esfast.es.es",
    "esfast.trainer.trainer",
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["eval", "--help"],
        ["bench", "--help"],
        ["train", "--sigma"],
        ["--debug", "train", "--help"],
    ],
)
def test_helps_and_wrong_options_do_not_wait_for_torch(arguments):
    code = f"""import sys
from esfast import cli
try: cli.main({arguments!r})
except SystemExit: pass
print([name for name in {HEAVY!r} if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "code", ["import esfast", "import esfast; esfast.ESConfig(), esfast.Adam(), esfast.EsfastError"]
)
def test_settings_do_not_wait_for_torch(code):
    code = f"""import sys
{code}
print([name for name in {HEAVY!r} if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "esfast", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "COMMAND" in done.stdout


def test_the_process_is_left_as_it_was(tmp_path, monkeypatch, capsys):
    """A program that calls `main` keeps its import path, its number of threads, and Transformers' progress bars."""
    from transformers.utils.logging import is_progress_bar_enabled

    monkeypatch.chdir(tmp_path)
    (tmp_path / "only_here.py").write_text(
        "def length(prompts, completions):\n    return list(map(len, completions))\n"
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "split": "test"}\n{"prompt": "b"}\n')
    base = str(Path(__file__).parent / "fixtures" / "d3e6f80" / "base")
    torch.set_num_threads(2)
    before = list(sys.path), torch.get_num_threads(), is_progress_bar_enabled()
    options = [
        "--task",
        "file:p.jsonl",
        "--reward",
        "only_here:length",
        "--samples",
        "1",
        "--max-completion-length",
        "2",
    ]
    assert cli.main(["eval", "--model", base, *options]) == 0, capsys.readouterr().err
    assert (list(sys.path), torch.get_num_threads(), is_progress_bar_enabled()) == before
