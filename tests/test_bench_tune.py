"""`esfast bench tune`: its ways differ in sigma and lr alone, at equal budget; its table compares gains."""

import argparse

import pytest

from esfast.bench import tune
from esfast.tasks import embedded


def options(*words):
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(words)


def test_ways_differ_in_sigma_and_lr_alone_at_equal_budget():
    jobs = tune.jobs(options("--seeds", "0", "4", "--tasks", "math"))
    assert [(j["seed"], j["chosen"]) for j in jobs] == [(s, way) for s in (0, 4) for way in tune.WAYS]
    recipe = embedded.settings("math")
    by = {j["chosen"]: j for j in jobs}
    assert (by["by hand"]["sigma"], by["by hand"]["lr"]) == (recipe["sigma"], recipe["lr"])
    assert by["ten times"]["sigma"] == pytest.approx(10 * recipe["sigma"])
    assert by["a tenth"]["lr"] == pytest.approx(recipe["lr"] / 10)
    assert (by["auto"]["sigma"], by["auto"]["lr"]) == ("auto", "auto")
    # the search takes at most what auto trains less
    assert by["auto"]["generations"] <= 0.95 * recipe["generations"] < by["auto"]["generations"] + 1
    assert {j["generations"] for j in jobs if j["chosen"] != "auto"} == {recipe["generations"]}
    assert len({j["way"]["name"] for j in jobs}) == len(tune.WAYS)


def test_the_table_has_the_losers_and_what_a_gain_is_of_that_by_hand():
    def row(chosen, after, sigma, seed=0, searched=0.0):
        shared = {"task": "math", "generations": 95, "reward_before": 0.3, "lr": sigma / 2, "searched": searched}
        return {**shared, "chosen": chosen, "seed": seed, "reward_after": after, "sigma": sigma}

    rows = [row("by hand", 0.5, 0.01), row("auto", 0.55, 0.02, 0, 0.04), row("auto", 0.45, 0.01, 1, 0.02)]
    headers, lines = tune.table({"rows": [*rows, row("ten times", 0.1, 0.1)]})
    found = [dict(zip(headers, line, strict=True)) for line in lines]
    assert [f["sigma, lr"] for f in found] == ["by hand", "auto", "ten times"]
    assert found[1]["of the gain by hand"] == "100%" and found[1]["sigma"] == "0.01 to 0.02"
    assert found[1]["search, of all responses"] == "3.0%" and found[2]["of the gain by hand"] == "-100%"
