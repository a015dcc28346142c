"""`esfast bench modes` and the figures: every mode is held to the memory it states, and figures follow the results."""

import json
import re
from pathlib import Path

import pytest
import torch
import warm

from esfast import Plan
from esfast.bench import figures, main, memory, modes, tables, today
from esfast.core import ops
from esfast.es import weights
from esfast.update import updater as update

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
TINY = ["modes", "--numel", "3e6", "--tensors", "9", "--members", "3", "--repeats", "2", "--threads", "1"]
on_linux = pytest.mark.skipif(not memory.STATUS.exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("modes") / "modes.json"
    with warm.python():
        main([*TINY, "--dtypes", "bfloat16", "--json", str(path)])  # so small that memory may miss the 2 %
    return json.loads(path.read_text())


def test_every_mode_has_its_statement_and_its_time(result):
    rows = {(r["mode"], r["noise"]): r for r in result["rows"]}
    assert set(rows) == {(m, kind) for m in weights.MODES for kind in ("gaussian", "rademacher")}
    for (mode, kind), r in rows.items():
        cost = weights.MODES[mode].cost(torch.bfloat16)
        assert r["stated"] == cost._asdict() and all(r["ms"][op] > 0 for op in modes.OPS)
        assert r["extra_stated_bytes"] == (cost.device + cost.host) * r["numel"]
        assert r["gbytes_per_s"]["update"] == pytest.approx(cost.update * r["numel"] / r["ms"]["update"] / 1e6)
        assert (r["pass"] is None) == (kind == "rademacher" or not memory.STATUS.exists())
    assert rows["base", "gaussian"]["update_ratio_to_base"] == 1


@on_linux
def test_memory_is_near_the_statement_even_of_few_weights(result):
    for r in result["rows"]:
        if r["extra_bytes"] is not None:
            assert abs(r["extra_bytes"] - r["extra_stated_bytes"]) < 0.25 * r["weights_bytes"] + 2**20


@on_linux
@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, 4.0), (torch.float32, 1.6)], ids=str)
def test_todays_way_takes_what_is_computed_for_it(dtype, expected):
    plan = Plan([(name, torch.full((n,), 0.5, dtype=dtype)) for name, n in (("large", 2**23), ("small", 2**21))])
    found = memory.growth(lambda: today.update_(plan.tensors, [1, 2], [0.1, 0.2], "gaussian"))
    share = memory.todays_share({"large": (2**23,), "small": (2**21,)}, dtype.itemsize, "cpu")
    assert share == expected and found / plan.nbytes == pytest.approx(share, rel=0.05)


def test_a_generation_is_shown_with_what_it_takes_in_every_mode(result, tmp_path):
    headers, lines = memory.generation_table(result)
    if memory.STATUS.exists():
        assert [line[0] for line in lines[:-2]] == [f'weights="{mode}"' for mode in weights.MODES]
    shown = {line[0]: line[1:] for line in lines}
    assert shown["today's way, Qwen2.5-0.5B"] == ["83%", "none", "138% (computed)"]
    assert all(len(line) == len(headers) for line in lines)


