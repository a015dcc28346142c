"""`esfast bench vllm` without vLLM: what it says, and its table. tests/with_vllm runs it."""

import importlib.util

import pytest

from esfast.bench import main, vllm

ROW = {
    "model": "m",
    "device": "cpu",
    "members": 16,
    "prompts": 4,
    "rank": 1,
    "same_texts_percent": 100.0,
    "seconds": {"one by one": 6.0, "at once": 2.0, "frozen": 1.6},
    "times_as_fast": 3.0,
    "overhead_ratio": 1.25,
}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_says_what_to_install(capsys):
    assert main(["vllm", "--members", "2"]) == 1
    assert "needs vLLM: pip install 'esfast[vllm]'" in capsys.readouterr().err


def test_its_table():
    headers, (cells,) = vllm.table({"rows": [ROW]})
    assert len(headers) == len(cells) and cells[3:7] == ["2", "3.00", "1.6", "1.25"]
