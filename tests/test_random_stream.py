"""What a run draws besides its noise is frozen: known draws, which hold on every version of Python and NumPy."""

import ast
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from esfast import _cpu, tasks
from esfast.core.noise import DOMAINS
from esfast.core.random_stream import RandomStream, permutation, seed_of
from esfast.tasks.base import draw

PACKAGE = Path(__file__).parent.parent / "esfast"
NUMBERS = [4, 81, 87, 0, 11, 65, 91, 69, 40, 13, 22, 35]
ORDER = [2, 3, 7, 1, 4, 5, 0, 8, 9, 6]
DRAWN = [[4, 8, 5, 2], [9, 6, 0, 7], [3, 1, 3, 5], [1, 6, 9, 7], [0, 8, 4, 2], [5, 1, 4, 0]]
PROBLEMS = {
    ("countdown", "paper"): {"train": "f71ddb85c423152c", "test": "0eb179cf6f4ee215", "examples": "b8959955ef66b671"},
    ("countdown", "compact"): {"train": "cfdd1cad5f570918", "test": "6a18cb6440184260", "examples": "b8959955ef66b671"},
    ("conciseness", "paper"): {"train": "cf7c0946e3c9f073", "test": "a819a61d92e62115", "examples": "bf8f714b478509ba"},
    ("conciseness", "compact"): {"train": "05eb230fe8a2a3f1", "test": "56c36eba5a257485", "examples": "bf8f714b478509ba"},
    ("math", "paper"): {"train": "6f3654bdedd72120", "test": "3349da76da6cd467", "examples": "7fc436356c85abe4"},
    ("math", "compact"): {"train": "779998c0922dd32c", "test": "bd44a1611f1f9a2b", "examples": "7fc436356c85abe4"},
    ("sudoku", "paper"): {"train": "e8fc4e58bc065500", "test": "f1aa57c4a97d4cd0", "examples": "4e1c94ad5b3eab4b"},
    ("sudoku", "compact"): {"train": "37bfbafa99ba3464", "test": "bc75030ad7bef629", "examples": "4e1c94ad5b3eab4b"},
}  # fmt: skip


def words(seed, domain, index, count):
    """By the compiled Philox, a block at a time."""
    return [w for block in range(-(-count // 4)) for w in _cpu.philox(seed, block, index, DOMAINS[domain])][:count]


def test_a_stream_is_philox_word_by_word():
    for seed, index in ((0, 0), (2**64 - 1, 2**32 - 1), (12345678901234567, 3)):
        stream = RandomStream(seed, "problems", index)
        assert [stream.below(2**32) for _ in range(9001)] == words(seed, "problems", index, 9001)
    assert seed_of("abc") == int.from_bytes(hashlib.sha256(b"abc").digest()[:8], "little")
    assert RandomStream("abc", "problems").below(2**64) == RandomStream(seed_of("abc"), "problems").below(2**64)


def test_integers_are_words_without_bias():
    drawn = words(5, "problems", 0, 4000)
    stream = RandomStream(5, "problems")
    assert [stream.below(10) for _ in range(1000)] == [
        w % 10 for w in drawn[:1000]
    ]  # 6 of 2^32 words would be left out
    n = 3 << 30  # three quarters of all words are below it, and the others are left out
    stream = RandomStream(5, "problems")
    assert [stream.below(n) for _ in range(2000)] == [w for w in drawn if w < n][:2000]
    stream = RandomStream(5, "problems")
    assert [stream.below(2**40) for _ in range(9)] == [
        (a | b << 32) % 2**40 for a, b in zip(*[iter(drawn[:18])] * 2, strict=True)
    ]
    stream = RandomStream(5, "problems")
    assert [stream.between(-3, 3) for _ in range(99)] == [w % 7 - 3 for w in drawn[:99]]
    assert RandomStream(5, "problems").below(1) == 0
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        RandomStream(5, "problems").choice([])


def test_chances_and_samples():
    stream = RandomStream(1, "problems")
    assert not any(stream.chance(0.0) for _ in range(1000)) and all(stream.chance(1.0) for _ in range(1000))
    assert sum(stream.chance(0.2) for _ in range(20_000)) / 20_000 == pytest.approx(0.2, abs=0.01)
    samples = Counter(tuple(sorted(stream.sample("abcd", 2))) for _ in range(6000))
    assert len(samples) == 6 and all(count == pytest.approx(1000, abs=130) for count in samples.values())
    assert sorted(stream.sample(range(16), 16)) == list(range(16)) and stream.sample([], 0) == []


def test_a_permutation_is_the_order_of_its_keys():
    for size in (0, 1, 5, 1000):
        keys = [a | b << 32 for a, b, _, _ in zip(*[iter(words(9, "row_order", 2, 4 * size))] * 4, strict=True)]
        assert permutation(size, 9, "row_order", 2).tolist() == sorted(range(size), key=lambda i: keys[i])
    places = np.zeros((4, 4), int)
    for seed in range(4000):
        places[np.arange(4), permutation(4, seed, "row_order")] += 1
    assert np.abs(places - 1000).max() < 120  # four standard deviations are 110


def test_known_draws():
    """Literal numbers: they hold for as long as the noise of version 1 does."""
    stream = RandomStream(0, "problems")
    assert [stream.below(100) for _ in range(12)] == NUMBERS
    assert permutation(10, 0, "row_order").tolist() == ORDER
    rows = [{"prompt": i} for i in range(10)]
    assert [[r["prompt"] for r in draw(rows, g, 4, 7)] for g in range(6)] == DRAWN
    assert sorted(r["prompt"] for r in draw(rows, 3, 20, 7)) == list(range(10))


@pytest.mark.parametrize("style", ["paper", "compact"])
@pytest.mark.parametrize("task", list(tasks.MODULES))
def test_known_problems(task, style):
    """Problems of the first generations of a run, those that are held out, and what the embedded model is taught."""
    module = tasks.MODULES[task]
    made = {
        "train": module.problems(20, "0/3", "train", style), "test": module.problems(20, "evaluation", "test", style),
        "examples": module.RECIPE.examples(0, 1)[:50],
    }  # fmt: skip
    found = {what: hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] for what, rows in made.items()}
    assert found == PROBLEMS[task, style]


def test_nothing_else_draws():
    """No generator of Python's, NumPy's or PyTorch's decides what a run does. Initial weights come from PyTorch's: those
    of the embedded model, and of adapters, which a run keeps in its folder."""
    # member_check.py gives the generator back as it was. steps.py and gym_problems.py set it for libraries that draw from
    # it, to what a row's seed says, and put it back. member_products.py draws numbers to compare two routines, from a
    # generator of its own.
    initial = {"embedded.py", "adapters.py", "member_check.py", "member_products.py", "steps.py", "gym_problems.py"}
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            for name in names:
                if name.startswith(("random", "np.random", "numpy.random", "torch.rand", "torch.manual_seed")):
                    found.add(path.name)
    assert found == initial
