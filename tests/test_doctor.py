"""The doctor: each illness that a run can show in its metrics is named, with what to change; healthy runs are not."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from esfast import ESConfig, ESTrainer, cli
from esfast.report import load, page
from esfast.tasks import GAMES, MODULES, embedded
from esfast.trainer.doctor import RULES, WINDOW, Doctor, diagnose
from esfast.trainer.run_folder import RunFolder

TOKENIZER = embedded.make_tokenizer()
CONFIG = {"generations": 200, "population_size": 30, "max_completion_length": 64, "eval_prompts": 500}


def run_of(training=None, evaluations=None, generations=20, every=10):
    """Metrics of a healthy run that learns slowly; `training` and `evaluations` are what differs: values, or functions
    of the generation."""

    def value(x, g):
        return x(g) if callable(x) else x

    rows = []
    for g in range(generations + 1):
        mean = 0.3 + 0.01 * g
        row = {"generation": g}
        if g:
            row |= {"reward_mean": mean, "reward_max": mean + 0.1, "reward_min": mean - 0.1, "reward_std": 0.05}
            row |= {"same_reward": 0.1, "update_kept": 0.99, "sigma": 0.01, "lr": 0.005, "response_tokens": 20.0}
            row |= {name: value(x, g) for name, x in (training or {}).items()}
        if g % every == 0:
            row |= {"eval_reward": mean, "eval_reward_se": 0.02, "eval_accuracy": mean, "eval_length": 50.0}
            row |= {name: value(x, g) for name, x in (evaluations or {}).items()}
        rows.append(row)
    return rows


# What is planted, the name under which it is found, and what the advice must speak of.
STILL = {"reward_mean": 0.3, "reward_max": 0.35, "reward_min": 0.25, "reward_std": 0.02}
FLAT = {"reward_mean": 0.0, "reward_max": 0.0, "reward_min": 0.0, "reward_std": 0.0, "same_reward": 1.0}
EVEN = {"eval_reward": 0.3}
ILL = {
    "every reward is zero": (
        run_of({**FLAT}, {"eval_reward": 0.0, "eval_reward_se": 0.0, "eval_accuracy": 0.0}),
        "nothing to learn from",
        "part marks",
    ),
    "sigma so small that all are equal": (
        run_of({"reward_mean": 0.3, "reward_max": 0.3, "reward_min": 0.3, "reward_std": 0.0, "same_reward": 1.0}, EVEN),
        "members answer alike",
        "Raise sigma, to 0.04",
    ),
    "sigma so small that most are equal": (
        run_of(
            {"reward_mean": 0.3, "reward_max": 0.31, "reward_min": 0.29, "reward_std": 3e-3, "same_reward": 0.85}, EVEN
        ),
        "members answer alike",
        "Raise sigma",
    ),
    "sigma so large that members are broken": (
        run_of({"reward_mean": 0.01, "reward_max": 0.05, "reward_min": 0.0, "reward_std": 0.01}),
        "members are broken",
        "Lower sigma, to 0.0025",
    ),
    "updates below the steps of bfloat16": (run_of({"update_kept": 0.02}), "updates rounded away", "weights='master'"),
    "lr too large": (
        run_of({"reward_mean": lambda g: 0.3 + 0.05 * (-1) ** g}, {"eval_reward": lambda g: 0.3 - 0.01 * g}),
        "steps too long",
        "Lower lr, to 0.0017",
    ),
    "gained and lost again": (
        run_of({"reward_mean": 0.3, "reward_max": 0.5}, {"eval_reward": lambda g: {0: 0.3, 10: 0.5}.get(g, 0.35)}),
        "steps too long",
        "best/",
    ),
    "few training prompts": (run_of({}, {"eval_reward": lambda g: 0.3 - 0.01 * g}), "overfitting", "Take more of them"),
    "the length limit": (run_of({"response_tokens": 63.9}), "responses cut off", "Raise max_completion_length"),
    "a reward that pays for wrong answers": (
        run_of({}, {"eval_accuracy": lambda g: 0.4 - 0.015 * g}),
        "reward gamed",
        "samples.jsonl",
    ),
    "another language": (
        run_of({}, {"eval_kl_to_base": lambda g: 0.3 * g}),
        "far from the base model",
        "decay_to='initial'",
    ),
    "a reward function that raises": (run_of({"set_aside": 6}), "rewards fail", "Mend the reward"),
    "one member that is right by luck": (
        # one member of 30 has 0.29 more than all others
        run_of({"reward_max": lambda g: 0.58 + 0.01 * g, "reward_std": 0.052, "same_reward": 29 / 30}),
        "one member dominates",
        "centered_rank",
    ),
    "steps too short": (run_of(STILL, {"eval_reward": 0.3}, generations=60), "no progress", "if it did, raise them"),
    "nothing is said any more": (
        run_of({}, {"eval_length": lambda g: 50.0 if not g else 0.0}),
        "empty responses",
        "Lower lr",
    ),
}


@pytest.mark.parametrize("planted", ILL)
def test_an_illness_is_named_once_and_alone(planted):
    rows, name, advice = ILL[planted]
    found = diagnose(rows, CONFIG)
    assert [f.name for f in found] == [name] and advice in found[0].text
    # not before it can be known, and with the generation at which it was
    assert 0 < found[0].generation <= 60 and "\n" not in found[0].text


def test_every_rule_has_its_illness():
    assert {name for _, name, _ in ILL.values()} == set(RULES)


def test_a_run_that_learns_has_none():
    assert diagnose(run_of(), CONFIG) == []


@pytest.mark.parametrize("planted", ILL)
def test_no_illness_from_fewer_generations_than_the_window(planted):
    rows, _, _ = ILL[planted]
    doctor = Doctor(CONFIG)
    first = [f.name for row in rows[:WINDOW] for f in doctor(row)]
    assert first == []


@pytest.mark.parametrize(("lr", "advice"), [(0.006, "Lower lr, to 0.002 for example, or"), (None, "Lower lr, or")])
def test_advice_of_a_run_of_two_generations_has_a_number_or_none(lr, advice):
    rows = run_of({"lr": lr}, generations=2, every=1)
    rows[-1]["eval_reward"] = -1.0
    (found,) = diagnose(rows, CONFIG)
    assert found.name == "steps too long" and advice in found.text


def test_episodes_of_several_responses_are_longer_than_the_limit():
    assert diagnose(run_of({"response_tokens": 130.0}), CONFIG) == []


def test_a_run_that_has_learned_all_there_is_is_not_ill():
    rows = run_of({}, {"eval_reward": lambda g: 0.3 + 0.01 * g if g < 30 else 1.0}, generations=40)
    for row in rows[30:]:
        row |= {"reward_mean": 1.0, "reward_max": 1.0, "reward_min": 1.0, "reward_std": 0.0, "same_reward": 1.0}
        row |= {**({"eval_reward_se": 0.0} if "eval_reward" in row else {})}
    assert diagnose(rows, CONFIG) == []


@pytest.mark.parametrize("broken", [None, "high", math.nan, math.inf, True, [0.5]])
def test_rows_of_any_kind_are_read(broken):
    rows = [{name: broken for name in row} for row in run_of()]
    assert diagnose(rows, CONFIG) == [] and diagnose(run_of(), dict.fromkeys(CONFIG, broken)) == []
    assert diagnose([{}] * 9, {}) == []


# ---- real runs -------------------------------------------------------------------------------------------------------


def train(folder, dtype=torch.float32, **settings):
    """A real run of an untrained model, which never ends its answers."""
    torch.manual_seed(0)
    net, rows = embedded.make_model(TOKENIZER).eval().to(dtype), [{"prompt": f"{i}="} for i in range(4)]
    given = {"output_dir": str(folder), "generations": 6, "population_size": 4, "sigma": 0.05, "lr": 0.05}
    given |= {"prompts_per_generation": 4, "max_completion_length": 6, "eval_every": 3, "progress": False}
    trainer = ESTrainer(net, varied, ESConfig(**{**given, **settings}), rows, rows, TOKENIZER)
    trainer.train()
    return trainer.folder


def varied(prompts, completions, **columns):
    return [float(sum(map(ord, prompt + text)) % 11) for prompt, text in zip(prompts, completions, strict=True)]


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "esfast.trainer.recorder"]


def test_a_run_says_it_in_its_log_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "esfast"):
        folder = train(tmp_path / "run", sigma=1e-7)
    first, second = said(caplog)
    assert first.startswith(f"generation {WINDOW}: members answer alike") and "cut off at the limit of 6 tok" in second
    # a resumed run has no need to say it again
    caplog.clear()
    train(folder.path, sigma=1e-7, generations=8, resume=True)
    assert said(caplog) == []


def test_updates_that_bfloat16_rounds_away(tmp_path, caplog):
    train(tmp_path / "run", torch.bfloat16, lr=1e-9)
    assert any("left after rounding to the weights' 16 bits" in text for text in said(caplog))


def test_what_a_run_folder_of_an_older_version_shows(tmp_path, capsys):
    folder = train(tmp_path / "run", sigma=1e-7)
    rows = folder.read_metrics()
    assert rows[1]["same_reward"] == 1.0 and rows[1]["response_tokens"] == 6.0
    folder.write_metrics([{k: v for k, v in row.items() if k != "same_reward"} for row in rows])
    assert load(folder.path).metrics == [{k: v for k, v in row.items()} for row in rows]
    assert cli.main(["report", "--diagnose", str(folder.path)]) == 0
    out = capsys.readouterr().out
    assert "6 generations, found:" in out and f"  generation {WINDOW}: members answer alike" in out
    assert not Path("report.html").exists()
    text = page([load(folder.path)])
    # before everything that needs scrolling
    assert text.index("members answer alike") < text.index("<h2>Curves")
    healthy = RunFolder(tmp_path / "healthy")
    healthy.write_metrics(run_of())
    assert cli.main(["report", "--diagnose", str(healthy.path)]) == 0
    assert "20 generations, nothing is wrong" in capsys.readouterr().out and "What is wrong" not in page(
        [load(healthy.path)]
    )


@pytest.mark.parametrize("rows", [[], [{"generation": 0, "eval_reward": 0.1}], run_of(generations=WINDOW - 1)])
def test_a_run_of_few_generations_is_not_called_healthy(tmp_path, capsys, rows):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_metrics(rows)
    assert cli.main(["report", "--diagnose", str(folder.path)]) == 0
    out = capsys.readouterr().out
    assert f"{max(0, len(rows) - 1)} generations, fewer than the {WINDOW} that a diagnosis needs" in out


def damaged(path, what):
    """A run folder of which something is missing or damaged."""
    folder = RunFolder(path)
    folder.path.mkdir()
    folder.write_metrics(run_of({"update_kept": 0.02}))
    text = folder.metrics.read_text()
    if what == "a torn last line":
        folder.metrics.write_text(text[:-9])
    if what == "a foreign metric":
        rows = [{**row, "generation": "seven", "reward_min": {}, "step": None} for row in run_of()]
        folder.write_metrics(rows)
    if what == "a damaged line":
        folder.metrics.write_text("{}\nnonsense\n" + text)
    if what == "a list in a line":
        folder.metrics.write_text("[1, 2]\n" + text)
    if what == "no text":
        folder.metrics.write_bytes(b"\xff\xfe\x00" + text.encode())
    if what == "another config":
        folder.config.write_text("- a list\n")
    if what == "another journal":
        folder.journal.write_text("nonsense\n")
    if what == "no metrics":
        folder.metrics.unlink()
    return folder.path


@pytest.mark.parametrize(
    ("what", "status", "words"),
    [
        ("a torn last line", 0, "updates are lost"),
        ("a foreign metric", 0, "nothing is wrong"),
        ("a damaged line", 1, "line 2 is damaged"),
        ("a list in a line", 1, "line 1 is damaged"),
        ("no text", 1, "line 1 is damaged"),
        ("another config", 1, "expected lines of the form NAME: VALUE"),
        ("another journal", 1, "journal.jsonl"),
        ("no metrics", 1, "is no run folder"),
        ("no folder", 1, "is no run folder"),
    ],
)
def test_what_is_no_whole_run_is_read_as_far_as_it_goes_or_refused_in_words(tmp_path, capsys, what, status, words):
    path = tmp_path / "nowhere" if what == "no folder" else damaged(tmp_path / "run", what)
    before = sorted((p.name, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())
    assert cli.main(["report", "--diagnose", str(path)]) == status
    out, err = capsys.readouterr()
    assert words in (err if status else out) and "Traceback" not in err
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file()) == before


def test_healthy_runs_have_none():
    """Recorded metrics of runs that learned: tasks, kinds of noise, and sigma and lr that were found."""
    recorded = json.loads((Path(__file__).parent / "fixtures" / "healthy.json").read_text(encoding="utf-8"))
    # every recipe of the embedded model among them
    assert {name.partition(",")[0] for name in recorded} >= {*MODULES, *GAMES, "gym:spell_backward"}
    for name, run in recorded.items():
        evaluated = [row["eval_reward"] for row in run["rows"] if "eval_reward" in row]
        assert len(run["rows"]) > 2 * WINDOW and evaluated[-1] > evaluated[0], name
        assert diagnose(run["rows"], run["config"]) == [], name


def test_a_recorded_run_whose_members_answered_alike():
    """The first generations of gym:spell_backward with sigma 0.01; with 0.03 it learned."""
    same = [0.9, 0.9333, 0.9333, 0.9, 0.8333, 0.8333, 0.9333]
    means, highest = (
        [0.296, 0.187, 0.281, 0.237, 0.219, 0.268, 0.268],
        [0.297, 0.188, 0.281, 0.297, 0.234, 0.344, 0.297],
    )
    rows = [{"generation": 0, "eval_reward": 0.226, "eval_reward_se": 0.019}]
    for g, (share, mean, high) in enumerate(zip(same, means, highest, strict=True), start=1):
        rows.append({"generation": g, "reward_mean": mean, "reward_max": high, "reward_min": mean - 0.005})
        rows[-1] |= {"reward_std": 0.003, "same_reward": share, "sigma": 0.01, "lr": 0.01, "update_kept": 1.0}
    (found,) = diagnose(rows, CONFIG)
    assert found.name == "members answer alike" and "Raise sigma, to 0.04" in found.text
