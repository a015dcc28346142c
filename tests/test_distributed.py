"""Several processes train as one: the same bits for any number of them, whatever becomes of one of them.

Where torchrun has no part in what is tested, the processes are forks (forks.py).
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forks
import job
import pytest
import torch
from forks import environment
from job import free_port
from safetensors.torch import load_file

import esfast
from esfast.distributed import team as distributed
from esfast.distributed.team import Team
from esfast.journal.journal import read
from esfast.utils.lock import Lock

JOB = str(Path(__file__).parent / "job.py")


def options(settings):
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def launcher(processes, out, *arguments, **settings):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
            "--master-port", str(free_port()), *arguments, JOB, str(out), *options(settings)]  # fmt: skip


def torchrun(processes, out, *arguments, timeout=120, **settings):
    command = launcher(processes, out, *arguments, **settings)
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)


def team(processes, out, folder, **settings):
    """Processes without torchrun, which would end all if one fails: they must notice by themselves."""
    return forks.team(processes, job.program, out, *options(settings), folder=folder)


def several(processes, out, folder, **settings):
    return forks.ended(team(processes, out, folder, **settings))


def alone(out, folder, **settings):
    return forks.alone(job.program, out, *options(settings), folder=folder)


def outcome(folder):
    """The tuned weights' bits, and the journal."""
    return (folder / "model" / "model.safetensors").read_bytes(), (folder / "journal.jsonl").read_bytes()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    done = alone(folder / "run", folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("processes", (2, 3, 4))
def test_the_same_bits_and_journal_for_any_number_of_processes(warm_python, processes, single, tmp_path):
    if processes == 3:
        done = torchrun(processes, tmp_path / "run", pause=0.005)
    else:
        done = several(processes, tmp_path / "run", tmp_path, pause=0.005)
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(tmp_path / "run") == outcome(single)
    assert len(read(single / "journal.jsonl").checks) == 3  # two checkpoints and the end
    members = list(map(int, re.findall(r"rank \d: (\d+) members", done.stdout)))
    assert sum(members) == 6 * 7 and len(members) == processes  # each member once


LOW_RANK = {"noise": "low_rank", "rank": 2, "rounding": "stochastic", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {"weights": "master", "dtype": "bfloat16", "groups": ["*norm*:sigma=2,lr=0.5"]}),
        (2, {"optimizer": "momentum", "momentum_window": 2, "rounding": "stochastic", "dtype": "float16"}),
        (2, {"optimizer": "adam", "weight_decay": 0.5, "decay_to": "initial", "noise": "rademacher"}),
        (2, LOW_RANK),
        (4, LOW_RANK),
    ],
    ids=["master", "momentum", "adam", "low rank", "low rank on four"],
)
def test_modes_and_optimizers(processes, settings, tmp_path):
    """Both ways of updating are tried: every process updates all (generations 0 and 2), and each updates a share (1 and
    3). Then the faster one is kept."""
    one, shared = tmp_path / "one", tmp_path / "shared"
    for done in (alone(one, tmp_path, **settings), several(processes, shared, tmp_path, **settings)):
        assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(one) == outcome(shared)
    assert ("updates: " in done.stderr) == (settings.get("optimizer") != "adam")


def test_all_processes_find_the_same_sigma_and_lr(tmp_path):
    """Members of the search are handed out as they are in a generation; a resumed run searches no more."""
    one, shared = tmp_path / "one", tmp_path / "shared"
    settings = {"sigma": "auto", "lr": "auto", "generations": 90, "checkpoint_every": 0}
    for done in (alone(one, tmp_path, **settings), several(3, shared, tmp_path, pause=0.002, **settings)):
        assert done.returncode == 0 and "found sigma" in done.stderr, done.stderr[-3000:]
    assert outcome(one) == outcome(shared)
    assert json.loads((one / "tuning.json").read_text()) == json.loads((shared / "tuning.json").read_text())
    # each of the three asked members, not one for all
    assert len(asked := list(map(int, re.findall(r"rank \d: (\d+) members", done.stdout)))) == 3 and min(asked) > 90
    # a search that is killed begins again, and finds the same
    killed = tmp_path / "killed"
    assert alone(killed, tmp_path, at=[0, 0], fault="SIGKILL", **settings).returncode == -9
    assert not (killed / "tuning.json").exists() and not (killed / "config.yaml").exists()
    assert alone(killed, tmp_path, **settings, resume=True).returncode == 0 and outcome(killed) == outcome(one)
    more = {**settings, "generations": 91, "resume": True}
    done = several(2, one, tmp_path, **more)
    assert done.returncode == 0 and "found sigma" not in done.stderr, done.stderr[-3000:]


