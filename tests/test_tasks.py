"""Sudoku, math and conciseness: problems, prompts, grading; problems from files; rewards named on the command line."""

import json
import sys

import pytest

from esfast import tasks
from esfast.tasks import conciseness, data, file, math, sudoku
from esfast.tasks.base import draw

SOLVED = "1234341221434321"
PUZZLE = "123.341.2143432."


def tagged(answer):
    return f"</think>\n<answer>{answer}</answer>"


def test_there_are_288_grids_and_all_are_solved():
    assert len(set(sudoku.GRIDS)) == 288 and all(map(sudoku.is_grid, sudoku.GRIDS))
    assert not any(map(sudoku.is_grid, ["", "1" * 16, "1234" * 4, SOLVED[:-1] + "2", "1234214334124321"]))


@pytest.mark.parametrize(
    ("completion", "share"),
    [
        (tagged(SOLVED), 1.0),
        (tagged("1234\n3412\n2143\n4321\n"), 1.0),
        (tagged("1 2 3 4 3 4 1 2 2 1 4 3 4 3 2 1"), 1.0),
        ("no tags: " + SOLVED, 0.0),
        (tagged(SOLVED[:-1] + "2"), 2 / 3),  # one of three blanks wrong
        (tagged("1231341121434322"), 0.0),  # all three wrong
        (tagged("1232341121434321"), 1 / 3),
        (tagged("2" + SOLVED[1:]), 0.0),  # a given digit changed
        (tagged("4321214334121234"), 0.0),  # a solved grid, but of another puzzle
        (tagged(PUZZLE), 0.0),
        (tagged(SOLVED + "1"), 0.0),
        (tagged(SOLVED[:-1]), 0.0),
        (tagged(SOLVED[:-1] + "\u0661"), 0.0),  # a digit to str.isdigit
        (tagged("0" * 16), 0.0),
        (tagged(""), 0.0),
        (tagged("1" * 10**6), 0.0),
        ("<answer>" * 10**5, 0.0),
    ],
)
def test_sudoku_grading(completion, share, cpu_seconds):
    def graded():
        assert sudoku.answer_score(completion, PUZZLE) == pytest.approx(share)
        assert sudoku.accuracy([""], [completion], puzzle=[PUZZLE]) == [float(share == 1)]

    assert cpu_seconds(graded) < 0.05


def test_sudoku_reward_adds_a_tenth_for_the_format():
    assert sudoku.reward([""], [tagged(SOLVED)], puzzle=[PUZZLE]) == [1.1]
    assert sudoku.reward([""], [f"<answer>{SOLVED}</answer>"], puzzle=[PUZZLE]) == pytest.approx([1.05])


@pytest.mark.parametrize("style", ["paper", "compact"])
def test_sudoku_puzzles_have_one_solution_and_keep_to_their_split(style):
    train, test = (sudoku.problems(150, 1, split, style) for split in ("train", "test"))
    low, high = sudoku.BLANKS[style]
    for row in train + test:
        # by brute force over all ways to fill the blanks in order, not over the table of grids
        assert _fill(row["puzzle"]) == [row["solution"]]
        assert low <= row["puzzle"].count(".") <= high and row["prompt"].endswith("<think>")
    assert not {r["puzzle"] for r in train} & {r["puzzle"] for r in test}
    assert train == sudoku.problems(150, 1, "train", style) != sudoku.problems(150, 2, "train", style)


def _fill(puzzle):
    at = puzzle.find(".")
    if at < 0:
        return [puzzle] if sudoku.is_grid(puzzle) else []
    taken = {puzzle[i] for house in sudoku._HOUSES if at in house for i in house}
    return [s for d in "1234" if d not in taken for s in _fill(puzzle[:at] + d + puzzle[at + 1 :])]


@pytest.mark.parametrize("puzzle", ["", "1234", "." * 16, SOLVED, "55..............", "11" + "." * 14])
def test_bad_puzzles_are_refused(puzzle):
    with pytest.raises(ValueError, match="puzzle: "):
        sudoku.row({"puzzle": puzzle})


