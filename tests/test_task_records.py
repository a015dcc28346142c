"""Records of data files in the forms that people have: problems of Countdown, answers of mathematics, puzzles, short
answers."""

import sys
import time
from decimal import Decimal

import numpy as np
import pytest

from esfast.tasks import conciseness, countdown, file, math, sudoku


@pytest.mark.parametrize(
    ("record", "numbers", "target"),
    [
        ({"numbers": [1, 2, 3], "target": 6}, [1, 2, 3], 6),
        ({"nums": [44, 19, 35], "target": 98}, [44, 19, 35], 98),
        ({"numbers": [1, 2], "nums": [8, 9], "target": 3}, [1, 2], 3),
        ({"numbers": [1, 2], "target": "24"}, [1, 2], 24),
        ({"numbers": [1, 2], "target": " 24.0 "}, [1, 2], 24),
        ({"numbers": [1, 2], "target": 24.0}, [1, 2], 24),
        ({"numbers": [1, 2], "target": "27.4"}, [1, 2], 27.4),
        ({"numbers": [1, 2], "target": "-3"}, [1, 2], -3),
        ({"numbers": [1, 2], "target": "2.4e1"}, [1, 2], 24),
        ({"numbers": ["1", " 2 ", "3.0", 4.0], "target": 3}, [1, 2, 3, 4], 3),
        ({"numbers": "[1, 2, 3]", "target": 3}, [1, 2, 3], 3),
        ({"numbers": "(1, 2)", "target": 3}, [1, 2], 3),
        ({"numbers": '["1", "2"]', "target": 3}, [1, 2], 3),
        ({"numbers": None, "nums": [1, 2], "target": 3}, [1, 2], 3),
        ({"numbers": "44 19  35", "target": 3}, [44, 19, 35], 3),
        ({"numbers": (1, 2), "target": np.float32(3)}, [1, 2], 3),
        ({"numbers": np.array([1, 2]), "target": np.int64(3)}, [1, 2], 3),
    ],
)
def test_countdown_records_are_read_as_they_come(record, numbers, target):
    row = countdown.row(record, "compact")
    assert row == {"prompt": f"{' '.join(map(str, numbers))}={target}\n<think>", "numbers": numbers, "target": target}
    assert type(row["target"]) is type(target) and all(type(n) is int for n in row["numbers"])
    name = "nums" if record.get("numbers") is None else "numbers"
    sample = {name: [record[name]]}
    assert countdown.reward([""], ["x"], target=[record["target"]], **sample) == [0.0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"numbers": [1, float("inf")], "target": 1}, "numbers: expected a finite number, got inf"),
        ({"numbers": [1, 2], "target": float("inf")}, "target: expected a finite number, got inf"),
        ({"numbers": [1, 2], "target": float("nan")}, "target: expected a finite number, got nan"),
        ({"numbers": [1, 2], "target": "nan"}, "target: expected a finite number, got 'nan'"),
        ({"numbers": [1, 2], "target": "Infinity"}, "target: expected a finite number"),
        ({"numbers": [1, 2], "target": "1e999"}, "target: expected a finite number"),
        ({"numbers": [1, 2], "target": "1/3"}, "target: expected a finite number"),
        ({"numbers": [1, 2], "target": "\u0662"}, "target: expected a finite number"),
        ({"numbers": [1, 2], "target": ""}, "target: expected a finite number"),
        ({"numbers": [1, 2], "target": None}, "target: expected a finite number, got None"),
        ({"numbers": [1, 2], "target": True}, "target: expected a finite number, got True"),
        ({"numbers": [1, 2], "target": [3]}, r"target: expected a finite number, got \[3\]"),
        ({"numbers": [1, 2], "target": -0.0}, "target: minus zero is not accepted"),
        ({"numbers": [1, 2], "target": "-0"}, "target: minus zero is not accepted"),
        ({"numbers": [True, 2], "target": 1}, "numbers: expected a finite number, got True"),
        ({"numbers": [1, -2], "target": 1}, "numbers: .* not negative, got -2"),
        ({"numbers": ["1.5"], "target": 1}, "numbers: .* whole .* got '1.5'"),
        ({"numbers": [[1], [2]], "target": 1}, r"numbers: expected a finite number, got \[1\]"),
        ({"numbers": [None, 1], "target": 1}, "numbers: expected a finite number, got None"),
        ({"numbers": [1, 2], "target": "9" * 5000}, "target: expected a finite number, got '9999"),
        ({"numbers": None, "target": 1}, "numbers: expected a list, got None"),
        ({"numbers": 3, "target": 3}, "numbers: expected a list, got 3"),
        ({"numbers": {"a": 1}, "target": 1}, "numbers: expected a list"),
        ({"numbers": [], "target": 1}, "numbers: expected at least one"),
        ({"numbers": "[]", "target": 1}, "numbers: expected at least one"),
        ({"numbers": "one two", "target": 1}, "numbers: expected a finite number, got 'one'"),
        ({"numbers": [1]}, "expected 'numbers' .or 'nums'. and 'target', got only 'numbers'"),
    ],
)
def test_countdown_records_that_are_no_problems_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        countdown.row(record, "compact")


