"""bench/gpu_suite.sh: what fails in a stage, planted one at a time, costs its own rows and nothing else; on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from esfast.bench import noise, suite

SCRIPT = Path(noise.__file__).resolve().parent / "gpu_suite.sh"
# Read by every Python of a stage: in the process that the benchmark's work is done in, or in that which listens to it.
PLANTS = """
import os, signal, sys
command, plant = " ".join(sys.orig_argv), os.environ.get("PLANT")
if plant == "bit" and "isolated import serve" in command:
    import torch
    from esfast import ops
    right = ops._BACKENDS["cpu"]
    def wrong(call):
        right(call)
        if "lm_head.weight" in call.plan.names:
            call.plan.tensors[-1].view(-1)[-1:].view(torch.int16).bitwise_xor_(1)
    ops._BACKENDS["cpu"] = wrong
if plant == "kill" and "bench gpu" in command:
    from esfast.bench import gpu
    row = gpu.Result._row
    def killed(self, *arguments):
        row(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    gpu.Result._row = killed
"""
FEW = [
    "--models",
    "tiny",
    "--dtypes",
    "bfloat16",
    "--noise",
    "rademacher",
    "--members",
    "2",
    "--repeats",
    "1",
    "--backends",
    "cpu",
    "reference",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(stages, plant): the exit status and what status.json says of each stage."""
    (tmp_path / "plants").mkdir()
    (tmp_path / "plants" / "sitecustomize.py").write_text(PLANTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "plants"), prepend=os.pathsep)
    monkeypatch.setenv("ESFAST_SUITE_DEVICE", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(suite, "KILL_AFTER", 1)
    monkeypatch.setitem(
        suite.STAGES, "noise", suite.Stage(200, lambda site, s: [site.bench("gpu", "noise", [], FEW)], "noise")
    )
    few = ["--numel", "1e3", "--dtypes", "bfloat16", "--noise", "rademacher"]
    monkeypatch.setitem(
        suite.STAGES,
        "profile",
        suite.Stage(200, lambda site, s: [site.bench("profile", "profile", [], few)], "profile"),
    )

    def start(*stages, plant=""):
        monkeypatch.setenv("PLANT", plant)
        before = signal.getsignal(signal.SIGTERM)
        try:
            status = suite.main(list(stages))
        finally:
            signal.signal(signal.SIGTERM, before)
        found = json.loads((tmp_path / "out" / "status.json").read_text())["stages"]
        return status, {r["stage"]: r for r in found}

    start.out, start.folder = tmp_path / "out", tmp_path
    return start


def rows_of(out):
    result = json.loads((out / "noise_dry_run.json").read_text())
    return result, {(r["op"], r["backend"]) for r in result["rows"]}


ALL = {
    (op, b)
    for op in ("perturb_base", "perturb", "restore_base", "perturb_restore_base", "perturb_restore", "update", "memory")
    for b in ("cpu", "reference")
}


def test_a_red_test_costs_the_stage_of_tests_alone(run, monkeypatch, capfd):
    red = run.folder / "test_planted.py"
    red.write_text("def test_green(): pass\ndef test_red(): assert 0, 'planted'\n")
    monkeypatch.setenv("ESFAST_SUITE_TESTS", str(red))
    status, found = run("tests", "noise")
    assert status == 1
    assert found["tests"]["state"] == "failed" and "1 failed, 1 passed" in found["tests"]["reason"]
    assert found["noise"]["state"] == "passed" and found["noise"]["rows"] == len(ALL)
    result, rows = rows_of(run.out)
    assert rows == ALL and "unfinished" not in result and result["left_out"] == []
    shown, log = capfd.readouterr().out, (run.out / "suite.log").read_text()
    closing = shown[shown.rindex("\nstage ") :]
    assert "tests      failed" in closing and "noise      passed" in closing and closing in log and "planted" in log


def test_a_stage_that_is_killed_keeps_the_rows_it_had(run):
    status, found = run("noise", "profile", plant="kill")
    assert status == 1
    assert found["noise"]["state"] == "killed" and found["noise"]["reason"] == "by SIGKILL"
    assert found["profile"]["state"] == "passed"
    result, rows = rows_of(run.out)
    assert result["unfinished"] and len(rows) == found["noise"]["rows"] == 1
    assert "stopped before its end" in suite_caption(result)
    assert not list(run.out.glob(".*")), "nothing half-written is left"


def suite_caption(result):
    from esfast.bench.provenance import caption

    return caption(result)


def test_a_wrong_bit_costs_the_figures_of_its_backend(run, monkeypatch):
    green = run.folder / "test_planted.py"
    green.write_text("def test_green(): pass\n")
    monkeypatch.setenv("ESFAST_SUITE_TESTS", str(green))
    status, found = run("noise", "tests", plant="bit")
    assert status == 1 and found["tests"]["state"] == "passed"
    assert found["noise"]["state"] == "failed"
    (reason,) = found["noise"]["left_out"]
    assert reason.startswith("cpu: backend 'cpu', rademacher, on the weights to be timed: 1 of ")
    result, rows = rows_of(run.out)
    assert rows == {(op, b) for op, b in ALL if b == "reference"} and "unfinished" not in result


def test_a_stage_whose_time_is_up_ends_with_all_its_processes(run, monkeypatch):
    """A stage that ignores SIGTERM is ended too, and so are the processes that it started."""
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import signal, time; "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)']).pid, flush=True); time.sleep(60)"
    )
    slow = suite.Stage(2, lambda site, s: [[sys.executable, "-c", code], [sys.executable, "-c", "print('went on')"]])
    quick = suite.Stage(9, lambda site, s: [[sys.executable, "-c", "print('here')"]])
    monkeypatch.setattr(suite, "STAGES", {"build": slow, "tests": quick})
    began = time.monotonic()
    status, found = run("build", "tests")
    assert status == 1 and time.monotonic() - began < 15
    assert (found["build"]["state"], found["tests"]["state"]) == ("timed out", "passed")
    log = (run.out / "suite.log").read_text()
    assert "went on" not in log and "here" in log
    pid = int(next(line for line in log.splitlines() if line.isdecimal()))
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "a process is left behind"
        time.sleep(0.05)


