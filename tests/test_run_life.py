"""The life of a run: who owns its folder, how it begins, ends, is stopped and goes on, and what its files then say."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import esfast
from esfast import ES, Plan, embedded, interrupts, lock, report
from esfast.export import pack
from esfast.integrations import ray as fleet_of_ray
from esfast.interrupts import Interrupted, stoppable
from esfast.journal import read, replay
from esfast.lock import InUse, Lock
from esfast.run_folder import RunFolder

ROWS = [{"prompt": str(i)} for i in range(1, 5)]
TOKENIZER = embedded.make_tokenizer()


def value(completions, **columns):
    return [float(text) for text in completions]


def other_value(completions, **columns):
    return [1 - float(text) for text in completions]


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = embedded.make_model(TOKENIZER)
    for name, setting in changes.items():
        setattr(model.config, name, setting)
    return model


def trainer(folder, reward=value, rows=ROWS, model=None, metrics=None, at=None, eval_rows=ROWS, **settings):
    """The reward of a member is a function of its weights. `at` is called with every batch of prompts."""
    model = model if model is not None else make_model()
    weight = next(model.parameters())

    def answer(prompts):
        if at is not None:
            at(made)
        return [str(float(weight.detach().double().sum()))] * len(prompts)

    settings = {"generations": 4, "population_size": 4, "sigma": 0.02, "lr": 0.02, "prompts_per_generation": 2,
                "eval_every": 0, "checkpoint_every": 1, "progress": False} | settings  # fmt: skip
    config = esfast.ESConfig(output_dir=str(folder), **settings)
    made = esfast.ESTrainer(model, reward, config, rows, eval_rows, TOKENIZER, metrics, answer)
    return made


def fails_at(generation, error=None):
    """Stops a run amidst this generation (numbered from 0), in training."""

    def at(made):
        if made.es.generation == generation and made.es._inside is not None:
            raise error or ZeroDivisionError("made to fail")

    return at


def stopped(folder, generation, **options):
    made = trainer(folder, at=fails_at(generation), **options)
    with pytest.raises(ZeroDivisionError):
        made.train()
    return made


def contents(folder):
    """Every file's bytes and time of change."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def bits(made):
    return made.es.plan.fingerprint()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed: folder and fingerprint of its weights."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    made = trainer(folder)
    made.train()
    return folder, bits(made)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)