def test_a_puzzle_may_be_written_in_several_ways():
    assert sudoku.row({"puzzle": "1230\n3410\n2143\n432_"})["puzzle"] == PUZZLE


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{47}", "47"),
        (r"\boxed{1}, no, \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{}", ""),
        ("47", None),
        (r"\boxed{" * 10**5, None),
        (r"\boxed{" + "9" * 10**6 + "}", None),
        ("{" * 10**6, None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"} \boxed{3} {", "3"),
    ],
)
def test_last_box(text, box, cpu_seconds):
    assert math.last_box(text) == box
    assert cpu_seconds(lambda: math.last_box(text)) < 0.05


def test_math_grading():
    pytest.importorskip("math_verify", reason="the math task needs math-verify")
    cases = {
        r"\boxed{47}": 1,
        r"\boxed{46+1}": 1,
        r"\boxed{\frac{94}{2}}": 1,
        r"\boxed{48}": 0,
        "47": 0,
        "": 0,
        r"\boxed{}": 0,
        r"\boxed{__import__('os').system('x')}": 0,
        r"\boxed{47} \boxed{1}": 0,
    }
    assert math.accuracy([""] * len(cases), list(cases), answer=["47"] * len(cases)) == list(cases.values())
    assert math.reward([""], [[{"role": "assistant", "content": r"\boxed{0.5}"}]], answer=[r"\frac{1}{2}"]) == [1.1]
    assert math.reward([""] * 3, ["1", r"\boxed{1}", r"\boxed{2}"], answer=["2"] * 3) == [0.0, 0.1, 1.1]


def test_math_without_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    math._math_verify.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'esfast\[math\]'"):
        tasks.get("math")
    math._math_verify.cache_clear()


def test_math_problems_are_right():
    for style in math.PROMPTS:
        for row in math.problems(100, 0, "test", style):
            text = row["prompt"].split("\n")[0].removeprefix("What is $").removesuffix("$?").replace(r"\cdot", "*")
            assert eval(text) == int(row["answer"])
    row = math.row({"problem": "Half of one?", "solution": r"It is \boxed{\frac12}."})
    assert row["answer"] == r"\frac12" and "Half of one?" in row["prompt"]
    with pytest.raises(ValueError, match="expected an 'answer', or a 'solution' with a"):
        math.row({"problem": "x", "solution": "none"})


def test_conciseness():
    assert conciseness.reward(["", ""], ["12", "It is 12."], target=["12", "12"]) == [0.0, -7.0]
    assert conciseness.accuracy([""] * 4, ["12", " 12.\n", "13", "12 or 13"], target=["12"] * 4) == [1, 1, 0, 0]
    task = tasks.get("conciseness")
    train, test = task.train_rows(0, 100, 0), task.eval_rows(100)
    assert (len(train), len(test)) == (2, 8) and task.max_new_tokens == 100  # as in the paper
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}


