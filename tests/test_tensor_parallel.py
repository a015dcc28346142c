"""Processes that hold one model together, by `esfast train --tensor-parallel-size`: what comes of it is a run like any
other, whose journal leads to the same bits on the whole model. How models are cut: sharded_models.py."""

import json
import os
import signal
import subprocess
import sys
import time

import forks
import pytest
import torch
import warm
from forks import environment
from job import free_port
from test_distributed import outcome

from esfast import cli
from esfast.distributed.team import Team
from esfast.journal.journal import read
from esfast.tasks import embedded

REWARDS = """
def luck(completions, **columns):
    return [sum(map(ord, text)) % 97 / 97 for text in completions]
"""
OPTIONS = {
    "task": "countdown",
    "style": "compact",
    "reward": "lucky:luck",
    "population-size": 4,
    # One with which an evaluation beats the base model's, so that there is a best/.
    "seed": 2,
    "sigma": 0.05,
    "lr": 0.05,
    "prompts-per-generation": 8,
    "max-completion-length": 8,
    "eval-prompts": 8,
    "eval-every": 2,
    "checkpoint-every": 2,
    "generations": 5,
    "reward-workers": 0,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with an untrained model, and a module of rewards beside it."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "lucky.py").write_text(REWARDS)
    tokenizer = embedded.make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        embedded.make_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def command(base, out, *more, **options):
    settings = OPTIONS | {"model": base / "model", "out": out} | {k.replace("_", "-"): v for k, v in options.items()}
    pairs = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["train", *pairs, "--no-progress", *more]


def launch(base, processes, out, *more, **options):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
    with warm.python():
        return subprocess.run(
            [sys.executable, *launcher, "-m", "esfast", *command(base, out, *more, **options)],
            env=environment(PYTHONPATH=str(base)),
            capture_output=True,
            text=True,
            timeout=180,
        )


def team(base, processes, out, *more, folder, program=forks.esfast, **options):
    """As torchrun's, but forks."""
    return forks.team(processes, program, *command(base, out, *more, **options), folder=folder, path=[base])


@pytest.fixture(scope="module")
def of_two(base, tmp_path_factory):
    """A run of one model in two shards."""
    folder = tmp_path_factory.mktemp("of_two") / "run"
    done = launch(base, 2, folder, "--kl-to-base", tensor_parallel_size=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_leaves_what_a_run_leaves(of_two, base):
    from transformers import AutoModelForCausalLM

    left = {p.name for p in of_two.iterdir()}
    assert left >= {"config.yaml", "curves.png", "journal.jsonl", "metrics.jsonl", "model", "best", "samples.jsonl"}
    rows = metrics(of_two)
    assert [r["generation"] for r in rows] == list(range(6)) and "distance" not in rows[1]
    assert rows[0]["eval_kl_to_base"] == 0 < rows[-1]["eval_kl_to_base"]
    assert len(read(of_two / "journal.jsonl").checks) == 3  # two checkpoints and the end
    untuned = AutoModelForCausalLM.from_pretrained(base / "model")
    for folder in ("model", "best"):
        tuned = AutoModelForCausalLM.from_pretrained(of_two / folder)
        assert tuned.state_dict().keys() == untuned.state_dict().keys()
        assert not torch.equal(tuned.model.layers[0].mlp.up_proj.weight, untuned.model.layers[0].mlp.up_proj.weight)


def test_its_journal_leads_to_its_bits_on_the_whole_model(of_two, base, tmp_path):
    argv = [
        "replay",
        of_two / "journal.jsonl",
        "--base",
        base / "model",
        "--out",
        tmp_path / "tuned",
        "--device",
        "cpu",
    ]
    assert cli.main(list(map(str, argv))) == 0
    replayed = (tmp_path / "tuned" / "model.safetensors").read_bytes()
    assert replayed == (of_two / "model" / "model.safetensors").read_bytes()


def test_two_groups_of_two_are_as_one(of_two, base, tmp_path):
    done = forks.ended(team(base, 4, tmp_path / "run", folder=tmp_path, tensor_parallel_size=2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(tmp_path / "run") == outcome(of_two)


def test_it_resumes_from_checkpoints_in_parts_and_without(of_two, base, tmp_path):
    run = tmp_path / "run"
    started = team(base, 2, run, folder=tmp_path, tensor_parallel_size=2, generations=3)
    assert forks.ended(started).returncode == 0
    parts = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert parts == [f"generation-00000002-{part}of2.safetensors" for part in (1, 2)]
    (run / "checkpoints" / parts[1]).unlink()  # one rank begins at the checkpoint, the other at the base weights
    done = forks.ended(team(base, 2, run, "--resume", folder=tmp_path, tensor_parallel_size=2))
    assert done.returncode == 0, done.stderr[-3000:]
    for found in ("2 of them from a checkpoint, 1 from the journal", "0 of them from a checkpoint, 3 from the journal"):
        assert found in done.stderr
    records = read(of_two / "journal.jsonl").records
    assert outcome(run)[0] == outcome(of_two)[0] and read(run / "journal.jsonl").records == records
    # the whole model goes on with it
    words = command(base, run, "--resume", generations=6)
    done = forks.alone(forks.esfast, *words, folder=tmp_path, path=[base])
    assert done.returncode == 0 and "0 of them from a checkpoint, 5 from the journal" in done.stderr
    assert read(run / "journal.jsonl").records[:5] == records


def test_a_shard_that_hangs_ends_the_job(base, tmp_path):
    """The other process waits for it inside a matrix product, in a collective, where it does not look at the store."""
    endless = {"tensor_parallel_size": 2, "generations": 10_000, "eval_every": 0}
    both = team(base, 2, tmp_path / "run", folder=tmp_path, program=forks.impatient_esfast, **endless)
    try:
        journal, began = tmp_path / "run" / "journal.jsonl", time.monotonic()
        while not (journal.exists() and read(journal).records):
            assert time.monotonic() - began < 60 and both[0].poll() is None
            time.sleep(0.1)
        os.kill(both[1].pid, signal.SIGSTOP)
        began = time.monotonic()
        _, errors = both[0].communicate(timeout=60)
        assert both[0].returncode == 1 and "process 1 has not been heard of for 12 s" in errors, errors[-3000:]
        assert time.monotonic() - began < 40
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_what_does_not_fit_is_refused(base, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(base)
    assert cli.main(command(base, tmp_path / "run", tensor_parallel_size=2)) == 1
    assert "1 processes can't be grouped by 2; start a multiple of 2 with torchrun" in capsys.readouterr().err
    done = forks.ended(team(base, 3, tmp_path / "run", folder=tmp_path, tensor_parallel_size=3))
    assert done.returncode == 1 and "4 num_attention_heads of Qwen2ForCausalLM can't be shared by 3" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_trainer_asks_for_the_model_itself(base, tmp_path):
    import esfast

    team = Team(torch.distributed.HashStore(), 0, 2, shards=2)
    config = esfast.ESConfig(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="in shards: expected the model itself, without adapters"):
        esfast.ESTrainer(str(base / "model"), len, config, [{"prompt": "a"}], team=team)
    team._ended.set()
