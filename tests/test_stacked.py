"""Several members in one forward pass: what each answers is what it answers alone, or it is refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import esfast
from esfast.bench.architectures import tiny_model
from esfast.core.plan import Plan
from esfast.rollout.stacked_model import StackedModel, Unsupported
from esfast.tasks import embedded
from esfast.update.optimizers import check_groups
from esfast.update.updater import Rule

MEMBERS = [(1, 0.1), (2, 0.05), (1, -0.1)]


class Text(nn.Module):
    """Shared positions, a learned prefix that is repeated for each row, a tied head."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(20, 16)
        self.prefix = nn.Parameter(torch.randn(1, 2, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.layer(torch.cat([self.prefix.expand(len(ids), -1, -1), x], 1)))


class Recurrent(nn.Module):
    """Keeps its weights in a list, too."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class TimeFirst(nn.Module):
    """Rows in the second dimension inside."""

    def __init__(self):
        super().__init__()
        self.cell, self.mix = nn.GRU(8, 16), nn.Parameter(torch.randn(16, 5))
        self.attend = nn.MultiheadAttention(16, 4)

    def forward(self, x):
        y = self.cell(x.transpose(0, 1))[0]
        return torch.einsum("tbi,ij->btj", self.attend(y, y, y)[0], self.mix)


class Experts(nn.Module):
    """Each row goes to one of four; how many rows an expert gets depends on the weights."""

    def __init__(self):
        super().__init__()
        self.router, self.weights = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for expert in range(4):
            rows = (chosen == expert).nonzero()[:, 0]
            y.index_add_(0, rows, F.linear(x[rows], self.weights[expert]))
        return y


class Layers(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers, self.scale = nn.Sequential(*layers), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.layers(x) * self.scale


class Odd(nn.Module):
    """Weights of odd places and with odd functions."""

    def __init__(self):
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.bent, self.pairs = nn.PReLU(8), nn.Bilinear(8, 8, 4)
        self.list = nn.ParameterList([torch.randn(4), torch.randn(1)])

    def forward(self, x):
        y = self.pairs(x, self.bent(self.normed(x)))
        return (y * self.list[0].exp() + self.list[1]).square().sum(-1)


def conv():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 49, 5),
    ).eval()


MODULES = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)), (6, 4)),
    "convolutions": (conv, (5, 3, 8, 8)),
    "text": (lambda: Text().eval(), None),
    "recurrent": (Recurrent, (5, 6, 8)),
    "time first": (TimeFirst, (5, 6, 8)),
    "experts": (lambda: Layers(Experts(), nn.LayerNorm(8), nn.RMSNorm(8)), (7, 8)),
    "statistics of a batch": (
        lambda: Layers(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8)),
        (6, 8),
    ),
    "odd places": (Odd, (4, 8)),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def inputs(shape):
    return torch.randint(0, 50, (5, 9)) if shape is None else torch.randn(shape)


@torch.no_grad()
def alone(model, x, members=MEMBERS, **options):
    answers = []
    for seed, sigma in members:
        with esfast.perturbed(model, seed, sigma, **options):
            answers.append(model(x))
    return torch.cat(answers)


@pytest.mark.parametrize("name", MODULES)
def test_each_member_answers_as_alone(name, same_bits):
    make, shape = MODULES[name]
    model, x = make(), inputs(shape)
    expected = alone(model, x)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    rows = x.repeat(len(MEMBERS), *[1] * (x.dim() - 1))
    with torch.no_grad(), esfast.stacked(model, MEMBERS) as together:
        answers = [together(rows), together(rows)]
    for answer in answers:
        assert torch.allclose(answer, expected, rtol=1e-5, atol=1e-5)
    assert (expected[: len(x)] - expected[len(x) : 2 * len(x)]).abs().max() > 1e-3
    assert all(model.get_parameter(name) is p and same_bits(p, copy) for name, (p, copy) in before.items())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert not model._forward_pre_hooks and not any("forward" in vars(m) for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "low_rank"])
def test_members_have_the_weights_that_perturbed_gives(dtype, noise, same_bits):
    model = Text().to(dtype)
    together = StackedModel(model, 3, rule=Rule(noise=noise, groups=check_groups(["words*:sigma=0.5"])))
    together.write(MEMBERS)
    for k, (seed, sigma) in enumerate(MEMBERS):
        weights = {}
        for part, factor in (({"include": "words*"}, 0.5), ({"exclude": "words*"}, 1.0)):
            plan = Plan(model, **part)
            with esfast.perturbed(plan, seed, sigma * factor, noise=noise):
                weights |= {n: t.clone() for n, t in zip(plan.names, plan.tensors, strict=True)}
        with together.alone(k):
            assert all(same_bits(dict(model.named_parameters())[n], t) for n, t in weights.items())
    tied = sum(copies.nbytes for copies in together._tied.values())
    assert 3 <= (together.nbytes - tied) / Plan(model).nbytes <= 4


def test_a_packet_may_be_smaller_than_the_memory_for_it():
    model, x = Text().eval(), inputs(None)
    together = StackedModel(model, 3)
    for count in (3, 1, 2):
        together.write(MEMBERS[:count])
        with torch.no_grad(), together.in_place() as module:
            answer = module(x.repeat(count, 1))
        assert torch.allclose(answer, alone(model, x, MEMBERS[:count]), atol=1e-5)
    with pytest.raises(ValueError, match="expected 1 to 3 members, got 6"):
        together.write(MEMBERS * 2)


def test_a_base_is_what_members_are_written_from(same_bits):
    model = nn.Linear(4, 4)
    base = Plan(model).clone()
    with torch.no_grad():
        model.weight.zero_()
    together = StackedModel(model, 2, base=base)
    together.write([(1, 1e-20), (2, 1e-20)])
    with together.alone(1):
        assert same_bits(model.weight, base.tensors[0])


class Reads(nn.Module):
    """A number read out of a weight, which is another for each member."""

    def __init__(self):
        super().__init__()
        self.limit = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.clamp(max=self.limit.item())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.weight = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = self.inner(x)
        return torch.cosh(self.weight) * y if len(x) > 40 else y


def test_what_members_cannot_share_is_refused_by_name():
    with pytest.raises(Unsupported, match="can't share a Reads: item of limit"), esfast.stacked(Reads(), MEMBERS) as m:
        m(torch.randn(6, 4))
    dropping = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    with pytest.raises(Unsupported, match="Sequential: it answers otherwise"), esfast.stacked(dropping, MEMBERS) as m:
        m(torch.randn(6, 8))
    with pytest.raises(Unsupported, match="can't share"), esfast.stacked(dropping, MEMBERS) as m:
        m(torch.randn(6, 8))
    assert esfast.stacked(dropping.eval(), MEMBERS).__enter__()(torch.randn(6, 8)).shape == (6, 8)


def test_an_operation_that_the_first_look_did_not_see_is_refused():
    model = Branches()
    with torch.no_grad(), esfast.stacked(model, MEMBERS) as together:
        together(torch.randn(6, 4))
        with pytest.raises(Unsupported, match=r"cosh of weight, which the first look did not see"):
            together(torch.randn(60, 4))
        with pytest.raises(Unsupported, match=r"linear of inner.weight, inner.bias and 10 rows: .* each of 3 members"):
            together(torch.randn(10, 4))
    assert isinstance(model.weight, nn.Parameter)


def test_wrong_arguments_are_refused_before_anything_is_written():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="8 rows can't be shared by 3 members"), esfast.stacked(model, MEMBERS) as m:
        m(torch.randn(8, 4))
    for wrong, message in (([], "at least one"), ([(1, float("nan"))], "finite"), ([(-1, 0.1)], "seed")):
        with pytest.raises((TypeError, ValueError), match=message), esfast.stacked(model, wrong):
            pass
    with pytest.raises(TypeError, match="made of an nn.Module"):
        StackedModel(Plan(model.named_parameters()), 2)
    with pytest.raises(ValueError, match="'other' of the plan is no parameter"):
        plan = Plan(model)
        StackedModel(_with_module(Plan([("other", torch.ones(3))]), plan.module), 2)
    model.view = model.weight.detach()[:2]
    with pytest.raises(ValueError, match="keeps a view of the weight 'weight' in 'view'"):
        StackedModel(model, 2)


def _with_module(plan, module):
    plan.module = module
    return plan


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_model_is_whole_after_any_exit(error):
    model = nn.Sequential(Experts(), nn.Linear(8, 8))
    parameters = list(model.parameters())
    with pytest.raises(error), torch.no_grad(), esfast.stacked(model, MEMBERS) as together:
        together(torch.randn(6, 8))
        raise error
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not any("forward" in vars(m) for m in model.modules()) and not model._forward_pre_hooks


def test_what_a_plan_leaves_out_all_members_share():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    plan, x = Plan(model, exclude="1.*"), torch.randn(5, 4)
    with torch.no_grad(), esfast.stacked(plan, MEMBERS) as together:
        answer = together(x.repeat(3, 1))
    expected = []
    for seed, sigma in MEMBERS:
        with torch.no_grad(), esfast.perturbed(plan, seed, sigma):
            expected.append(model(x))
    assert torch.allclose(answer, torch.cat(expected), atol=1e-6)
    assert not torch.allclose(answer, alone(model, x), atol=1e-3)


def test_packets_hold_the_members_that_come_one_by_one():
    model = nn.Linear(3, 1)
    es = esfast.ES(model, sigma=0.1, lr=0.1, population_size=10, mirrored=True, seed=4)
    weights = [p.clone() for p in model.parameters()]
    one_by_one = [(m.index, m.seed, m.sign) for m in es.population()]
    packets = es.population(at_once=4)
    found = []
    assert len(packets) == 3
    for packet in packets:
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        found.append([(m.index, m.seed, m.sign) for m in packet])
        for member in packet:
            member.reward = float(member.index)
    assert [len(packet) for packet in found] == [4, 4, 2] and sum(found, []) == one_by_one
    assert es.step().rewards == [float(i) for i in range(10)]
    with pytest.raises(esfast.utils.errors.BadState, match="of the past"):
        list(packets)
    for wrong in (0, 1.5, "2"):
        with pytest.raises((TypeError, ValueError), match="at_once"):
            es.population(at_once=wrong)


def test_a_module_of_any_kind_learns_the_same_from_members_together(same_bits):
    """README's circle: the accuracy is a count of rows, so that rewards are equal to the bit."""
    points = torch.randn(200, 2)
    inside = points.norm(dim=1) < 1.6
    models = []
    for at_once in (None, 1, 4, 10):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
        es = esfast.ES(model, sigma=0.1, lr=0.1, population_size=10, mirrored=True)
        for _ in range(5):
            with torch.no_grad():
                if at_once is None:
                    for member in es.population():
                        member.reward = ((model(points)[:, 0] > 0) == inside).float().mean().item()
                else:
                    for members in es.population(at_once):
                        with esfast.stacked(es.plan, [(m.seed, m.sign * es.sigma) for m in members]) as together:
                            right = (together(points.repeat(len(members), 1))[:, 0] > 0).view(-1, 200) == inside
                        for member, reward in zip(members, right.float().mean(1).tolist(), strict=True):
                            member.reward = reward
            es.step()
        models.append(list(model.parameters()))
    assert all(same_bits(models[0], other) for other in models[1:])


# what must be called one by one: a dense model, one with learned positions, experts, states, hybrids, ALiBi, seq first
LANGUAGE_MODELS = {
    "gpt2": set(),
    "qwen3_moe": {"model.layers.*.mlp.experts"},
    "mamba": set(),
    "jamba": {"model.layers.*.feed_forward.experts"},
    "falcon": set(),
    "xlnet": set(),
    "recurrent_gemma": set(),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_are_tried_out_before_the_first_text(name):
    model = tiny_model(name, embedded.make_tokenizer())
    ids = torch.randint(3, 200, (2, 7))
    with torch.no_grad():
        expected = []
        for seed, sigma in MEMBERS:
            with esfast.perturbed(model, seed, sigma):
                expected.append(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
        together = StackedModel(model, 3)
        together.write(MEMBERS)
        together.check()
        assert together.learned.one_by_one == LANGUAGE_MODELS[name]
        with together.in_place():
            answer = model.generate(ids.repeat(3, 1), max_new_tokens=4, do_sample=False, pad_token_id=0)
    width = answer.shape[1]
    assert torch.equal(answer, torch.cat([F.pad(text, (0, width - text.shape[1])) for text in expected]))
    assert len({tuple(text.flatten().tolist()) for text in expected}) == 3


def test_a_language_model_that_cannot_be_shared_is_refused_at_the_door():
    model = tiny_model("rwkv", embedded.make_tokenizer())
    with pytest.raises(Unsupported, match="members can't share a RwkvForCausalLM"), esfast.stacked(model, MEMBERS):
        pytest.fail("it was let in")