BOXES = [
    (r"so it is $\boxed 2$.", "2"),
    (r"$\boxed {72}$", "72"),
    (r"\boxed  {5}", "5"),
    ("\\boxed\n{7}", "7"),
    (r"$\fbox{2}$", "2"),
    (r"\fbox {x}", "x"),
    (r"$\boxed 72$", "72"),
    (r"$\boxed x$", "x"),
    (r"$\boxed\frac12$ of it", r"\frac12"),
    (r"\(\boxed -3\)", "-3"),
    (r"so \boxed\text{two words} it is", r"\text{two words}"),
    (r"\boxed 2, as was to be shown", "2"),
    (r"\boxed 1.5.", "1.5"),
    (r"\boxed{\text{Tuesday}}", r"\text{Tuesday}"),
    (r"\boxed{\boxed{4}}", "4"),
    (r"\boxed{\boxed{4} + \boxed{5}}", r"\boxed{4} + \boxed{5}"),
    (r"\boxed{\frac{1}{2^{3}}}", r"\frac{1}{2^{3}}"),
    (r"$\boxed 2$ or \boxed{3}", "3"),
    (r"\boxed{3} or $\boxed 72$", "72"),
    (r"\boxed{1}, \boxed", "1"),
    (r"\boxedfoo{3}", None),
    (r"put it into \boxed", None),
    (r"the \boxed notation: x", None),
]


@pytest.mark.parametrize(("text", "box"), BOXES)
def test_boxes_as_people_write_them(text, box):
    assert math.last_box(text) == box


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 2000 + "1" + "}" * 2000,
        r"\boxed" * 3000,
        r"\boxed 1 " * 3000,
        r"\boxed" + " " * 20000 + "{",
        r"\fbox" * 4000,
    ],
)
def test_boxes_without_end_cost_nothing(text):
    began = time.perf_counter()
    math.last_box(text)
    assert time.perf_counter() - began < 0.5


GOLDS = [
    ({"answer": "42"}, "42"),
    ({"answer": 42}, "42"),
    ({"answer": 42.5}, "42.5"),
    ({"answer": 1e-7}, "0.0000001"),
    ({"answer": np.int64(42)}, "42"),
    ({"answer": " 42\n"}, "42"),
    ({"answer": "6*7=<<6*7=42>>42\n#### 42"}, "42"),
    ({"answer": "so\n#### 1,234,567"}, "1234567"),
    ({"answer": "so\n#### $1,200"}, "1200"),
    ({"answer": "so\n#### -5"}, "-5"),
    ({"answer": "so\n#### -$1,005"}, "-1005"),
    ({"answer": "so\n#### $-5"}, "-5"),
    ({"answer": Decimal("1.50")}, "1.50"),
    ({"answer": "so\n#### 1,000.50"}, "1000.50"),
    ({"answer": "so #### 3 #### 4"}, "4"),
    ({"answer": "$1,234.50"}, "1234.50"),
    ({"answer": r"\$5"}, "5"),
    ({"answer": "$42$"}, "42"),
    ({"answer": "$$42$$"}, "42"),
    ({"answer": r"\(\frac12\)"}, r"\frac12"),
    ({"answer": r"\boxed{42}"}, "42"),
    ({"answer": r"$\boxed 2$"}, "2"),
    ({"answer": r"Long words, then \boxed{(1,2]}."}, "(1,2]"),
    # A comma in parentheses may separate the ends of an interval, so it stays.
    ({"answer": "(1,234)"}, "(1,234)"),
    ({"answer": "42%"}, "42%"),
    ({"answer": r"\text{Tuesday}"}, r"\text{Tuesday}"),
    ({"answer": r"\{1, 2\}"}, r"\{1, 2\}"),
    ({"answer": "", "solution": r"so \boxed{42}"}, "42"),
    ({"answer": " \n", "solution": r"so \boxed{42}"}, "42"),
    ({"answer": None, "solution": r"so \boxed 2"}, "2"),
    ({"answer": float("nan"), "solution": r"$\fbox{2}$"}, "2"),
    ({"solution": r"\boxed{1}, no: \boxed {72}"}, "72"),
    ({"solution": "so\n#### 9"}, "9"),
    ({"answer": "7", "solution": r"\boxed{8}"}, "7"),
    ({"answer": "None", "solution": r"\boxed{8}"}, "8"),
    ({"answer": "NaN", "solution": r"\boxed{8}"}, "8"),
    ({"answer": r"so #### \boxed{42}"}, "42"),
    ({"answer": "so\n####\n42\n"}, "42"),
    ({"solution": "#### Step 1\nwords\n\n#### Final answer\n\nIt is $\\boxed{42}$."}, "42"),  # Markdown's headings
    ({"solution": "It is $\\boxed{42}$.\n#### Check\n6 times 7 is 42."}, "42"),
]
NO_GOLDS = [
    {"answer": None},
    {"answer": float("nan")},
    {"answer": float("inf")},
    {"answer": ""},
    {"answer": "  "},
    {"answer": {"value": 1}},
    {"answer": ["1"]},
    {"answer": []},
    {"answer": True},
    {"answer": b"1"},
    {"answer": "nan"},
    {"answer": "null"},
    {"answer": r"\boxed{}"},
    {"answer": "#### "},
    {"answer": r"\frac{1"},
    {"answer": "1}"},
    {"answer": "x" * 400},
    {"answer": "", "solution": "no box"},
    {"answer": None, "solution": None},
    {"answer": "", "solution": r"\boxed{}"},
    {"solution": 3},
    {"text": "x"},
    {"answer": "None"},
    {"answer": "N/A"},
    {"answer": "<NA>"},
    {"answer": "NULL"},
    {"answer": "42\\"},
    {"answer": "\\"},
    {"answer": "1}{2"},
    {"answer": "#### 42\nand more"},
    {"solution": "#### Step 1\nno box"},
]