def test_a_slow_process_delays_nobody(tmp_path):
    """One of two is 5 times slower: together they do 1.2 members in the time of one; at most 1.3 times that is taken."""
    settings = {"pause": 0.1, "slow": [1, 5.0], "population_size": 30, "generations": 3, "checkpoint_every": 0}
    done = several(2, tmp_path / "run", tmp_path, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    ideal = 30 * 0.1 / 1.2
    taken = min(row["seconds"] for row in rows)
    assert taken <= 1.3 * ideal, (taken, ideal)


def test_a_process_that_dies_ends_the_job_and_another_number_of_them_goes_on(single, tmp_path):
    began = time.monotonic()
    done = torchrun(2, tmp_path / "run", fault="SIGKILL", at=[0, 3], pause=0.05)
    assert done.returncode != 0 and time.monotonic() - began < 60
    assert "rank      : 0" in done.stderr and "SIGKILL" in done.stderr  # torchrun names it
    assert len(read(tmp_path / "run" / "journal.jsonl").records) == 3
    done = several(3, tmp_path / "run", tmp_path, resume=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(tmp_path / "run") == outcome(single)


def test_torchrun_starts_them_again_and_they_resume(warm_python, single, tmp_path):
    done = torchrun(2, tmp_path / "run", "--max-restarts", "1", fault="SIGKILL", at=[1, 3], pause=0.05)
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(tmp_path / "run") == outcome(single) and "resuming after generation 3" in done.stderr


def test_a_scheduler_ends_torchrun_and_the_run_is_saved(single, tmp_path):
    """torchrun passes SIGTERM on to its processes, and a scheduler sends it to all: process 0 hears it twice."""
    out = tmp_path / "run"
    process = subprocess.Popen(launcher(2, out, pause=0.2), env=environment(), stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    try:
        until = time.monotonic() + 100
        while not (out / "journal.jsonl").exists() or len(read(out / "journal.jsonl").records) < 2:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and time.monotonic() - began < 30, errors[-3000:]
    done = len(read(out / "journal.jsonl").records)
    assert done < 6 and json.loads((out / "summary.json").read_text())["generations"] == done
    assert "interrupted by SIGTERM: saving the model" in errors and "resume to go on (--resume" in errors
    assert not list(out.glob("*.lock"))
    done = alone(out, tmp_path, resume=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcome(out)[0] == outcome(single)[0]
    assert read(out / "journal.jsonl").records == read(single / "journal.jsonl").records


def test_two_machines_that_share_no_files(warm_python, single, tmp_path):
    """Each machine has a launcher, one of them two processes and the other one. To resume, the second machine gets the
    journal from the first."""
    for generations, resume in ((4, False), (6, True)):
        port = str(free_port())
        launchers = []
        for node, processes in enumerate(("2", "1")):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
                       "--nproc-per-node", processes, "--master-addr", "127.0.0.1", "--master-port", port, JOB,
                       str(tmp_path / f"machine{node}"), *options({"generations": generations, "resume": resume})]  # fmt: skip
            launchers.append(subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True))
        for launcher in launchers:
            _, errors = launcher.communicate(timeout=120)
            assert launcher.returncode == 0, errors[-3000:]
    assert outcome(tmp_path / "machine0")[0] == outcome(single)[0]
    assert read(tmp_path / "machine0" / "journal.jsonl").records == read(single / "journal.jsonl").records
    assert "4 of them from a checkpoint" not in errors and "resuming after generation 4: 0 of them" in errors
    assert not (tmp_path / "machine1").exists()


def test_the_journal_is_with_process_0_or_there_is_a_word(tmp_path, caplog):
    def begin(rank, folder, store, restarted=False):
        team = Team(torch.distributed.PrefixStore(folder, store), rank, 2)
        team.restarted = restarted
        try:
            journal = tmp_path / f"{folder}{rank}" / "journal.jsonl"
            return esfast.ES([("a", torch.zeros(3))], team=team, journal=journal, resume=True)
        finally:
            team._ended.set()

    with ThreadPoolExecutor(1) as pool:
        for folder, restarted in (("new", False), ("again", True)):
            store = torch.distributed.HashStore()
            other = pool.submit(begin, 1, folder, store)
            begin(0, folder, store, restarted)
            other.result(timeout=10)
            assert ("beginning anew" in caplog.text) == restarted
        # as if machines had changed places
        es = esfast.ES([("a", torch.zeros(3))], population_size=2, journal=tmp_path / "moved1" / "journal.jsonl")
        for member in es.population():
            member.reward = float(member.index)
        es.step()
        store = torch.distributed.HashStore()
        other = pool.submit(begin, 1, "moved", store)
        with pytest.raises(FileNotFoundError, match="is on the machine of process 1, not on that of process 0"):
            begin(0, "moved", store)
        torch.distributed.PrefixStore("moved", store).set("stop", "failed: enough")
        with pytest.raises(distributed.Stopped):
            other.result(timeout=10)


def test_one_machine_goes_on_when_the_other_is_gone(single, tmp_path):
    """An elastic job of one or two machines: it is started again with as many as there are."""
    port, machines = free_port(), []
    for node in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
                   "--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
                   "--rdzv-id", "job", "--rdzv-conf", "last_call_timeout=5", JOB, str(tmp_path / f"machine{node}"),
                   *options({"pause": 0.2, "silence": 12})]  # fmt: skip
        machines.append(subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True))
        time.sleep(2 * (1 - node))  # the first is to be the one that holds the store
    try:
        journal, began = tmp_path / "machine0" / "journal.jsonl", time.monotonic()
        while not (journal.exists() and len(read(journal).records) > 2):  # amidst 4: no checkpoint is under way
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        worker = int(Path(f"/proc/{machines[1].pid}/task/{machines[1].pid}/children").read_text())
        for process in (worker, machines[1].pid):
            os.kill(process, signal.SIGKILL)
        _, errors = machines[0].communicate(timeout=120)
    finally:
        for machine in machines:
            machine.terminate()
            machine.communicate()
    assert machines[0].returncode == 0, errors[-3000:]
    assert "process 1 has not been heard of for 12 s" in errors and "resuming after generation" in errors
    assert outcome(tmp_path / "machine0") == outcome(single)


