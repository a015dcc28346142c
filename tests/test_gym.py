"""reasoning-gym's tasks: rows, splits, grading without evaluation, names and options."""

import ast
import hashlib
import importlib.metadata
import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from esfast import tasks
from esfast.tasks import gym, gym_options, gym_problems, gym_scoring
from esfast.tasks.gym import ANY_ANSWER, WITHOUT_ANSWER
from esfast.utils.child import child
from esfast.utils.errors import EsfastError

pytest.importorskip("reasoning_gym", reason="of the extra gym: pip install 'esfast[gym]'")

ROOT = Path(__file__).parent.parent
# Its problems take seconds each unless they are small.
SMALL = {"knight_swap": "?min_nodes=6&max_nodes=6", "futoshiki": "?max_board_size=4"}
# Their problems depend on the order of sets of texts, or on a global generator.
DELICATE = (
    "codeio isomorphic_strings polynomial_multiplication pool_matrix ransom_note word_ladder list_functions".split()
)
HOSTILE = (
    "__import__('os').getpid()",
    "[__import__('os').getpid()]",
    "[[print(1)]]",
    "print((lambda: 1)())",
    "open('x', 'w')",
)


def answered(rows, answers=None):
    answers = [row["answer"] for row in rows] if answers is None else answers
    completions = [f"so\n</think>\n<answer>\n{answer}\n</answer>" for answer in answers]
    return gym.reward(None, completions, [r["problem"] for r in rows], [r["entry"] for r in rows])


def test_every_task_gives_problems_and_scores_its_own_answers_one():
    names, scores, none = gym_problems.known(), {}, []
    for name in names:
        rows = gym.problems(name + SMALL.get(name, ""), 1, "own answers")
        assert rows[0].keys() == {"prompt", "problem", "answer", "entry"}
        if rows[0]["answer"] is None:
            none.append(name)
        else:
            scores[name] = answered(rows)[0]
    assert len(names) == 105
    assert {name: s for name, s in scores.items() if s != 1} == {}
    assert set(none) == set(WITHOUT_ANSWER)
    page = (ROOT / "docs/how-to/gym.md").read_text()
    assert all(f"| `{name}` |" in page for name in (*WITHOUT_ANSWER, *ANY_ANSWER))


def test_no_grader_evaluates_an_answer(tmp_path):
    """In a process of its own, whose audit hook sees all code that runs from a text."""
    code = f"""
import json, sys
from esfast.tasks import gym, gym_options, gym_problems, gym_scoring
SMALL, HOSTILE = {SMALL!r}, {HOSTILE!r}
seen, plain, careless = [], [], []
sys.addaudithook(lambda event, args: seen.append(args[0].co_filename) if event == "exec" and args[0].co_names else None)
for name in gym_problems.known():
    row = gym.problems(name + SMALL.get(name, ""), 1, "hostile")[0]
    part, = gym_options.parse(row["problem"])
    gym.score(f"<answer>{{row['answer']}}</answer>", row["problem"], row["entry"])  # imports what it needs
    seen.clear()
    scores = [gym.score(f"<answer>{{h}}</answer>", row["problem"], row["entry"]) for h in HOSTILE]
    assert not seen, (name, seen)
    if max(scores) >= 0.5:
        careless.append(name)
    entry = gym_scoring.ast.literal_eval(row["entry"])
    original = gym_options.dataset(part, 0, 1)
    for h in HOSTILE:
        try:
            original.score_answer(h, entry)
        except BaseException:
            pass
    if "<string>" in seen:
        plain.append(name)
print(json.dumps([plain, careless]))
"""
    done = subprocess.run(child(code), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluating, careless = json.loads(done.stdout.splitlines()[-1])
    assert careless == list(ANY_ANSWER)
    # As they are, these evaluate: the hook sees what it should.
    assert evaluating == [
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    ]


def test_what_evaluates_in_the_package_is_known():
    """A new version may evaluate elsewhere: then look whether a grader does."""
    package = Path(importlib.metadata.distribution("reasoning-gym").locate_file("reasoning_gym"))
    found = set()
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "arc/rearc_utils"):
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            called = {getattr(f, "id", getattr(f, "attr", "")) for f in calls}
            if called & {"eval", "exec", "parse_expr", "sympify", "S", "parse_latex"}:
                found.add((path.stem, function.name))
    graders = {module for module, name in found if name == "score_answer"}
    others = {f"{module}.{name}" for module, name in found if name != "score_answer"}
    expected = """binary_matrix countdown intermediate_integration n_queens number_sorting polynomial_multiplication
        puzzle24 simple_integration spiral_matrix string_insertion"""
    assert graders == set(expected.split())
    # They evaluate what the package wrote; propositional_logic has a parser of its own under such a name.
    expected = """basic_arithmetic.eval_floordiv bitwise_arithmetic.generate_problem bitwise_arithmetic.verify_solution
        codeio._generate_io_pair generators_00_49.generate_32 generators_00_49.generate_example
        generators_50_99.generate_69 generators_50_99.generate_from_variables
        propositional_logic.from_string propositional_logic.parse_expr"""
    assert others == set(expected.split())


