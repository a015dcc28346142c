"""`esfast bench together` compares the same texts, and its ratios are those of its seconds."""

import json

import pytest
import torch

from esfast.bench import BenchmarkError, main, together
from esfast.rollout import population
from esfast.rollout.graphs import CaptureFailed
from esfast.rollout.shared_batches import SharedBatches
from esfast.rollout.static_steps import StaticSteps
from esfast.tasks import embedded

CASE = together.Case("embedded", "gaussian", 3, 2, 3)


@pytest.fixture(autouse=True)
def embedded_model(tmp_path, monkeypatch):
    """Untrained."""
    tokenizer = embedded.make_tokenizer()
    torch.manual_seed(0)
    embedded.make_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(embedded, "cached", lambda **options: tmp_path / "model")


OPTIONS = ["together", "--members", "3", "--prompts", "2", "--new-tokens", "3", "--repeats", "2"]


def test_rows_add_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(together, "LIMITS", {("embedded", "gaussian", 3, 2): (1e9, 1e9)})
    assert main([*OPTIONS, "--json", str(tmp_path / "together.json")]) == 1, "a row that misses its limit fails"
    (row,) = json.loads((tmp_path / "together.json").read_text())["rows"]
    s = row["seconds"]
    assert row["same_texts"] == 1 and row["tokens_per_second"]["batch, all tokens"] == 18 / s["batch, all tokens"]
    assert row["at_once"] == 3 and not row["pass"] and row["drops"]
    assert row["times_as_fast"] == s["one by one"] / s["together"]
    assert row["overhead_ratio"] == s["together, all tokens"] / s["batch, all tokens"]
    assert all(len(values) == 2 and min(values) > 0 for values in row["all_seconds"].values())
    headers, lines = together.table({"rows": [row]})
    assert [len(line) for line in lines] == [len(headers)] and "one after another" in capsys.readouterr().out


def test_other_texts_give_no_figures(monkeypatch):
    texts = population._texts
    monkeypatch.setattr(population, "_texts", lambda found: [text + "!" for text in texts(found)])
    with pytest.raises(BenchmarkError, match=r"0\.0% of the texts"):
        together.measure(CASE, repeats=1)


def test_rates_of_several_noises_and_numbers_at_once(tmp_path, monkeypatch):
    """As on a GPU: what doesn't fit is left out and the rest is measured."""
    files = ["--json", str(tmp_path / "together.json")]
    options = "--models tiny --prompts 2 --new-tokens 2 --rates --repeats 1"
    generate = SharedBatches._generate

    def short_of_memory(self, rows, members, *options):
        if members == 3:
            raise torch.OutOfMemoryError
        return generate(self, rows, members, *options)

    assert main(["together", *options.split(), "--noise", "gaussian", "low_rank", "--members", "3", *files]) == 0
    rows = json.loads((tmp_path / "together.json").read_text())["rows"]
    assert [(r["noise"], r["at_once"]) for r in rows] == [("gaussian", 3), ("low_rank", 3)]
    assert all(r["times_as_fast"] is r["same_texts"] is None and len(r["seconds"]) == 2 for r in rows)
    assert rows[1]["bytes"] < rows[0]["bytes"]
    monkeypatch.setattr(SharedBatches, "_generate", short_of_memory)
    main(["together", *options.split(), "--members", "1", "3", *files])
    found = json.loads((tmp_path / "together.json").read_text())
    assert [r["at_once"] for r in found["rows"]] == [1]
    assert [r["reason"] for r in found["left_out"]] == ["out of memory with 3 members at once"]


def test_what_tells_most_comes_first_and_static_rows_are_static(tmp_path, capsys, monkeypatch):
    file = tmp_path / "together.json"
    options = "--models tiny --prompts 2 --new-tokens 3 --rates --repeats 1 --decoding plain static --members 2 1 3"
    main(["together", *options.split(), "--noise", "gaussian", "low_rank", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    found = [(r["members"], r["decoding"], r["noise"]) for r in rows]

    def several(count, way):
        return [(count, way, noise) for noise in ("gaussian", "low_rank")]

    assert found == [
        *several(3, "static"),
        (1, "static", "gaussian"),
        *several(2, "static"),
        *several(3, "plain"),
        *several(2, "plain"),
    ]
    headers, lines = together.table({"rows": rows})
    assert [(int(line[1].split(",")[0]), line[3], line[2]) for line in lines] == [
        (1, "static", "any"),
        *several(2, "static"),
        *several(3, "static"),
        *several(2, "plain"),
        *several(3, "plain"),
    ]
    rates = {(r["members"], r["decoding"], r["noise"]): r["tokens_per_second"]["together, all tokens"] for r in rows}
    alone = rates[1, "static", "gaussian"]
    assert lines[0][5] == "1.0" and lines[2][5] == f"{rates[2, 'static', 'low_rank'] / alone:.1f}"
    assert all(len(line) == len(headers) for line in lines)
    most = [f"{rates[3, 'static', noise] / alone:.1f}" for noise in ("gaussian", "low_rank")]
    assert [line[-1] for line in together.short({"rows": rows})[1]] == most
    printed = capsys.readouterr().err
    assert printed.count("tokens/s") == len(rows), "each row is printed when it is there"

    def fails(*arguments):
        raise CaptureFailed("it waits")

    monkeypatch.setattr(StaticSteps, "_generate", fails)
    main(["together", *options.split(), "--json", str(file)])
    result = json.loads(file.read_text())
    assert {r["decoding"] for r in result["rows"]} == {"plain"}
    assert {(r["decoding"], r["reason"]) for r in result["left_out"]} == {
        ("static", "static decoding went on plainly: it waits")
    }