@pytest.mark.parametrize(
    ("fault", "rank", "status", "words"),
    [
        ("raise", 1, 1, "process 1 stopped with ZeroDivisionError: made to fail"),
        ("SIGINT", 1, 130, "process 1 was interrupted"),
        ("SIGINT", 0, 130, "process 0 was interrupted"),
        ("SIGSTOP", 1, 1, "process 1 has not been heard of for 12 s"),
    ],
)
def test_all_stop_with_one_and_know_why(fault, rank, status, words, tmp_path):
    began = time.monotonic()
    both = team(2, tmp_path / "run", tmp_path, fault=fault, at=[rank, 2], pause=0.05, silence=12)
    other = both[1 - rank]
    try:
        _, errors = other.communicate(timeout=60)
        assert other.returncode == status and words in errors, errors[-3000:]
        if fault == "SIGINT":
            both[rank].communicate(timeout=60)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert time.monotonic() - began < 60
    assert len(read(tmp_path / "run" / "journal.jsonl").records) == 2
    if fault == "SIGINT":  # what was completed is saved
        assert load_file(tmp_path / "run" / "model" / "model.safetensors")


def test_a_folder_in_use_is_told_to_all_with_its_owner(tmp_path):
    owner = Lock.take(tmp_path / "run" / "journal.jsonl")
    both = team(2, tmp_path / "run", tmp_path, patience=0)
    try:
        for process in both:
            _, errors = process.communicate(timeout=100)
            assert process.returncode == 1 and f"is in use by process {os.getpid()} on" in errors, errors[-3000:]
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert owner.held
