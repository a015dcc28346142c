"""`esfast bench tune`: its ways differ in sigma and lr alone, at equal budget; its table compares gains."""

import argparse
import json

import pytest

from esfast.bench import BenchmarkError, tune
from esfast.tasks import embedded
from esfast.trainer.search import ENOUGH
from esfast.trainer.tuning import BUDGET, LEAST_PROMPTS, TRIALS


def options(*words):
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(words)


def test_ways_differ_in_sigma_and_lr_alone_at_equal_budget():
    jobs = tune.jobs(options("--seeds", "0", "4", "--tasks", "conciseness"))
    assert [(j["seed"], j["chosen"]) for j in jobs] == [(s, way) for s in (0, 4) for way in tune.WAYS]
    recipe = embedded.settings("conciseness")
    by = {j["chosen"]: j for j in jobs}
    assert (by["by hand"]["sigma"], by["by hand"]["lr"]) == (recipe["sigma"], recipe["lr"])
    assert by["ten times"]["sigma"] == pytest.approx(10 * recipe["sigma"])
    assert by["a tenth"]["lr"] == pytest.approx(recipe["lr"] / 10)
    for way in ("auto", "auto, one sigma"):
        assert (by[way]["sigma"], by[way]["lr"]) == ("auto", "auto")
        # the search takes at most what auto trains less
        assert by[way]["generations"] <= 0.95 * recipe["generations"] < by[way]["generations"] + 1
    assert {way: job["groups"] for way, job in by.items() if "groups" in job} == {"auto, one sigma": "*:sigma=1"}
    assert {j["generations"] for j in jobs if "auto" not in j["chosen"]} == {recipe["generations"]}
    assert len({j["way"]["name"] for j in jobs}) == len(tune.WAYS)


def test_runs_are_long_enough_for_a_whole_search():
    """With fewer responses `auto` would be a guess, which is not what is measured."""
    for job in tune.jobs(options("--seeds", "0", "--ways", "auto")):
        recipe = embedded.settings(tune.TASKS[job["task"]])
        responses = job["generations"] * recipe["population_size"] * recipe["prompts_per_generation"]
        assert BUDGET * responses >= LEAST_PROMPTS * (ENOUGH + TRIALS), job["task"]


def test_the_table_has_the_losers_and_what_a_gain_is_of_that_by_hand():
    def row(chosen, after, sigma, seed=0, searched=0.0):
        shared = {
            "task": "math",
            "generations": 95,
            "reward_before": 0.3,
            "lr": sigma / 2,
            "searched": searched,
            "seconds": 9.0,
        }
        return {**shared, "chosen": chosen, "seed": seed, "reward_after": after, "sigma": sigma}

    rows = [row("by hand", 0.5, 0.01), row("auto", 0.55, 0.02, 0, 0.04), row("auto", 0.45, 0.01, 1, 0.02)]
    headers, lines = tune.table({"rows": [row("a way of old", 0.4, 0.1), *rows, row("ten times", 0.1, 0.1)]})
    found = [dict(zip(headers, line, strict=True)) for line in lines]
    assert [f["sigma, lr"] for f in found] == ["by hand", "auto", "ten times", "a way of old"]
    # of a loss there is no part
    lost = [row("by hand", 0.2, 0.01), row("auto", 0.4, 0.01)]
    assert {line[headers.index("of the gain by hand")] for line in tune.table({"rows": lost})[1]} == {""}
    assert found[1]["of the gain by hand"] == "100%" and found[1]["sigma"] == "0.01 to 0.02"
    assert found[1]["search, of all responses"] == "3.0%" and found[2]["of the gain by hand"] == "-100%"


def test_the_members_beside_the_tuned_model():
    def row(task, seed, *accuracies):
        shared = {"task": task, "chosen": "by hand", "seed": seed, "reward_before": 0.25}
        return {**shared, "members": [{"reward": 0.5, "accuracy": a, "samples": 300} for a in accuracies]}

    rows = [row("math", 0, 0.4, 0.2, 0.3), row("math", 1, 0.6, 0.2, 0.3), row("none", 0, None, None, None)]
    headers, lines = tune.members_table({"rows": [*rows, {"task": "math", "chosen": "auto"}]})
    found = [dict(zip(headers, line, strict=True)) for line in lines]
    assert [(f["task"], f["measure"]) for f in found] == [("math", "reward"), ("math", "accuracy"), ("none", "reward")]
    assert found[1]["tuned model"] == "0.500 ± 0.141" and found[1]["best member"] == "0.200 ± 0.000"
    assert found[0]["before"] == "0.250" and found[2]["runs"] == "1"


def test_searches_alone(tmp_path, monkeypatch, capsys):
    """Those of the ways with "auto", for seeds of their own."""
    jobs = tune.searches(options("--seeds", "5", "--tasks", "sudoku", "math", "--searches", "2"))
    assert [(j["task"], j["chosen"], j["seed"]) for j in jobs] == [
        (task, way, seed) for seed in (0, 1) for task in ("sudoku", "math") for way in ("auto", "auto, one sigma")
    ]
    runs = tune.jobs(options("--seeds", "0", "1", "--tasks", "sudoku", "math"))
    assert not {j["way"]["name"] for j in jobs} & {j["way"]["name"] for j in runs}

    def main(words):
        assert words[0] == "tune" and words[words.index("--groups") + 1] == "*:sigma=1"
        print(json.dumps({"settings": {"sigma": 0.02, "lr": 0.01}, "learns": False, "why": ["so"]}))
        return 0

    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr("esfast.cli.main", main)
    row = tune.find(jobs[-1], tmp_path / "run")
    assert (row["sigma"], row["learns"], row["seed"]) == (0.02, False, 1) and not capsys.readouterr().out
    found = [row, {**row, "sigma": 0.04, "learns": True}]
    assert tune.searches_table({"rows": [], "searches": found})[1] == [
        ["math", "auto, one sigma", "2", "0.02 to 0.04", "0.01", "1"]
    ]
    # of a result that is older there is nothing to show
    assert tune.searches_table({"rows": []})[1] == []
    monkeypatch.setattr("esfast.cli.main", lambda words: 1)
    with pytest.raises(BenchmarkError, match="`esfast tune` of other failed with exit status 1"):
        tune.find(jobs[-1], tmp_path / "other")


def test_a_run_and_its_members(tmp_path, monkeypatch):
    """The commands that a run consists of, and what is read of their output."""
    called = []

    def call(what, command, environment):
        called.append(command)
        (tmp_path / "run").mkdir()
        summary = {"before": {"eval_reward": 0.1}, "after": {"eval_reward": 0.3}, "seconds": {"total": 2.0}}
        (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
        found = {"settings": {"sigma": 0.02, "lr": 0.01}, "responses": 40, "run": 1000, "why": ["so"]}
        (tmp_path / "run" / "tuning.json").write_text(json.dumps(found))

    monkeypatch.setattr(tune, "call", call)
    (job,) = tune.jobs(options("--seeds", "3", "--tasks", "spell_backward", "--ways", "auto, one sigma"))
    row = tune.train(job, tmp_path / "run")
    words = called[0]
    assert (
        words[words.index("--task") + 1].startswith("gym:spell_backward?") and words[words.index("--seed") + 1] == "3"
    )
    assert [words[words.index(o) + 1] for o in ("--sigma", "--lr", "--groups")] == ["auto", "auto", "*:sigma=1"]
    assert (row["task"], row["sigma"], row["searched"]) == ("spell_backward", 0.02, 0.04) and "members" not in row
    # a folder of a run that was cut short is no hindrance
    assert tune.train(job, tmp_path / "run")["reward_after"] == 0.3