# ---- one owner ------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from esfast.lock import Lock
lock = Lock.take(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that owns tmp_path / "run"; it has forked a child that outlives it."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / "journal.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_an_owner_in_another_process_is_named_and_a_dead_one_is_none(holder, tmp_path):
    for resume in (False, True):
        with pytest.raises(InUse, match=rf"run is in use by process {holder.pid} on {os.uname().nodename}"):
            trainer(tmp_path / "run", resume=resume)
    with pytest.raises(InUse, match=f"process {holder.pid}"):
        ES([("a", torch.zeros(3))], journal=tmp_path / "run" / "journal.jsonl")
    holder.kill()
    holder.wait()
    made = trainer(tmp_path / "run")
    made.train()
    assert not list((tmp_path / "run").glob("*.lock"))


def test_an_owner_that_ends_in_time_is_waited_for(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 30)
    threading.Timer(0.5, holder.kill).start()
    trainer(tmp_path / "run")


def test_two_trainers_for_one_folder_in_one_process(tmp_path):
    first = trainer(tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(InUse, match=f"in use by another trainer of this process .process {os.getpid()} on"):
            trainer(tmp_path / "run", resume=resume)
    first.train()
    with pytest.raises(FileExistsError, match="holds a run already"):
        trainer(tmp_path / "run")
    assert trainer(tmp_path / "run", resume=True, generations=5).train()["generations"] == 5


def test_a_trainer_that_was_deleted_or_refused_owns_nothing(tmp_path):
    made = trainer(tmp_path / "new" / "run")
    del made
    with pytest.raises(ValueError, match="sigma"):
        trainer(tmp_path / "new" / "run", sigma=-1.0)
    trainer(tmp_path / "new" / "run")
    with pytest.raises(ValueError, match="even number"):
        trainer(tmp_path / "other" / "run", mirrored=True, population_size=5)
    assert not (tmp_path / "other").exists()


def test_a_forked_process_neither_keeps_nor_removes_the_lock(tmp_path):
    held = Lock.take(tmp_path / "journal.jsonl")
    child = os.fork()
    if child == 0:
        time.sleep(5 if held._descriptor is None else 0.5)
        os._exit(0)
    held.release()
    Lock.take(tmp_path / "journal.jsonl").release()  # while the child lives
    os.waitpid(child, 0)


def test_two_that_begin_at_once(tmp_path):
    """ES alone, whose journals are created exclusively, in threads at a barrier."""
    barrier, made = threading.Barrier(8), []

    def begin():
        barrier.wait()
        try:
            made.append(ES([("a", torch.zeros(3))], journal=tmp_path / "journal.jsonl"))
        except FileExistsError:
            pass

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_two_es_never_write_one_journal(tmp_path):
    def step(es):
        for member in es.population():
            member.reward = float(member.seed % 1000)
        es.step()

    def start(**options):
        return ES(Plan([("a", torch.zeros(30))]), population_size=4, journal=tmp_path / "journal.jsonl", **options)

    first = start()
    step(first)
    second = start(resume=True)
    step(second)
    before = first.plan.fingerprint()
    with pytest.raises(RuntimeError, match="was changed while the run went on"):
        step(first)
    assert first.plan.fingerprint() == before and len(read(tmp_path / "journal.jsonl").records) == 2


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def refused(descriptor, operation):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refused)
    trainer(tmp_path / "run").train()
    assert "the file system has no locks (No locks available)" in caplog.text
    assert not list((tmp_path / "run").glob("*.lock"))


# ---- checkpoints and folders of an earlier run ----------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_left_out(tmp_path, whole, caplog):
    """Of the same seed, base weights and settings, but other rewards: the header of the journal is the same."""
    stopped(tmp_path / "other", 3, reward=other_value)
    made = stopped(tmp_path / "run", 3, checkpoint_every=0)
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    assert read(tmp_path / "other" / "journal.jsonl").header == read(made.folder.journal).header
    again = trainer(tmp_path / "run", resume=True)
    assert "it is of another run" in caplog.text and "0 of them from a checkpoint" in caplog.text
    again.train()
    assert bits(again) == whole[1]


@pytest.mark.parametrize("checked", [True, False])
def test_a_checkpoint_that_names_no_run_needs_the_journal_to_vouch_for_it(checked, tmp_path, whole, caplog):
    made = stopped(tmp_path / "run", 3)
    made.es._history.identities.clear()  # as if an older version had written it
    made.es._history.save(3, made.es._weights.updater)
    assert 3 in read(made.folder.journal).checks
    if not checked:
        lines = made.folder.journal.read_bytes().splitlines(keepends=True)
        made.folder.journal.write_bytes(b"".join(line for line in lines if b'"check":3' not in line))
    again = trainer(tmp_path / "run", resume=True)
    assert f"{3 if checked else 2} of them from a checkpoint" in caplog.text
    again.train()
    assert bits(again) == whole[1]


@pytest.mark.parametrize("deleted", ["journal.jsonl", "journal.jsonl metrics.jsonl config.yaml"])
def test_resuming_without_a_journal_needs_a_clean_folder(deleted, folder):
    for name in deleted.split():
        (folder / name).unlink()
    before = contents(folder)
    with pytest.raises(FileNotFoundError, match=r"resume: .*run holds .*checkpoints.* but no journal\.jsonl with"):
        trainer(folder, resume=True)
    assert contents(folder) == before


def test_resuming_begins_anew_in_a_clean_folder(tmp_path, whole):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    made = trainer(tmp_path / "run", resume=True)
    made.train()
    assert bits(made) == whole[1] and (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_new_run_moves_what_an_earlier_one_left_without_its_journal(folder, caplog):
    for name in ("journal.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    made = stopped(folder, 2, seed=1)
    assert sorted(p.name for p in (folder / "earlier-1").iterdir()) == [
        "best", "checkpoints", "curves.png", "model", "samples.jsonl", "summary.json"
    ] and "moved to" in caplog.text  # fmt: skip
    again = trainer(folder, seed=1, resume=True)
    assert bits(again) == bits(made) and "2 of them from a checkpoint" in caplog.text


# ---- ends and new beginnings ----------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(folder, caplog):
    (folder / "tensorboard").mkdir()
    before, summary = contents(folder), json.loads((folder / "summary.json").read_text())
    for generations in (4, 3):
        made = trainer(folder, resume=True, generations=generations)
        assert made.train() == summary and "is finished, all of its 4 generations" in caplog.text
        assert contents(folder) == before
    assert trainer(folder, resume=True, generations=5).train()["generations"] == 5


def facts(folder):
    """What a run says at its end, less the time that it took."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "evaluations": {k: summary[k] for k in ("generations", "before", "after", "after_generation")},
        "rows": [{k: v for k, v in r.items() if "second" not in k and k != "overhead_ratio"} for r in rows],
        "card": (folder / "model" / "README.md").read_text(),
        "weights": (folder / "model" / "model.safetensors").read_bytes(),
    }


def test_killed_in_its_last_evaluation(whole, tmp_path):
    def at(made):
        if made.es.generation == 4 and made.es._inside is None:
            raise ZeroDivisionError("made to fail")

    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path / "run", at=at).train()
    trainer(tmp_path / "run", resume=True).train()
    found, expected = facts(tmp_path / "run"), facts(whole[0])
    for run in (found, expected):
        for name in ("update_norm", "distance"):  # which the journal does not know
            run["rows"][-1].pop(name, None)
    assert found == expected


@pytest.mark.parametrize("lost", ["summary.json", "summary.json model", "summary.json curves.png", "model"])
def test_killed_between_its_last_generation_and_its_end(lost, folder, whole):
    for name in lost.split():
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trainer(folder, resume=True).train()
    assert facts(folder) == facts(whole[0])


def test_killed_in_an_evaluation_on_the_way(tmp_path):
    def at(made):
        if made.es.generation == 2 and made.es._inside is None:
            raise ZeroDivisionError("made to fail")

    trainer(tmp_path / "whole", eval_every=2).train()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path / "run", eval_every=2, at=at).train()
    trainer(tmp_path / "run", eval_every=2, resume=True).train()
    evaluated = [
        [(r["generation"], r["eval_reward"]) for r in facts(folder)["rows"] if "eval_reward" in r]
        for folder in (tmp_path / "whole", tmp_path / "run")
    ]
    assert evaluated[0] == evaluated[1] and [g for g, _ in evaluated[0]] == [0, 2, 4]


def test_an_interrupted_run_does_not_call_an_earlier_evaluation_its_own(tmp_path):
    made = trainer(tmp_path, at=fails_at(3, KeyboardInterrupt()), eval_every=2)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["generations"] == 3 and summary["after_generation"] == 2
    assert "| before | after generation 2 |" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("missing", ["deleted", "empty"])
def test_metrics_that_were_lost_are_taken_from_the_journal(missing, tmp_path, whole, caplog):
    stopped(tmp_path, 3)
    (tmp_path / "metrics.jsonl").unlink() if missing == "deleted" else (tmp_path / "metrics.jsonl").write_text("")
    summary = trainer(tmp_path, resume=True).train()
    found, expected = facts(tmp_path), facts(whole[0])
    assert summary["before"] == {} and summary["after"] == expected["evaluations"]["after"]
    assert "evaluation of the base model is lost" in caplog.text
    assert [r["generation"] for r in found["rows"]] == list(range(5))
    assert [r.get("reward_mean") for r in found["rows"]] == [r.get("reward_mean") for r in expected["rows"]]
    assert "for 4 generations" in found["card"] and "| reward | not known |" in found["card"]


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_journal_that_goes_while_the_run_goes_on_stops_it(how, tmp_path):
    def at(made):
        if made.es.generation == 2:
            path = made.folder.journal
            if how == "replaced":
                path.write_bytes(b"")
            elif path.exists():
                path.unlink() if how == "deleted" else path.rename(tmp_path / "away.jsonl")

    made = trainer(tmp_path / "run", at=at)
    words = "was changed while" if how == "replaced" else "was deleted or moved away while the run went on"
    with pytest.raises((RuntimeError, FileNotFoundError), match=f"journal: .*{words}"):
        made.train()
    assert made.es.generation == 2 and not made.folder.journal.exists() or how == "replaced"
    if how == "moved":
        (tmp_path / "away.jsonl").rename(made.folder.journal)
        assert trainer(tmp_path / "run", resume=True).train()["generations"] == 4


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("header", [b"", b"\0" * 300, b'{"esfast_journal":2,"noi', b'{"esfast_jour\0\0\0\0'])
def test_a_journal_without_its_header_is_no_run(header, resume, tmp_path, whole):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_bytes(header)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"generation": 0, "eval_reward": 7.0}\n{"gener')
    made = trainer(tmp_path / "run", resume=resume)
    made.train()
    assert bits(made) == whole[1] and facts(tmp_path / "run") == facts(whole[0])


@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_header_with_generations_behind_it_is_refused(resume, folder):
    data = folder.joinpath("journal.jsonl").read_bytes()
    folder.joinpath("journal.jsonl").write_bytes(b"{" + data[2:])
    before = contents(folder)
    with pytest.raises((ValueError, FileExistsError), match="line 1 of .* is damaged" if resume else "holds a run"):
        trainer(folder, resume=resume)
    assert contents(folder) == before


@pytest.mark.parametrize("resume", [False, True])
def test_what_failed_in_its_first_generation_is_started_again_with_other_settings(resume, tmp_path, caplog):
    stopped(tmp_path / "run", 0)
    assert "nothing is lost, start it again" in caplog.text and "resume to go on" not in caplog.text
    rows = [{"prompt": "mended"}, *ROWS[1:]]
    made = trainer(tmp_path / "run", rows=rows, reward=other_value, seed=3, population_size=6, resume=resume)
    made.train()
    other = trainer(tmp_path / "other", rows=rows, reward=other_value, seed=3, population_size=6)
    other.train()
    assert bits(made) == bits(other) and facts(tmp_path / "run") == facts(tmp_path / "other")


# ---- what a run is --------------------------------------------------------------------------------------------------


class Counting:
    """A reward function that is an object."""

    def __call__(self, completions, **columns):
        return value(completions)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": other_value}, r"reward_funcs .*test_run_life:value.*, asked for is .*test_run_life:other_value"),
        ({"reward": [value, Counting()]}, r"reward_funcs .*Counting"),
        ({"rows": ROWS[:3]}, "train_dataset of 4 rows .* asked for is of 3 rows"),
        ({"rows": [{"prompt": "5"}, *ROWS[1:]]}, "train_dataset of 4 rows .* asked for is of 4 rows"),
        ({"rows": lambda generation, count: ROWS[:count]}, "train_dataset of 4 rows .* asked for is the function"),
        ({"sigma": 0.03}, "sigma 0.02, asked for is 0.03"),
    ],
    ids=["reward", "another reward", "fewer rows", "another row", "a function", "sigma"],
)
def test_what_a_run_is_must_be_the_same(changes, words, folder):
    before = contents(folder)
    with pytest.raises(ValueError, match=f"resume: the run has {words}"):
        trainer(folder, resume=True, generations=5, **changes)
    assert contents(folder) == before


def test_the_model_must_be_the_same(folder):
    class Other(type(make_model())):
        pass

    other = make_model()
    other.__class__ = Other
    with pytest.raises(ValueError, match=r"resume: the run has model Qwen2\w*, asked for is .*Other"):
        trainer(folder, resume=True, model=other)
    with pytest.raises(ValueError, match="resume: the run has model config: rms_norm_eps .*, asked for is 0.5"):
        trainer(folder, resume=True, model=make_model(rms_norm_eps=0.5))
    with pytest.raises(ValueError, match="is of a run with fingerprint of the base weights"):
        trainer(folder, resume=True, model=make_model(seed=1))


def test_what_says_how_a_run_is_looked_at_may_change_and_older_folders_say_less(folder, whole):
    model = make_model(_name_or_path="elsewhere", use_cache=False)
    trainer(folder, resume=True, generations=4, eval_rows=ROWS[:2], metrics={"more": value}, model=model, samples=1)
    (folder / "identity.json").unlink()
    assert trainer(folder, resume=True, generations=5, reward=value).train()["generations"] == 5
    assert json.loads((folder / "identity.json").read_text())["reward_funcs"] == [f"{__name__}:value"]


# ---- damaged files --------------------------------------------------------------------------------------------------

DAMAGE = {"binary": b"\x00\xff\xfe\x80", "torn": b'{"a": [1, ', "of another kind": b"[1, 2]", "empty": b""}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "identity.json"])
def test_a_damaged_file_is_named_with_what_to_do(name, damage, folder):
    (folder / name).write_bytes(DAMAGE[damage])
    if name != "identity.json":
        with pytest.raises(ValueError, match=rf"{name}.*delete it"):
            report.load(folder)
    if name == "summary.json":  # a resumed run writes it anew
        return
    with pytest.raises(ValueError, match=rf"{name}.*delete it"):
        trainer(folder, resume=True)
    (folder / name).unlink()
    assert trainer(folder, resume=True, generations=5).train()["generations"] == 5


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b'{"generation": 2, "rew', b"[]", b""])
def test_a_damaged_line_of_metrics_is_named_and_written_anew(damage, folder, whole):
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    lines[2] = damage
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 3 is damaged .* resume the run, which writes it anew"):
        report.load(folder)
    trainer(folder, resume=True).train()
    found, expected = (facts(run)["rows"] for run in (folder, whole[0]))
    assert [r.get("reward_mean") for r in found] == [r.get("reward_mean") for r in expected]
    assert report.load(folder).metrics[2]["generation"] == 2


def test_damaged_samples_are_named_and_a_torn_line_is_cut_off(tmp_path):
    made = stopped(tmp_path, 2)
    whole = made.folder.samples.read_bytes()
    made.folder.samples.write_bytes(whole + b'{"generation": 2, "prom')
    assert len(report.load(tmp_path).samples) == 4
    trainer(tmp_path, resume=True).train()
    assert made.folder.samples.read_bytes().startswith(whole) and len(report.load(tmp_path).samples) == 8
    made.folder.samples.write_bytes(b"\xff\n" + whole)
    with pytest.raises(ValueError, match=r"samples\.jsonl: line 1 is damaged .*: delete the line"):
        report.load(tmp_path)


@pytest.mark.parametrize("cut", [10, 300])
def test_a_truncated_export_is_named(cut, folder):
    pack(folder / "journal.jsonl", folder / "e.safetensors")
    (folder / "e.safetensors").write_bytes((folder / "e.safetensors").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"e\.safetensors is damaged"):
        replay(Plan(make_model()), folder / "e.safetensors")


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(tmp_path):
    stopped(tmp_path, 3)
    rows = RunFolder(tmp_path).read_metrics()
    rows[1]["seconds_generate"] += 1000.0
    rows[0]["evaluate_seconds"] += 2000.0
    RunFolder(tmp_path).write_metrics(rows)
    seconds = trainer(tmp_path, resume=True).train()["seconds"]
    assert 1000 < seconds["generate"] < 1100 and 2000 < seconds["evaluate"] < 2100 and 3000 < seconds["total"] < 3200


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def default_signals():
    """What a shell starts in its background ignores SIGINT."""
    kinds = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {signum: signal.signal(signum, handler) for signum, handler in kinds.items()}
    yield kinds
    assert {signum: signal.getsignal(signum) for signum in kinds} == kinds
    for signum, handler in before.items():
        signal.signal(signum, handler)


def sends(signum, generation=2, swallow=False):
    def at(made):
        if made.es.generation == generation and made.es._inside is not None:
            try:
                os.kill(os.getpid(), signum)
                time.sleep(0.01)
            except BaseException:
                if not swallow:
                    raise

    return at


@pytest.mark.parametrize("swallow", [False, True], ids=["", "swallowed"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=str)
def test_a_signal_saves_the_last_generation(signum, swallow, tmp_path, whole, default_signals, caplog):
    made = trainer(tmp_path, at=sends(signum, swallow=swallow))
    with pytest.raises(Interrupted) as caught:
        made.train()
    assert caught.value.signum == signum and made.es.generation == 2 == made.summary["generations"]
    assert f"interrupted by {signal.Signals(signum).name}: saving the model after generation 2" in caplog.text
    assert "resume to go on (--resume" in caplog.text
    saved = type(made.model).from_pretrained(tmp_path / "model")
    assert Plan(saved).fingerprint() == bits(made)
    again = trainer(tmp_path, resume=True)
    again.train()
    assert bits(again) == whole[1]


def test_a_signal_in_the_first_generation_saves_nothing(tmp_path, default_signals, caplog):
    with pytest.raises(Interrupted):
        trainer(tmp_path / "run", at=sends(signal.SIGTERM, 0)).train()
    assert not (tmp_path / "run" / "model").exists() and "nothing is lost, start it again" in caplog.text


def test_handlers_of_the_caller_stay(tmp_path, default_signals):
    got = []
    signal.signal(signal.SIGTERM, lambda *received: got.append(received[0]))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        trainer(tmp_path / "run", at=sends(signal.SIGTERM)).train()
        trainer(tmp_path / "other", at=sends(signal.SIGHUP)).train()
        assert set(got) == {signal.SIGTERM}
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, lambda *received: sys.exit(7))
        made = trainer(tmp_path / "third", at=sends(signal.SIGTERM))
        with pytest.raises(SystemExit, match="7"):
            made.train()
        assert made.summary["generations"] == 2

        def scores(completions, **columns):
            sends(signal.SIGTERM)(made)
            return value(completions)

        made = trainer(tmp_path / "fourth", scores)  # where SystemExit and KeyboardInterrupt are a function's failure
        with pytest.raises(Interrupted):
            made.train()
        assert made.summary["generations"] == 2
    finally:
        for signum, handler in default_signals.items():
            signal.signal(signum, handler)


def test_in_other_threads_signals_are_left_alone(tmp_path, default_signals):
    made, ends = trainer(tmp_path, generations=1), []
    thread = threading.Thread(target=lambda: ends.append(made.train()["generations"]))
    thread.start()
    thread.join()
    assert ends == [1]


SECOND = """
import os, signal, sys, time
from esfast.interrupts import stoppable
with stoppable():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun and terminals do
        print("saving", flush=True)
        time.sleep(60)
"""


def test_a_second_signal_ends_it_at_once_and_an_echo_does_not():
    process = subprocess.Popen([sys.executable, "-c", SECOND], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    time.sleep(interrupts.REPEATED + 0.2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    process.communicate()


def test_an_error_that_the_same_signal_made_elsewhere_is_no_error(tmp_path, default_signals):
    """A worker process dies of a scheduler's signal before this one hears of it."""

    def at(made):
        if made.es.generation == 2 and made.es._inside is not None:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
            raise RuntimeError("an engine died")

    made = trainer(tmp_path, at=at)
    with pytest.raises(Interrupted):
        made.train()
    assert made.summary["generations"] == 2


def test_workers_outlive_the_signals_of_their_parent():
    import scoring

    from esfast.rewards import Scorer

    scorer = Scorer([scoring.length], workers=1)
    try:
        for _ in range(2):  # at its start, and when it runs
            scores = scorer.submit([scoring.length], ROWS[:1], ["abc"])
            for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                os.kill(scorer._running[0]._process.pid, signum)
            assert scores.result() == [[3.0]]
    finally:
        scorer.close()


def test_the_command_is_ended_by_a_scheduler_and_goes_on(tmp_path):
    """SIGTERM to the process and to those that score, at once: saved, the status is 143, and the rest follows."""
    tiny = embedded.build(tmp_path / "tiny", steps=1, progress=False)
    out = tmp_path / "run"
    command = [sys.executable, "-m", "esfast", "train", "--model", tiny, "--generations", "100000", "--out", out,
               "--population-size", "2", "--prompts-per-generation", "2", "--eval-prompts", "2", "--no-progress",
               "--max-completion-length", "2", "--reward-workers", "2", "--eval-every", "0"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(map(str, command), stderr=subprocess.PIPE, text=True, env=environment)
    try:
        until = time.monotonic() + 120
        while not (out / "journal.jsonl").exists() or len(read(out / "journal.jsonl").records) < 3:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        for pid in (*map(int, children), process.pid):
            os.kill(pid, signal.SIGTERM)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and time.monotonic() - began < 30, errors
    assert "interrupted by SIGTERM: saving the model" in errors and "resume to go on (--resume" in errors, errors
    done = len(read(out / "journal.jsonl").records)
    assert json.loads((out / "summary.json").read_text())["generations"] == done
    assert not list(out.glob("*.lock"))


def test_nested_blocks_are_one(default_signals):
    with stoppable() as outer, stoppable() as inner:
        assert inner is outer
    assert fleet_of_ray.kept_handlers is interrupts.kept_handlers
    with interrupts.kept_handlers():
        signal.signal(signal.SIGTERM, lambda *received: sys.exit(15))
