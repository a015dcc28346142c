"""ESTrainer and its run folder, on a tiny model with its real tokenizer and generation."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import scoring
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import esfast
from esfast.journal import journal
from esfast.tasks import embedded
from esfast.trainer.clock import PHASES
from esfast.trainer.run_folder import RunFolder

ROWS = [{"prompt": f"{i} {i + 1} {i + 2}={i}\n<think>", "numbers": [i, i + 1, i + 2], "target": i} for i in range(1, 7)]


def count_digits(prompts, completions, **columns):
    return [sum(c.isdigit() for c in text) for text in completions]


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    return embedded.make_model(tokenizer).eval(), tokenizer


def config(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "generations": 3,
        "population_size": 4,
        "sigma": 0.05,
        "lr": 0.05,
        "prompts_per_generation": 4,
        "max_completion_length": 6,
        "eval_every": 2,
        "progress": False,
    }
    return esfast.ESConfig(**{**settings, **changes})


def train(folder, model, rows=ROWS, **changes):
    net, tokenizer = model
    trainer = esfast.ESTrainer(
        net, count_digits, config(folder, **changes), rows, ROWS, tokenizer, metrics={"digits": count_digits}
    )
    return trainer, trainer.train()


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_run_folder_is_complete_and_the_saved_model_loads(tmp_path, model):
    before = weights(model[0])
    trainer, summary = train(tmp_path / "run", model)
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "identity.json",
        "metrics.jsonl",
        "journal.jsonl",
        "summary.json",
        "curves.png",
        "model",
        "samples.jsonl",
    } | ({"best"} if (folder / "best").exists() else set())
    assert esfast.ESConfig(**yaml.safe_load((folder / "config.yaml").read_text())) == trainer.args
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["generation"] for r in rows] == [0, 1, 2, 3]
    assert ["eval_digits" in r for r in rows] == [True, False, True, True]  # before, every second, and the last
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["generations"] == 3 and summary["before"]["eval_digits"] == rows[0]["eval_digits"]
    assert {"perturb", "generate", "score", "update", "evaluate", "total"} <= summary["seconds"].keys()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert equal(weights(loaded), weights(model[0])) and not equal(before, weights(loaded))
    assert AutoTokenizer.from_pretrained(folder / "model")(ROWS[0]["prompt"]) == model[1](ROWS[0]["prompt"])


def test_journal_leads_from_the_base_weights_to_the_saved_model(tmp_path, model):
    base = embedded.make_model(model[1])
    base.load_state_dict(model[0].state_dict())
    train(tmp_path / "run", model)
    journal.replay(esfast.Plan(base), tmp_path / "run" / "journal.jsonl")
    assert equal(weights(base), weights(model[0]))


def test_same_seed_same_bits_other_seed_other_bits(tmp_path, model):
    start = {k: v.clone() for k, v in model[0].state_dict().items()}
    results = []
    for run, seed in enumerate((5, 5, 6)):
        model[0].load_state_dict(start)
        train(tmp_path / str(run), model, seed=seed)
        results.append(weights(model[0]))
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


def test_reward_functions_get_columns_and_are_added(tmp_path, model):
    seen = []

    def ones(prompts, completions, numbers, target, **rest):
        seen.append((prompts, numbers, target, rest))
        return [1.0] * len(completions)

    def twos(prompts, completions, **columns):
        return torch.full((len(completions),), 2.0).tolist()

    net, tokenizer = model
    trainer = esfast.ESTrainer(net, [ones, twos], config(tmp_path / "run", generations=1), ROWS, None, tokenizer)
    before = weights(net)
    trainer.train()
    rows = trainer.folder.read_metrics()
    assert rows[-1]["reward_mean"] == 3.0
    assert equal(before, weights(net))  # equal rewards teach nothing
    prompts, numbers, target, rest = seen[0]
    assert len(prompts) == 4 and numbers == [[t, t + 1, t + 2] for t in target] and rest == {}


def test_rows_are_drawn_without_repetition_until_all_were_used(tmp_path, model):
    net, tokenizer = model
    trainer = esfast.ESTrainer(net, count_digits, config(tmp_path / "run"), ROWS, None, tokenizer)
    drawn = [row["target"] for g in range(3) for row in trainer.batches.rows(g)]  # 12 draws from 6 rows
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [1, 2, 3, 4, 5, 6]
    assert drawn == [row["target"] for g in range(3) for row in trainer.batches.rows(g)]


def test_fresh_rows_from_a_function(tmp_path, model):
    asked = []

    def fresh(generation, count):
        asked.append((generation, count))
        return ROWS[:count]

    train(tmp_path / "run", model, rows=fresh)
    assert asked == [(0, 4), (1, 4), (2, 4)]


def test_interrupt_saves_the_last_completed_generation(tmp_path, model):
    net, tokenizer = model
    calls = []

    def interrupted(prompts, completions, **columns):
        calls.append(weights(net))
        if len(calls) == 4 + 2:  # the second member of the second generation
            signal.raise_signal(signal.SIGINT)
        return count_digits(prompts, completions)

    trainer = esfast.ESTrainer(net, interrupted, config(tmp_path / "run", members_at_once=1), ROWS, None, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.summary["generations"] == 1 and trainer.es.generation == 1
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert equal(weights(saved), weights(net)) and not equal(weights(net), calls[-1])


def test_a_model_that_cannot_be_saved_leaves_no_half_folder(tmp_path, model):
    folder = RunFolder(tmp_path / "run")
    folder.save_model(model[0].save_pretrained, model[1])

    class Broken:
        def save_pretrained(self, path):
            (path / "model.safetensors").write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.save_model(Broken().save_pretrained, model[1])
    assert [p.name for p in folder.path.iterdir()] == ["model"]
    AutoModelForCausalLM.from_pretrained(folder.model)


BAD = {
    "args": (
        lambda p, m: esfast.ESTrainer(m[0], len, {"sigma": 1}, ROWS, None, m[1]),
        TypeError,
        "args: expected an esfast.ESConfig",
    ),
    "reward not callable": (
        lambda p, m: esfast.ESTrainer(m[0], ["accuracy"], config(p), ROWS, None, m[1]),
        TypeError,
        "expected functions, got str 'accuracy'",
    ),
    "no reward": (
        lambda p, m: esfast.ESTrainer(m[0], [], config(p), ROWS, None, m[1]),
        ValueError,
        "at least one function",
    ),
    "no rows": (
        lambda p, m: esfast.ESTrainer(m[0], len, config(p), None, None, m[1]),
        TypeError,
        "train_dataset: expected rows",
    ),
    "empty rows": (
        lambda p, m: esfast.ESTrainer(m[0], len, config(p), [], None, m[1]),
        ValueError,
        "train_dataset: expected at least one row",
    ),
    "no prompt": (
        lambda p, m: esfast.ESTrainer(m[0], len, config(p), [{"text": "x"}], None, m[1]),
        ValueError,
        'must be dicts with a "prompt"',
    ),
    "unequal rows": (
        lambda p, m: esfast.ESTrainer(m[0], len, config(p), [ROWS[0], {"prompt": "x"}], None, m[1]),
        ValueError,
        "its rows must have equal columns",
    ),
    "generations": (
        lambda p, m: config(p, generations=0),
        ValueError,
        "ESConfig.generations: expected 1 <= ESConfig.generations",
    ),
    "population": (
        lambda p, m: config(p, population_size=1.5),
        TypeError,
        "ESConfig.population_size: expected an int, got float 1.5",
    ),
    "batch": (lambda p, m: config(p, batch_size=0), ValueError, "ESConfig.batch_size"),
    "temperature": (
        lambda p, m: config(p, temperature=-1.0),
        ValueError,
        "ESConfig.temperature: expected a finite number of at least 0, got -1.0",
    ),
    "responses": (
        lambda p, m: config(p, num_generations=2),
        ValueError,
        "ESConfig.num_generations: 2 equal responses to a prompt at temperature 0",
    ),
    "decoding": (
        lambda p, m: train(p, m, decoding="fast"),
        ValueError,
        "ESConfig.decoding: expected one of 'auto', 'plain', 'static', 'continuous', got 'fast'",
    ),
    "timeout": (
        lambda p, m: config(p, reward_timeout=0),
        ValueError,
        "ESConfig.reward_timeout: expected seconds, more than 0 and at most 1e+08, got 0",
    ),
    "workers": (lambda p, m: config(p, reward_workers=-1), ValueError, "ESConfig.reward_workers"),
    "engine": (
        lambda p, m: esfast.ESTrainer(m[0], len, config(p), ROWS, None, m[1], engine=m[0]),
        TypeError,
        "engine: expected an object with generate",
    ),
    "sigma": (lambda p, m: train(p, m, sigma=-1.0), ValueError, "sigma: expected a positive finite number, got -1.0"),
    "mirrored": (
        lambda p, m: train(p, m, mirrored=True, population_size=5),
        ValueError,
        "mirrored sampling needs an even number, got 5",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(tmp_path, model, case):
    call, error, message = BAD[case]
    before = weights(model[0])
    with pytest.raises(error) as caught:
        call(tmp_path / "run", model)
    assert message in str(caught.value)
    assert equal(before, weights(model[0])) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], "reward function bad: expected 4 rewards, got 1"),
        ([1.0, float("nan"), 1.0, 1.0], "reward function bad: its reward for completion 1 is nan, no finite number"),
        ([None] * 4, "no completion of which one of them returned anything but None"),
    ],
)
def test_bad_rewards_are_named_and_the_weights_stay(tmp_path, model, rewards, message):
    def bad(prompts, completions, **columns):
        return rewards

    net, tokenizer = model
    before = weights(net)
    trainer = esfast.ESTrainer(net, bad, config(tmp_path / "run"), ROWS, None, tokenizer)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert equal(before, weights(net))


def test_a_run_is_never_overwritten(tmp_path, model):
    train(tmp_path / "run", model, generations=1)
    record = (tmp_path / "run" / "journal.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(tmp_path / "run", model)
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == record


def test_workers_score_as_this_process_does(tmp_path, model):
    net, tokenizer = model
    start, results = {k: v.clone() for k, v in net.state_dict().items()}, []
    for workers in (0, 2):
        net.load_state_dict(start)
        args = config(tmp_path / str(workers), reward_workers=workers, generations=2)
        trainer = esfast.ESTrainer(net, scoring.length, args, ROWS, ROWS, tokenizer)
        trainer.train()
        results.append((weights(net), [r["reward_mean"] for r in trainer.folder.read_metrics()[1:]]))
    assert equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


def test_a_reward_that_hangs_stops_the_run_with_the_weights_restored(tmp_path, model):
    net, tokenizer = model
    rows = [row | {"note": str(tmp_path / "pid")} for row in ROWS]
    before = weights(net)
    args = config(tmp_path / "run", reward_workers=1, reward_timeout=0.5)
    trainer = esfast.ESTrainer(
        net, scoring.hangs, args, rows, None, tokenizer, engine=SimpleNamespace(generate=lambda p: ["hang"] * len(p))
    )
    with pytest.raises(esfast.rewards.RewardError, match="reward function hangs gave no rewards in 0.5 s"):
        trainer.train()
    assert equal(before, weights(net)) and trainer.es.generation == 0


def test_metrics_say_where_the_time_went(tmp_path, model):
    trainer, summary = train(tmp_path / "run", model)
    rows = trainer.folder.read_metrics()[1:]
    for row in rows:
        parts = {k.removeprefix("seconds_"): v for k, v in row.items() if k.startswith("seconds_")}
        assert parts.keys() == set(PHASES) and all(v >= 0 for v in parts.values())
        assert math.isclose(sum(parts.values()), row["seconds"]) and parts["generate"] > 0 and parts["journal"] > 0
        assert math.isclose(row["overhead_ratio"], row["seconds"] / parts["generate"]) and row["overhead_ratio"] > 1
        tokens = row["tokens_per_second"] * row["seconds"]
        assert math.isclose(tokens, round(tokens)) and 0 < round(tokens) <= 4 * 4 * 6  # members, prompts, new tokens
    assert min(r["overhead_ratio"] for r in rows) * 0.5 < summary["overhead_ratio"]
    seconds = summary["seconds"]
    assert seconds["generate"] >= sum(r["seconds_generate"] for r in rows) - 0.01 and summary["tokens_per_second"] > 0


def test_several_sampled_responses_to_each_prompt(tmp_path, model):
    net, tokenizer = model
    start = {k: v.clone() for k, v in net.state_dict().items()}
    seen = []

    def watch(prompts, completions, target, **columns):
        seen.append((prompts, completions))
        return [len(text) for text in completions]

    results = []
    for run, seed in enumerate((5, 5, 6)):
        net.load_state_dict(start)
        args = config(tmp_path / str(run), temperature=1.0, num_generations=3, seed=seed, generations=1)
        esfast.ESTrainer(net, watch, args, ROWS, None, tokenizer).train()
        results.append(weights(net))
    prompts, completions = seen[0]
    assert len(seen) == 12 and len(prompts) == 12 and prompts[:3] == [prompts[0]] * 3
    assert len(set(completions)) > 6, "equal prompts, different responses"
    assert seen[:4] == seen[4:8] and seen[0] != seen[8]
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


def test_a_function_as_engine(tmp_path, model):
    net, tokenizer = model
    asked = []

    def engine(prompts, **options):
        asked.append(options)
        return ["7" * len(prompts[0])] * len(prompts)

    for temperature in (0.0, 0.7):
        args = config(tmp_path / str(temperature), temperature=temperature, generations=1)
        trainer = esfast.ESTrainer(net, count_digits, args, ROWS, ROWS, tokenizer, engine=engine)
        summary = trainer.train()
        assert summary["overhead_ratio"] > 1 and "tokens_per_second" not in summary, "it does not count tokens"
    assert asked[:6] == [{}] * 6 and [len(o.get("seeds", [])) for o in asked[6:]] == [0, 4, 4, 4, 4, 0]


def test_empty_completions_are_scored(tmp_path, model):
    net, tokenizer = model
    args = config(tmp_path / "run", generations=1, reward_workers=1)
    trainer = esfast.ESTrainer(
        net, scoring.length, args, ROWS, ROWS, tokenizer, engine=lambda prompts: [""] * len(prompts)
    )
    trainer.train()
    assert [r["reward_mean"] for r in trainer.folder.read_metrics()[1:]] == [0.0]