@pytest.mark.parametrize(
    "text, value",
    [
        ("x**2/2 + C", "C + x**2/2"),
        ("-(3*x - 1.5)*exp(2*x)", "-(3*x - 1.5)*exp(2*x)"),
        ("log(sqrt(x))", "log(sqrt(x))"),
        ("2*pi", "2*pi"),
        (" 1/3 ", "1/3"),
    ],
)
def test_expressions(text, value):
    import sympy

    assert gym_scoring.expression(text) == sympy.parse_expr(value)


@pytest.mark.parametrize(
    "text",
    ["x.__class__", "x[0]", "f(x)", "9**9**9", "2**100000", "(x+1)**1000", "lambda: 1", "1 if x else 2", "'a'", "x = 1"]
    + ["(" * 5000, "1+" * 3000 + "1", "", "exp(x, evaluate=False)", "(10**200)**200", "True", "1e400**2 + y(1)"],
)
def test_what_is_no_expression(text):
    with pytest.raises(ValueError):
        gym_scoring.expression(text)


def test_answers_are_those_of_the_last_tags():
    (row,) = gym.problems("lcm?min_numbers=2&max_numbers=2", 1, "tags")
    right, problem = row["answer"], (row["problem"], row["entry"])
    assert gym.score(f"<answer>no</answer> wait\n<answer> {right}\n</answer> done", *problem) == 1
    assert gym.score(f"<answer>{right}</answer> or <answer>0</answer>", *problem) == 0
    for untagged in (right, f"<answer>{right}", f"the answer is {right}", "", f"{right}</answer>"):
        assert gym.score(untagged, *problem) == 0
    assert gym.reward(None, [[{"role": "assistant", "content": f"<answer>{right}</answer>"}]], *zip(problem)) == [1]


def test_accuracy_counts_whole_answers_only():
    (row,) = gym.problems("countdown", 1, "part")
    numbers = ast.literal_eval(row["entry"])["metadata"]["numbers"]
    columns = {"problem": [row["problem"]] * 2, "entry": [row["entry"]] * 2}
    completions = [f"<answer>{'+'.join(map(str, numbers))}</answer>", f"<answer>{row['answer']}</answer>"]
    assert gym.reward(None, completions, **columns) == [0.05, 1.0]
    assert gym.accuracy(None, completions, **columns) == [0.0, 1.0]


def test_a_grader_that_raises_or_hangs_scores_zero(monkeypatch):
    (row,) = gym.problems("lcm", 1, "hang")

    def hangs(answer, entry):
        while True:
            pass

    monkeypatch.setattr(gym_scoring, "SECONDS", 0.05)
    monkeypatch.setattr(gym_scoring, "_grader", lambda problem: hangs)
    assert gym_scoring.score(row["problem"], row["entry"], "1") == 0
    monkeypatch.setattr(gym_scoring, "_grader", lambda problem: lambda answer, entry: 1 / 0)
    assert gym_scoring.score(row["problem"], row["entry"], "1") == 0


def digest(rows) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def delicate_rows():
    return {name: digest(gym.problems(name, 3, "7/0")) for name in DELICATE}


