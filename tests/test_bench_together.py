"""`esfast bench together` compares the same texts, and its ratios are those of its seconds."""

import json

import pytest
import torch

from esfast.bench import BenchmarkError, main, together
from esfast.rollout.population import PopulationEvaluator
from esfast.tasks import embedded


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
    monkeypatch.setattr(together, "LIMITS", {("embedded", 3, 2): (1e9, 1e9)})
    assert main([*OPTIONS, "--json", str(tmp_path / "together.json")]) == 1, "a row that misses its limit fails"
    (row,) = json.loads((tmp_path / "together.json").read_text())["rows"]
    s = row["seconds"]
    assert row["at_once"] == 3 and not row["pass"] and row["drops"]
    assert row["times_as_fast"] == s["one by one"] / s["together"]
    assert row["overhead_ratio"] == s["together, all tokens"] / s["batch, all tokens"]
    assert all(len(values) == 2 and min(values) > 0 for values in row["all_seconds"].values())
    headers, lines = together.table({"rows": [row]})
    assert [len(line) for line in lines] == [len(headers)] and "one after another" in capsys.readouterr().out


def test_other_texts_give_no_figures(monkeypatch):
    answers = PopulationEvaluator._answers
    monkeypatch.setattr(PopulationEvaluator, "_answers", lambda *a: [[t + "!" for t in ts] for ts in answers(*a)])
    with pytest.raises(BenchmarkError, match="other texts"):
        together.measure("embedded", 3, 2, 3, repeats=1)
