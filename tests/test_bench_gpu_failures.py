"""`esfast bench gpu` where something fails: it costs its own rows and no others; on the GPU that is here, or on the CPU."""

import json
import os
import sys
import time

import pytest
import torch

from esfast.bench import BenchmarkError, gpu, gpu_race, gpu_rows, main, models, workload
from esfast.bench.isolated import isolated
from esfast.core import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Without a GPU, Triton kernels are interpreted, which takes too long for every row of the benchmark.
BACKEND = "triton" if DEVICE == "cuda" else "cpu"


def job(**changes):
    return {
        "device": DEVICE,
        "todo": [("tiny", "bfloat16")],
        "noise": ["gaussian"],
        "members": 3,
        "repeats": 1,
        "backends": [BACKEND],
        "without": [],
        "had": [],
        "seconds": 600.0,
    } | changes


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gpu_rows, "randn4x_contenders", lambda w, device: {})


@pytest.mark.parametrize("where", ["odd sizes", "timed weights"])
def test_a_backend_that_differs_in_one_bit_is_not_timed(where, monkeypatch, quick):
    right = ops.add_noise_

    def wrong(plan, *arguments, backend, **options):
        right(plan, *arguments, backend=backend, **options)
        if backend == BACKEND and ("cube" in plan.names) == (where == "odd sizes"):
            plan.tensors[-1].view(-1)[-1:].view(torch.int16).bitwise_xor_(1)

    for module in (gpu_race, workload):
        monkeypatch.setattr(module, "add_noise_", wrong)
    events = list(gpu_rows.events(job(backends=[BACKEND, "reference"])))
    (left_out,) = [e["left_out"] for e in events if "left_out" in e]
    assert left_out["backend"] == BACKEND and left_out["everywhere"] and left_out["failed"]
    assert "differ from the reference" in left_out["reason"]
    rows = [e["row"] for e in events if "row" in e]
    assert {(r["op"], r["backend"]) for r in rows} == {(op, "reference") for op in (*gpu_rows.OPS, "memory")}


def test_figures_of_a_backend_that_turns_out_wrong_are_withdrawn():
    saved = []
    result, todo = gpu.Result(lambda found: saved.append(json.loads(json.dumps(found)))), job()
    rows = [
        {
            "row": {
                "model": "tiny",
                "dtype": "float32",
                "op": "update",
                "noise": "gaussian",
                "backend": b,
                "began": 0,
                "ended": 1,
            }
        }
        for b in ("good", "bad")
    ]
    wrong = {"left_out": {"backend": "bad", "reason": "a bit", "failed": True, "everywhere": True}}
    assert not result.take(iter([*rows, wrong]), todo)
    assert [r["backend"] for r in saved[1]["rows"]] == ["good", "bad"] and todo["without"] == ["ours:bad"]
    assert [r["backend"] for r in result.found()["rows"]] == ["good"]
    assert result.found()["left_out"] == [{"backend": "bad", "reason": "a bit", "failed": True}]


@pytest.mark.parametrize("contender", ["ours:reference", "today:", "copy:each"])
@pytest.mark.parametrize("at_first", [True, False])
def test_a_contender_that_fails_costs_its_own_figures(contender, at_first, monkeypatch, quick):
    made, laps = gpu_race.lap, []

    def failing(c, on_gpu):
        if c is target.get(contender):
            laps.append(1)
            if at_first or len(laps) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.\nMore words")
        return made(c, on_gpu)

    target, right = {}, gpu_race.race

    def race(contenders, *rest):
        target.update(contenders)
        return right(contenders, *rest)

    monkeypatch.setattr(gpu_race, "lap", failing)
    monkeypatch.setattr(gpu_rows, "race", race)
    monkeypatch.setattr(gpu_rows, "OPS", ("perturb",))
    events = list(gpu_rows.events(job(backends=[BACKEND, "reference"])))
    (left_out,) = [e["left_out"] for e in events if "left_out" in e]
    assert (left_out["contender"], left_out["reason"], left_out["failed"]) == (contender, "CUDA out of memory.", False)
    assert (left_out["op"], left_out["noise"], left_out["model"]) == ("perturb", "gaussian", "tiny")
    rows = {r["backend"]: r for r in (e["row"] for e in events if "row" in e) if r["op"] == "perturb"}
    assert rows.keys() == {BACKEND, "reference"} - {contender.removeprefix("ours:")}
    assert (rows[BACKEND]["today_ms_median"] is None) == (contender == "today:")
    assert rows[BACKEND]["copy_variant"] == ("flat" if contender == "copy:each" else rows[BACKEND]["copy_variant"])
    result = gpu.Result(lambda found: None)
    result.take(iter(events), job())
    headers, lines = gpu.table(result.found())
    assert all(len(line) == len(headers) for line in lines)
    assert any(f"{contender}, left out: CUDA out of memory." in line[1] for line in lines)


