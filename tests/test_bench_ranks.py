"""`esfast bench ranks`: each kind of noise learns as it says, with all members in one batch, and with its best sigma."""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import small_model

from esfast import ES
from esfast.bench import kept_runs, main, ranks
from esfast.rollout.population import PopulationEvaluator
from esfast.tasks import embedded


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small_model.build(tmp_path_factory.mktemp("model") / "tiny", steps=20))


def options(*given):
    parser = argparse.ArgumentParser()
    ranks.add_arguments(parser)
    return parser.parse_args(given)


FEW = ("--generations", "2", "--members", "4", "--prompts", "3", "--eval-prompts", "10")


@pytest.mark.parametrize(("rank", "mirrored"), [(ranks.FULL, False), (4, True)])
def test_a_run_learns_as_its_way_says(rank, mirrored, model, tmp_path, monkeypatch):
    steps, packets = [], []
    step, ask = ES.step, PopulationEvaluator._ask
    monkeypatch.setattr(ES, "step", lambda es, **how: steps.append(es) or step(es, **how))
    monkeypatch.setattr(
        PopulationEvaluator,
        "_ask",
        lambda self, ms, packet, *rest: packets.append(len(packet)) or ask(self, ms, packet, *rest),
    )
    way = ranks._way("countdown", rank, 0.02, mirrored)
    asked = ranks._job(options(*FEW), way, 5, scan=False)
    row = ranks.train(asked, tmp_path / "run", {"countdown": model})
    rule = steps[0].rule
    assert (rule.noise, rule.rank) == (("low_rank", 4) if rank else ("gaussian", 1))
    assert steps[0].sigma == 0.02 and steps[0].mirrored is mirrored and len(steps) == 2
    assert packets == [4, 4], "all members of a generation answer in one batch"
    assert row["way"] == way and row["seed"] == 5 and row["rollouts"] == 2 * 4 * 3 and len(row["reward"]) == 2
    assert row == json.loads(json.dumps(row)) and 0 <= row["accuracy_after"] <= 1


def test_every_kind_has_every_sigma_and_then_its_best():
    args = options("--tasks", "countdown", "--repeats", "2")
    scan = ranks.scan_jobs(args)
    assert {(s["way"]["rank"], s["way"]["sigma"]) for s in scan} == {
        (rank, sigma) for rank in (1, 4, 16, ranks.FULL) for sigma in (0.005, 0.01, 0.02)
    }
    assert {s["seed"] for s in scan} == {0}
    sigmas = ranks.best_sigmas(
        [{**s, "reward_after": -abs(s["way"]["sigma"] - 0.01 * (s["way"]["rank"] == 4))} for s in scan]
    )
    assert sigmas == {("countdown", rank): 0.01 if rank == 4 else 0.005 for rank in (1, 4, 16, ranks.FULL)}
    jobs = ranks.jobs(args, sigmas)
    assert len(jobs) == 4 * 2 * 2 == len({(s["way"]["name"], s["seed"]) for s in jobs})
    assert {s["seed"] for s in jobs} == {1, 2} and all(
        s["way"]["sigma"] == sigmas["countdown", s["way"]["rank"]] for s in jobs
    )


def test_the_table_compares_runs_that_saw_the_same_prompts():
    args, rows = options("--ranks", "1", "--tasks", "countdown"), []
    for s in ranks.scan_jobs(args):
        rows.append(
            {**s, "accuracy_before": 0.06, "accuracy_after": s["way"]["sigma"], "reward_after": s["way"]["sigma"]}
        )
    for s in ranks.jobs(args, ranks.best_sigmas(rows)):
        # seeds differ by far more than ranks
        worse = 0.01 * (s["way"]["rank"] == 1) * (1 + s["way"]["mirrored"])
        rows.append(
            {**s, "accuracy_before": 0.06, "accuracy_after": 0.2 + 0.1 * s["seed"] - worse, "reward_after": 0.0}
        )
    headers, lines = ranks.table({"rows": rows})
    assert lines == [
        [
            "countdown",
            "rank 1",
            "0.005",
            "0.010",
            "0.020",
            "0.02",
            "0.060",
            "0.390 ± 0.100",
            "0.380 ± 0.100",
            "-0.015 (-6.7)",
        ],
        ["countdown", "full rank", "0.005", "0.010", "0.020", "0.02", "0.060", "0.400 ± 0.100", "0.400 ± 0.100", ""],
    ]
    assert all(len(line) == len(headers) for line in lines)


def test_the_whole_benchmark(model, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "cached", lambda task: model)
    monkeypatch.setattr(ranks, "FACTORS", (1.0,))
    # a process of its own takes seconds to start; test_bench_training.py has that
    monkeypatch.setattr(kept_runs, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))
    path = tmp_path / "ranks.json"
    command = ["ranks", "--tasks", "countdown", "--ranks", "2", "--repeats", "1", "--jobs", "1", *FEW]
    command += ["--keep", str(tmp_path / "runs"), "--json", str(path)]
    assert main(command) == 0
    result = json.loads(path.read_text())
    assert [r["scan"] for r in result["rows"]] == [True] * 2 + [False] * 4 and "unfinished" not in result
    assert len(ranks.table(result)[1]) == 2
    kept = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert "countdown-rank2-sigma0.01-mirrored-seed1" in kept and len(kept) == 6