def test_countdown_from_json_and_jsonl(tmp_path):
    problems = [{"numbers": [n, n + 1, 2], "target": 2 * n + 3, "note": "kept out"} for n in range(1, 40)]
    (tmp_path / "p.json").write_text(json.dumps(problems))
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, problems)) + "\n\n")
    for name in ("p.json", "p.jsonl"):
        task = tasks.get("countdown", data=str(tmp_path / name))
        train, test = task.train_rows(0, 1000, 0), task.eval_rows(1000)
        assert (
            len(train) + len(test) == 39 and 3 <= len(test) <= 18 and train[0].keys() == {"prompt", "numbers", "target"}
        )
        assert task.train_rows(3, 4, 0) == task.train_rows(3, 4, 0) != task.train_rows(4, 4, 0)
        assert {tuple(r["numbers"]) for r in train}.isdisjoint(tuple(r["numbers"]) for r in test)
    for record, split in zip(problems, ["train", "test", "validation"] * 13, strict=True):
        record["split"] = split
    (tmp_path / "p.json").write_text(json.dumps(problems))
    task = tasks.get("countdown", data=str(tmp_path / "p.json"))
    assert len(task.train_rows(0, 99, 0)) == 13 and len(task.eval_rows(99)) == 26


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"numbers": [1, 2], "target": 3}\n{"numbers": [1,', "line 2 is no JSON"),
        (
            '{"numbers": [1, 2], "target": 3}\n{"numbers": [1, 2]}',
            r"record 2: expected 'numbers' \(or 'nums'\) and 'target', got only 'numbers'",
        ),
        (
            '{"numbers": [1.5], "target": 3}',
            "record 1: numbers: Countdown numbers must be whole and not negative, got 1.5",
        ),
        ('{"numbers": [1], "target": 1, "split": "dev"}', "record 1: split 'dev': expected train, test or validation"),
        ("[1, 2]", "record 1: expected an object, got 1"),
        ("", "at least one record"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        tasks.get("countdown", data=str(path))
    assert str(path) in str(caught.value)


def test_missing_files_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        tasks.get("countdown", data=str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match="dataset:NAME"):
        tasks.get("countdown", data=str(tmp_path / "none.parquet"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'esfast\[datasets\]'"):
        data.read("dataset:someone/something")


def test_a_fixed_training_set_is_drawn_from_again_and_again():
    task = tasks.get("countdown", style="compact", train_prompts=10)
    drawn = [row["prompt"] for generation in range(5) for row in task.train_rows(generation, 4, 7)]
    assert len(set(drawn)) == 10 and len(set(drawn[:10])) == 10
    assert len(task.train_rows(0, 200, 7)) == 10
    assert [draw(task.train_dataset(7), g, 4, 7) for g in range(5)] == [task.train_rows(g, 4, 7) for g in range(5)]
    fresh = tasks.get("countdown", style="compact").train_dataset(7)
    assert fresh(3, 5) == tasks.get("countdown", style="compact").train_rows(3, 5, 7)


def test_a_task_of_a_file_and_a_reward_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(prompts, completions, **columns):\n    return [-len(c) for c in completions]\nnumber = 1\n"
    )
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"q{i}", "extra": i}) for i in range(30)))
    task = tasks.get("file:p.jsonl", reward=["my_rewards:brevity"])
    assert task.reward_funcs[0](prompts=[""], completions=["abc"]) == [-3] and task.accuracy is None
    assert set(task.train_rows(0, 5, 0)[0]) == {"prompt", "extra"}
    with pytest.raises(ValueError, match="needs a reward function: --reward MODULE:FUNCTION"):
        tasks.get("file:p.jsonl")
    for name, message in {
        "brevity": "expected MODULE:FUNCTION",
        "my_rewards:number": "no function 'number'",
        "my_rewards:none": "no function 'none'",
    }.items():
        with pytest.raises(ValueError, match=message):
            file.reward_function(name)
    with pytest.raises(ImportError, match="no module 'my_reward'"):
        file.reward_function("my_reward:brevity")
    replaced = tasks.get("countdown", reward=["my_rewards:brevity"])
    assert replaced.reward_funcs == task.reward_funcs and replaced.accuracy is not None


def test_the_kl_divergence_is_that_of_the_definition_and_leaves_the_weights():
    import torch

    from esfast.tasks import embedded
    from esfast.trainer.kl import KLToBase

    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    model = embedded.make_model(tokenizer)
    base = embedded.make_model(tokenizer)
    base.load_state_dict(model.state_dict())
    metric = KLToBase(model, tokenizer, 8)
    prompts, completions = ["1 2 3\n", "7\n", "x"], ["abc", "", "a long one, of more than eight tokens"]
    assert metric(prompts, completions) == [0.0, 0.0, 0.0]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    tuned = {k: v.clone() for k, v in model.state_dict().items()}
    values = metric(prompts, completions)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in tuned.items())
    for prompt, completion, value in zip(prompts, completions, values, strict=True):
        before, after = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]
        after = after if len(after) >= 8 else [*after, tokenizer.eos_token_id]
        ids, terms = before + after, []
        for t in range(len(before), len(ids)):
            p, q = (m(torch.tensor([ids[:t]])).logits[0, -1].double().softmax(0) for m in (model, base))
            terms.append((p * (p / q).log()).sum().item())
        assert value == pytest.approx(sum(terms) / len(terms), rel=1e-3) and value > 0
