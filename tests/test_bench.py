"""The benchmarks: they check before they time, they fail on bad noise, and the README's tables follow the results."""

import itertools
import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
import warm

from esfast.bench import (
    BENCHMARKS,
    afternoon,
    count,
    main,
    memory,
    noise,
    provenance,
    statistics,
    tables,
    workload,
)
from esfast.bench.provenance import caption
from esfast.core import ops
from esfast.core.noise import KINDS, tensor_id

NOISE = ["noise", "--numel", "3e4", "--tensors", "9", "--members", "3", "--repeats", "2", "--threads", "1"]


OPS = {"perturb_base": (1, 1), "perturb_restore_base": (1, 2), "perturb_restore": (2, 2), "update": (3, 1)}


def on_linux():
    return memory.STATUS.exists()


@pytest.fixture(autouse=True, scope="module")
def nothing_is_compiled():
    """Leaves out the contenders of bench/afternoon.py that g++ must compile; test_bench_afternoon.py runs those."""
    quick = {kind: {name: make for name, make in ways.items() if "compiled" not in name}
             for kind, ways in afternoon.WAYS.items()}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(afternoon, "WAYS", quick)
        yield


@pytest.fixture(scope="module")
def noise_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("noise") / "results" / "noise_cpu.json"
    with warm.python():
        assert main([*NOISE, "--dtypes", "bfloat16", "float32", "--json", str(path)]) == 0
    return path


def test_noise_gives_every_row(noise_run):
    result = json.loads(noise_run.read_text())
    rows = result["rows"]
    assert result["benchmark"] == "noise"
    assert {(r["op"], r["noise"], r["dtype"]) for r in rows} == {
        (op, kind, dtype)
        for dtype in ("bfloat16", "float32")
        for op, kind in [
            *itertools.product(OPS, KINDS),
            ("memory", "gaussian or rademacher or low_rank"),
        ]
    }
    for r in rows:
        if r["op"] == "memory":
            assert (r["share_of_weights"] is not None) == on_linux()
            continue
        size = {"bfloat16": 2, "float32": 4}[r["dtype"]]
        assert r["ratio_to_today"] == pytest.approx(r["today_ms_median"] / r["ms_median"])
        assert r["bytes"] == 2 * size * r["numel"] * r["passes"]
        assert r["weights_per_s"] * r["ms_median"] / 1e3 == pytest.approx(r["numel"] * r["draws"])
        assert r["share_of_copy"] == pytest.approx(r["copy_ms_median"] * r["passes"] / r["ms_median"])
        assert (r["draws"], r["passes"]) == OPS[r["op"]] and r["members"] == (3 if r["op"] == "update" else 1)
        assert r["repeats"] == 2 and 1 <= r["today_repeats"] <= 2 and r["threads"] == 1 and r["tensors"] == 9
        times = r["afternoon_ms_median"]
        assert set(times) == set(afternoon.WAYS[r["noise"]]) and times[r["strongest"]] == min(times.values())
        assert r["ratio_to_strongest"] == pytest.approx(min(times.values()) / r["ms_median"])


