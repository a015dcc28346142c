"""The command line, in process, on an embedded model of a few training steps."""

import dataclasses
import json
import subprocess
import sys

import pytest
from transformers import Qwen2Config

import esfast
from esfast import cli, embedded

FEW = ["--generations", "2", "--population-size", "4", "--prompts-per-generation", "4", "--eval-prompts", "6",
       "--max-completion-length", "4", "--no-progress"]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(embedded.build(tmp_path_factory.mktemp("model") / "tiny", steps=2, progress=False))


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
    arguments = cli._parser(full=False).parse_args(["eval", "--model", tiny])
    assert cli._task(arguments).eval_rows(1)[0]["prompt"].count(" ") == 2  # compact: three numbers, no words
    config = Qwen2Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.save_pretrained(tmp_path)
    arguments = cli._parser(full=False).parse_args(["eval", "--model", str(tmp_path)])
    assert "Reason step by step" in cli._task(arguments).eval_rows(1)[0]["prompt"]


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
    text = capsys.readouterr().out
    for field in dataclasses.fields(esfast.ESConfig):
        assert "--" + field.name.replace("_", "-") in text


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "--task", "countdow"], 1, "Did you mean 'countdown'?"),
        (["train", "--model", "no/such/folder/here"], 1, "no/such/folder/here"),
        (["train", "--sigma", "0"], 1, "sigma: expected a positive finite number, got 0.0"),
        (["train", "--population-size", "1"], 1, "population_size: expected 2 <="),
        (["train", "--mirrored", "--population-size", "7"], 1, "mirrored sampling needs an even number, got 7"),
        (["train", "--device", "warp"], 1, "warp"),
        (["eval", "--samples", "0"], 1, "samples"),
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
    (tmp_path / "journal.jsonl").touch()
    assert cli.main(["train", "--model", "no-such-model", "--out", str(tmp_path), *FEW]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_info_names_backends_and_reasons(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert esfast.__version__ in printed and "takes 'cpu'" in printed and "reference  ready" in printed


def test_help_does_not_wait_for_torch():
    code = "import sys; from esfast import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "esfast", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "COMMAND" in done.stdout
