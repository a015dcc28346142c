"""A run that was killed, whose disk was full or whose files are damaged, goes on and ends with the same bits."""

import contextlib
import json
import os
import subprocess

import forks
import job
import pytest
import small_model
import torch
from life import FEW

import esfast
from esfast import ES, Plan, cli
from esfast.journal.export import pack, unpack
from esfast.journal.journal import read, replay
from esfast.update.updater import Updater


def run_job(*arguments, folder, **settings):
    options = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    return forks.alone(job.program, *arguments, *options, folder=folder, timeout=1200)


LONG = bool(os.environ.get("ESFAST_LONG_TESTS"))


@pytest.mark.parametrize(
    ("kills", "stops"),
    [
        (7, 3),
        pytest.param(
            50, 20, marks=pytest.mark.skipif(not LONG, reason="takes minutes; ESFAST_LONG_TESTS=1 runs the whole drill")
        ),
    ],
)
def test_stopped_at_any_instant_it_resumes_to_the_same_bits(kills, stops, tmp_path):
    """Runs of 1 to 3 processes are ended by SIGKILL or SIGTERM. Two jobs, with another number of processes, then try to
    resume each run at the same time: exactly one may win. Every generation writes a checkpoint, so some runs are killed
    while writing one."""
    done = run_job("--drill", kills, stops, tmp_path, folder=tmp_path, pause=0.01, checkpoint_every=1, generations=8)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["SIGKILL"] == kills and found["SIGTERM"] == stops and found["generations done"] > kills
    assert found["refused"] > 0 and found["saved"] > 0


@contextlib.contextmanager
def small_disk(folder, size):
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here ({made.stderr.decode().strip()}), so no disk can be full")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("size", "settings"),
    [("1300k", {"checkpoint_every": 1, "generations": 4}), ("24k", {"checkpoint_every": 0, "generations": 30})],
    ids=["checkpoint", "journal or metrics"],
)
def test_a_full_disk_is_a_clear_error_and_loses_nothing(size, settings, tmp_path):
    whole = tmp_path / "whole"
    assert run_job(whole, folder=tmp_path, **settings).returncode == 0
    with small_disk(tmp_path / "disk", size) as disk:
        done = run_job(disk / "run", folder=tmp_path, **settings)
        assert done.returncode == 1 and "No space left on device" in done.stderr.splitlines()[-1], done.stderr[-2000:]
        kept = read(disk / "run" / "journal.jsonl").records
        assert 0 < len(kept) < settings["generations"] and "resume to go on" in done.stderr
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        done = run_job(disk / "run", folder=tmp_path, resume=True, **settings)
        assert done.returncode == 0, done.stderr[-2000:]
        assert job.outcome(disk / "run") == job.outcome(whole)
        rows = [json.loads(line) for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [r["generation"] for r in rows] == list(range(settings["generations"] + 1))


# ---- ES alone -------------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"weights": "master"},
    {"weights": "host"},
    {"optimizer": "momentum"},
    {"noise": "low_rank", "rank": 3, "optimizer": "momentum", "weights": "master"},
    {"optimizer": "adam", "decay_to": "initial", "weight_decay": 1.0, "weights": "master"},
]


def plan_of(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return Plan(
        [("a", (torch.randn(200, generator=generator) * 0.02).to(dtype)), ("b", torch.ones(5, 3).to(dtype).t())]
    )


def start(folder, plan=None, **options):
    return ES(
        plan or plan_of(),
        sigma=1e-3,
        lr=5e-3,
        population_size=4,
        journal=folder / "journal.jsonl",
        checkpoints=folder / "checkpoints",
        resume=True,
        **options,
    )


def step(es, saves=False):
    for member in es.population():
        member.reward = float(member.seed % 1000)
    es.step()
    if saves:
        es.checkpoint()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("saved", ((), (2,), (1, 3)), ids=str)
def test_taken_up_with_and_without_checkpoints(saved, options, tmp_path, same_bits, caplog):
    whole = start(tmp_path / "whole", **options)
    for _ in range(6):
        step(whole)
    first = start(tmp_path / "run", **options)
    for g in range(1, 5):
        step(first, saves=g in saved)
    second = start(tmp_path / "run", **options)
    assert second.generation == 4 and same_bits(second.plan.tensors, first.plan.tensors)
    assert f"{max(saved, default=0)} of them from a checkpoint" in caplog.text
    for _ in range(2):
        step(second)
    assert same_bits(second.plan.tensors, whole.plan.tensors)
    again = plan_of()
    replay(again, tmp_path / "run" / "journal.jsonl")
    assert same_bits(again.tensors, whole.plan.tensors)


def test_only_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path, same_bits, caplog):
    es = start(tmp_path)
    for _ in range(4):
        step(es, saves=True)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [f"generation-0000000{g}.safetensors" for g in (3, 4)]
    newest = folder / "generation-00000004.safetensors"
    data = bytearray(newest.read_bytes())
    data[-9] ^= 1
    newest.write_bytes(data)
    again = start(tmp_path)
    assert "its fingerprint does not fit" in caplog.text and "3 of them from a checkpoint" in caplog.text
    assert same_bits(again.plan.tensors, es.plan.tensors)
    newest.write_bytes(data[:100])
    assert same_bits(start(tmp_path).plan.tensors, es.plan.tensors)


