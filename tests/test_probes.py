"""Probes: other tasks that a run evaluates alongside, and what metrics, summary and report say of them."""

import json

import pytest

import esfast
from esfast import cli
from esfast.report import load, page
from esfast.rewards import Scorer
from esfast.tasks import get
from esfast.trainer.probes import Probe, Probes, name_of
from esfast.utils.errors import EsfastError


def train(tiny, out, *words):
    given = (
        f"train --model {tiny} --task countdown --style compact --population-size 4 --sigma 0.5 --lr 0.5 --samples 2 "
        f"--prompts-per-generation 3 --eval-prompts 6 --eval-every 1 --max-completion-length 4 --out {out}"
    )
    return cli.main([*given.split(), *words])


PROBES = ("--probe", "sudoku", "conciseness")


def test_probes_are_evaluated_and_reported(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(tiny, run, "--generations", "2", *PROBES) == 0
    said = capsys.readouterr()
    assert "probe/conciseness/reward" in said.out and "probe" not in said.err.split("gen/s")[-1]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("sudoku", "conciseness"):
            assert {f"eval_probe/{name}/{m}" for m in ("reward", "reward_se", "accuracy")} <= row.keys()
    name = "eval_probe/conciseness"
    assert f"{name}/forgotten" not in rows[0]
    assert rows[2][f"{name}/forgotten"] == rows[0][f"{name}/reward"] - rows[2][f"{name}/reward"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"][f"{name}/forgotten"] == rows[2][f"{name}/forgotten"]
    # What is asked of the probe are its own held-out problems.
    again = get("conciseness", "compact")
    assert Probe.of_task(again, 6).rows == again.eval_rows(6)
    found = page([load(run)])
    assert "<h2>What other tasks lost</h2>" in found and '<td class="">conciseness</td>' in found
    assert f"{-rows[2][f'{name}/forgotten'] + 0.0:+.4g} ±" in found


def test_probes_change_nothing_of_the_training_and_resume(tiny, tmp_path):
    assert train(tiny, tmp_path / "without", "--generations", "2") == 0
    assert "What other tasks lost" not in page([load(tmp_path / "without")])
    assert train(tiny, tmp_path / "with", "--generations", "1", *PROBES) == 0
    # What isn't given is the run's, the probes too.
    assert cli.main(["train", "--out", str(tmp_path / "with"), "--resume", "--generations", "2"]) == 0
    rows = [
        [json.loads(x) for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("without", "with")
    ]
    assert [r["reward_mean"] for r in rows[0][1:]] == [r["reward_mean"] for r in rows[1][1:]]
    assert "eval_probe/sudoku/forgotten" in rows[1][2]
    weights = [(tmp_path / n / "model/model.safetensors").read_bytes() for n in ("without", "with")]
    assert weights[0] == weights[1]


def brevity(prompts, completions, **columns):
    return [-float(len(c)) for c in completions]


def test_probes_of_your_own(tiny, tmp_path):
    probe = Probe([{"prompt": "say 3"}, {"prompt": "say 4"}], [brevity, brevity], {"short": brevity})
    args = esfast.ESConfig(
        output_dir=str(tmp_path / "run"),
        generations=1,
        population_size=4,
        prompts_per_generation=2,
        max_completion_length=4,
        progress=False,
    )
    rows = [{"prompt": f"say {i}"} for i in range(3)]
    summary = esfast.ESTrainer(tiny, brevity, args, rows, rows, probes={"mine": probe}).train()
    assert summary["before"]["eval_probe/mine/reward"] == 2 * summary["before"]["eval_probe/mine/short"]


def test_forgotten_is_what_the_reward_lost():
    class Engine:
        def generate(self, texts):
            return [self.says] * len(texts)

    engine, probe = Engine(), Probe([{"prompt": "say 3"}], [brevity])
    asked = Probes({"mine": probe}, lambda rows: [r["prompt"] for r in rows], engine, Scorer([brevity]), None, False)
    engine.says = "xx"
    base = asked(0, {}, lambda score: score())
    engine.says = "xxxxx"
    assert asked(3, base, lambda score: score()) == {"eval_probe/mine/reward": -5.0, "eval_probe/mine/forgotten": 3.0}


@pytest.mark.parametrize(
    "probes, evaluated, words",
    [
        (
            {"mine": Probe([{"prompt": "x"}], [brevity])},
            False,
            "probes: they are asked when eval_dataset is; there is none",
        ),
        (
            {"a b": Probe([{"prompt": "x"}], [brevity])},
            True,
            "probes: expected a name of letters, digits and . _ -, got 'a b'",
        ),
        ({"mine": [{"prompt": "x"}]}, True, "expected an esfast.trainer.probes.Probe as 'mine', got list"),
        ({"mine": Probe([], [brevity])}, True, "probes: mine: expected at least one row"),
        ({"mine": Probe([{"prompt": "x"}], [])}, True, "probes: mine: expected reward functions"),
        (
            {"mine": Probe([{"prompt": "x"}], [brevity], {"reward": brevity})},
            True,
            "'reward' is a name of the trainer's own",
        ),
        ({"mine": Probe([{"prompt": "x" * 4000}], [brevity])}, True, "probes: mine"),
    ],
)
def test_probes_that_cannot_be_asked(tiny, tmp_path, probes, evaluated, words):
    args = esfast.ESConfig(output_dir=str(tmp_path / "run"), generations=1, max_completion_length=4, progress=False)
    rows = [{"prompt": "say 1"}]
    with pytest.raises(EsfastError) as caught:
        esfast.ESTrainer(tiny, brevity, args, rows, rows if evaluated else None, probes=probes)
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    "words, said",
    [
        (("--probe", "sudoku", "sudoku"), "--probe: expected different tasks, got sudoku, sudoku"),
        (("--probe", "sudokku"), "unknown task 'sudokku'. Did you mean 'sudoku'?"),
    ],
)
def test_the_command_line_names_what_is_wrong(tiny, tmp_path, capsys, words, said):
    assert train(tiny, tmp_path / "run", *words) == 1
    assert said in capsys.readouterr().err


def test_names_in_metrics():
    assert name_of("gym:lcm?level=2+gcd") == "gym-lcm-level-2-gcd"
    assert name_of("math") == "math"
