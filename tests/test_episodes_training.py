"""Training on environments: the trainer, the command, and the page of the documentation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from playing import play, small_model, three_turns
from test_trainer import config

import esfast
from esfast.cli import main
from esfast.report import load, page
from esfast.rollout import SequentialEvaluator, TransformersEngine
from esfast.rollout.episodes.engine import check_environment
from esfast.tasks import embedded
from esfast.utils.errors import BadType

pytest.importorskip("openai", reason="episodes ask through the package openai: pip install esfast[environments]")


@pytest.fixture(scope="module")
def made():
    return small_model()


class Env:
    """Rewards answers that have digits; the second turn shows the first."""

    def rows(self, generation, count, seed):
        return [{"number": 10 * generation + i} for i in range(count)]

    def held_out(self, count):
        return [{"number": -i} for i in range(min(count, 4))]

    async def episode(self, client, row):
        messages, digits = [{"role": "user", "content": str(row["number"])}], 0
        for _ in range(2):
            answer = await client.chat.completions.create(model=client.model, messages=messages, max_tokens=6)
            said = answer.choices[0].message
            digits += sum(map(str.isdigit, said.content))
            messages += [said, {"role": "user", "content": "?"}]
        return digits / 12


def train(folder, made, environment=None, settings=None, **options):
    torch.manual_seed(0)
    tokenizer = made[1]
    model = embedded.make_model(tokenizer)
    options = {"environment": environment or Env(), "processing_class": tokenizer, **options}
    trainer = esfast.ESTrainer(
        model, args=config(folder, **{"max_completion_length": 8, **(settings or {})}), **options
    )
    try:
        trainer.train()
    finally:
        trainer.folder.release()
    return trainer


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_run_resumes_to_the_same_weights(tmp_path, made, temperature):
    settings = {"temperature": temperature, "eval_every": 2}
    whole = train(tmp_path / "whole", made, settings={**settings, "generations": 4})
    train(tmp_path / "run", made, settings={**settings, "generations": 2})
    again = train(tmp_path / "run", made, settings={**settings, "generations": 4, "resume": True})
    assert again.es.store.fingerprint() == whole.es.store.fingerprint()
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert all(row["episode_turns"] == 2 and row["episodes_failed"] == 0 for row in rows[1:])
    assert rows[-1]["eval_episode_turns"] == 2 and rows[-1]["eval_episodes_failed"] == 0
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert [m["role"] for m in samples[0]["messages"]] == ["user", "assistant", "user", "assistant"]
    html = page([load(tmp_path / "run")])
    assert html.count('<div class="turn"><i>assistant</i>') >= 4 and "episode_turns on held-out" in html


def test_sigma_and_lr_are_found_on_episodes(tmp_path, made, same_bits):
    torch.manual_seed(0)
    model = embedded.make_model(made[1])
    before = [p.detach().clone() for p in model.parameters()]
    settings = {"sigma": "auto", "lr": "auto", "generations": 400, "max_completion_length": 6}
    trainer = esfast.ESTrainer(
        model, args=config(tmp_path / "run", **settings), environment=Env(), processing_class=made[1]
    )
    found = trainer.tune()
    assert same_bits(before, [p.detach() for p in model.parameters()])
    assert found.rows and found.responses <= 0.05 * found.run and set(found.settings) == {"sigma", "lr"}


def test_a_failing_episode_stops_the_run_or_its_member_is_left_out(tmp_path, made, caplog):
    class Fails(Env):
        calls = 0

        async def episode(self, client, row):
            Fails.calls += 1
            if row["number"] == 1:
                raise ValueError("the sandbox is gone")
            return await super().episode(client, row)

    class FailsOnce(Fails):
        async def episode(self, client, row):
            if row["number"] == 1 and Fails.calls < 1:
                Fails.calls += 1
                raise ValueError("the sandbox is gone")
            return await Env.episode(self, client, row)

    with pytest.raises(ValueError, match=r"row 1 \(.*its episode raised ValueError: the sandbox is gone"):
        train(tmp_path / "stop", made, Fails())
    Fails.calls = 0
    trainer = train(tmp_path / "skip", made, FailsOnce(), {"on_reward_error": "skip", "generations": 1})
    assert trainer.es.generation == 1 and "is set aside: row 1" in caplog.text


class Own(SequentialEvaluator):
    def evaluate(self, members, prompts, seeds):
        yield from super().evaluate(members, prompts, seeds)


class Mixed:
    evaluate = Own.evaluate


class OfBoth(Mixed, SequentialEvaluator):
    pass


class Around:
    """Has its own `evaluate`, and all else from another."""

    evaluate = Own.evaluate

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


def replaced(evaluator):
    evaluator.evaluate = lambda members, prompts, seeds: iter(())
    return evaluator


# Ways to an `evaluate` that an environment's members would not be asked through.
OWN_EVALUATE = [
    lambda made: Own(TransformersEngine(*made, 6)),
    lambda made: OfBoth(TransformersEngine(*made, 6)),
    lambda made: Around(SequentialEvaluator(TransformersEngine(*made, 6))),
    lambda made: replaced(SequentialEvaluator(TransformersEngine(*made, 6))),
]


def test_an_evaluator_with_a_placed_of_its_own_plays(tmp_path, made):
    class Both(Own):
        asked = 0

        def placed(self, members, sampled):
            for some, complete in super().placed(members, sampled):
                type(self).asked += len(some)
                yield some, complete

    model = embedded.make_model(made[1])
    settings = config(tmp_path / "own", generations=1, max_completion_length=8)
    evaluator = Both(TransformersEngine(model, made[1], 8))
    trainer = esfast.ESTrainer(model, args=settings, environment=Env(), processing_class=made[1], evaluator=evaluator)
    trainer.train()
    trainer.folder.release()
    assert Both.asked > 0


def test_bad_arguments_are_errors_at_the_door(tmp_path, made):
    def sync(client, row):
        return 1.0

    async def one(client):
        return 1.0

    for wrong, words in [
        (sync, "async def"),
        (Env, "async def"),
        (one, "can't be called"),
        (object(), "async def"),
        (3, "async"),
    ]:
        with pytest.raises(BadType, match=words):
            check_environment(wrong)
    rows = [{"number": 1}]
    for options, words in [
        ({"reward_funcs": lambda **k: [0]}, "reward_funcs: an environment"),
        ({"metrics": {"x": lambda **k: [0]}}, "metrics"),
        ({"environment": three_turns}, "train_dataset: the environment has no method rows"),
        ({"settings": {"kl_to_base": True}}, "kl_to_base"),
        (
            {"settings": {"members_at_once": 2}, "engine": lambda prompts: list(prompts)},
            "members_at_once: an engine of yo",
        ),
        ({"evaluator": object()}, "evaluator: .*asked many times, for which it needs a method `placed`"),
        *(
            ({"evaluator": own(made)}, "evaluator: .*has an `evaluate` of its own, but not a `placed`")
            for own in OWN_EVALUATE
        ),
        ({"settings": {"max_episode_turns": 0}}, "max_episode_turns"),
        ({"settings": {"episode_timeout": 0}}, "episode_timeout"),
        ({"settings": {"endpoint_port": 70000}}, "endpoint_port"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            train(tmp_path / "bad", made, **options)
    with pytest.raises(TypeError, match="reward_funcs: expected a function"):
        esfast.ESTrainer(embedded.make_model(made[1]), args=config(tmp_path / "bad"), train_dataset=rows)
    assert not (tmp_path / "bad").exists()


# ---- the command -----------------------------------------------------------------------------------------------------

MINE = """
import json


