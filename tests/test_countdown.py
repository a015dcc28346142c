import ast
import random
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esfast import tasks
from esfast.tasks import countdown


def tagged(answer):
    return f"</think>\n<answer>{answer}</answer>"


# answer, numbers, target, whether it earns the point; checked by hand
ANSWERS = [
    # plain arithmetic, precedence, parentheses, spaces
    ("1+2", [1, 2], 3, True),
    ("2+1", [1, 2], 3, True),
    ("1+2", [1, 2], 4, False),
    ("7", [7], 7, True),
    ("2+3*4", [2, 3, 4], 14, True),
    ("2+3*4", [2, 3, 4], 20, False),
    ("(2+3)*4", [2, 3, 4], 20, True),
    ("10-4-3", [3, 4, 10], 3, True),
    ("10-(4-3)", [3, 4, 10], 9, True),
    ("24/4/2", [2, 4, 24], 3, True),
    ("24/(4/2)", [2, 4, 24], 12, True),
    ("8-6/2", [2, 6, 8], 5, True),
    ("  ( 1 + 2 ) * 3 ", [1, 2, 3], 9, True),
    ("(((1+(2))))*((3))", [1, 2, 3], 9, True),
    ("((1+2)*(3+4))/7", [1, 2, 3, 4, 7], 3, True),
    ("6/(1-3/4)", [1, 3, 4, 6], 24, True),
    ("8/(3-8/3)", [3, 3, 8, 8], 24, True),
    ("44+19+35", [44, 19, 35], 98, True),
    ("100000*100000", [100000, 100000], 10**10, True),
    ("0*5+3", [0, 3, 5], 3, True),
    ("00+3", [0, 3], 3, True),  # Python reads 00 as 0
    # unary signs
    ("-1+3", [1, 3], 2, True),
    ("+3-1", [1, 3], 2, True),
    ("3--1", [1, 3], 4, True),
    ("3-+-1", [1, 3], 4, True),
    ("3*-2", [2, 3], -6, True),
    ("-2*-3", [2, 3], 6, True),
    ("-(1-3)", [1, 3], 2, True),
    ("6/-2", [2, 6], -3, True),
    ("- - 5", [5], 5, True),
    # what is no expression
    ("", [], 0, False),
    ("", [1], 1, False),
    (" ", [1], 1, False),
    ("()", [1], 1, False),
    ("3-", [3], 3, False),
    ("*3", [3], 3, False),
    ("3 4", [3, 4], 34, False),
    ("3 4", [3, 4], 7, False),
    ("2(3)", [2, 3], 6, False),
    ("(2)(3)", [2, 3], 6, False),
    ("(2)3", [2, 3], 6, False),
    ("(1+2", [1, 2], 3, False),
    ("1+2)", [1, 2], 3, False),
    (")1+2(", [1, 2], 3, False),
    ("03+4", [3, 4], 7, False),
    ("2**3", [2, 3], 8, False),
    ("2* *3", [2, 3], 6, False),
    ("7//2", [2, 7], 3, False),
    ("7/ /2", [2, 7], 3.5, False),
    # characters beyond digits, + - * / ( ) and spaces
    ("1+2=3", [1, 2, 3], 3, False),
    ("1+2=3", [1, 2], 3, False),
    ("1.0+2", [1, 0, 2], 3, False),
    ("1+2\n", [1, 2], 3, True),  # white space around an answer doesn't count
    ("\n  (1+2)*3\n", [1, 2, 3], 9, True),
    ("\t1+2\r\n", [1, 2], 3, True),
    ("\u00a01+2\u2028", [1, 2], 3, True),
    (" " * 2000 + "1+2", [1, 2], 3, True),
    (" \n ", [1], 1, False),
    ("1\t+2", [1, 2], 3, False),  # inside it, spaces alone are allowed
    ("1\n+2", [1, 2], 3, False),
    ("1e1", [1, 1], 10, False),
    ("1_0", [10], 10, False),
    ("5%3", [3, 5], 2, False),
    ("abs(3)", [3], 3, False),
    ("\u0663+\u0664", [3, 4], 7, False),  # digits to str.isdigit, not to the task
    ("3\u00d74", [3, 4], 12, False),
    # division by zero
    ("1/0", [0, 1], 0, False),
    ("5/(3-3)", [3, 3, 5], 0, False),
    ("0/(2-2)", [0, 2, 2], 0, False),
    ("0/5", [0, 5], 0, True),
    # the numbers: each exactly once
    ("3+4", [3, 4, 5], 7, False),
    ("3+4+5", [3, 4], 12, False),
    ("3+3", [3], 6, False),
    ("3+3", [3, 3], 6, True),
    ("3*4", [3, 3, 4], 12, False),
    ("34", [3, 4], 34, False),
    ("3+5", [3, 4], 8, False),
    ("12", [1, 2], 12, False),
    # targets that are no integers
    ("7/2", [2, 7], 3.5, True),
    ("1/3", [1, 3], 0.33333, True),  # off by 3.3e-6
    ("1/3", [1, 3], 0.3333, False),  # off by 3.3e-5
    ("1/3", [1, 3], 1 / 3, True),
    ("2/3", [2, 3], 0.666667, True),
    ("3", [3], 3.000009, True),
    ("3", [3], 3.000011, False),
    # values and texts out of all proportion
    ("9**9**9", [9, 9, 9], 9, False),
    ("9" * 400, [9], 9, False),
    ("1" + " " * 2000 + "+2", [1, 2], 3, False),
]


