"""Schedules of sigma and lr: their values, and runs that follow them and can be replayed and resumed anywhere."""

import dataclasses
import json
import math

import hypothesis.strategies as st
import pytest
import torch
import yaml
from hypothesis import given
from life import FEW

import esfast
from esfast import cli
from esfast.cli.run_options import FIELDS, es_config
from esfast.journal import journal
from esfast.tasks import embedded
from esfast.trainer.schedules import SCHEDULES, constant, cosine, linear

ROWS = [{"prompt": f"{i} {i + 1}={i}\n<think>"} for i in range(6)]


def test_values():
    assert [constant(8.0, g, 5, 0.5) for g in range(5)] == [8.0] * 5
    assert [linear(8.0, g, 5, 0.5) for g in range(5)] == [8.0, 7.0, 6.0, 5.0, 4.0]
    wave = [4 + 4 * (1 + math.cos(math.pi * g / 4)) / 2 for g in range(5)]
    assert [cosine(8.0, g, 5, 0.5) for g in range(5)] == pytest.approx(wave, rel=1e-15)
    assert cosine(8.0, 2, 5, 0.5) == pytest.approx(6.0, rel=1e-15)  # half way


def test_warmup_rises_in_equal_steps_to_the_full_value_and_the_rest_is_the_schedule():
    for f in SCHEDULES.values():
        assert [f(8.0, g, 10, 0.5, 3) for g in range(3)] == [2.0, 4.0, 6.0]
        assert [f(8.0, g, 10, 0.5, 3) for g in range(3, 10)] == [f(8.0, g, 7, 0.5) for g in range(7)]


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.floats(1e-30, 1e30),
    st.floats(1e-6, 1),
    st.integers(1, 200).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total - 1))),
)
def test_every_schedule_starts_full_ends_at_its_fraction_and_falls_between(name, start, fraction, generations):
    total, warmup = generations
    values = [SCHEDULES[name](start, g, total, fraction, warmup) for g in range(total + 5)]
    fall = values[warmup:]
    assert fall[0] == start and fall == sorted(fall, reverse=True)
    assert all(0 < v < start for v in values[:warmup]) and values[:warmup] == sorted(set(values[:warmup]))
    if name == "constant" or warmup == total - 1:  # no generation is left to fall in
        assert values[total - 1] == start
    else:
        assert values[total - 1 :] == [start * fraction] * 6


# ---- ESConfig -------------------------------------------------------------------------------------------------------


def test_by_default_nothing_changes():
    config = esfast.ESConfig()
    assert {config.rates(g) for g in (0, 1, 250, 499)} == {(config.sigma, config.lr)}


def test_rates_follow_the_settings():
    config = esfast.ESConfig(
        generations=11,
        sigma=0.5,
        lr=0.25,
        sigma_schedule="linear",
        lr_schedule="cosine",
        sigma_final_fraction=0.2,
        lr_final_fraction=0.5,
        warmup_generations=4,
    )
    for g in range(11):
        assert config.rates(g) == (linear(0.5, g, 11, 0.2), cosine(0.25, g, 11, 0.5, 4))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"lr_schedule": "cosin"},
            ValueError,
            "ESConfig.lr_schedule: expected one of 'constant', 'linear', 'cosine', got 'cosin'",
        ),
        ({"sigma_schedule": None}, ValueError, "ESConfig.sigma_schedule: expected one of"),
        ({"sigma_schedule": ["linear"]}, ValueError, "ESConfig.sigma_schedule: expected one of"),
        (
            {"sigma_final_fraction": 0.0},
            ValueError,
            "ESConfig.sigma_final_fraction: expected a number above 0 and at most 1, got 0.0",
        ),
        ({"lr_final_fraction": 1.5}, ValueError, "ESConfig.lr_final_fraction: expected a number above 0"),
        ({"lr_final_fraction": float("nan")}, ValueError, "got nan"),
        ({"lr_final_fraction": "a tenth"}, TypeError, "expected a number, got str 'a tenth'"),
        ({"lr_final_fraction": True}, TypeError, "expected a number, got bool True"),
        ({"sigma": 1e-40, "sigma_final_fraction": 1e-6, "sigma_schedule": "linear"}, ValueError, "is 0 as a float32"),
        ({"warmup_generations": -1}, ValueError, "ESConfig.warmup_generations: expected 0 <="),
        (
            {"warmup_generations": 20, "generations": 20},
            ValueError,
            "ESConfig.warmup_generations: expected 0 <= ESConfig.warmup_generations < 20",
        ),
        ({"warmup_generations": 2.5}, TypeError, "ESConfig.warmup_generations: expected an int"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error) as caught:
        esfast.ESConfig(**settings)
    assert message in str(caught.value)


