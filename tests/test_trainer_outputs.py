"""What a run writes beside its last model: the best model, samples, a model card, metrics for other loggers. Also which
weights it tunes."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import esfast
from esfast.report import load, page
from esfast.tasks import embedded
from esfast.trainer.loggers import Report
from esfast.trainer.movement import Movement
from esfast.update.updater import Rule
from esfast.utils.files import write_whole

ROWS = [{"prompt": f"{i}\n", "n": i} for i in range(1, 7)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    return embedded.make_model(tokenizer).eval(), tokenizer


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def trained(folder, model, rewards=None, **changes):
    """A run whose evaluations give the rewards listed, one after the other; members get random ones."""
    net, tokenizer = model
    rewards = iter(rewards or [0.0] * 99)
    kept = []

    def reward(prompts, completions, n, **columns):
        if len(n) == 6:  # an evaluation
            kept.append(weights(net))
            return [next(rewards)] * 6
        return [float(hash(c) % 7) for c in completions]

    settings = {
        "output_dir": str(folder),
        "generations": 4,
        "population_size": 4,
        "sigma": 0.05,
        "lr": 0.05,
        "prompts_per_generation": 3,
        "max_completion_length": 4,
        "eval_every": 1,
        "progress": False,
    }
    trainer = esfast.ESTrainer(net, reward, esfast.ESConfig(**{**settings, **changes}), ROWS, ROWS, tokenizer)
    trainer.train()
    return trainer, kept


@pytest.mark.parametrize("rewards, best", [([0, 1, 3, 2, 3], 2), ([5, 1, 3, 2, 3], None), ([0, 1, 2, 3, 4], 4)])
def test_the_best_model_so_far_is_kept_if_it_beats_the_base(tmp_path, model, rewards, best):
    _, kept = trained(tmp_path, model, map(float, rewards))
    assert (tmp_path / "best").exists() == (best is not None)
    if best is not None:
        saved = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "best"))
        assert all(torch.equal(saved[name], w) for name, w in kept[best].items())
        assert f"for {best} generations" in (tmp_path / "best" / "README.md").read_text().replace("\n", " ")


def test_evaluations_fire_when_they_say(tmp_path, model):
    trainer, kept = trained(tmp_path, model, generations=7, eval_every=3, save_best=False)
    assert [r["generation"] for r in trainer.folder.read_metrics() if "eval_reward" in r] == [0, 3, 6, 7]
    assert len(kept) == 4 and not (tmp_path / "best").exists()


def test_samples_and_their_rewards_are_kept(tmp_path, model):
    trained(tmp_path, model, [0.0, 1.0, 2.0, 3.0, 4.0], samples=2)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [s["generation"] for s in lines] == [g for g in range(5) for _ in range(2)]
    assert [s["rewards"] for s in lines[::2]] == [[float(g)] for g in range(5)]
    assert lines[0]["prompt"] == "1\n" and isinstance(lines[0]["completion"], str)


def test_the_model_card_states_the_facts(tmp_path, model):
    trained(tmp_path, model, [0.25, 1.0, 1.0, 1.0, 0.5])
    text = (tmp_path / "model" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "transformers" and "base_model" not in header  # it has no name on a hub
    assert "| reward | 0.25 | 0.5 |" in text and "sigma: 0.05" in text and "4 generations" in text


def test_metrics_tell_how_far_the_weights_moved(tmp_path, model):
    net, tokenizer = model
    before = weights(net)
    trainer, _ = trained(tmp_path, model, generations=1)
    exact = torch.cat([(p - before[name]).flatten() for name, p in net.named_parameters()]).norm().item()
    row = trainer.folder.read_metrics()[-1]
    assert row["update_norm"] == row["distance"] == pytest.approx(exact, rel=0.05)
    tensors = [("a", torch.zeros(1000)), ("b", torch.zeros(3, 5))]
    movement = Movement(esfast.Plan(tensors))
    for _, t in tensors:
        t.add_(2.0)
    assert movement.norms() == {"update_norm": pytest.approx(2 * 1015**0.5), "distance": pytest.approx(2 * 1015**0.5)}
    assert movement.norms()["update_norm"] == 0
    # an update of groups is whole if each tensor moves as its group says
    rule = Rule(groups=(esfast.Group("b", lr=3.0),))
    movement = Movement(esfast.Plan(tensors), rule)
    for (_, t), lr in zip(tensors, (1.0, 3.0), strict=True):
        t.add_(0.5 * lr)
    assert movement.norms([0.3, 0.4])["update_kept"] == pytest.approx(1.0)


def test_weights_are_selected_by_name(tmp_path, model):
    net, _ = model
    before = weights(net)
    trained(tmp_path, model, generations=1, include="*layers.0*", exclude=["*norm*", "*bias"])
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {n for n in before if "layers.0" in n and "norm" not in n and not n.endswith("bias")} != set()


def test_selecting_nothing_names_the_pattern(tmp_path, model):
    with pytest.raises(ValueError, match=r"include pattern '\*lora_\*' matches no tensor"):
        trained(tmp_path / "run", model, include=["*lora_*"])
    assert not (tmp_path / "run").exists()


def test_tensorboard_and_wandb(tmp_path, model, monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda m, step: calls.append((step, m)), finish=lambda: calls.append("closed"))
    fake = SimpleNamespace(init=lambda **kw: calls.append(kw["name"]) or run, __spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trained(tmp_path / "mine", model, [0.5] * 5, generations=2, report_to="wandb")
    assert calls[0] == "mine" and calls[-1] == "closed" and [c[0] for c in calls[1:-1]] == [0, 1, 2]
    assert calls[1][1]["eval_reward"] == 0.5 and "generation" not in calls[1][1] and "reward_mean" in calls[2][1]


def test_tensorboard_event_files_hold_the_metrics(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard, an optional package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = Report(["tensorboard"], tmp_path, {"sigma": 0.1})
    for g in range(3):
        report.log({"generation": g, "reward_mean": g / 2, "note": "text is not drawn"})
    report.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward_mean")] == [(0, 0), (1, 0.5), (2, 1)]


def test_loggers_that_are_missing_or_unknown(tmp_path, model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="report_to: wandb is not installed: pip install wandb"):
        trained(tmp_path / "run", model, report_to=["wandb"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="report_to: expected one of 'tensorboard', 'wandb', 'none', got 'tensorbord'"):
        esfast.ESConfig(report_to="tensorbord")
    assert esfast.ESConfig(report_to="none").report_to is None


def test_half_a_character_is_escaped_in_files_and_refused_in_names(tmp_path, model):
    net, tokenizer = model
    half, c = "\ud83d", esfast.ESConfig(output_dir=str(tmp_path), generations=1, population_size=2, progress=False)

    def reward(completions, **columns):
        return [float(len(text)) for text in completions]

    def answer(prompts):
        return [prompt + half for prompt in prompts]

    with pytest.raises(ValueError, match="metrics: .* holds a lone surrogate"):
        esfast.ESTrainer(net, reward, c, ROWS, ROWS, tokenizer, {half: reward}, engine=answer)
    rows = [{**row, "column": half} for row in ROWS]
    esfast.ESTrainer(net, reward, c, rows, rows, tokenizer, engine=answer).train()
    sample = json.loads((tmp_path / "samples.jsonl").read_text(encoding="ascii").splitlines()[0])
    assert sample["completion"] == "1\n" + half
    write_whole(tmp_path / "report.html", page([load(tmp_path)], samples=5))
    assert "\u27e8U+D83D\u27e9" in (tmp_path / "report.html").read_text(encoding="utf-8")  # shown by its number
