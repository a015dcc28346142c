"""Benchmarks of whole jobs: Countdown runs a training for each seed, dropin people's loops, replay a run's journal."""

import json
import sys

import pytest
from life import FEW

from esfast.bench import countdown, dropin, main, replay, tables
from esfast.utils.child import child

TRAIN = """
import json, pathlib, sys
seed, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
print("training")
if seed == 13: sys.exit(3)
folder.mkdir(parents=True)
(folder / "summary.json").write_text(json.dumps({"generations": 4, "seed": seed, "eval_prompts": 100,
    "before": {"eval_accuracy": 0.25, "eval_reward": 0.3}, "after": {"eval_accuracy": 0.5, "eval_reward": 0.6},
    "seconds": {"generate": 6.0, "update": 0.5, "perturb": 1.5, "total": 10.0}}))
"""


@pytest.fixture
def quick_train(monkeypatch):
    def child_of(code, *arguments):
        return [sys.executable, "-c", "pass"] if "embedded" in code else child(code, *arguments)

    monkeypatch.setattr(countdown, "child", child_of)
    monkeypatch.setattr(
        countdown, "train_command", lambda seed, folder, options: [sys.executable, "-c", TRAIN, str(seed), str(folder)]
    )


def test_countdown_collects_a_row_a_seed(quick_train, tmp_path, capfd):
    path = tmp_path / "countdown.json"
    runs = tmp_path / "runs"
    assert main(["countdown", "--seeds", "4", "5", "--keep", str(runs), "--json", "-"]) == 0
    out = capfd.readouterr().out
    result = json.loads(out)  # what the training prints isn't in it
    assert [r["seed"] for r in result["rows"]] == [4, 5] and str(tmp_path) not in result["provenance"]["command"]
    row = result["rows"][0]
    assert (row["accuracy_before"], row["accuracy_after"], row["eval_problems"], row["generations"]) == (
        0.25,
        0.5,
        100,
        4,
    )
    assert row["seconds"] == {"generate": 6.0, "update": 0.5, "perturb": 1.5} and row["seconds_training"] == 10.0
    assert row["seconds_total"] > row["seconds_pretraining"] > 0
    assert (runs / "seed5" / "summary.json").exists()
    path.write_text(out)
    text = tables.generate("countdown", tmp_path)
    assert "| 4 | 25.0% ± 4.3% | 50.0% ± 5.0% | 100 | 4 |" in text and "| mean | 25.0% | 50.0% |" in text
    assert "| 15.0% | 60.0% | 0.0% | 5.0% | 0.0% | 20.0% |" in text


def test_countdown_says_which_seed_failed(quick_train, capfd):
    assert main(["countdown", "--seeds", "13"]) == 1
    assert "seed 13 failed with exit status 3" in capfd.readouterr().err
    assert main(["countdown", "--seeds", "1", "1"]) == 1
    assert "each once" in capfd.readouterr().err


def test_countdown_compares_kinds_of_noise(quick_train, tmp_path, capfd, monkeypatch):
    asked, command = [], countdown.train_command
    monkeypatch.setattr(countdown, "train_command", lambda *given: asked.append(given) or command(*given))
    runs = tmp_path / "runs"
    words = ["countdown", "--seeds", "4", "5", "--noise", "gaussian", "low_rank", "--keep", str(runs), "--json", "-"]
    assert main([*words, "--", "--lr", "0.1"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [(seed, options) for seed, _, options in asked] == [
        (seed, ["--noise", noise, "--lr", "0.1"]) for noise in ("gaussian", "low_rank") for seed in (4, 5)
    ]
    assert [(r["noise"], r["seed"]) for r in result["rows"]] == [
        (noise, seed) for noise in ("gaussian", "low_rank") for seed in (4, 5)
    ]
    assert (runs / "low_rank-seed5" / "summary.json").exists()
    # 0.6 is 2 errors of 0.05 above 0.5
    for row in result["rows"][2:]:
        row["accuracy_after"] = 0.6
    (tmp_path / "countdown_noise.json").write_text(json.dumps(result))
    text = tables.generate("countdown-noise", tmp_path)
    assert "| gaussian | 25.0% | 50.0% ± 5.0% | 50.0% ± 5.0% | 50.0% ± 3.5% |  |" in text
    assert "| low_rank | 25.0% | 60.0% ± 4.9% | 60.0% ± 4.9% | 60.0% ± 3.5% | +2.0 |" in text


def test_countdown_is_told_the_noise_once(quick_train, capfd):
    assert main(["countdown", "--noise", "low_rank", "--", "--noise", "gaussian"]) == 1
    assert "--noise: give it to the benchmark or, after --, to esfast train, not to both" in capfd.readouterr().err


def test_train_command_is_one_that_the_cli_takes(tmp_path):
    from esfast.cli.parser import parser_of_all

    command = countdown.train_command(3, tmp_path, ["--generations", "2"])
    args = parser_of_all().parse_args(command[3:])
    assert (args.seed, args.output_dir, args.generations) == (3, str(tmp_path), 2)


def test_dropin_times_every_loop(tmp_path):
    path = tmp_path / "dropin.json"
    assert main(["dropin", "--numel", "20000", "--members", "3", "--repeats", "1", "--seeds", "--json", str(path)]) == 0
    rows = {row["loop"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows.keys() == dropin.LOOPS.keys()
    for name, row in rows.items():
        assert row["after_restored"] == 1 and row["before_ms"] > 0 and row["after_ms"] > 0
        copies = name not in ("randn tensor by tensor", "es-at-scale's worker, v1.0.0", "MeZO, one step")
        assert (row["before_restored"] == 1) == copies  # subtracting bfloat16 noise gives back other weights


def test_a_loop_of_ours_that_does_not_restore_is_left_out(tmp_path, monkeypatch):
    class Broken(dropin.OurES):
        def members(self):
            super().members()
            self.plan.tensors[-1].view(-1)[:1].add_(1)

    before, _ = dropin.LOOPS["functional_call"]
    monkeypatch.setitem(dropin.LOOPS, "functional_call", (before, Broken))
    path = tmp_path / "dropin.json"
    assert main(["dropin", "--numel", "20000", "--members", "2", "--repeats", "1", "--seeds", "--json", str(path)]) == 1
    result = json.loads(path.read_text())
    assert [r["loop"] for r in result["rows"]] == [name for name in dropin.LOOPS if name != "functional_call"]
    (left_out,) = result["left_out"]
    assert left_out["loop"] == "functional_call" and "does not restore the weights" in left_out["reason"]
    headers, lines = dropin.table(result)
    assert all(len(line) == len(headers) for line in lines)


def test_replay_makes_the_same_model_again(warm_python, tiny, tmp_path, monkeypatch):
    command = replay._command
    monkeypatch.setattr(
        replay, "_command", lambda name, *rest: command(name, *rest, *["--base", tiny][: 2 * (name == "replay")])
    )
    few = ["--model", tiny, "--generations", "2", *FEW]
    path = tmp_path / "replay.json"
    assert main(["replay", "--json", str(path), "--", *few]) == 0
    row = json.loads(path.read_text())["rows"][0]
    assert row["pass"] and row["generations"] == 2 and row["exported_bytes"] > 2 * 2 * 12 and row["fingerprints"] == 1
    assert "| 2 | 2 | 123,968 |" in tables.generate("replay", tmp_path)
