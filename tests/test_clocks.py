"""What stands beside a GPU's figures (clocks, power, throttling, where they come from) and what ncu says of kernels: from
tools that are stood in for."""

import argparse
import time

import pytest
import torch

from esfast.bench import BenchmarkError, clocks, main, profile, provenance
from esfast.bench.clocks import Clocks


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """tool(name, script): a program of that name comes first on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def make(name, script):
        path = tmp_path / name
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
        return path

    return make


def sampled(found, seconds=10.0):
    """What is said once there is a sample, or a reason for none."""
    deadline = time.monotonic() + seconds
    while not found._samples and (found.absent is None or found._process is not None and found._process.poll() is None):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found.between(0.0, time.time() + 1)


def test_samples_of_the_time_between(tool):
    tool(
        "nvidia-smi",
        'echo "$@" >&2; echo "1755, 2619, 640.12, 61, 0x0000000000000005"; '
        'echo "1980, 2619, 412.50, 60, 0x0000000000000000"; sleep 60\n',
    )
    with Clocks() as found:
        while len(found._samples) < 2:
            sampled(found)
        began = found._samples[0][0]
        both, early = found.between(began - 1, time.time()), found.between(began - 9, began - 8)
        process = found._process
    assert process.poll() is not None, "it ends with the block"
    assert both == {
        "clocks": {
            "sm_mhz": 1867.5,
            "sm_mhz_min": 1755.0,
            "memory_mhz": 2619.0,
            "power_w": 526.31,
            "power_w_max": 640.12,
            "temperature_c": 61.0,
            "throttled": ["power cap"],
            "samples": 2,
        }
    }
    assert early["clocks"]["samples"] == 1, "a time too short for a sample has the nearest one"
    assert clocks.text(both) == "1868 (power cap)" and clocks.text({"clocks": None}) == clocks.text({}) == "?"


def test_a_tool_that_keeps_its_lines_back_is_asked(tool):
    tool("nvidia-smi", 'case "$*" in *loop*) exec sleep 60;; esac; echo "1980, 2619, 300.00, 50, 0x0000000000000001"\n')
    with Clocks() as found:
        assert found.between(0, 1)["clocks"]["sm_mhz"] == 1980


def test_why_there_are_none(tool, monkeypatch, tmp_path):
    with Clocks("cpu") as found:
        assert found.between(0, 1) == {"clocks": None, "clocks_absent": "measured on a CPU"}
    tool("nvidia-smi", 'echo Field \\"x\\" is not a valid field to query.; exit 2\n')
    with Clocks() as found:
        said = sampled(found)
        for _ in range(500):
            if "no sample yet" not in said["clocks_absent"]:
                break
            time.sleep(0.01)
            said = found.between(0, 1)
    assert said == {"clocks": None, "clocks_absent": 'nvidia-smi says: Field "x" is not a valid field to query.'}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with Clocks() as found:
        assert found.between(0, 1)["clocks_absent"].startswith("nvidia-smi can't be run: ")


# ---- ncu -------------------------------------------------------------------------------------------------------------

ARGS = argparse.Namespace(
    device="cuda", numel=2**20, dtypes=["bfloat16"], noise=["rademacher"], seconds=60.0, save=lambda found: None
)
NAMES = ["ID", "Process ID", "Kernel Name", *profile.METRICS.values()]


def text_of(kernels=3, units=True):
    """As ncu --csv --page raw writes: lines of its own, names, units, a line for each kernel."""
    unit = ["", "", "", "us", "%", "%", "%", "inst", "cycle", "Mbyte", "Mbyte", "register/thread"]
    lines = ["==PROF== Connected to process 1", NAMES, *[unit] * units]
    lines += [
        [str(i), "1", "add_noise_kernel", "12.5", "91.2", "55", "40", "1,048,576", "20,000", "2.097152", "2.1", "80"]
        for i in range(kernels)
    ]
    return "\n".join(x if isinstance(x, str) else ",".join(f'"{cell}"' for cell in x) for x in lines) + "\n"


def test_rows_of_ncus_text(monkeypatch):
    monkeypatch.setattr(profile, "_multiprocessors", lambda: 132)
    restore, perturb, update = profile.rows_of(text_of(), "cuda", ARGS)
    assert [r["kernel"] for r in (restore, perturb, update)] == list(profile.LAUNCHES)
    assert (restore["noise"], perturb["noise"], update["members"]) == ("none", "rademacher", profile.MEMBERS)
    assert perturb["ns"] == 12500 and perturb["instructions"] == 2**20 and perturb["memory_percent"] == 91.2
    assert perturb["instructions_per_weight"] == 32 and update["instructions_per_weight"] == 32 / profile.MEMBERS
    assert perturb["cycles_per_weight"] == pytest.approx(20000 * 4 * 132 * 32 / 2**20)
    assert perturb["bytes_per_weight"] == pytest.approx((2.097152 + 2.1) * 1e6 / 2**20)
    with pytest.raises(BenchmarkError, match="saw 2 launches of our kernels, and not 3"):
        profile.rows_of(text_of(2), "cuda", ARGS)
    absent = profile.rows_of(text_of().replace('"20,000"', '"n/a"'), "cuda", ARGS)
    assert all(r["cycles"] is r["cycles_per_weight"] is None for r in absent)
    headers, lines = profile.table({"rows": absent, "left_out": [{"backend": "triton", "reason": "no"}]})
    assert all(len(line) == len(headers) for line in lines) and lines[0][9] == "?" and lines[0][4] == "12"


def test_ncu_is_run_over_every_launch_and_its_failure_costs_one_backend(tool, monkeypatch, tmp_path):
    (tmp_path / "text").write_text(text_of())
    tool(
        "ncu",
        f"""
