"""`esfast bench gpu`: the lists of parameters, the rivals, the rows; on the GPU that is here, or else on the CPU."""

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm

import esfast
from esfast.bench import gpu, gpu_race, main, models, noise, rivals, tables
from esfast.core.kinds import ELEMENTWISE, KINDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Without a GPU, Triton kernels are interpreted, which takes too long for every row of the benchmark.
BACKEND = "triton" if DEVICE == "cuda" else "cpu"
RUN = ["gpu", "--device", DEVICE, "--models", "tiny", "--backends", BACKEND, "--members", "3", "--repeats", "1"]
PASSES = {
    "perturb_base": (1, 1),
    "perturb": (1, 1),
    "restore_base": (0, 1),
    "perturb_restore_base": (1, 2),
    "perturb_restore": (2, 2),
    "update": (3, 1),
}


# ---- the lists of parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, count",
    [
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Llama-3.1-8B", 8_030_261_248),
    ],
)
def test_totals_are_the_published_ones(model, count):
    assert models.numel(models.parameters(models.MODELS[model])) == count


@pytest.mark.parametrize("name", models.MODELS)
def test_names_and_shapes_are_those_of_transformers(name):
    import transformers

    m = models.MODELS[name]
    family = "Qwen2" if m.qkv_bias else "Llama"
    config = getattr(transformers, f"{family}Config")(
        hidden_size=m.hidden,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        intermediate_size=m.intermediate,
        vocab_size=m.vocab,
        tie_word_embeddings=m.tied,
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    wanted = [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert list(models.parameters(m).items()) == wanted


def test_a_workload_is_one_allocation():
    shapes = models.parameters(models.MODELS["tiny"])
    w = gpu_race.Workload.make(shapes, torch.bfloat16, DEVICE)
    assert {n: tuple(t.shape) for n, t in zip(w.plan.names, w.plan.tensors, strict=True)} == shapes
    start = w.flat.data_ptr()
    for t in w.plan.tensors:
        assert (t.data_ptr() - start) % gpu_race.ALIGNMENT == 0
        assert start <= t.data_ptr() and t.data_ptr() + t.nbytes <= start + w.flat.nbytes
        assert t.numel() < 100 or 0.01 < t.float().std() < 0.03
    before = w.flat.clone()
    rivals.copy_flat(w.flat)
    low, high = before.chunk(2)
    assert torch.equal(w.flat, torch.cat([high, high])) and len(low) == len(high)
    rivals.copy_each(w.plan.tensors, w.base.tensors)
    assert all(map(torch.equal, w.plan.tensors, w.base.tensors))


# ---- the rivals do what they are said to -----------------------------------------------------------------------------


def weights(dtype, count=40_000):
    return [torch.full((count,), 0.5, dtype=dtype, device=DEVICE), torch.full((3, 7), 0.5, dtype=dtype, device=DEVICE)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empties_cache", [False, True])
def test_today_perturbs_restores_and_updates(kind, empties_cache):
    tensors = weights(torch.float32)
    today = rivals.Today(tensors, kind, empties_cache)
    today.perturb_self_weights(7, 0.1)
    noise = (tensors[0] - 0.5) / 0.1
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    if kind == "rademacher":
        assert set(noise.round().tolist()) == {-1.0, 1.0}
    assert (torch.linalg.matrix_rank(tensors[1] - 0.5, rtol=1e-4) == 1) == (kind == "low_rank")
    today.restore_self_weights(7, 0.1)
    assert all(torch.allclose(t, torch.full_like(t, 0.5), atol=1e-6) for t in tensors)
    today.update_weights_from_seeds([7, 8], [1.0, -3.0], alpha=0.2, population_size=2)
    change = tensors[0] - 0.5
    assert abs(change.std() - 0.1 * 10**0.5) < 0.01
    today.update_weights_from_seeds([7, 8], [-1.0, 3.0], alpha=0.2, population_size=2)
    today.fill_cache()
    assert all(torch.allclose(t, torch.full_like(t, 0.5), atol=1e-6) for t in tensors)


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_rival_perturbs_all_weights(kind, dtype):
    pytest.importorskip("triton")
    from esfast.bench import randn4x
    from esfast.core.backends import triton as triton_backend

    if reason := triton_backend.missing(torch.device(DEVICE)):
        pytest.skip(reason)

    big, small = weights(dtype)
    # It begins at an unaligned address, and its length is no multiple of a tile.
    big = big[3:]
    aligned = torch.full((2 * randn4x.TILE,), 0.5, dtype=dtype, device=DEVICE)
    plan = esfast.Plan([("a", big), ("b", small), ("c", aligned)])
    base = plan.clone()
    rival = randn4x.Randn4x(plan, base)
    for options in randn4x.OPTIONS.values():
        for t in plan.tensors:
            t.fill_(float("nan"))
        rival.run([7, 2**64 - 1], [0.1, 0.2], True, kind, options)
        noise = torch.cat([(t.float() - 0.5).view(-1) for t in plan.tensors]) / 0.05**0.5
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
        if dtype is torch.float32:  # 16-bit rounding makes equal ones
            distinct = 4 if kind == "rademacher" else 0.99 * len(noise)
            assert len(noise.unique()) >= distinct
        x = noise - noise.mean()
        for lag in (1, 2, 3, 8, 128, 1024):
            assert abs((x[lag:] * x[:-lag]).mean()) < 0.03, lag
        from_base = [t.clone() for t in plan.tensors]
        rival.run([], [], True, kind, options)
        assert all(map(torch.equal, plan.tensors, base.tensors))
        rival.run([7, 2**64 - 1], [0.1, 0.2], False, kind, options)
        assert all(map(torch.equal, plan.tensors, from_base))
        rivals.copy_each(plan.tensors, base.tensors)
    assert big[0] == 0.5 and weights(dtype)[0][0] == 0.5


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from esfast.bench import randn4x
kernel = randn4x.randn4x_kernel
types = ["*i64", "*i64", "*fp32", "i32", "constexpr", "constexpr", "constexpr"]
for options in randn4x.OPTIONS.values():
    for kind in (0, 1):
        for dtype in (0, 1, 2):
            source = ASTSource(
                fn=kernel, signature=dict(zip(kernel.arg_names, types)),
                constexprs={"KIND": kind, "DTYPE": dtype, "TILE": randn4x.TILE},
                attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
            )
            ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
            print("st.global.v" in ptx and "ld.global.v" in ptx)
"""


def test_the_fused_rival_compiles_for_a_gpu_and_is_vectorised():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 12, done.stdout


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Without the rival in Triton where that would be interpreted, which takes longer than all others together; the test
    of scaled updates has it."""
    path = tmp_path_factory.mktemp("gpu") / "noise_gpu.json"
    with warm.python(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        assert main([*RUN, "--seconds", "600", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_row_is_there(result):
    rows = result["rows"]
    assert [(r["op"], r["noise"], r["dtype"]) for r in rows] == [
        (op, kind, dtype)
        for dtype in ("bfloat16", "float32")
        for op, kind in [
            *(
                (op, "none" if op == "restore_base" else kind)
                for kind, op in itertools.product(KINDS, PASSES)
                if op != "restore_base" or kind == "gaussian"
            ),
            ("memory", " or ".join(KINDS)),
        ]
    ]
    assert result["left_out"] == []
    for r in rows:
        assert (r["model"], r["device"], r["backend"]) == ("tiny", DEVICE, BACKEND)
        if r["op"] == "memory":
            assert (r["extra_bytes"] is None) == (DEVICE == "cpu")
            continue
        size = {"bfloat16": 2, "float32": 4}[r["dtype"]]
        assert (r["draws"], r["passes"]) == PASSES[r["op"]] and r["members"] == (3 if r["op"] == "update" else 1)
        assert r["bytes"] == 2 * size * r["numel"] * r["passes"] and r["repeats"] == 1
        assert r["gbytes_per_s"] == pytest.approx(r["bytes"] / r["ms_median"] / 1e6)
        assert r["weights_per_s"] * r["ms_median"] / 1e3 == pytest.approx(r["numel"] * max(1, r["draws"]))
        assert (r["clocks"] is None) == (DEVICE == "cpu") and r["began"] < r["ended"]
        assert r["share_of_copy"] == pytest.approx(r["copy_ms_median"] * r["passes"] / r["ms_median"])
        for rival in ("today", "today_kept", "randn4x"):
            if r[f"{rival}_ms_median"] is None:
                assert rival == "randn4x"
                continue
            assert r[f"ratio_to_{rival}"] == pytest.approx(r[f"{rival}_ms_median"] / r["ms_median"])
            assert r[f"{rival}_host_us_median"] > 0 and r[f"{rival}_repeats"] == 1
        assert r["copy_variant"] in ("flat", "each") and r["host_us_median"] > 0
        assert r["today_members"] == r["members"] and r["today_scaled"] is False


def test_figures_of_a_cpu_are_never_a_gpus(result, tmp_path):
    (tmp_path / "noise_gpu.json").write_text(json.dumps(result))
    headers, lines = gpu.table(result)
    assert all(len(line) == len(headers) for line in lines)
    for name in ("noise-gpu", "noise-gpu-summary"):
        if DEVICE == "cpu":
            assert all("on a CPU" in line[4] for line in lines)
            with pytest.raises(ValueError, match="measured on cpu, which is no GPU"):
                tables.generate(name, tmp_path)
        for row in result["rows"]:
            row["device"] = "cuda"
        (tmp_path / "noise_gpu.json").write_text(json.dumps(result))
        text = tables.generate(name, tmp_path)
        assert "| tiny | update, 3 members | rademacher | bfloat16 |" in text and "on a CPU" not in text
        for row in result["rows"]:
            row["device"] = DEVICE
        (tmp_path / "noise_gpu.json").write_text(json.dumps(result))
        assert tables.generate(name, tmp_path / "elsewhere") == tables.NOT_YET


def test_the_summary_keeps_the_rows_where_a_rival_is_faster(result):
    rows = [
        dict(r, device="cuda", **{f"ratio_to_{x}": 2.0 for x in ("today", "today_kept", "randn4x")})
        for r in result["rows"]
        if r["op"] != "memory"
    ]
    _, lines = gpu.summary({"rows": rows})
    assert {line[3] for line in lines} == {"bfloat16"} and len(lines) == 16
    for rival in ("today", "today_kept", "randn4x"):
        slow = next(r for r in rows if r["dtype"] == "float32")
        slow[f"ratio_to_{rival}"] = 0.5
        _, lines = gpu.summary({"rows": rows})
        assert [line[3] for line in lines].count("float32") == 1
        slow[f"ratio_to_{rival}"] = 2.0


def test_readmes_rows_are_of_a_gpu(result):
    rows = [
        dict(r, device="cuda", model="Qwen2.5-7B", backend="cuda", ratio_to_today=3.0, ratio_to_today_kept=2.5)
        | {"ratio_to_randn4x": None if r["op"] == "update" else 1.5}
        for r in result["rows"]
        if r["op"] != "memory"
    ]
    headers, lines = gpu.short({"rows": rows})
    assert {line[1] for line in lines} <= set(KINDS) and {len(line) for line in lines} == {len(headers)}
    assert {line[-2] for line in lines} == {"3.00"}
    assert {(line[0].startswith("update"), line[-1]) for line in lines} == {(True, "-"), (False, "1.50")}
    with pytest.raises(ValueError, match="not measured on a GPU"):
        gpu.short({"rows": [dict(r, device="cpu") for r in rows]})


# ---- the clock -------------------------------------------------------------------------------------------------------


class FakeGpu:
    """A clock of the host and one of the device, which works through what is queued."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(fake.host, fake.device)
                fake.device = self.at

            def synchronize(self):
                fake.host = max(fake.host, self.at)

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(gpu_race, "now", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "Event", Event)

    def work(self, launch, compute):
        def run():
            self.host += launch
            self.device = max(self.device, self.host) + compute

        return run


def test_a_launch_is_hidden_behind_the_copy_before(monkeypatch):
    fake = FakeGpu(monkeypatch)
    lap = gpu_race.lap(gpu_race.Contender(fake.work(0.0001, 0.02), fake.work(0.0, 0.01)), on_gpu=True)
    assert (lap.ms, lap.host_us, lap.seconds) == pytest.approx((20, 100, 0.03))
    slow = gpu_race.lap(gpu_race.Contender(fake.work(0.05, 0.02), fake.work(0.0, 0.01)), on_gpu=True)
    assert slow.ms == pytest.approx(60)  # 40 of them the device waited for the host
    wall = gpu_race.lap(gpu_race.Contender(fake.work(0.003, 0.0), fake.work(1.0, 0.0)), on_gpu=False)
    assert (wall.ms, wall.host_us) == pytest.approx((3, 3000))


def test_a_race_keeps_to_its_time(monkeypatch):
    fake = FakeGpu(monkeypatch)

    def contender(seconds, rounds=gpu_race.MIN_ROUNDS):
        return gpu_race.Contender(fake.work(seconds, 0.0), lambda: None, rounds)

    def rounds(seconds, repeats=9):
        contenders = {"ours": contender(0.1), "slow": contender(1.0, 1)}
        return {name: len(x) for name, x in gpu_race.race(contenders, repeats, seconds, True).items()}

    assert rounds(100) == {"ours": 9, "slow": 9}
    assert rounds(0) == {"ours": gpu_race.MIN_ROUNDS, "slow": 1}
    assert rounds(0, repeats=2) == {"ours": 2, "slow": 1}
    assert rounds(2.55) == {"ours": 5, "slow": 2}


def test_a_budget_hands_on_what_is_saved(monkeypatch):
    fake = FakeGpu(monkeypatch)
    budget = gpu_race.Budget(10.0, 4.0)
    assert budget.share(1.0) == pytest.approx(2.5)
    fake.host = 1.0
    assert budget.share(2.0) == pytest.approx(6.0)
    fake.host = 12.0
    assert budget.share(1.0) == 0.0


def test_todays_update_is_scaled_where_time_is_short(warm_python, tmp_path, capsys):
    path = tmp_path / "r.json"
    command = [*RUN, *"--noise gaussian --dtypes float32 --seconds 0 --json".split(), str(path)]
    assert main(command) == 0
    rows = json.loads(path.read_text())["rows"]
    for r in rows:
        if r.get("randn4x_ms_median") is not None:
            assert r["ratio_to_randn4x"] == pytest.approx(r["randn4x_ms_median"] / r["ms_median"])
    assert any(r.get("randn4x_ms_median") for r in rows) or importlib.util.find_spec("triton") is None
    update = next(r for r in rows if r["op"] == "update")
    assert (update["members"], update["today_members"], update["today_scaled"]) == (3, 1, True)
    assert "(1 of 3 members, scaled)" in capsys.readouterr().out
    laps = {
        "today:": [gpu_race.Lap(2.0, 30.0, 1.0), gpu_race.Lap(4.0, 50.0, 1.0)],
        "today_kept:": [gpu_race.Lap(1.0, 1.0, 1.0)],
    }
    assert gpu_race.figures(laps, "today", 3.0) == {
        "today_variant": None,
        "today_ms_median": 9.0,
        "today_ms_min": 6.0,
        "today_repeats": 2,
        "today_host_us_median": 120.0,
    }
    copies = {"copy:flat": [gpu_race.Lap(2.0, 1.0, 1.0)], "copy:each": [gpu_race.Lap(1.0, 1.0, 1.0)]}
    assert gpu_race.figures(copies, "copy", 1)["copy_variant"] == "each"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("name", ["gpu_suite.sh", "rehearse.sh"])
def test_the_scripts_are_shell(name):
    assert subprocess.run(["bash", "-n", Path(noise.__file__).resolve().parent / name]).returncode == 0


def test_updates_of_both_releases_of_es_at_scale():
    """v1.0.0 sums in float32 and rounds once; v0.1.0 rounds the weights after every member, and loses what is small."""
    seeds, coeffs = list(range(32)), [1.0] * 32
    summed, one_by_one = weights(torch.bfloat16), weights(torch.bfloat16)
    rivals.Today(summed, "rademacher", False).update_weights_from_seeds(seeds, coeffs, alpha=0.016, population_size=32)
    rivals.Today(one_by_one, "rademacher", False).update_member_by_member(seeds, coeffs, 0.016, 32)
    # each member moves a weight by 0.0005, a quarter of a place above 0.5 and half of one below
    exact = weights(torch.float32)
    rivals.Today(exact, "rademacher", False).update_member_by_member(seeds, coeffs, 0.016, 32)
    errors = [(t[0].float() - exact[0]).pow(2).mean().sqrt() for t in (summed, one_by_one)]
    assert errors[0] < 0.0015 < errors[1]