@pytest.mark.parametrize("torn", (b'{"generation":4,"see', b"\0" * 300, b'{"generation":4\0\0\0'))
def test_a_torn_last_line_is_dropped_with_a_word(torn, tmp_path, same_bits, caplog):
    es = start(tmp_path)
    for _ in range(4):
        step(es)
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(read(path).records) == 4 and "is torn" in caplog.text
    again = start(tmp_path)
    assert again.generation == 4 and path.read_bytes() == whole
    step(again)
    assert len(read(path).records) == 5


def test_what_is_not_the_same_run_is_refused(tmp_path):
    step(start(tmp_path))
    for options, words in (
        ({"seed": 1}, "is of a run with seed 0, this one has 1"),
        ({"noise": "rademacher"}, "is of a run with noise 'gaussian'"),
        (
            {"plan": Plan([("a", torch.ones(200).bfloat16()), ("b", torch.ones(5, 3).bfloat16().t())])},
            "is of a run with fingerprint of the base weights '[0-9a-f]{16}', this one has '[0-9a-f]{16}'",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            start(tmp_path, **options)
    path = tmp_path / "inplace" / "journal.jsonl"
    ES(plan_of(), weights="inplace", journal=path)
    with pytest.raises(ValueError, match="can't be resumed"):
        ES(plan_of(), weights="inplace", journal=path, resume=True)
    config = esfast.ESConfig(sigma=1e-3)
    with pytest.raises(ValueError, match="resume: the run has sigma 0.1, asked for is 0.001"):
        config.check_resumes({"sigma": 0.1})
    config.check_resumes({"generations": 3, "eval_every": 77})
    with pytest.raises(ValueError, match="the run has generations 3"):
        esfast.ESConfig(lr_schedule="cosine").check_resumes({"generations": 3, "lr_schedule": "cosine"})


# ---- replay and export ----------------------------------------------------------------------------------------------


def test_replay_compares_fingerprints(tmp_path):
    es = start(tmp_path)
    for _ in range(3):
        step(es)
    es.record_fingerprint()
    path = tmp_path / "journal.jsonl"
    other = Plan([("a", torch.ones(200).bfloat16()), ("b", torch.ones(5, 3).bfloat16().t())])
    before = other.fingerprint()
    with pytest.raises(ValueError, match=f"fingerprint {plan_of().fingerprint()}, these have {before}"):
        replay(other, path)
    assert other.fingerprint() == before
    contents = read(path)
    assert contents.checks == {3: es.plan.fingerprint()}
    wrong = Updater.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "__call__", lambda self, r: r.generation == 1 or wrong(self, r))
        with pytest.raises(RuntimeError, match="after 3 generations the weights have the fingerprint"):
            replay(plan_of(), path)


def test_an_exported_journal_is_the_journal(tmp_path, same_bits):
    es = start(tmp_path, optimizer="momentum", weights="master", noise="low_rank", rank=2)
    for _ in range(3):
        step(es)
    for member in es.population():
        member.reward = float(member.index) if member.index else None
    es.step(set_aside=True)
    es.record_fingerprint()
    size = pack(tmp_path / "journal.jsonl", tmp_path / "run.safetensors")
    assert size == (tmp_path / "run.safetensors").stat().st_size
    assert unpack(tmp_path / "run.safetensors") == read(tmp_path / "journal.jsonl")
    again = plan_of()
    replay(again, tmp_path / "run.safetensors")
    assert same_bits(again.tensors, es.plan.tensors)
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no journal packed by"):
        replay(plan_of(), tmp_path / "other.safetensors")


def test_the_commands(tiny, tmp_path, capsys):
    torch.set_num_threads(1)
    few = ["--model", tiny, "--generations", "2", "--reward-workers", "0", *FEW]
    out = tmp_path / "run"
    assert cli.main(["train", *few, "--out", str(out)]) == 0
    assert cli.main(["train", *few, "--out", str(out)]) == 1 and "go on with it (--resume" in capsys.readouterr().err
    assert cli.main(["train", *few, "--out", str(out), "--resume", "--generations", "3"]) == 0
    assert cli.main(["export", str(out), "--out", str(tmp_path / "e.safetensors")]) == 0
    assert "3 generations" in capsys.readouterr().out
    for number, journal in enumerate((out / "journal.jsonl", tmp_path / "e.safetensors")):
        again = tmp_path / f"again{number}"
        assert cli.main(["replay", str(journal), "--base", tiny, "--out", str(again)]) == 0
        tuned = [(f / "model.safetensors").read_bytes() for f in (again, out / "model")]
        assert tuned[0] == tuned[1]
    # The folder exists already.
    assert cli.main(["replay", str(journal), "--base", tiny, "--out", str(again)]) == 1
    other = str(small_model.build(tmp_path / "other", seed=1))
    assert cli.main(["replay", str(journal), "--base", other, "--out", str(tmp_path / "no")]) == 1
    assert "began with weights of fingerprint" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_run_of_some_of_the_weights_is_replayed_with_the_same_patterns(tiny, tmp_path, capsys):
    torch.set_num_threads(1)
    few = ["--model", tiny, "--generations", "1", "--reward-workers", "0", *FEW]
    out, patterns = tmp_path / "run", ["--include", "*layers*", "--exclude", "*norm*"]
    assert cli.main(["train", *few, "--out", str(out), *patterns]) == 0
    command = ["replay", str(out / "journal.jsonl"), "--base", tiny, "--out", str(tmp_path / "again")]
    assert cli.main(command) == 1 and "is of a model with" in capsys.readouterr().err
    assert cli.main([*command, *patterns]) == 0
    tuned = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "again", out / "model")]
    assert tuned[0] == tuned[1]