def test_an_error_that_the_gpu_does_not_survive_ends_the_process_and_not_the_benchmark(monkeypatch, quick):
    """The work continues in a new process, without the contender that ran when the old one died. Nothing is measured
    twice."""
    lap, jobs = gpu_race.lap, []
    monkeypatch.setattr(gpu_rows, "_survives", lambda error, device: False)
    monkeypatch.setattr(gpu_rows, "OPS", ("perturb", "update"))

    def isolated(module, job):
        jobs.append(json.loads(json.dumps(job)))
        broken = "ours:reference" not in job["without"]

        def failing(contender, on_gpu):
            if broken and "reference" in str(contender.work) and "update" in str(gpu_rows.OPS) and at[0] == "update":
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
            return lap(contender, on_gpu)

        at = [None]
        monkeypatch.setattr(gpu_race, "lap", failing)
        try:
            for event in gpu_rows.events(job):
                at[0] = event.get("at", {}).get("op", at[0])
                yield event
        except RuntimeError as error:
            yield {"died": str(error).partition("\n")[0]}

    monkeypatch.setattr(gpu, "isolated", isolated)
    result, todo = gpu.Result(lambda found: None), job(backends=[BACKEND, "reference"])
    while todo["todo"] and result.take(gpu.isolated("gpu_rows", todo), todo):
        pass
    assert len(jobs) == 2 and jobs[1]["had"][0] == ["perturb", "gaussian"] and todo["todo"] == []
    rows = [(r["op"], r["backend"]) for r in result.found()["rows"]]
    assert sorted(rows) == sorted(
        [("perturb", BACKEND), ("perturb", "reference"), ("update", BACKEND), ("memory", BACKEND)]
    )
    (left_out,) = result.found()["left_out"]
    assert left_out["contender"] == "ours:reference" and left_out["op"] == "update" and left_out["failed"]
    assert left_out["reason"] == "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("at", "without", "todo", "more"),
    [
        ({"contender": "ours:x"}, ["ours:x"], [("tiny", "bfloat16")], True),
        ({"model": "tiny", "dtype": "bfloat16", "op": "update", "noise": "gaussian"}, [], [("tiny", "bfloat16")], True),
        ({"model": "tiny", "dtype": "bfloat16"}, [], [], False),
        ({}, [], [("tiny", "bfloat16")], False),
    ],
)
def test_every_death_takes_something_out(at, without, todo, more):
    result, work = gpu.Result(lambda found: None), job()
    assert result.take(iter([{"at": at}, {"died": "signal"}]), work) is more
    assert (work["without"], work["todo"]) == (without, todo)
    assert work["had"] == ([("update", "gaussian")] if "op" in at else [])
    if "op" in at:  # the second time at the same place
        assert result.take(iter([{"at": at}, {"died": "signal"}]), work) is False and work["todo"] == []


def test_events_come_from_a_process_of_its_own(monkeypatch, tmp_path):
    """The last event says how the process died, whatever killed it. If the reader stops early, the process is ended."""
    (tmp_path / "acts.py").write_text(
        "import os, signal, time, sys\n"
        "def events(job):\n"
        "    print('noise on stdout')\n"
        "    yield {'pid': os.getpid(), 'got': job}\n"
        "    if job == 'raise': raise ValueError('first line\\nsecond')\n"
        "    if job == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if job == 'exit': sys.exit(7)\n"
        "    if job == 'sleep': time.sleep(60)\n"
    )
    monkeypatch.setattr("esfast.bench.__path__", [*sys.modules["esfast.bench"].__path__, str(tmp_path)])
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.path_hooks  # the child finds acts too\nimport esfast.bench as b; b.__path__.append({str(tmp_path)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    ends = {
        "raise": "ValueError: first line",
        "kill": "its process was ended by SIGKILL",
        "exit": "its process ended with status 7",
    }
    for what in ("finish", *ends):
        first, *rest = isolated("acts", what)
        assert first["got"] == what and first["pid"] != os.getpid()
        assert rest == ([{"died": ends[what]}] if what in ends else [])
    events = isolated("acts", "sleep")
    pid = next(events)["pid"]
    events.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_backend_that_is_not_ready_is_named(monkeypatch):
    monkeypatch.setattr(gpu_rows, "backend_report", lambda device: {"triton": "no driver", "reference": "ready"})
    with pytest.raises(BenchmarkError, match=f"no backend can run on {DEVICE}: triton: no driver"):
        list(gpu_rows.events(job(backends=None)))


