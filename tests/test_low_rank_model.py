"""Members with low-rank noise answer in one batch, with one set of weights, as each does alone."""

import pytest
import torch
from test_population import train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import esfast
from esfast.bench.architectures import tiny_model
from esfast.journal.journal import read, replay
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.evaluator import SequentialEvaluator
from esfast.rollout.low_rank_model import LowRankModel
from esfast.rollout.member_factors import Factors
from esfast.rollout.population import PopulationEvaluator, asking
from esfast.rollout.probe import first_logits
from esfast.rollout.stacked_model import StackedModel, Unsupported
from esfast.tasks import embedded

TOKENIZER = embedded.make_tokenizer()
MEMBERS = [(3, 0.1), (4, -0.1), (3, -0.05)]
ROWS = [[5, 9, 13, 50], [77, 3, 8, 21]]
# what is called for one member after another, and which matrices are made whole
MODELS = {
    "gpt2": (set(), set()),
    "qwen2": (set(), set()),
    "llama": (set(), set()),
    "gemma3_text": (set(), set()),
    "opt": (set(), set()),
    "gpt_neox": (set(), set()),
    "bloom": (set(), set()),
    "falcon": (set(), set()),
    "phi3": (set(), set()),
    "olmo2": (set(), set()),
    "cohere": (set(), set()),
    "qwen3_moe": ({"model.layers.*.mlp.experts"}, set()),
    "gpt_oss": ({"model.layers.*.mlp.experts"}, set()),
    "mamba": (set(), {f"backbone.layers.*.mixer.{n}" for n in ("A_log", "conv1d.weight", "dt_proj.weight")}),
}


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


def alone(model, run, members=MEMBERS, **options):
    answers = []
    for seed, sigma in members:
        with torch.no_grad(), esfast.perturbed(model, seed, sigma, noise="low_rank", **options):
            answers.append(run())
    return torch.cat(answers)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_language_models(name):
    model = tiny_model(name, TOKENIZER).eval()
    rank = 1 + list(MODELS).index(name) % 3
    config = TransformersEngine(model, TOKENIZER, 4).generation_config
    expected = alone(model, lambda: first_logits(model, config, ROWS), rank=rank)
    weights = [p.clone() for p in model.parameters()]
    together = LowRankModel(model, 3, rule=esfast.ES(model, sigma=1, noise="low_rank", rank=rank).rule)
    together.write(MEMBERS)
    together.check()
    assert (together.learned.one_by_one, set(together.learned.operations.whole)) == MODELS[name]
    with torch.no_grad(), together.in_place():
        got = first_logits(model, config, ROWS * 3)
    assert (got - expected).abs().max() < 1e-4 * expected.std()
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


