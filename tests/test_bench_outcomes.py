"""What benchmarks say of a run: rows with the keys of the recorded results, tables of them, and when a row passes."""

import json
import math
from pathlib import Path

import pytest

from esfast.bench import episodes, forgetting, kept_runs, outcomes, tasks
from esfast.trainer.probes import PREFIX, name_of

RESULTS = Path(tasks.__file__).parent / "results"
METRICS = {"eval_reward": 0.25, "eval_reward_se": 0.03, "eval_accuracy": 0.2, "eval_episode_turns": 1.5}
AFTER = {"eval_reward": 0.75, "eval_reward_se": 0.04, "eval_accuracy": 0.7, "eval_episode_turns": 1.0}


def summary(after=AFTER):
    probe = f"{PREFIX}{name_of(forgetting.PROBE)}/"
    both = {
        when: metrics | {probe + name.removeprefix("eval_"): value / 2 for name, value in metrics.items()}
        for when, metrics in (("before", METRICS), ("after", METRICS | after))
    }
    return {"eval_prompts": 200, "generations": 12, "seconds": {"total": 34.0, "generate": 30.0}, **both}


@pytest.fixture
def trains(monkeypatch):
    """`esfast train` writes this summary, and no model is made."""

    def install(module, after=AFTER):
        monkeypatch.setattr(module, "train_command", lambda seed, folder, options: folder)

        def call(what, folder, environment):
            if isinstance(folder, Path):
                folder.mkdir(parents=True)
                (folder / "summary.json").write_text(json.dumps(summary(after)))
                (folder / "metrics.jsonl").write_text('{"distance": 1.0}\n{"distance": 2.0}\n')

        monkeypatch.setattr(module, "call", call)

    return install


RUNS = {
    "tasks": lambda folder: tasks._one("sudoku", 3, folder, {}),
    "episodes": lambda folder: episodes._learned(3, folder),
    "forgetting": lambda folder: forgetting._one(0.0, 3, folder, folder / "base", []),
}
MODULES = {"tasks": tasks, "episodes": episodes, "forgetting": forgetting}


@pytest.mark.parametrize("name", RUNS)
def test_rows_have_the_keys_of_the_recorded_results_and_the_summary_s_numbers(name, trains, tmp_path):
    trains(MODULES[name])
    row = RUNS[name](tmp_path / "run")
    recorded = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"][0]
    assert row.keys() == recorded.keys()
    prefix, error = ("task_", "reward_se") if name == "forgetting" else ("", "error")
    numbers = [row[f"{prefix}{what}_{when}"] for what in ("reward", error) for when in ("before", "after")]
    assert numbers == [0.25, 0.75, 0.03, 0.04] and row["rose"] == pytest.approx(10)
    assert (row["problems"], row["generations"], row["seed"]) == (200, 12, 3) and row.get("pass", True)
    if name == "forgetting":
        assert (row["probe_accuracy_before"], row["probe_accuracy_after"], row["distance"]) == (0.1, 0.35, 2.0)
    if name == "episodes":
        assert (row["turns_before"], row["turns_after"], row["seconds"]) == (1.5, 1.0, 34.0)
    show = forgetting.learned_table if name == "forgetting" else MODULES[name].table
    headers, (line,) = show({"rows": [row]})
    assert len(line) == len(headers) and headers[1:5] == outcomes.HEADERS
    assert line[1:5] == ["200", "0.250 ± 0.030", "0.750 ± 0.040", "10"]


@pytest.mark.parametrize(
    ("after", "error", "rose", "passes"),
    [
        (0.30, 0.03, 0.05 / math.hypot(0.03, 0.03), False),
        (0.50, 0.03, 0.25 / math.hypot(0.03, 0.03), True),
        (0.20, 0.03, -0.05 / math.hypot(0.03, 0.03), False),
    ],
    ids=["within the error", "more", "fell"],
)
def test_a_row_passes_if_the_reward_rose_by_more_than_errors(after, error, rose, passes, trains, tmp_path):
    for name in ("tasks", "episodes"):
        trains(MODULES[name], {"eval_reward": after, "eval_reward_se": error})
        row = RUNS[name](tmp_path / name)
        assert row["rose"] == pytest.approx(rose) and row["pass"] is passes


def test_rewards_without_spread_rise_or_not():
    """Every held-out problem gets one reward before training, and one after."""
    for after, passes in ((1.0, True), (0.0, False)):
        row = {"problems": 9, "reward_before": 0.0, "error_before": 0.0, "reward_after": after, "error_after": 0.0}
        row["rose"] = None
        assert outcomes.rose_by(row, 2) is passes
        assert outcomes.cells(row) == ["9", "0.000 ± 0.000", f"{after:.3f} ± 0.000", "any"]


def test_folders_of_runs_go_unless_they_are_kept(tmp_path):
    import argparse

    parser = argparse.ArgumentParser()
    kept_runs.add_keep(parser)
    kept_runs.add_jobs(parser)
    for words, stays in ((["--keep", str(tmp_path / "kept")], True), ([], False)):
        args = parser.parse_args(words, argparse.Namespace(name="ranks"))
        with kept_runs.run_folder(args) as folder:
            (folder / "a").mkdir(parents=True)
        assert (folder / "a").exists() is stays
    assert args.jobs == 2