@on_linux
def test_a_mode_that_takes_more_than_it_states_fails(warm_python, monkeypatch, capsys):
    truth = weights.MasterWeights.cost(torch.bfloat16)
    monkeypatch.setattr(weights.MasterWeights, "cost", staticmethod(lambda dtype: truth._replace(device=3)))
    assert main([*TINY, "--numel", "2e7", "--dtypes", "bfloat16", "--noise", "rademacher"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("master"))
    assert "1.50x" in line and line.endswith("FAIL")


@pytest.mark.parametrize("mode", weights.MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_stated_traffic_is_that_of_the_passes(mode, dtype, monkeypatch):
    """Counts the bytes that every call of add_noise_ and every copy reads and writes, and compares the sum with the
    stated traffic."""
    moved = [0]
    real, copy = ops.add_noise_, torch.Tensor.copy_

    def width(plan):
        return plan.tensors[0].element_size() + (2 if plan.low is not None else 0)

    def counted(plan, seeds, coeffs, base=None, **options):
        if plan.numel == 5000:  # not the sample that drift is measured on
            moved[0] += width(plan if base is None else base) + width(plan)
        return real(plan, seeds, coeffs, base=base, **options)

    def counted_copy(to, source, *rest):
        moved[0] += 2 * source.element_size() * (source.numel() == 5000)
        return copy(to, source, *rest)

    monkeypatch.setattr(weights, "add_noise_", counted)
    monkeypatch.setattr(update, "add_noise_", counted)
    monkeypatch.setattr(torch.Tensor, "copy_", counted_copy)
    made = weights.MODES[mode](Plan([("w", torch.zeros(5000, dtype=dtype))]), update.Rule())
    made.perturb(1, 1e-3)
    found = []
    for work in (lambda: made.perturb(2, 1e-3), made.restore, lambda: made.update(modes._generation(3))):
        moved[0] = 0
        work()
        found.append(moved[0])
    cost = weights.MODES[mode].cost(dtype)
    assert found == [cost.member, cost.restore, cost.update]


# ---- figures and tables of the docs --------------------------------------------------------------------------------


def test_tables_of_several_files(tmp_path, capsys):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    block = "<!-- begin:weights-time -->\n<!-- end:weights-time -->\n"
    files = [tmp_path / "README.md", tmp_path / "docs" / "numerics.md"]
    for file in files:
        file.write_text(block)
    assert tables.main([*map(str, files), "--check"]) == 1
    assert tables.main(list(map(str, files))) == 0
    assert all(tables.NOT_YET in file.read_text() for file in files)
    files[1].write_text(block)
    assert tables.main([*map(str, files), "--check"]) == 1 and "numerics.md as generated" in capsys.readouterr().out
    assert tables._results_of(files[1]) == tables._results_of(files[0]) == tmp_path / "bench" / "results"


def test_the_modes_tables(result, tmp_path):
    (tmp_path / "modes.json").write_text(json.dumps(result))
    text = tables.generate("weights-memory", tmp_path)
    if memory.STATUS.exists():
        assert "| master | bfloat16 | 2x | none |" in text and "| host | bfloat16 | none | 1x |" in text
    assert "| master | bfloat16 | gaussian |" in tables.generate("weights-time", tmp_path)


def test_figures_are_drawn_whole_and_the_same_every_time(tmp_path):
    path = tmp_path / "drift.json"
    command = ["drift", "--numel", "1000", "--generations", "3", "--members", "4"]
    assert main([*command, "--json", str(path), "--plots", str(tmp_path / "a")]) == 0
    result = json.loads(path.read_text())
    assert figures.main([str(tmp_path / "b"), "--results", str(tmp_path)]) == 0
    names = {f"drift-{what}.svg" for what in ("restore", "update", "rates")}
    assert {f.name for f in (tmp_path / "a").iterdir()} == {f.name for f in (tmp_path / "b").iterdir()} == names
    for name in names:
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text() and f"rows {figures.checksum(result)}" in text
        assert "usual code" in text and len(text) < 150_000


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_in_the_docs_are_of_the_results(name):
    results = RESULTS / f"{figures.FIGURES[name][0]}.json"
    figure = ROOT / "docs" / "figures" / f"{name}.svg"
    assert results.exists() == figure.exists()
    if results.exists():
        assert f"rows {figures.checksum(json.loads(results.read_text()))}" in figure.read_text()
        assert figure.stat().st_size < 150_000


def test_the_docs_show_every_figure_there_is():
    text = "".join(page.read_text() for page in (ROOT / "docs").glob("*/*.md"))
    assert set(re.findall(r"\((?:\.\./)?figures/([\w-]+)\.svg\)", text)) == set(figures.FIGURES)
