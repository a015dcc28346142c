"""Runs on reasoning-gym's tasks: bits, resuming, and the embedded model that is made for a task."""

import functools
import json

import pytest

from esfast import cli, tasks
from esfast.tasks import embedded, gym, gym_problems

pytest.importorskip("reasoning_gym", reason="of the extra gym: pip install 'esfast[gym]'")


def train(tiny, out, *options):
    words = (
        f"train --model {tiny} --task gym:lcm+ransom_note --style compact --population-size 4 --sigma 0.02 --samples 2 "
        f"--prompts-per-generation 3 --eval-prompts 4 --eval-every 2 --max-completion-length 4 --out {out}"
    )
    return cli.main([*words.split(), *options])


def test_a_run_is_the_same_bits_and_resumes(tiny, tmp_path, monkeypatch):
    """In one go; and in two parts, each with other processes, under another hash seed."""
    assert train(tiny, tmp_path / "whole", "--generations", "4") == 0
    for generations, seed in (("2", "1"), ("4", "2")):
        gym_problems._Process.of_this_run().stop()
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        assert train(tiny, tmp_path / "parts", "--generations", generations, "--resume") == 0
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    weights = [(run / "model/model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]
    evaluations = [
        [{k: v for k, v in json.loads(line).items() if k.startswith(("eval_", "reward_"))} for line in lines]
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in (whole, parts))
    ]
    assert evaluations[0] == evaluations[1]
    assert json.loads((whole / "identity.json").read_text())["train_dataset"].startswith(
        "gym:lcm+ransom_note of reasoning-gym "
    )


def test_another_version_of_reasoning_gym_does_not_go_on_with_a_run(tiny, tmp_path, capsys):
    assert train(tiny, tmp_path / "run", "--generations", "1") == 0
    identity = tmp_path / "run/identity.json"
    identity.write_text(identity.read_text().replace("of reasoning-gym ", "of reasoning-gym 9."))
    assert train(tiny, tmp_path / "run", "--generations", "2", "--resume") == 1
    assert "the run has gym:lcm+ransom_note of reasoning-gym 9." in capsys.readouterr().err


def test_the_embedded_model_is_made_for_a_task(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "CORPUS", 1)
    monkeypatch.setattr(embedded, "build", functools.partial(embedded.build, steps=1))
    monkeypatch.setenv("ESFAST_CACHE", str(tmp_path))
    name = "gym:spell_backward?min_word_len=3&max_word_len=4"
    folder = embedded.cached(task=name, progress=False)
    assert folder == embedded.cached(task=name) and folder != embedded.cached(task="gym:spell_backward", progress=False)
    config = json.loads((folder / "config.json").read_text())
    assert (config["prompt_task"], config["prompt_style"]) == (name, "compact")
    prompts = {prompt for prompt, _ in gym.recipe(name[4:]).examples(0, 1)}
    assert not prompts & {row["prompt"] for row in tasks.get(name, "compact").eval_rows(50)}
    # Room for the longest answers: a token a byte.
    assert tasks.get("gym:caesar_cipher", "compact").max_new_tokens > tasks.get(name, "compact").max_new_tokens == 24


def test_the_embedded_model_of_other_names_is_refused():
    with pytest.raises(
        ValueError, match="the embedded model knows only countdown, .* and gym:NAME, not 'file:x.jsonl'"
    ):
        embedded.settings("file:x.jsonl")