echo "$@" >>{tmp_path}/log
while [ "$1" != --log-file ]; do shift; done
case "$*" in *"launch('triton'"*) echo 'no counters' >&2; exit 3;; esac
cp {tmp_path}/text "$2"
""",
    )
    tool("nvidia-smi", "exit 1\n")
    monkeypatch.setattr(profile.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profile, "_multiprocessors", lambda: 132)
    monkeypatch.setattr(profile, "backend_report", lambda device: {"cuda": "ready", "triton": "ready"})
    found = profile.run(ARGS)
    assert [(r["backend"], r["kernel"]) for r in found["rows"]] == [("cuda", kernel) for kernel in profile.LAUNCHES]
    assert found["left_out"] == [
        {"backend": "triton", "reason": "ncu ended with status 3: no counters", "failed": True}
    ]
    command = (tmp_path / "log").read_text()
    assert (
        "--clock-control none" in command and "launch('cuda', 'cuda', 1048576, ['bfloat16'], ['rademacher'])" in command
    )


def test_what_ncu_looks_at_launches_every_kernel_in_order(monkeypatch):
    calls = []
    monkeypatch.setattr(profile, "add_noise_", lambda plan, seeds, coeffs, **o: calls.append((len(seeds), o["noise"])))
    kinds = ["gaussian", "rademacher"]
    profile.launch("cpu", "cpu", 100, ["bfloat16", "float32"], kinds)
    expected = [
        ({"restore": 0, "perturb": 1}.get(what, profile.MEMBERS), kind)
        for _, kind, what in profile.cases(["bfloat16", "float32"], kinds)
    ]
    assert calls == expected and len(calls) == 10


# ---- where it comes from ---------------------------------------------------------------------------------------------


def test_provenance_names_the_gpu_and_its_driver(monkeypatch, tmp_path):
    class Properties:
        name, total_memory = "NVIDIA H200", 140 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 570.86.15\necho 570.86.15\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = provenance.provenance("gpu", [])
    assert (found["hardware"]["gpu"], found["hardware"]["gpu_memory_gib"]) == ("NVIDIA H200", 140)
    assert (found["versions"]["cuda"], found["versions"]["driver"]) == ("12.8", "570.86.15")
    shown = provenance.caption({"provenance": found})
    assert shown.startswith("NVIDIA H200, 140 GiB, ") and "CUDA 12.8, driver 570.86.15" in shown
    smi.write_text("#!/bin/sh\necho no devices were found >&2\nexit 9\n")
    assert provenance.driver_version() is None


def test_provenance_without_a_git_folder(monkeypatch, capsys):
    for told, commit, dirty in (("0123abcd", "0123abcd", False), ("0123abcd+", "0123abcd", True)):
        monkeypatch.setenv("ESFAST_COMMIT", told)
        found = provenance.provenance(
            "gpu", ["--json", "a.json", "b.json", "--models", "tiny", "--plots=x", "--repeats", "1"]
        )
        assert (found["commit"], found["dirty"]) == (commit, dirty)
        assert found["command"] == "esfast bench gpu --models tiny --repeats 1"
    monkeypatch.setenv("ESFAST_COMMIT", "yesterday's")
    assert main(["gpu", "--device", "cpu"]) == 2
    assert "ESFAST_COMMIT: expected a commit's hex digits" in capsys.readouterr().err
