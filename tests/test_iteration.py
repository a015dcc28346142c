"""`esfast bench iteration` on a model of a few thousand weights: what it compares is equal work, and what it says adds up."""

import argparse
import json

import pytest
import torch

from esfast.bench import BenchmarkError, iteration, main
from esfast.tasks import embedded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model, untrained."""
    path, tokenizer = tmp_path_factory.mktemp("model"), embedded.make_tokenizer()
    torch.manual_seed(0)
    embedded.make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def embedded_model(folder, monkeypatch):
    monkeypatch.setattr(embedded, "cached", lambda **options: folder)


OPTIONS = ["--members", "2", "--prompts", "3", "--new-tokens", "4", "--repeats", "2"]


def test_rows_add_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(iteration, "LIMITS", {("cpu", "tiny"): (1e9, 1e9)})
    path, threads = tmp_path / "iteration.json", torch.get_num_threads()
    status = main(["iteration", "--models", "embedded", "tiny", *OPTIONS, "--json", str(path)])
    result = json.loads(path.read_text())
    assert status == 1, "a row that misses its limit fails"
    assert torch.get_num_threads() == threads
    for row, name, dtype in zip(result["rows"], ("embedded", "tiny"), ("float32", "bfloat16"), strict=True):
        assert (row["model"], row["dtype"], row["pass"]) == (name, dtype, name == "embedded")
        assert row["rounds"] == 2 and row["decoding"] == "plain"
        # both models are so small that `esfast train` asks their members together
        assert row["seconds"].keys() == {"esfast", "together", "frozen", "plain"}
        assert all(len(v) == 2 and min(v) > 0 for v in row["all_seconds"].values())
        s = row["seconds"]
        assert row["overhead_ratio"] == s["esfast"] / s["frozen"] and row["times_as_fast"] == s["plain"] / s["esfast"]
        assert row["times_as_fast_together"] == s["plain"] / s["together"]
        assert row["tokens_per_second"] == 2 * 3 * 4 / s["esfast"]
    headers, lines = iteration.table(result)
    assert all(len(line) == len(headers) for line in lines)
    shown = capsys.readouterr().out
    assert "overhead ratio" in shown and "embedded" in shown


def test_what_is_out_of_time_is_left_out(capsys):
    assert main(["iteration", "--models", "embedded", "tiny", *OPTIONS, "--seconds", "1e-9", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in result["left_out"]] == ["embedded", "tiny"] and result["rows"] == []


def test_a_model_has_a_row_for_each_of_its_settings(tmp_path, monkeypatch):
    """As Qwen2.5-0.5B: short texts, where the noise weighs most, and texts as long as people use, with a limit of their
    own."""
    dtype, members, prompts, *_ = iteration.TINY
    cases = [("tiny", (dtype, members, prompts, 8, 1)), ("tiny", (dtype, members, prompts, 20, 6))]
    monkeypatch.setattr(iteration, "CPU", cases)
    monkeypatch.setattr(iteration, "LIMITS", {("cpu", "tiny"): (None, 1e9), ("cpu", "tiny", 6): (None, None)})
    path = tmp_path / "iteration.json"
    assert main(["iteration", "--repeats", "2", "--json", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    assert [(r["prompt_tokens"], r["new_tokens"], r["pass"]) for r in rows] == [(8, 1, False), (20, 6, True)]


def test_a_model_that_fails_costs_its_own_row(monkeypatch, tmp_path, capsys):
    measure, saved = iteration.Work.measure, []

    def failing(self, *arguments):
        if self.name == "embedded":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore words")
        return measure(self, *arguments)

    monkeypatch.setattr(iteration.Work, "measure", failing)
    path = tmp_path / "iteration.json"
    monkeypatch.setattr("esfast.bench.write_whole", lambda path, text: saved.append((str(path), json.loads(text))))
    assert main(["iteration", "--models", "embedded", "tiny", *OPTIONS, "--repeats", "1", "--json", str(path)]) == 1
    assert [len(found["rows"]) for _, found in saved] == [0, 1, 1], "written after every row"
    result = saved[-1][1]
    assert [r["model"] for r in result["rows"]] == ["tiny"] and result["rows"][0]["clocks"] is None
    (left_out,) = result["left_out"]
    assert (left_out["model"], left_out["failed"], left_out["prompts"]) == ("embedded", True, 3)
    assert left_out["reason"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "left out: 3 prompts, 4 new tokens; RuntimeError: CUDA error" in capsys.readouterr().out


def test_what_says_most_comes_first_on_a_gpu():
    args = argparse.Namespace(device="cuda", models=None)
    cases = iteration._cases(args)
    assert [(name, sizes[2], sizes[4]) for name, sizes in cases[:2]] == [
        ("Qwen2.5-1.5B", 64, 64),
        ("Qwen2.5-7B", 64, 64),
    ]
    args.models = ["tiny", "Qwen2.5-7B"]
    assert [name for name, _ in iteration._cases(args)] == ["Qwen2.5-7B", "Qwen2.5-7B", "tiny"]


def work(**changes):
    settings = {
        "name": "embedded",
        "dtype": "float32",
        "device": "cpu",
        "decoding": "auto",
        "members": 2,
        "prompts": 2,
        "prompt_tokens": None,
        "new_tokens": 4,
    }
    return iteration.Work(**{**settings, **changes})


def test_texts_that_differ_or_end_early_are_refused(monkeypatch):
    with work() as w:
        monkeypatch.setattr(w, "_generate", lambda: ["other"] * 2)
        with pytest.raises(BenchmarkError, match="other texts than the engine"):
            w.measure(1, 0)
    with work() as w:
        monkeypatch.setattr(w, "frozen", lambda: None)
        with pytest.raises(BenchmarkError, match="frozen: expected 16 tokens, got 0"):
            w.measure(1, 0)


def test_the_plain_loop_moves_the_weights_as_es_does_and_restores_inexactly():
    with work(prompt_tokens=9) as w:
        assert {len(prompt) for prompt in w.prompts} == {9}
        before = [p.detach().clone() for p in w.model.parameters()]
        w.plain()
        moved = max(float((p.detach() - b).abs().max()) for p, b in zip(w.model.parameters(), before, strict=True))
        assert 0 < moved < 0.01


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["iteration", "--device", "cuda"]) == 1
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err