def test_problems_are_the_same_in_every_process(monkeypatch):
    rows = delicate_rows()
    gym_problems._Process.of_this_run().stop()
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    assert delicate_rows() == rows


@pytest.mark.skipif(importlib.metadata.version("reasoning-gym") != "0.1.25", reason="other versions draw others")
def test_problems_are_those_of_earlier_versions_of_esfast():
    assert digest(tasks.get("gym:basic_arithmetic+2*lcm").train_rows(3, 6, 1)) == "711d2196bfe43867"


def test_rows_depend_on_seed_and_generation_and_begin_alike():
    task = tasks.get("gym:chain_sum")
    assert task.train_rows(2, 5, 0) == task.train_rows(2, 9, 0)[:5]
    drawn = [[r["prompt"] for r in task.train_rows(g, 8, s)] for g, s in ((0, 0), (1, 0), (0, 1))]
    assert len({p for prompts in drawn for p in prompts}) == 24
    fixed = tasks.get("gym:chain_sum", train_prompts=4)
    assert sorted(map(str, fixed.train_rows(0, 4, 0))) == sorted(map(str, fixed.train_rows(5, 4, 0)))
    assert fixed.train_rows(0, 4, 0) != fixed.train_rows(0, 4, 1)


@pytest.mark.parametrize("name", ["coin_flip", "basic_arithmetic?max_terms=2&max_digits=1", "arc_agi"])
def test_held_out_problems_are_never_trained_on(name):
    def sources(split, seeds):
        entries = [ast.literal_eval(r["entry"]) for s in seeds for r in gym.problems(name, 40, s, split)]
        return {e["metadata"].get("task_id", e["question"]) for e in entries}

    held_out, trained = sources("test", ["evaluation"]), sources("train", [f"0/{g}" for g in range(3)])
    assert len(held_out) >= 10 and len(trained) >= 30
    assert not held_out & trained


def test_a_task_of_few_problems_gives_what_there_is(caplog):
    spec = "basic_arithmetic?max_terms=2&max_digits=1&allow_parentheses=false&allow_negation=false&operators=%2B"
    rows = gym.problems(spec, 200, "few")
    assert 40 < len(rows) < 100 and len({r["prompt"] for r in rows}) == len(rows)
    assert f"{len(rows)} different problems instead of 200" in caplog.text


def test_mixtures_follow_their_weights():
    problems = Counter(row["problem"] for row in gym.problems("lcm?level=1+3*gcd", 200, "mix"))
    assert problems.keys() == {"lcm?level=1", "gcd"} and 120 < problems["gcd"] < 180


def test_prompts_of_each_style():
    text, compact = (tasks.get("gym:lcm", style).eval_rows(1)[0]["prompt"] for style in ("paper", "compact"))
    (message,) = tasks.get("gym:lcm", "chat").eval_rows(1)[0]["prompt"]
    assert "<answer> </answer>" in text and text.endswith("\n<think>")
    assert compact.endswith("\n<think>") and "<answer>" not in compact
    assert message["role"] == "user" and text == message["content"] + "\n<think>"
    with pytest.raises(ValueError, match="unknown prompt style 'other': expected one of paper, compact, chat"):
        gym.task("lcm", "other")