@pytest.mark.parametrize("answer, numbers, target, correct", ANSWERS)
def test_answer(answer, numbers, target, correct):
    assert countdown.answer_score(tagged(answer), numbers, target) == float(correct)
    assert countdown.is_correct(tagged(answer), numbers, target) is correct
    assert countdown.score(tagged(answer), numbers, target) == pytest.approx(0.1 + correct)


# completion after "<think>", format score, answer score for the numbers 1, 2 and the target 3
RESPONSES = [
    ("why</think>\n<answer>1+2</answer>", 1.0, 1),
    ("</think>\n<answer>1+2</answer>", 1.0, 1),
    ("a\nb</think>\n<answer>9</answer>", 1.0, 0),
    ("</think>\n<answer></answer>", 1.0, 0),
    ("a</think>b</think>\n<answer>1+2</answer>", 1.0, 1),
    ("a</think><answer>1+2</answer>", 0.6, 1),  # no newline between
    ("a</think> \n<answer>1+2</answer>", 0.6, 1),
    ("a</think>\n\n<answer>1+2</answer>", 0.6, 1),
    ("a</think>\n<answer>1+2</answer>.", 0.6, 1),  # something after
    ("a</think>\n<answer>1+2</answer>\n", 1.0, 1),  # a last newline is nothing
    ("a</think>\n<answer>1+2</answer>\n\n", 0.6, 1),
    ("a</think>\n<answer>1+2</answer> ", 0.6, 1),
    ("a</think>\n<answer>1+2", 0.1, 0),  # unclosed
    ("a</think>\n<answer>1+2<answer>", 0.1, 0),
    ("a</think>\n<answer>", 0.1, 0),
    ("a</think>\n1+2</answer>", 0.1, 0),  # never opened
    ("a</think>\n</answer>", 0.1, 0),
    ("a</think>\n</answer>1+2<answer>", 0.1, 0),
    ("a</think>", 0.1, 0),
    ("a\n<answer>1+2</answer>", 0.5, 1),  # never finished thinking
    ("1+2", 0.0, 0),
    ("", 0.0, 0),
    ("<think>", 0.0, 0),
    ("</THINK>\n<ANSWER>1+2</ANSWER>", 0.0, 0),
    # several answers: the last one counts, and all is one answer to the strict format
    ("</think>\n<answer>9</answer> <answer>1+2</answer>", 1.0, 1),
    ("</think>\n<answer>1+2</answer> <answer>9</answer>", 1.0, 0),
    ("<answer>9</answer></think>\n<answer>1+2</answer>", 1.0, 1),
    ("</think><answer>9</answer><answer>1+2</answer>", 0.6, 1),
    ("</think>\n<answer>1+2</answer><answer>9", 0.6, 1),  # the last closed one
    ("</think>\n<answer>1+2</answer></answer>", 1.0, 1),
    ("</think>\n<answer>9<answer>1+2</answer>", 1.0, 0),  # an answer begins at its first opening
    ("</answer><answer>9</answer></answer><answer>x<answer>1+2</answer><answer>", 0.5, 0),
]


@pytest.mark.parametrize("completion, form, answer", RESPONSES)
def test_response(completion, form, answer):
    assert countdown.format_score(completion) == pytest.approx(form)
    assert countdown.answer_score(completion, [1, 2], 3) == answer
    assert countdown.score(completion, [1, 2], 3) == pytest.approx(0.1 * form + answer)


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "</think>\n", "1", "+"]), max_size=12).map("".join))
@settings(max_examples=300, deadline=None)
def test_last_answer_is_the_last_of_all_pairs_matched_from_the_left(text):
    pairs, position = [], 0
    while (start := text.find("<answer>", position)) >= 0 and (end := text.find("</answer>", start)) >= 0:
        pairs.append(text[start + len("<answer>") : end])
        position = end + len("</answer>")
    assert countdown.last_answer(text) == (pairs[-1] if pairs else None)