def test_what_does_not_fit_or_has_no_time_is_left_out_aloud(monkeypatch, capsys, quick):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * 2**30, 100 * 2**30))
    shapes = models.parameters(models.MODELS["Llama-3.1-8B"])
    assert gpu_race.too_large(shapes, "bfloat16", "cuda") is None
    assert gpu_race.too_large(shapes, "float32", "cpu") is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * 2**30, 80 * 2**30))
    assert gpu_race.too_large(shapes, "float32", "cuda") == "needs 65.7 GiB of GPU memory, and 60.0 are free"

    monkeypatch.setattr(gpu_rows, "too_large", lambda shapes, dtype, device: "no room" if dtype == "float32" else None)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore words")

    monkeypatch.setattr(gpu_rows, "_rows", out_of_memory)
    work = job(todo=[("tiny", "float32"), ("tiny", "bfloat16"), ("tiny", "float16")], seconds=0.0)
    result = gpu.Result(lambda found: None)
    assert not result.take(gpu_rows.events(work), work) or not work["todo"]
    assert [(r["dtype"], r["reason"], r.get("failed", False)) for r in result.found()["left_out"]] == [
        ("float32", "no room", False),
        ("bfloat16", "no time was left of 0 s", False),
        ("float16", "no time was left of 0 s", False),
    ]
    work = job(seconds=600.0)
    (left_out,) = [e["left_out"] for e in gpu_rows.events(work) if "left_out" in e]
    assert (left_out["reason"], left_out["failed"]) == ("CUDA out of memory.", False)
    _, lines = gpu.table(result.found())
    assert lines[0][:4] == ["tiny", "left out: no room", "", "float32"]


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is here: test_bench_gpu.py runs this on it")
def test_what_a_gpu_is_asked_for(monkeypatch, quick):
    """Runs the code for GPUs on a stand-in for a GPU: events, memory, backends that are not ready, models that do not
    fit."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    make, odd_plan, allocated = gpu_race.Workload.make, workload.odd_plan, iter(range(0, 10**9, 1000))
    monkeypatch.setattr(gpu_race.Workload, "make", lambda shapes, dtype, device: make(shapes, dtype, "cpu"))
    monkeypatch.setattr(workload, "odd_plan", lambda dtype, device: odd_plan(dtype, "cpu"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: next(allocated))
    rooms = iter([2**40, 2**20])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(rooms), 2**40))
    state = {"cpu": "ready", "cuda": "not built: no nvcc", "triton": "no driver", "reference": "ready"}
    monkeypatch.setattr(gpu_rows, "backend_report", lambda device: state)
    work = job(device="cuda", backends=None, todo=[("tiny", "bfloat16"), ("Qwen2.5-7B", "bfloat16")])
    result = gpu.Result(lambda found: None)
    assert not result.take(gpu_rows.events(work), work) and work["todo"] == []
    found = result.found()
    assert [(r["op"], r["backend"], r["device"]) for r in found["rows"]] == [
        (op, "cpu", "cuda") for op in (*gpu_rows.OPS, "memory")
    ]
    assert all(r["ms_median"] > 0 for r in found["rows"] if r["op"] != "memory")
    assert found["rows"][-1]["extra_bytes"] == found["rows"][-1]["today_extra_bytes"] == 1000
    reasons = [(x.get("backend"), x.get("model"), x["reason"], x.get("failed", False)) for x in found["left_out"]]
    assert reasons == [
        ("cuda", None, "not ready: not built: no nvcc", True),
        ("triton", None, "not ready: no driver", True),
        (None, "Qwen2.5-7B", "needs 31.3 GiB of GPU memory, and 0.0 are free", False),
    ]
    headers, lines = gpu.readme_table(found)
    assert all(len(line) == len(headers) for line in lines) and len(lines) == 10


@pytest.mark.skipif(DEVICE == "cuda", reason="a CUDA device is here")
def test_without_a_gpu_it_says_so(capsys):
    assert main(["gpu"]) == 1
    assert "PyTorch finds no CUDA device here" in capsys.readouterr().err
