"""A tiny model of each architecture that Transformers has: two generations, saved, loaded, replayed to the same bits."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from esfast.bench import zoo
from esfast.bench.architectures import MOST_WEIGHTS, NOT_MADE, architectures, tiny_model
from esfast.tasks import embedded

# One of each kind: dense, learned positions, ALiBi, sliding windows, experts, compressed keys and values, recurrent,
# hybrid, states in modules, no padding, an encoder's decoder, part of a model of pictures.
FEW = {
    "bert",
    "deepseek_v3",
    "gemma3",
    "gpt2",
    "jamba",
    "llama",
    "mamba",
    "mpt",
    "qwen3_moe",
    "recurrent_gemma",
    "rwkv",
    "xlnet",
}
RECORDED = json.loads((Path(__file__).parent.parent / "bench" / "results" / "zoo.json").read_text())
long = pytest.mark.skipif(
    not os.environ.get("ESFAST_LONG_TESTS"), reason="all architectures take minutes: set ESFAST_LONG_TESTS=1"
)


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=long) for n in architectures()])
def test_architecture(name, tmp_path):
    row = zoo.trial(name, tmp_path)
    assert row["pass"], row["reason"]
    if name in FEW:
        assert row["result"] == zoo.WORKS
    if transformers.__version__ == RECORDED["transformers"]:
        known = {r["architecture"]: r for r in RECORDED["rows"]}[name]
        assert (row["result"], row["class"]) == (known["result"], known["class"]), row["reason"]


def test_at_least_sixty_work_and_none_fails():
    rows = RECORDED["rows"]
    assert sum(r["result"] == zoo.WORKS for r in rows) >= 60
    assert not [r["architecture"] for r in rows if r["result"] == zoo.FAILS]
    assert all(r["reason"] for r in rows if r["result"] != zoo.WORKS)
    assert {r["architecture"] for r in rows if r["result"] == zoo.NOT_MADE} == NOT_MADE.keys()
    assert FEW <= {r["architecture"] for r in rows if r["result"] == zoo.WORKS}


def test_tiny_models_depend_on_their_seed_alone_and_are_tiny(same_bits):
    tokenizer = embedded.make_tokenizer()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = (list(tiny_model("qwen3", tokenizer, seed).parameters()) for seed in (0, 0, 1))
    assert same_bits(one, two) and not same_bits(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(p.numel() for p in one) < MOST_WEIGHTS / 50


def test_a_row_says_what_went_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("esfast.bench.architectures.tiny_model", lambda *a: 1 / 0)
    row = zoo.trial("llama", tmp_path)
    assert row["result"] == zoo.FAILS and row["reason"] == "ZeroDivisionError: division by zero" and not row["pass"]
    refused = {"result": zoo.REFUSED, "reason": "it is", "class": "X", "together": "", "architecture": "x"}
    assert zoo.table({"rows": [refused]})[1] == [["x", "X", "refused", "", "it is"]]