def test_status_is_there_while_a_stage_runs_and_after_the_suite_is_ended(tmp_path):
    """The suite is ended by SIGTERM, as on a machine that is taken back."""
    environment = {
        **os.environ,
        "ESFAST_SUITE_DEVICE": "cpu",
        "OUT": str(tmp_path),
        "PYTHON": sys.executable,
        "ESFAST_SUITE_TESTS": str(tmp_path / "test_slow.py"),
    }
    (tmp_path / "test_slow.py").write_text("import time\ndef test_slow():\n    time.sleep(60)\n")
    with subprocess.Popen(["bash", SCRIPT, "tests", "build"], env=environment, stdout=subprocess.DEVNULL) as process:
        status = tmp_path / "status.json"
        deadline = time.monotonic() + 60
        while not status.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        assert [r["state"] for r in json.loads(status.read_text())["stages"]] == ["running"]
        process.terminate()
        assert process.wait(20) == 143


def test_the_script_names_its_stages():
    done = subprocess.run(
        ["bash", SCRIPT, "noize"], capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
    assert done.returncode == 2 and "unknown stage 'noize'; the stages are build tests noise iteration" in done.stderr
    named = [suite.STAGES[name].seconds for name in ("build", "tests")]
    assert sum(named) < 570 and all(stage.seconds < 540 for stage in suite.STAGES.values())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_package_lies_as_installed_and_the_results_where_they_are_wanted(device, tmp_path):
    with suite.site_of(device, tmp_path) as site:
        code = "import esfast.bench, importlib.util as u; u.find_spec('esfast.kernels'); print(esfast.bench.__file__)"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=site.tree,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(site.tree)},
        )
        assert done.stdout.strip() == str(site.tree / "esfast" / "bench" / "__init__.py"), done.stderr
        assert site.results == ((suite.ROOT / "bench" / "results", tmp_path) if device == "cuda" else (tmp_path,))
        for name, stage in suite.STAGES.items():
            commands = stage.commands(site, 100)
            assert commands and all(isinstance(word, str) for command in commands for word in command), name
            written = [w for command in commands for w in command if w.endswith(".json")]
            assert len(written) == bool(stage.file) * len(site.results)


def test_no_gpu_and_no_tool_are_red_where_a_gpu_should_be(run, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with suite.site_of("cuda", run.out) as site:
        (command,) = suite.STAGES["sanitize"].commands(site, 10)
        assert subprocess.run(command, capture_output=True).returncode == 1
        *_, ready = suite.STAGES["build"].commands(site, 10)
        done = subprocess.run(
            ready, capture_output=True, text=True, cwd=site.tree, env={**os.environ, "PYTHONPATH": str(site.tree)}
        )
        assert done.returncode == 1 and "backend 'cuda': there is no NVIDIA driver" in done.stdout


def test_the_gpus_architecture_is_what_is_built(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 9.0\necho 8.0\necho 9.0\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert suite.architectures("cuda") == "80 90" and suite.architectures("cpu") is None
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert suite.architectures("cuda") is None