@given(
    st.text("012 34+-*/()", max_size=12) | st.lists(st.sampled_from("7 5 (2-9) 0 + - - * / ( )".split())).map("".join)
)
@settings(max_examples=1000, deadline=None)
def test_evaluate_agrees_with_python_on_fractions(expression):
    try:
        ast.parse(expression.strip(), mode="eval")
        exact = re.sub("([0-9]+)", r"Fraction(\1)", expression.strip())
        if "**" in exact.replace(" ", "") or "//" in exact.replace(" ", ""):
            raise SyntaxError("two more operators of Python's, not of the task's")
        expected = eval(exact, {"Fraction": Fraction})
        if not isinstance(expected, Fraction):
            raise TypeError("() is a tuple")
    except (SyntaxError, TypeError):  # TypeError: a number is called, 2(3), or () is in the way
        with pytest.raises((ValueError, ZeroDivisionError)):  # whichever error is read first: 1/0/
            countdown.evaluate(expression)
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            countdown.evaluate(expression)
    else:
        assert countdown.evaluate(expression) == expected


HOSTILE = {
    "tower of powers": tagged("9**9**9"),
    "open parentheses": tagged("(" * 10**5),
    "nested parentheses": tagged("(" * 10**5 + "9" + ")" * 10**5),
    "deepest that is read": tagged("(" * 495 + "9+9+9" + ")" * 495),
    "signs": tagged("-" * 10**5 + "9"),
    "digits": tagged("9" * 10**6),
    "digits among the numbers": tagged("9+9+" + "9" * 900),
    "spaces": tagged(" " * 10**6),
    "opened answers": "<answer>" * 125_000,
    "opened answers, one closed": "<answer>" * 125_000 + "</answer>",
    "closed answers": "</answer>" * 125_000,
    "pairs": "<answer></answer>" * 60_000,
    "opened thoughts": "<think>" * 150_000,
    "closed thoughts": "</think>\n" * 120_000,
    "almost answers": "<answer" * 150_000 + "</answe" * 150_000,
    "brackets": "<" * 10**6,
    "a long text": "</think>\n<answer>" + "lorem ipsum " * 400_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_score_nothing_and_cost_nothing(name, cpu_seconds):
    def scored():
        assert countdown.answer_score(HOSTILE[name], [9, 9, 9], 9) == 0.0
        assert countdown.format_score(HOSTILE[name]) in (0.0, 0.1, 0.5, 0.6, 1.0)

    assert cpu_seconds(scored) < 0.05


def test_evaluate_errors():
    for expression in ["", "1+", "2(3)", "(1", "1)", "03", "1 2", "a", "1" * 1001]:
        with pytest.raises(ValueError):
            countdown.evaluate(expression)
    with pytest.raises(ZeroDivisionError):
        countdown.evaluate("1/(1-1)")
    assert countdown.evaluate("1/3-2") == Fraction(-5, 3)


def test_malformed_problems_are_refused():
    with pytest.raises(TypeError, match="completion"):
        countdown.score(None, [1], 1)
    with pytest.raises(ValueError, match="whole"):
        countdown.score("x", [1.5], 1)
    with pytest.raises(ValueError, match="finite"):
        countdown.score("x", [1], float("nan"))
    with pytest.raises(TypeError, match="'numbers' .or 'nums'. and 'target'"):
        countdown.reward([""], ["x"], target=[1])


def test_reward_takes_columns_as_trl_passes_them():
    texts = [tagged("1+2"), tagged("4"), "no"]
    columns = {"numbers": [[1, 2], [3], [1, 2]], "target": [3, 3, 3], "solution": ["", "", ""], "trainer_state": None}
    assert countdown.reward(prompts=["p"] * 3, completions=texts, **columns) == pytest.approx([1.1, 0.1, 0.0])
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert countdown.reward(prompts=["p"] * 3, completions=chats, **columns) == pytest.approx([1.1, 0.1, 0.0])
    with pytest.raises(ValueError):
        countdown.reward(prompts=["p"] * 3, completions=texts, numbers=[[1]], target=[1])


@pytest.mark.parametrize("style", ["paper", "compact"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_problems_are_solvable_and_of_their_split(style, split):
    game = countdown.GAMES[style]
    rows = countdown.problems(100, 3, split, style)
    assert len({(tuple(sorted(row["numbers"])), row["target"]) for row in rows}) == 100
    for row in rows:
        assert countdown.answer_score(tagged(row["solution"]), row["numbers"], row["target"]) == 1.0
        assert len(row["numbers"]) == game["count_of_numbers"]
        assert all(game["low"] <= n <= game["high"] for n in row["numbers"])
        assert isinstance(row["target"], int) and 1 <= row["target"] <= 100
        assert row["prompt"].endswith("<think>") and str(row["target"]) in row["prompt"]
        assert countdown.split_of(row["numbers"], row["target"]) == split


def test_splits_never_meet_whatever_the_seed():
    def keys(split):
        return {
            (tuple(sorted(row["numbers"])), row["target"])
            for seed in range(8)
            for row in countdown.problems(300, seed, split, "compact")
        }

    train, test = keys("train"), keys("test")
    assert len(train) > 1000 and len(test) > 450
    assert not train & test


def test_split_is_a_fixed_property_of_the_problem():
    # Written down, since a change would let models trained before meet their training problems as held-out ones.
    rng = random.Random(0)
    drawn = [([rng.randint(1, 9) for _ in range(3)], rng.randint(1, 99)) for _ in range(2000)]
    splits = [countdown.split_of(*problem) for problem in drawn]
    assert splits == [countdown.split_of(numbers[::-1], float(target)) for numbers, target in drawn]
    assert 0.22 < splits.count("test") / 2000 < 0.28
    assert [countdown.split_of([1, 2, 3], target) for target in range(1, 13)] == FIRST_SPLITS


FIRST_SPLITS = ["test" if target in (1, 7, 12) else "train" for target in range(1, 13)]


def test_problems_are_deterministic_and_seeds_differ():
    first = countdown.problems(50, 1, style="compact")
    assert first == countdown.problems(50, 1, style="compact")
    assert first[:20] == countdown.problems(20, 1, style="compact")
    assert first != countdown.problems(50, 2, style="compact")
    assert first != countdown.problems(50, "1/0", style="compact")


def test_problems_options():
    rows = countdown.problems(30, 0, count_of_numbers=2, low=5, high=12, targets=(-3, 40))
    assert all(len(row["numbers"]) == 2 and -3 <= row["target"] <= 40 for row in rows)
    broken = countdown.problems(60, 0, style="compact", integer_target=False)
    assert any(isinstance(row["target"], float) for row in broken)
    assert all(countdown.is_correct(tagged(row["solution"]), row["numbers"], row["target"]) for row in broken)
    first = countdown.problems(40, 0, style="compact")
    others = countdown.problems(40, 0, style="compact", exclude=[(r["numbers"][::-1], r["target"]) for r in first])
    assert not {(*sorted(r["numbers"]), r["target"]) for r in first} & {
        (*sorted(r["numbers"]), r["target"]) for r in others
    }
    assert countdown.problems(0, 0) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "dev"}, "'train' or 'test'"),
        ({"style": "papper"}, "paper, compact"),
        ({"count": -1}, "count"),
        ({"low": 9, "high": 3}, "low"),
        ({"low": -2}, "low"),
        ({"count_of_numbers": 0}, "count_of_numbers"),
        ({"targets": (5, 1)}, "targets"),
        ({"count": 200, "count_of_numbers": 1, "high": 9}, "ask for fewer"),
    ],
)
def test_problems_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        countdown.problems(**{"count": 5, "seed": 0, **arguments})


def test_registry():
    task = tasks.get("countdown", style="compact")
    rows = task.train_rows(3, 10, 7)
    assert rows == task.train_rows(3, 10, 7) and rows != task.train_rows(4, 10, 7) and rows != task.train_rows(3, 10, 8)
    held_out = task.eval_rows(20)
    assert all(countdown.split_of(row["numbers"], row["target"]) == "test" for row in held_out)
    columns = {key: [row[key] for row in held_out[:2]] for key in ("numbers", "target", "solution")}
    completions = [tagged(held_out[0]["solution"]), ""]
    assert task.accuracy(prompts=["", ""], completions=completions, **columns) == [1.0, 0.0]
    assert [f(prompts=["", ""], completions=completions, **columns) for f in task.reward_funcs] == [[1.1, 0.0]]
    assert task.max_new_tokens == 16 and tasks.get("countdown").max_new_tokens == 1024
    with pytest.raises(
        ValueError, match="Did you mean 'countdown'.*Known tasks: MODULE:FUNCTION, conciseness, countdown"
    ):
        tasks.get("countdwn")
    with pytest.raises(ValueError, match="Known tasks"):
        tasks.get("")
    with pytest.raises(ValueError, match="style"):
        tasks.get("countdown", style="long")