@pytest.mark.parametrize("installed", [True, False])
def test_golds_are_read_from_what_data_has(installed, monkeypatch):
    if not installed:
        monkeypatch.setitem(sys.modules, "math_verify", None)
    for record, gold in GOLDS:
        row = math.row({"problem": "p", **record}, "compact")
        assert row == {"prompt": "p\n", "answer": gold}, record
        assert math.row({"question": "p", **record}, "compact") == row
    for record in NO_GOLDS:
        with pytest.raises(ValueError, match="answer"):
            math.row({"problem": "p", **record})
    for problem in (None, "", 3.5j, float("nan"), ["p"]):
        with pytest.raises(ValueError, match="problem: expected a text"):
            math.row({"problem": problem, "answer": "1"})


def test_golds_match_what_they_mean():
    pytest.importorskip("math_verify", reason="the math task needs math-verify")
    for answer, response in [
        ("6*7=42\n#### 42", "42"),
        ("#### 1,234", "1234"),
        ("#### $1,200", "1200"),
        ("42%", "42"),
        ("$42$", "42"),
        (r"\text{Tuesday}", "Tuesday"),
        (1e-7, "10^{-7}"),
        (r"\boxed{\frac12}", "0.5"),
    ]:
        assert math.score(rf"\boxed{{{response}}}", answer) == 1.1, answer
    assert math.score(r"It is $\boxed 72$.", "72") == 1.1 and math.score(r"\fbox{72}", 72) == 1.1
    for answer in ("$", "$$", r"\text{}", r"\$", "'"):
        with pytest.raises(ValueError, match="answer: expected LaTeX"):
            math.row({"problem": "p", "answer": answer})
    for answer in (r"\emptyset", r"\pi", r"\infty", "?", "()", "两"):
        assert math.row({"problem": "p", "answer": answer})["answer"] == answer
    with pytest.raises(ValueError, match="answer: expected a text, got None"):
        math.reward([""], [r"\boxed{1}"], answer=[None])


@pytest.mark.parametrize(
    ("row", "record", "message"),
    [
        (conciseness.row, {"prompt": "a", "target": None}, "target: expected a text, got None"),
        (conciseness.row, {"prompt": "a", "target": float("nan")}, "target: expected a text, got nan"),
        (conciseness.row, {"prompt": "a", "target": ["x"]}, r"target: expected a text, got \['x'\]"),
        (conciseness.row, {"prompt": "a", "target": ""}, "target: expected a text, got ''"),
        (conciseness.row, {"prompt": 3, "target": "x"}, "prompt: expected a text, or a chat"),
        (file.row, {"prompt": None}, "prompt: expected a text, or a chat .* got None"),
        (file.row, {"prompt": []}, "prompt: expected a text, or a chat"),
        (file.row, {"prompt": ["a"]}, "prompt: expected a text, or a chat"),
        (file.row, {"prompt": float("nan")}, "prompt: expected a text, or a chat"),
        (sudoku.row, {"puzzle": 1234}, "puzzle: expected a text of 16 digits and dots, got 1234"),
        (sudoku.row, {"puzzle": None}, "puzzle: expected a text of 16 digits and dots, got None"),
        (sudoku.row, {"puzle": "x"}, "expected 'puzzle', got only 'puzle'"),
    ],
)
def test_other_records_that_are_refused(row, record, message):
    with pytest.raises((ValueError, TypeError), match=message):
        row(record)


def test_other_records():
    assert conciseness.row({"prompt": "a", "target": 12}) == {"prompt": "a", "target": "12"}
    chat = [{"role": "user", "content": "x"}]
    assert file.row({"prompt": chat, "split": "train", "n": 1}) == {"prompt": chat, "n": 1}