# ---- runs -----------------------------------------------------------------------------------------------------------


SCHEDULED = {
    "sigma": 0.05,
    "lr": 0.05,
    "sigma_schedule": "linear",
    "lr_schedule": "cosine",
    "sigma_final_fraction": 0.5,
    "lr_final_fraction": 0.25,
    "warmup_generations": 1,
    "generations": 5,
}


class Engine:
    """Answers every prompt with a number that depends on the weights: a member's reward, at no cost."""

    def __init__(self, model):
        self.weight = next(model.parameters())

    def generate(self, prompts):
        return [str(float(self.weight.detach().double().sum()))] * len(prompts)


def value(prompts, completions):
    return [float(text) for text in completions]


def trainer_of(folder):
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    model = embedded.make_model(tokenizer)
    config = esfast.ESConfig(str(folder), population_size=4, prompts_per_generation=4, progress=False, **SCHEDULED)
    return esfast.ESTrainer(model, value, config, ROWS, None, tokenizer, engine=Engine(model))


def test_a_scheduled_run_is_logged_replayed_and_taken_up_in_the_middle(tmp_path, same_bits):
    trainer = trainer_of(tmp_path / "run")
    trainer.train()
    folder, tuned = trainer.folder, trainer.es.plan.tensors
    assert esfast.ESConfig(**yaml.safe_load((folder.path / "config.yaml").read_text())) == trainer.args

    wanted = [trainer.args.rates(g) for g in range(5)]
    assert [(r["sigma"], r["lr"]) for r in folder.read_metrics()[1:]] == wanted and len(set(wanted)) == 5
    records = journal.read(folder.journal)[1]
    assert [(r.sigma, r.lr) for r in records] == wanted
    assert all(sum(c * c for c in r.coeffs) == pytest.approx(r.lr**2 / 4, rel=1e-5) for r in records)

    replayed = trainer_of(tmp_path / "replayed").es.plan
    journal.replay(replayed, folder.journal)
    assert same_bits(replayed.tensors, tuned)

    later = trainer_of(tmp_path / "later")
    for g, record in enumerate(records[:2]):  # its first two generations are taken from the record
        assert [m.seed for m in later.es.population().members] == record.seeds
        later.es.sigma, later.es.lr = later.args.rates(g)
        for member, reward in zip(later.es.members, record.rewards, strict=True):
            member.reward = reward
        later.es.step()
    later.train()
    assert later.es.generation == 5 and same_bits(later.es.plan.tensors, tuned)


def test_every_setting_is_an_option(tiny, tmp_path):
    torch.set_num_threads(1)  # on a model this small, two threads mostly wait for each other
    options = [x for k, v in SCHEDULED.items() for x in ("--" + k.replace("_", "-"), str(v))]
    assert cli.main(["train", "--model", tiny, "--out", str(tmp_path / "run"), *FEW, *options]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {k: config[k] for k in SCHEDULED} == SCHEDULED
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["lr"] for r in rows[1:]] == [esfast.ESConfig(**SCHEDULED).rates(g)[1] for g in range(5)]
    again = dataclasses.asdict(es_config(config))
    assert {k: config[k] for k in again} == again and config.keys() == FIELDS.keys()