class Odd(nn.Module):
    """A matrix that is used otherwise than in products, one inside a norm, a convolution, vectors, tied weights."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.inner, self.grid = nn.Linear(8, 8, bias=False), nn.Parameter(torch.randn(5, 8))
        self.conv, self.norm = nn.Conv1d(5, 5, 3, padding=1), nn.LayerNorm((5, 8))

    def forward(self, ids):
        x = self.table(ids) * self.grid
        x = self.norm(self.conv(x)) @ self.inner.weight.t() + self.table(torch.arange(5))
        return x @ self.table.weight.T


@pytest.mark.parametrize("groups", [(), (esfast.Group("table*", sigma=3.0),)], ids=["", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_of_any_kind(dtype, groups):
    torch.manual_seed(0)
    model, ids = Odd().to(dtype), torch.randint(0, 11, (7, 5))
    plan = esfast.Plan(model)
    expected = []
    for seed, sigma in MEMBERS:
        with torch.no_grad(), esfast.stacked(model, [(seed, sigma)], noise="low_rank", rank=4, groups=groups) as member:
            expected.append(member(ids))
    expected = torch.cat(expected)
    with torch.no_grad(), esfast.low_rank(plan, MEMBERS, 4, groups=groups) as together:
        got = together(ids.repeat(3, 1))
    assert (got - expected).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype] * expected.std()
    with torch.no_grad():
        assert (model(ids).repeat(3, 1, 1) - expected).abs().max() > 0.2 * expected.std()


@pytest.mark.parametrize("wrong", ["sign", "scale", "member"])
def test_a_wrong_factor_changes_the_answers(wrong):
    model = tiny_model("qwen2", TOKENIZER).eval()
    config = TransformersEngine(model, TOKENIZER, 4).generation_config
    expected = alone(model, lambda: first_logits(model, config, ROWS))
    together = LowRankModel(model, 3)
    together.write(MEMBERS)
    together.check()
    held = next(s for name, s in zip(together.plan.names, together._stacks, strict=True) if "down_proj" in name)
    held.a.copy_({"sign": -held.a, "scale": held.a * 1.1, "member": held.a.roll(1, 0)}[wrong])
    with torch.no_grad(), together.in_place():
        got = first_logits(model, config, ROWS * 3)
    assert (got - expected).abs().max() > 1e-3 * expected.std()


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (6, 4, 2, 3)])
def test_a_member_s_whole_weight_is_that_of_its_noise(shape):
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

    model = Holds()
    together = LowRankModel(model, 3, rule=esfast.ES(model, sigma=1, noise="low_rank", rank=2).rule)
    together.write(MEMBERS)
    (held,) = together._stacks
    assert isinstance(held, Factors) and held.shape == (3, *shape) and held[1:].shape == (2, *shape)
    for k, (seed, sigma) in enumerate(MEMBERS):
        with esfast.perturbed(model, seed, sigma, noise="low_rank", rank=2):
            expected = model.weight.detach().clone()
        with together.alone(k):
            assert torch.allclose(model.weight, expected, atol=1e-6)
        assert not torch.allclose(model.weight, expected, atol=1e-3)


def test_a_member_takes_the_memory_of_its_factors_and_vectors():
    model = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96))
    rule = esfast.ES(model, sigma=1, noise="low_rank", rank=2).rule
    together, whole = LowRankModel(model, 5, rule=rule), StackedModel(model, 5, rule=rule)
    assert together.bytes_of_member == 4 * (2 * (64 + 96) + 3 * 96) == together.nbytes / 5
    assert whole.bytes_of_member == 4 * (64 * 96 + 3 * 96)
    # one member's matrix while it is checked; the memory that a stack's matrix is turned in
    assert (together.bytes_to_check, together.bytes_to_write) == (4 * 64 * 96, 0)
    assert (whole.bytes_to_check, whole.bytes_to_write) == (0, 4 * 64 * 96)


def test_what_members_cannot_share_is_refused():
    with pytest.raises(Unsupported, match="can't share a RwkvForCausalLM"):
        with esfast.low_rank(tiny_model("rwkv", TOKENIZER), MEMBERS):
            pytest.fail("it was let in")
    for options, message in (({"rank": 0}, "rank"), ({"rank": 300}, "rank"), ({"backend": "none"}, "backend")):
        with pytest.raises(ValueError, match=message), esfast.low_rank(nn.Linear(3, 3), MEMBERS, **options):
            pytest.fail("it was let in")


def test_texts_are_nearly_always_those_of_one_after_another(monkeypatch):
    model = tiny_model("qwen2", TOKENIZER)
    es = esfast.ES(model, sigma=0.05, population_size=30, noise="low_rank")
    engine, prompts = TransformersEngine(model, TOKENIZER, 12), [f"{i} + {3 * i} =" for i in range(8)]

    def texts(evaluator):
        found = {m.index: texts for m, texts in evaluator.evaluate(es.population(), prompts, None)}
        return [text for index in range(30) for text in found[index]]

    expected = texts(SequentialEvaluator(engine))
    assert len(set(expected)) > 30
    for at_once in (7, 30):
        found = texts(PopulationEvaluator(engine, at_once))
        assert sum(a == b for a, b in zip(expected, found, strict=True)) >= 238
    assert type(asking(engine, "auto", "low_rank")) is PopulationEvaluator
    monkeypatch.setattr("esfast.rollout.engine.WEIGHTS_FOR_THREADS", 10)
    assert type(asking(engine, "auto")) is SequentialEvaluator
    assert type(asking(engine, "auto", "low_rank")) is PopulationEvaluator


def test_a_run_with_low_rank_noise_goes_on_and_replays_whatever_is_asked_at_once(tmp_path):
    train(tmp_path / "run", members_at_once=4, generations=2, noise="low_rank", rank=2)
    trainer, *_ = train(tmp_path / "run", members_at_once="auto", generations=3, noise="low_rank", rank=2, resume=True)
    trainer, *_ = train(tmp_path / "run", members_at_once=1, generations=4, noise="low_rank", rank=2, resume=True)
    again = esfast.Plan(tiny_model("qwen2", TOKENIZER))
    replay(again, tmp_path / "run" / "journal.jsonl")
    assert again.fingerprint() == trainer.es.plan.fingerprint()
    assert len(read(tmp_path / "run" / "journal.jsonl").records) == 4


@pytest.mark.parametrize("bias", [None, torch.ones(3, 9)])
def test_the_shared_matrix_is_multiplied_once_for_all_rows(bias):
    """Also with each text's last token alone, a slice, which a language model's head is given."""
    held = Factors(torch.randn(9, 8), torch.randn(3, 1, 9), torch.randn(3, 1, 8))
    x, used = torch.randn(6, 4, 8), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(
                a.untyped_storage()._cdata == held.weight.untyped_storage()._cdata for a in args if torch.is_tensor(a)
            ):
                used.append(str(func))
            return func(*args, **(kwargs or {}))

    for some in (x, x[:, -1:], x[:, -1]):
        used.clear()
        with Record():
            got = held.mT.product(some, bias)
        assert [name for name in used if "mm" in name] == ["aten.mm.default" if bias is None else "aten.addmm_.default"]
        expected = some.unflatten(0, (3, 2)).flatten(1, -2) @ held.whole().mT + (0 if bias is None else bias[:, None])
        torch.testing.assert_close(got, expected.view(got.shape))
        assert got.shape == (*some.shape[:-1], 9)
