"""Who owns a run folder, and what of an earlier run may lie in it."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from life import bits, contents, other_value, stopped, trainer

from esfast import ES, Plan
from esfast.journal.journal import Journal, read
from esfast.utils import lock
from esfast.utils.lock import InUse, Lock

# ---- one owner ------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from esfast.utils.lock import Lock
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


@pytest.mark.parametrize("pause", [0, 0.05])
def test_two_that_begin_at_once(tmp_path, monkeypatch, pause):
    """Threads at a barrier create the same journal by `ES`, without a trainer: exactly one may get it, also if the
    first line of the journal takes time to write."""
    barrier, made, write = threading.Barrier(8), [], Journal._write
    monkeypatch.setattr(Journal, "_write", lambda journal, fields: time.sleep(pause) or write(journal, fields))

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
    """The other run has the same seed, base weights and settings, and so the same header of its journal, but other
    rewards."""
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
    made.es._history.save(3, made.es.store.updater)
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
    assert (
        sorted(p.name for p in (folder / "earlier-1").iterdir())
        == ["best", "checkpoints", "curves.png", "model", "samples.jsonl", "summary.json"]
        and "moved to" in caplog.text
    )
    again = trainer(folder, seed=1, resume=True)
    assert bits(again) == bits(made) and "2 of them from a checkpoint" in caplog.text
