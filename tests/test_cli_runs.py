"""Commands about a run that is there: going on with it, asking its model; errors in the words of the command line."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import yaml

import esfast
from esfast import cli
from esfast.cli.earlier_run import resumed
from esfast.cli.run_options import FIELDS, RunOptions, in_flags
from esfast.cli.train import _defaults
from esfast.tasks import embedded

LONGEST_TOKEN = len("</answer>")
REWARDS = "def brevity(prompts, completions, **columns):\n    return [-float(len(c)) for c in completions]\n"
WORDS = "def words(prompts, completions, **columns):\n    return [float(c.count(' ')) for c in completions]\n"


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A folder with a run on a file of prompts, two generations of it."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "run_rewards.py").write_text(REWARDS + WORDS)
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            cli.main(
                [
                    "train",
                    "--model",
                    tiny,
                    "--task",
                    "file:p.jsonl",
                    "--reward",
                    "run_rewards:brevity",
                    "run_rewards:words",
                    "--reward-weights",
                    "1",
                    "3",
                    "--out",
                    "run",
                    "--generations",
                    "2",
                    "--population-size",
                    "4",
                    "--sigma",
                    "0.02",
                    "--prompts-per-generation",
                    "3",
                    "--eval-prompts",
                    "6",
                    "--max-completion-length",
                    "5",
                    "--no-progress",
                ]
            )
            == 0
        )
    return folder


@pytest.fixture
def project(trained, monkeypatch, tmp_path):
    """A copy of that folder, as the current one."""
    import shutil

    shutil.copytree(trained, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def settings_of(run):
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_run_goes_on_with_what_its_folder_says(project):
    before = settings_of(project / "run")
    assert cli.main(["train", "--out", "run", "--resume", "--generations", "3"]) == 0
    after = settings_of(project / "run")
    assert after == before | {"generations": 3, "resume": True}
    lines = [json.loads(line) for line in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["generation"] == 3 and (project / "run" / "model").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--population-size", "8"], "--population-size: the run has 4, asked for is 8"),
        (["--max-completion-length", "6"], "--max-completion-length: the run has 5, asked for is 6"),
        (["--sigma", "0.5"], "--sigma: the run has 0.02, asked for is 0.5"),
        (["--task", "countdown"], "--task: the run in run has 'file:p.jsonl', asked for is 'countdown'"),
        (
            ["--reward", "run_rewards:brevity"],
            "--reward: the run in run has ['run_rewards:brevity', 'run_rewards:words']",
        ),
        (["--style", "paper"], "--style: the run in run has 'compact', asked for is 'paper'"),
    ],
)
def test_what_contradicts_the_run_is_refused_by_its_flag(project, arguments, message, capsys):
    before = {p: p.read_bytes() for p in (project / "run").rglob("*") if p.is_file()}
    assert cli.main(["train", "--out", "run", "--resume", "--generations", "3", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (project / "run").rglob("*") if p.is_file()} == before


def test_resume_where_nothing_is_yet_begins(project, tiny):
    assert (
        cli.main(
            [
                "train",
                "--out",
                "new",
                "--resume",
                "--model",
                tiny,
                "--generations",
                "1",
                "--population-size",
                "2",
                "--prompts-per-generation",
                "1",
                "--eval-prompts",
                "1",
                "--max-completion-length",
                "2",
            ]
        )
        == 0
    )
    assert settings_of(project / "new")["population_size"] == 2


@pytest.mark.parametrize(("engine", "taken"), [("transformers", {}), ("vllm", {"tensor_parallel_size": 4})])
def test_how_a_run_was_started_is_of_the_start(project, engine, taken):
    found = settings_of(project / "run") | {"engine": engine, "device": "cuda:7", "tensor_parallel_size": 4}
    (project / "run" / "config.yaml").write_text(yaml.safe_dump(found))
    given = {"output_dir": "run", "resume": True}
    of_the_run = {k: v for k, v in found.items() if k not in ("device", "tensor_parallel_size")}
    assert resumed(given) == of_the_run | taken | given
    assert resumed(given | {"device": "cpu"})["device"] == "cpu"


def test_resume_needs_to_know_which_run(project, capsys):
    assert cli.main(["train", "--resume", "--generations", "3"]) == 1
    assert "--resume: name the folder of the run with --out" in capsys.readouterr().err


def in_python(folder, tiny):
    model, tokenizer = load(tiny)
    args = esfast.ESConfig(
        output_dir=str(folder),
        generations=1,
        population_size=2,
        prompts_per_generation=1,
        sigma=0.01,
        max_completion_length=4,
        progress=False,
    )
    esfast.ESTrainer(
        model,
        lambda completions, **_: [float(len(c)) for c in completions],
        args,
        [{"prompt": "say 1"}],
        None,
        tokenizer,
    ).train()


def load(path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_a_run_of_python_is_not_taken_for_one_of_the_embedded_model(project, tiny, capsys):
    in_python(project / "mine", tiny)
    assert cli.main(["train", "--out", "mine", "--resume", "--generations", "2"]) == 1
    assert "was started in Python" in capsys.readouterr().err
    assert cli.main(["eval", "--model", "mine/model"]) == 1
    assert "--task: the run in mine was started in Python" in capsys.readouterr().err
    assert cli.main(["eval", "--model", "mine", "--task", "countdown", "--samples", "2"]) == 0


@pytest.mark.parametrize("model", ["run", "run/best", "./run/model/"])
def test_a_model_is_asked_what_its_run_was_trained_on(project, model, capsys):
    if "best" in model and not (project / "run" / "best").exists():
        (project / "run" / "model").rename(project / "run" / "best")
    assert cli.main(["eval", "--model", model, "--samples", "6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result["task"] == "file" and result["samples"] == 6 and "accuracy" not in result
    last = [r for r in rows if "eval_reward" in r][-1]
    if "best" not in model:
        # the same prompts, rewards, their weights, and length of responses
        assert result["reward"] == pytest.approx(last["eval_reward"])
        assert result["mean_length"] == pytest.approx(last["eval_length"])


def test_options_override_what_the_run_says(project, tiny, capsys):
    assert (
        cli.main(
            [
                "eval",
                "--model",
                "run",
                "--samples",
                "3",
                "--max-completion-length",
                "2",
                "--reward",
                "run_rewards:brevity",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["mean_length"] <= 2 * LONGEST_TOKEN and result["reward"] == -result["mean_length"]
    assert cli.main(["eval", "--model", "run/model", "--task", "countdown", "--samples", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "countdown"
    # one model of a run and its base: both are asked what the run was trained on
    assert cli.main(["eval", "--model", tiny, "run", "--samples", "3", "--json"]) == 0
    assert [r["task"] for r in json.loads(capsys.readouterr().out)] == ["file", "file"]


def test_a_run_without_a_model_yet(project, capsys):
    import shutil

    for name in ("model", "best"):
        shutil.rmtree(project / "run" / name, ignore_errors=True)
    assert cli.main(["eval", "--model", "run"]) == 1
    assert "--model: the run in run has neither model/ nor best/ yet" in capsys.readouterr().err


def test_responses_stay_within_the_context(project, tiny, tmp_path, capsys, caplog):
    model, tokenizer = load(tiny)
    model.config.max_position_embeddings = 16
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "short")
    task = ["--task", "file:p.jsonl", "--reward", "run_rewards:words", "--samples", "4", "--json"]
    assert cli.main(["eval", "--model", str(tmp_path / "short"), *task]) == 0
    assert "responses may have 10 tokens, not 1024: the model's context is 16, the longest prompt has 6" in caplog.text
    assert json.loads(capsys.readouterr().out)["mean_length"] <= 10 * LONGEST_TOKEN
    assert cli.main(["eval", "--model", str(tmp_path / "short"), *task, "--max-completion-length", "20"]) == 1
    said = capsys.readouterr().err
    assert "--max-completion-length" in said and "max_new_tokens" not in said
    arguments = ["train", "--model", str(tmp_path / "short"), *task[:4], "--out", "x", "--max-completion-length", "20"]
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert "--max-completion-length" in said and "max_new_tokens" not in said


def test_python_errors_have_pythons_names(project, tiny):
    model, tokenizer = load(tiny)
    model.config.max_position_embeddings = 8
    args = esfast.ESConfig(output_dir="y", max_completion_length=20, generations=1, prompts_per_generation=1)
    with pytest.raises(ValueError) as caught:
        esfast.ESTrainer(model, lambda completions, **_: [0.0], args, [{"prompt": "say 1"}], None, tokenizer).train()
    assert "max_completion_length" in str(caught.value) and "max_new_tokens" not in str(caught.value)


@pytest.mark.parametrize(
    ("python", "flags"),
    [
        ("ESConfig.sigma: expected", "--sigma: expected"),
        ("output_dir: runs/a holds a run already", "--out: runs/a holds a run already"),
        ("resume: the run has population_size 8, asked for is 30", "--population-size: the run has 8, asked for is 30"),
        ("expects max_new_tokens=3 or less", "expects --max-completion-length=3 or less"),
        ("the file runs/batch_size/x and 'batch_size' stay", "the file runs/batch_size/x and 'batch_size' stay"),
        ("journal: damaged", "journal: damaged"),
    ],
)
def test_settings_are_called_by_their_flags(python, flags):
    assert in_flags(python) == flags


def test_every_setting_has_its_flag_in_messages(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for name in FIELDS:
        assert re.match(r"(--[\w-]+):", in_flags(f"ESConfig.{name}: expected"))[1] in options


def test_runs_of_one_second_have_folders_of_their_own(monkeypatch):
    from esfast import tasks

    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    task = tasks.get("countdown", "compact")
    names = {_defaults(RunOptions(), task)["output_dir"] for _ in range(50)}
    assert len(names) == 50 and all(name.startswith("runs/countdown-20260101-000000-") for name in names)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--model", "no-such", "--out", "file/run"],
        ["eval", "--model", "no-such", "--save", "file/x.jsonl"],
        ["replay", "none.jsonl", "--base", "no-such", "--out", "file/tuned"],
        ["export", "none.jsonl", "--out", "file/x.safetensors"],
        ["report", "none", "--out", "file/page.html"],
        ["bench", "noise", "--json", "file/x.json", "--numel", "1e4", "--repeats", "1"],
    ],
    ids=lambda c: c[0],
)
def test_a_place_that_cannot_be_written_is_noticed_before_the_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "can't write to file/" in said and ("--out: " in said or "--save: " in said or "--json: " in said)


def test_a_cache_that_cannot_be_written_is_noticed_before_the_pretraining(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "build", lambda *a, **k: pytest.fail("it was made"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train"]) == 1
    said = capsys.readouterr().err
    assert "the folder of the embedded model (set ESFAST_CACHE to another one): can't write to" in said


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_where_the_locale_has_no_letters_for_a_prompt_or_a_name(project, tiny):
    """Prompts may hold any characters. A folder whose name the locale can't write is refused before a model is
    loaded."""
    rows = [{"prompt": f"wie heißt {i} 東京?"} for i in range(20)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (project / "p.jsonl").write_text(text, encoding="utf-8")
    arguments = [
        "eval",
        "--model",
        tiny,
        "--task",
        "file:p.jsonl",
        "--reward",
        "run_rewards:words",
        "--samples",
        "1",
        "--max-completion-length",
        "2",
        "--save",
        "out.jsonl",
    ]
    done = subprocess.run([sys.executable, "-m", "esfast", *arguments], env=os.environ | ASCII, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "東京" in json.loads((project / "out.jsonl").read_text(encoding="utf-8").splitlines()[0])["prompt"]
    command = [sys.executable, "-m", "esfast", "train", "--model", "no-such", "--out", "läufe"]
    done = subprocess.run(command, env=os.environ | ASCII, capture_output=True)
    assert done.returncode == 1 and b"can't be written in UTF-8 and in the locale's encoding" in done.stderr, (
        done.stderr
    )


def test_a_trainer_refuses_a_name_that_cannot_be_written(tiny, tmp_path):
    model, tokenizer = load(tiny)
    args = esfast.ESConfig(output_dir=str(tmp_path / "l\udce4ufe"), max_completion_length=4)
    with pytest.raises(ValueError, match="^output_dir: the name .* can't be written in UTF-8"):
        esfast.ESTrainer(model, lambda completions, **_: [0.0], args, ["say 1"], None, tokenizer)
    assert not list(tmp_path.iterdir())