class Env:
    max_new_tokens = 6
    settings = {"population_size": 4, "generations": 2, "prompts_per_generation": 2}

    def rows(self, generation, count, seed):
        return [{"number": generation + i} for i in range(count)]

    def held_out(self, count):
        return [{"number": -1 - i} for i in range(3)]

    async def episode(self, client, row):
        print("noise on standard output")
        answer = await client.chat.completions.create(
            model=client.model, messages=[{"role": "user", "content": str(row["number"])}]
        )
        return sum(map(str.isdigit, answer.choices[0].message.content))


async def alone(client, row):
    return await Env().episode(client, row)


class Broken:
    def __init__(self):
        raise OSError("no sandbox")
"""


@pytest.fixture
def here(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_env.py").write_text(MINE)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"number": i}) + "\n" for i in range(20)))
    made[0].save_pretrained("model")
    made[1].save_pretrained("model")
    yield tmp_path
    sys.modules.pop("mine_env", None)


@pytest.mark.slow
def test_the_command_trains_evaluates_and_reports(here, capsys):
    base = ["--model", "model", "--no-progress"]
    assert main(["train", "--environment", "mine_env:Env", "--out", "run", *base]) in (None, 0)
    out = capsys.readouterr().out
    assert "reward" in out and "episode_turns" in out and "noise" not in out
    assert main(["train", "--out", "run", "--resume", "--generations", "3", *base]) in (None, 0)
    assert len(lines(here / "run" / "metrics.jsonl")) == 4
    capsys.readouterr()
    assert main(["eval", "--model", "run", "--samples", "3", "--json", "--save", "said.jsonl"]) in (None, 0)
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    assert [len(line["messages"]) for line in lines(here / "said.jsonl")] == [2] * 3
    # the best member of the run, beside it; an environment by name, with limits, for a model that no run made
    assert main(["eval", "run", "--samples", "2", "--members", "1", "--json"]) in (None, 0)
    both = json.loads(capsys.readouterr().out)
    assert [r["mean_turns"] for r in both] == [1.0, 1.0] and both[1]["model"].startswith("best member")
    assert main(["eval", "run", "--members", "2"]) == 1
    assert "episodes can't be put to a vote" in capsys.readouterr().err
    assert main(["eval", "model", "--environment", "mine_env:Env", "--samples", "2", "--max-episode-tokens", "3"]) in (
        None,
        0,
    )
    assert "mean turns 1.00" in capsys.readouterr().out
    assert main(["eval", "model", "--environment", "mine_env:Env", "--samples", "2", "--endpoint-port", "0"]) in (
        None,
        0,
    )
    assert main(["train", "--environment", "mine_env:alone", "--data", "rows.jsonl", "--out", "other", "--generations", "1",
                 "--population-size", "2", "--prompts-per-generation", "2", "--max-completion-length", "4", *base]) in (None, 0)  # fmt: skip
    assert lines(here / "other" / "metrics.jsonl")[-1]["eval_episodes_failed"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--environment", "mine_env:Nothing"], "no function 'Nothing'"),
        (["--environment", "mine_env"], "MODULE:CLASS"),
        (["--environment", "nowhere:Env"], "no module 'nowhere'"),
        (["--environment", "mine_env:Broken"], "raised OSError: no sandbox"),
        (["--environment", "mine_env:alone"], "rows(generation, count, seed)"),
        (["--environment", "mine_env:json"], "no function"),
        (["--environment", "mine_env:Env", "--task", "sudoku"], "leave --task sudoku out"),
        (["--environment", "mine_env:Env", "--reward", "mine_env:alone"], "reward"),
        (["--environment", "textarena:NoGame-v0"], "textarena"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else None,
)
def test_bad_options_are_errors_at_the_door(here, capsys, options, words):
    assert main(["train", *options, "--model", "model", "--out", "bad"]) == 1
    assert words in capsys.readouterr().err
    assert not (here / "bad" / "journal.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--environment", "mine_env:Nothing"], "no function 'Nothing'"),
        (["--environment", "mine_env:Env", "--task", "sudoku"], "leave --task sudoku out"),
        (["--environment", "mine_env:Env", "--max-episode-turns", "0"], "--max-episode-turns: expected"),
        (["--environment", "mine_env:alone"], "rows(generation, count, seed)"),
        (["--environment", ""], "--environment: expected a name"),
        (["--task", "gym:count_down"], "gym task 'count_down'"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else None,
)
def test_bad_options_of_an_evaluation_are_errors_at_the_door(here, capsys, options, words):
    assert main(["eval", *options, "--model", "model", "--samples", "2"]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_as_one_does(warm_python, here):
    command = ["-m", "esfast", "train", "--environment", "mine_env:Env", "--model", "model", "--no-progress"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    started = [
        subprocess.Popen([sys.executable, *launch, *command, "--out", "team"], stderr=subprocess.PIPE, text=True),
        subprocess.Popen([sys.executable, *command, "--out", "alone"], stderr=subprocess.PIPE, text=True),
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    files = "model/model.safetensors", "journal.jsonl", "samples.jsonl"
    for name in files:
        assert (here / "team" / name).read_bytes() == (here / "alone" / name).read_bytes(), name


def test_the_page_on_environments_runs(here):
    text = (Path(__file__).parent.parent / "docs" / "how-to" / "environments.md").read_text(encoding="utf-8")
    environment, trainer, steps = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    trainer = trainer.replace("Qwen/Qwen2.5-0.5B-Instruct", "model").replace("generations=50", "generations=1")
    trainer = trainer.replace("population_size=30", "population_size=2, prompts_per_generation=2, eval_prompts=2")
    exec(environment + trainer + steps, scope := {"__name__": "page"})
    assert scope["trainer"].es.generation == 1 and "eval_reward" in lines(here / "runs" / "sums" / "metrics.jsonl")[-1]
    (done,) = play(scope["trainer"].engine.engine, scope["environment"], [{"seed": 1}])
    assert done.error is None and done.turns == 2