def test_provenance_is_complete(noise_run):
    p = json.loads(noise_run.read_text())["provenance"]
    assert p["hardware"]["cpu"] and p["hardware"]["cores"] >= 1
    v = p["versions"]
    assert v["torch"] == torch.__version__ and v["instruction_set"] and v["compiler"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", p["date"])
    assert p["command"] == "esfast bench " + " ".join([*NOISE, "--dtypes", "bfloat16", "float32"])  # where to: left out
    assert p["commit"] is None or re.fullmatch("[0-9a-f]{40}", p["commit"])


def test_today_runs_less_often_when_its_time_is_up(tmp_path, monkeypatch, capsys):
    # as on systems other than Linux, which have no such file
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    path = tmp_path / "r.json"
    command = [*NOISE, "--dtypes", "float32", "--noise", "gaussian", "--today-seconds", "0", "--json", str(path)]
    assert main(command) == 0
    *rows, extra = json.loads(path.read_text())["rows"]
    assert [(r["repeats"], r["today_repeats"]) for r in rows] == [(2, 1)] * 4
    assert extra["op"] == "memory" and extra["share_of_weights"] is None
    shown = capsys.readouterr().out
    assert shown.count("(1x)") == 8 and "?" in shown  # the strongest of an afternoon, too


def test_a_way_that_takes_twice_as_long_runs_no_more(warm_python, tmp_path, monkeypatch):
    ran = {"quick": 0, "slow": 0}

    def way(name, seconds):
        def work(*_):
            ran[name] += 1
            time.sleep(seconds)

        return lambda: SimpleNamespace(perturb_=work, update_=work)

    monkeypatch.setattr(afternoon, "WAYS", {"gaussian": {"slow": way("slow", 0.05), "quick": way("quick", 0.005)}})
    monkeypatch.setattr(noise, "_warm", lambda *_: None)
    path = tmp_path / "r.json"
    command = [*NOISE, "--dtypes", "float32", "--noise", "gaussian", "--json", str(path)]
    assert main(command) == 0
    rows = [r for r in json.loads(path.read_text())["rows"] if r["op"] != "memory"]
    assert {r["strongest"] for r in rows} == {"quick"} and {r["strongest_repeats"] for r in rows} == {2}
    assert ran["slow"] * 2 == ran["quick"]


def test_both_instruction_sets_stand_side_by_side(noise_run, tmp_path):
    avx2 = json.loads(noise_run.read_text())
    avx2["provenance"]["versions"]["instruction_set"] = "less"
    (tmp_path / "noise_cpu.json").write_text(noise_run.read_text())
    assert tables.generate("noise-cpu-summary", tmp_path) == tables.NOT_YET
    (tmp_path / "noise_cpu_avx2.json").write_text(json.dumps(avx2))
    header, _, *lines = tables.generate("noise-cpu-summary", tmp_path).splitlines()
    assert "| less: esfast, ms | times as fast as today | as the strongest |" in header
    assert sum(line.startswith("|") for line in lines) == 9 and sum(line.startswith("Measured") for line in lines) == 2


def test_kinds_stand_side_by_side(noise_run, tmp_path):
    result = json.loads(noise_run.read_text())
    ms = {"gaussian": 80.0, "rademacher": 20.0, "low_rank": 8.0}
    for r in result["rows"]:
        if r["op"] == "update" and r["dtype"] == "bfloat16":
            r["ms_median"] = ms[r["noise"]]
    headers, lines = noise.kinds_table(result)
    assert headers[3] == "update, 3 members, ms" and all(len(line) == len(headers) for line in lines)
    assert [(line[0], line[3], line[4]) for line in lines] == [
        ("gaussian", "80", "1.0"), ("rademacher", "20", "4.0"), ("low_rank", "8", "10.0"),
    ]  # fmt: skip
    (perturb,) = [
        r for r in result["rows"] if (r["op"], r["noise"], r["dtype"]) == ("perturb_base", "low_rank", "bfloat16")
    ]
    assert lines[2][2] == f"{perturb['share_of_copy']:.1%}"


@pytest.mark.parametrize(
    "limit, used", [("avx2", "avx2"), ("default", "baseline"), ("avx512", "avx512"), ("", "avx512")]
)
def test_pytorchs_limit_of_instruction_sets_is_heeded(limit, used, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", limit)
    assert ops.instruction_set(["avx512", "avx2", "baseline"]) == used
    assert ops.instruction_set(["baseline"]) == "baseline"
    command = provenance.provenance("noise", [])["command"]
    assert command == f"ATEN_CPU_CAPABILITY={limit} " * bool(limit) + "esfast bench noise"


@pytest.mark.parametrize("where", ["odd sizes", "timed weights"])
def test_a_backend_that_differs_in_one_bit_is_not_timed(where, monkeypatch, capsys, tmp_path):
    right = ops._BACKENDS["cpu"]

    def wrong(call):
        right(call)
        plan = call.plan
        if call.kind == "rademacher" and ("cube" in plan.names) == (where == "odd sizes"):
            plan.tensors[-1].view(-1)[-1:].view(torch.int16).bitwise_xor_(1)

    monkeypatch.setitem(ops._BACKENDS, "cpu", wrong)
    monkeypatch.setattr("esfast.bench.noise._time", lambda case, *_: pytest.fail("timed"))
    if where == "timed weights":  # gaussian is right, and may be timed
        monkeypatch.setattr("esfast.bench.noise._time", lambda case, *_: {})
    assert main([*NOISE, "--dtypes", "bfloat16", "--json", str(tmp_path / "r.json")]) == 1
    error = capsys.readouterr().err
    assert "differ from the reference" in error and "rademacher" in error and "No figures are given" in error
    assert list(tmp_path.iterdir()) == []


def test_json_to_stdout_stands_alone(capsys):
    assert main(["statistics", "--numbers", "2**12", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["benchmark"] == "statistics"
    assert "kurtosis" in err and "standard error" in err


def test_statistics_pass_on_good_noise(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(statistics, "CHUNK", 2**16)
    path = tmp_path / "statistics.json"
    assert main(["statistics", "--numbers", str(2**18 + 1), "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert all(r["pass"] for r in rows)
    names = {(r["noise"], r["name"]) for r in rows}
    assert {("gaussian", n) for n in ("mean", "variance", "skewness", "kurtosis", "largest |z|")} <= names
    assert {(kind, f"correlation at lag {k}") for kind in ("gaussian", "rademacher") for k in range(1, 9)} <= names
    assert "FAIL" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda z: z.mul_(1.05), {"variance", "numbers other than +1 and -1"}),
        (lambda z: z.add_(0.02), {"mean"}),
        (lambda z: z[1:].copy_(z[:-1].clone()), {"distance from Box-Muller in float64"}),
        (lambda z: z[1::2].copy_(z[::2].clone()), {"correlation at lag 1", "correlation in Box-Muller pairs"}),
        (lambda z: z.abs_(), {"mean", "correlation at lag 8"}),
        (lambda z: z.clamp_(-2.5, 2.5), {"kurtosis", "largest |z|"}),
        (lambda z: z.copy_(torch.randn(len(z), generator=torch.Generator().manual_seed(0))),
         {"correlation of neighbouring seeds", "correlation of neighbouring tensors"}),
    ],
    ids=["scaled", "shifted", "shifted by one", "pairs alike", "positive", "clipped", "without its seed"],
)  # fmt: skip
def test_statistics_fail_on_bad_noise(change, expected, monkeypatch, tmp_path):
    right = ops._BACKENDS["cpu"]

    def wrong(call):
        right(call)
        if call.kind != "low_rank":
            change(call.plan.tensors[0])

    monkeypatch.setitem(ops._BACKENDS, "cpu", wrong)
    path = tmp_path / "statistics.json"
    assert main(["statistics", "--numbers", "2**18", "--json", str(path)]) == 1
    failed = {r["name"] for r in json.loads(path.read_text())["rows"] if not r["pass"]}
    assert expected <= failed


def test_neighbouring_tensors_are_neighbours():
    assert tensor_id(statistics.NEXT) == tensor_id(statistics.NAME) + 1


@pytest.mark.parametrize("numel, tensors", [(50_000_000, 30), (1_000_000, 1), (1000, 9), (10_000_000, 340)])
def test_shapes_have_the_size_asked_for(numel, tensors):
    shapes = workload.model_shapes(numel, tensors)
    total = sum(torch.Size(s).numel() for s in shapes.values())
    assert len(shapes) == tensors and abs(total - numel) <= max(0.01 * numel, 8)


@pytest.mark.skipif(not on_linux(), reason="reads /proc")
def test_memory_growth_is_seen():
    size = 2**26
    assert 0.9 * size < memory.growth(lambda: torch.ones(size, dtype=torch.uint8)) < 1.2 * size
    assert memory.growth(lambda: None) < 2**20


@pytest.mark.parametrize("text, number", [("7", 7), ("5e7", 50_000_000), ("2**30", 2**30)])
def test_count(text, number):
    assert count(text) == number


@pytest.mark.parametrize("text", ["0", "-1", "x", "1e999", "nan", "2**x", "9**9**9", ""])
def test_count_refuses(text):
    with pytest.raises(Exception, match="expected a positive number"):
        count(text)


def test_help_names_every_benchmark(capsys):
    for name in BENCHMARKS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0 and "--json FILE" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["nonsense"])
    assert stop.value.code == 2


# ---- the README's tables -------------------------------------------------------------------------------------------

README = (
    "# Title\n\n<!-- begin:noise-cpu -->\n<!-- end:noise-cpu -->\n\n"
    "text\n\n<!-- begin:statistics -->\nold\n<!-- end:statistics -->\nend\n"
)


def test_tables_replace_and_check(noise_run, tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(README)
    command = [str(file), "--results", str(noise_run.parent)]
    assert tables.main([*command, "--check"]) == 1
    assert file.read_text() == README
    assert "+| perturb from a base | gaussian | bfloat16 |" in capsys.readouterr().out
    assert tables.main(command) == 0
    text = file.read_text()
    assert text.startswith("# Title\n\n<!-- begin:noise-cpu -->\n") and text.endswith("<!-- end:statistics -->\nend\n")
    assert caption(json.loads(noise_run.read_text())) in text and "old" not in text
    assert text.count(tables.NOT_YET) == 1  # the statistics
    assert tables.main([*command, "--check"]) == 0 and tables.main(command) == 0 and file.read_text() == text

    changed = json.loads(noise_run.read_text())
    changed["rows"][0]["ms_median"] = 123.0
    (tmp_path / "noise_cpu.json").write_text(json.dumps(changed))
    assert tables.main([str(file), "--results", str(tmp_path), "--check"]) == 1


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("<!-- begin:noise-cpu -->\n", "pair up: noise-cpu"),
        ("<!-- end:noise-cpu -->\n", "pair up: noise-cpu"),
        ("<!-- begin:noise-cpu -->\n<!-- begin:statistics -->\n<!-- end:noise-cpu -->\n", "pair up"),
        ("<!-- begin:noise-gpt -->\n<!-- end:noise-gpt -->\n", "unknown table 'noise-gpt'"),
    ],
)
def test_tables_refuse_bad_markers(text, complaint, tmp_path, capsys):
    file = tmp_path / "README.md"
    file.write_text(text)
    assert tables.main([str(file)]) == 1
    assert complaint in capsys.readouterr().err and file.read_text() == text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda z: z.mul_(1.05), {"variance"}),
        (lambda z: z.add_(0.05), {"mean"}),
        (lambda z: z[1:].copy_(z[:1].clone()), {"correlation of neighbouring matrices of a batch"}),
        (lambda z: z[:, :, 1:].copy_(z[:, :, :-1].clone()), {"correlation in a row"}),
        (lambda z: z[:, 1:].copy_(z[:, :-1].clone()), {"correlation in a column"}),
        (lambda z: z.copy_(torch.randn(z.shape, generator=torch.Generator().manual_seed(0))),
         {"correlation of neighbouring seeds", "correlation of neighbouring tensors"}),
    ],
    ids=["scaled", "shifted", "batch alike", "columns alike", "rows alike", "without its seed"],
)  # fmt: skip
def test_statistics_fail_on_bad_low_rank_noise(change, expected, monkeypatch):
    right = ops._BACKENDS["cpu"]

    def wrong(call):
        right(call)
        change(call.plan.tensors[0])

    for rank in statistics.RANKS:
        source = statistics.Source(2**18, 0, "cpu")
        good = statistics.low_rank_rows(source, rank)
        assert all(row["pass"] for row in good) and {row["noise"] for row in good} == {f"low_rank, rank {rank}"}
        with monkeypatch.context() as patch:
            patch.setitem(ops._BACKENDS, "cpu", wrong)
            found = {row["name"] for row in statistics.low_rank_rows(source, rank) if not row["pass"]}
        assert expected <= found, rank


def test_statistics_table_shows_the_worst_lag(tmp_path):
    path = tmp_path / "statistics.json"
    assert main(["statistics", "--numbers", "2**12", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    text = tables.generate("statistics", tmp_path)
    assert text.count("at lags 1 to 8, the largest") == 2 and "at lag 3" not in text and "largest \\|z\\|" in text
    lags = [r["deviation"] for r in result["rows"] if r["noise"] == "gaussian" and "at lag" in r["name"]]
    assert f"{max(lags, key=abs):+.2f}" in text