@pytest.mark.parametrize(
    "name, words",
    [
        ("countdwn", "unknown gym task 'countdwn'. Did you mean 'countdown'?"),
        ("composite", "gym:composite: tasks are mixed by their names: gym:A+2*B"),
        ("", "expected gym:NAME, gym:NAME?OPTION=VALUE"),
        ("lcm+", "expected gym:NAME, gym:NAME?OPTION=VALUE"),
        ("lcm+lcm", "gym:lcm+lcm names lcm twice; a weight, 2*lcm, asks for more"),
        ("0*lcm", "the weight of lcm: expected a positive number, got 0"),
        ("nan*lcm", "expected gym:NAME"),
        ("lcm?min_numbers", "gym:lcm: expected OPTION=VALUE after the question mark, got 'min_numbers'"),
        ("lcm?min_numbers=2&min_numbers=3", "gym:lcm: the option 'min_numbers' is given twice"),
        (
            "countdown?min_number=5",
            "gym:countdown: unknown option 'min_number'. Did you mean 'min_numbers'? It has: min_n",
        ),
        ("countdown?min_numbers=a", "gym:countdown: min_numbers: expected an int, got str 'a'"),
        ("countdown?min_numbers=2.5", "gym:countdown: min_numbers: expected an int, got float 2.5"),
        ("countdown?shuffle=maybe", "gym:countdown: shuffle: expected true or false"),
        (
            "countdown?min_numbers=5&max_numbers=3",
            "refuses min_numbers=5, max_numbers=3: max_numbers must be >= min_nu",
        ),
        ("countdown?seed=3", "'seed' is no option here: the run's --seed decides which problems come"),
        ("countdown?size=3", "'size' is no option here: problems are endless"),
        ("arc_agi?rotations=45", "reasoning-gym refuses rotations=45: Invalid rotation option: 45"),
        ("arc_agi?board_format_opts=3", "board_format_opts: its values can't be written in a task's name"),
        ("rearc?rng_difficulty_ranges=0.1", "rng_difficulty_ranges: its values can't be written in a task's name"),
        ("basic_arithmetic?format_style=odd", "format_style: expected one of simple, natural, got 'odd'"),
        (
            "word_sorting?transformation=odd",
            "transformation: expected one of lowercase, uppercase, original, randomcase",
        ),
        ("time_intervals?min_date=soon", "min_date: expected a date such as 2026-01-31 or 13:45, got 'soon'"),
        ("lcm?level=99", "gym:lcm: level: expected 0 to 3, got 99"),
        ("gsm_symbolic?level=1", "gym:gsm_symbolic: reasoning-gym has no curriculum for it, so there are no levels"),
    ],
)
def test_errors_name_what_is_wrong(name, words):
    with pytest.raises(EsfastError) as caught:
        tasks.get(f"gym:{name}")
    assert words in str(caught.value)
    assert isinstance(caught.value, (ValueError, TypeError))


def test_options_of_every_form():
    lists = "basic_arithmetic?operators=%2B,-&format_style=natural&allow_parentheses=no"
    assert all(row["answer"] for row in gym.problems(lists, 3, "lists"))
    assert gym.problems("arc_agi?rotations=&mirrors=&use_color_permutation=false", 1, "none")
    assert gym.problems("word_sorting?transformation=uppercase", 1, "enum")[0]["answer"].isupper()
    assert gym.problems("time_intervals?min_date=2026-01-01&max_date=2026-02-01", 1, "dates")


def test_options_without_a_problem_are_refused(monkeypatch):
    monkeypatch.setattr(gym_problems, "FRUITLESS", 3)
    parts = gym_options.parse("countdown?min_numbers=2&max_numbers=2&min_value=1&max_value=2&min_target=900")
    with pytest.raises(ValueError, match="has no more: 3 draws in a row gave none.*raised"):
        list(gym_problems.problems(parts, 1, "0", "train"))


def test_a_search_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(gym_problems, "PATIENCE", 0.001)
    with pytest.raises(ValueError, match="gym:futoshiki gave no problem in 0.001 s"):
        gym.problems("futoshiki", 1, "slow")
    monkeypatch.undo()
    assert len(gym.problems("lcm", 1, "next")) == 1


def test_a_process_that_dies_is_said(monkeypatch):
    running = gym_problems._Process.of_this_run()
    monkeypatch.setattr(
        running, "_exchange", lambda request: running._process.kill() or running._connection.recv_bytes()
    )
    with pytest.raises(ValueError, match="the process that makes problems of gym:lcm ended \\(status -9\\)"):
        gym.problems("lcm", 1, "dead")
    assert len(gym.problems("lcm", 1, "next")) == 1


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(gym_options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package reasoning-gym: pip install 'esfast\[gym\]'"):
        tasks.get("gym:lcm")


def test_data_files_are_refused():
    with pytest.raises(ValueError, match="data: gym:lcm makes its own problems"):
        tasks.get("gym:lcm", data="x.jsonl")


def test_global_generators_and_stdout_are_left_alone(capfd):
    import random

    import numpy as np

    before = random.getstate(), np.random.get_state()[1].tolist()
    gym.problems("pool_matrix+bf", 4, "global")
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert capfd.readouterr().out == ""
