"""`esfast bench training`: every way of training does what its name says, also those with the usual code's numerics,
and a benchmark that was cut short continues."""

import json

import pytest
import small_model
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esfast import ES, Plan
from esfast.bench import BenchmarkError, greedy, main, today, training
from esfast.bench.kept_runs import kept
from esfast.bench.usual import UsualWeights
from esfast.tasks import embedded
from esfast.update.updater import Generation

TINY = ["--repeats", "1", "--generations", "2", "--prompts", "4", "--eval-every", "1", "--eval-prompts", "20"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model.build(tmp_path_factory.mktemp("model") / "tiny", steps=60)


def settings(way, seed=0, **changes):
    args = {"generations": 2, "prompts_per_generation": 4, "eval_every": 1, "eval_prompts": 20}
    return {"way": training.asdict(way), "seed": seed, **args, **changes}


def test_the_engine_gives_the_completions_of_generate(model):
    loaded = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    prompts = [f"{i} {i + 3} 7={5 * i * i}\n<think>" for i in range(1, 40)]  # of several lengths
    greedy.check(*loaded, 16, prompts)
    engine = greedy.Greedy(*loaded, 16)
    before = engine.generate(prompts)
    assert engine.generate(prompts[:1]) == before[:1]
    with torch.no_grad():
        loaded[0].lm_head.weight.neg_()
    assert engine.generate(prompts) != before  # the weights are read anew


def test_an_engine_that_errs_is_not_trained_with(model, monkeypatch):
    loaded = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    monkeypatch.setattr(greedy._Norm, "__call__", lambda self, x: x * self.weight)
    with pytest.raises(BenchmarkError, match="that of TransformersEngine"):
        greedy.check(*loaded, 16, ["1 2 3=6\n<think>"])


@pytest.mark.parametrize("way", [*training.MODES, training.SWEEP[3]], ids=lambda way: way.name)
def test_a_way_trains_as_it_says(way, model, tmp_path, monkeypatch):
    seen = []
    real = ES.step
    monkeypatch.setattr(ES, "step", lambda es, **options: seen.append(es) or real(es, **options))
    row = training.train(settings(way), tmp_path / "run", str(model))
    es = seen[0]
    assert es.plan.tensors[0].dtype is getattr(torch, way.dtype) and len(seen) == 2
    assert isinstance(es.store, UsualWeights) == way.name.startswith("usual code")
    assert getattr(es.store, "summed", False) == way.name.endswith("summed")
    assert (es.rule.rounding, es.rule.noise, es.population_size) == (way.rounding, way.noise, way.population_size)
    assert "checkpoint_every: 0" in (tmp_path / "run" / "config.yaml").read_text()  # of the usual code there is none
    assert row["rollouts"] == 2 * way.population_size * 4 and row["evaluated"] == [0, 1, 2]
    assert len(row["reward"]) == 2 and len(row["accuracy"]) == 3
    assert (row["drift"] is not None) == (way.weights == "inplace")


def test_ways_of_one_seed_see_the_same_prompts_and_members(model, tmp_path, monkeypatch):
    prompts, seeds = {"usual": [], "base": []}, {"usual": [], "base": []}
    generate, step = greedy.Greedy.generate, ES.step
    for weights, asked in prompts.items():
        monkeypatch.setattr(greedy.Greedy, "generate", lambda self, p, a=asked: a.append(tuple(p)) or generate(self, p))
        monkeypatch.setattr(
            ES,
            "step",
            lambda es, w=weights, **options: seeds[w].append([m.seed for m in es.members]) or step(es, **options),
        )
        training.train(settings(training.Way(weights, weights)), tmp_path / weights, str(model))
    assert prompts["usual"] == prompts["base"] and len(prompts["base"]) == 2 * 30 + 3
    assert seeds["usual"] == seeds["base"] and len(seeds["base"]) == 2


def test_jobs_cover_every_way():
    import argparse

    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    found = training.jobs(parser.parse_args([]))
    assert len(found) == 5 * len(training.MODES) + 3 * (len(training.SWEEP) - 1)
    assert all(s["generations"] == 60 for s in found)
    names = {s["way"]["name"] for s in found}
    assert all(training.SAME.get(w.name, w.name) in names for w in (*training.MODES, *training.SWEEP))


def test_a_run_is_kept_and_taken_up(model, tmp_path):
    ran = []

    def learn(s, folder):
        ran.append(s)
        return training.train(s, folder, str(model))

    asked = settings(training.BASE)
    row = kept(learn, asked, tmp_path, "abc")
    assert kept(learn, asked, tmp_path, "abc") == row and len(ran) == 1
    for other in (({**asked, "generations": 3}, "abc"), (asked, "def")):
        with pytest.raises(BenchmarkError, match="other settings or of another commit"):
            kept(learn, other[0], tmp_path, other[1])
    (tmp_path / "base-seed0" / "row.json").unlink()  # cut short: the remains are no hindrance
    assert kept(learn, asked, tmp_path, "abc")["reward"] == row["reward"] and len(ran) == 2


def test_the_whole_benchmark(model, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "MODES", (training.MODES[0], training.BASE))
    monkeypatch.setattr(training, "SWEEP", training.SWEEP[:2])
    monkeypatch.setattr(embedded, "cached", lambda: model)
    path = tmp_path / "training.json"
    assert main(["training", *TINY, "--sweep-repeats", "1", "--jobs", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [r["way"]["name"] for r in result["rows"]] == ["usual code", "base", "gaussian, N = 10"]
    headers, lines = training.table(result)
    assert [line[0] for line in lines] == ["usual code", "base"]
    _, lines = training.sweep_table(result)
    assert [line[0] for line in lines] == ["gaussian, N = 10", "gaussian, N = 30"]
    assert [line[3] for line in lines] == ["80", "240"] and all(len(line) == len(headers) for line in lines)


# ---- the usual code ------------------------------------------------------------------------------------------------


def plan(dtype):
    generator = torch.Generator().manual_seed(0)
    return Plan([(f"t{i}", (torch.randn(40, 50, generator=generator) * 0.02).to(dtype)) for i in range(2)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_usual_weights_add_and_subtract_in_the_weights_dtype(dtype, same_bits):
    p = plan(dtype)
    expected = [t.clone() for t in p.tensors]
    usual = UsualWeights(p)

    def noise(seed):
        return torch.randn(40, 50, dtype=dtype, generator=torch.Generator().manual_seed(seed))

    for seed in (3, 4):
        usual.perturb(seed, 1e-3)
        for t in expected:
            t.add_(1e-3 * noise(seed))
        assert same_bits(p.tensors, expected)
        usual.restore()
        for t in expected:
            t.sub_(1e-3 * noise(seed))
        assert same_bits(p.tensors, expected)
    assert not same_bits(p.tensors, plan(dtype).tensors)  # it drifts
    usual.update(Generation(0, [3, 4], [1e-4, -2e-4], [], 1e-3, 1e-3))
    for seed, coeff in ((3, 1e-4), (4, -2e-4)):
        for t in expected:
            t.add_(coeff * noise(seed))
    assert same_bits(p.tensors, expected)


def test_usual_weights_summed_are_todays_update(same_bits):
    mine, theirs = plan(torch.bfloat16), plan(torch.bfloat16)
    UsualWeights(mine, summed=True).update(Generation(0, [1, 2], [1e-3, 2e-3], [], 1e-3, 1e-3))
    today.update_(theirs.tensors, [1, 2], [1e-3, 2e-3], "gaussian")
    assert same_bits(mine.tensors, theirs.tensors)
    with pytest.raises(ValueError, match="no weight decay"):
        UsualWeights(mine).update(Generation(0, [1], [1e-3], [], 1e-3, 1e-3, decay=0.1))
