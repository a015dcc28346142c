"""What members change of a model's buffers is put back; what somebody else changed of its weights is not undone."""

import threading

import pytest
import torch

import esfast
from esfast.es.buffers import Buffers
from esfast.es.weights import MODES
from esfast.integrations.ask_tell import AskTell


class Tricky(torch.nn.Module):
    """Every way in which a member's forward pass may change a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.spectral = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(3, 3))
        self.register_buffer("count", torch.tensor(7), persistent=False)
        self.register_buffer("average", torch.tensor([0.0, -0.0, float("nan")]))
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("nothing", None)
        self.register_buffer("shared", self.norm.running_mean)
        self.register_buffer("complex", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("flags", torch.zeros(5, dtype=torch.bool)[::2])
        self.longest = 4

    def forward(self, x):
        self.count += 1
        self.average.data.mul_(-1).add_(1)  # which PyTorch does not count as a write
        self.complex.real.add_(1)
        self.flags.logical_not_()
        self.nothing = torch.ones(2)
        if self.longest < 9:  # as rotary tables grow
            self.register_buffer("table", torch.arange(9.0))
            self.longest = torch.tensor(9)
            self.register_buffer("lazy", torch.ones(1), persistent=False)
        assert self.table.numel() == 9
        return self.spectral(self.norm(self.linear(x))).square().sum()


def state(model):
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return kept, list(model.state_dict()), [id(b) for b in model.buffers()], model.longest


def assert_same(model, before):
    kept, names, ids, longest = before
    assert [name for name, _ in model.named_buffers()] == list(kept)
    for name, buffer in model.named_buffers():
        raw = [t.view(torch.float32) if t.is_complex() else t for t in (buffer, kept[name])]
        integers = {1: torch.uint8, 4: torch.int32, 8: torch.int64}[raw[0].dtype.itemsize]
        assert torch.equal(*(t.view(integers) for t in raw)), name
    assert (list(model.state_dict()), [id(b) for b in model.buffers()], model.longest) == (names, ids, longest)
    assert model.nothing is None and not hasattr(model, "lazy")


def tricky():
    torch.manual_seed(0)
    return Tricky().train()


X = torch.arange(12.0).reshape(4, 3).sin()


def score(model):
    with torch.no_grad():
        return model(X).item()


@pytest.mark.parametrize("weights", MODES)
def test_a_population_leaves_the_buffers_as_they_were(weights):
    """Each member, too, begins with the same buffers, so members get the same rewards in any order."""
    model = tricky()
    before = state(model)
    es = esfast.ES(model, sigma=0.1, population_size=4, weights=weights)
    rewards = []
    for member in es.population():
        assert_same(model, before)
        member.reward = score(model)
        rewards.append(member.reward)
    assert_same(model, before)
    if weights in ("base", "master"):
        again = []
        with es.population() as members:
            for member in reversed(members.members):
                with esfast.perturbed(es.plan, member.seed, es.sigma):
                    again.append(score(model))
        assert again[::-1] == rewards
    for member in es.population():
        member.reward = score(model)
        break
    assert_same(model, before)


def test_perturbed_and_candidates_nested_or_failing():
    model = tricky()
    before, plan = state(model), esfast.Plan(model)
    base = plan.clone()
    for options in ({}, {"base": base}):
        with esfast.perturbed(plan, 1, 0.1, **options):
            score(model)
            inner = state(model)[0]
            with esfast.perturbed(plan, 2, 0.1):
                score(model)
            assert torch.equal(model.norm.running_var, inner["norm.running_var"])
            assert model.count == inner["count"] == 8
        assert_same(model, before)
    with pytest.raises(ZeroDivisionError), esfast.perturbed(model, 1, 0.1):
        score(model)
        raise ZeroDivisionError
    assert_same(model, before)
    es = AskTell(model, sigma=0.1, population_size=2)
    candidates, losses = es.ask(), []
    for candidate in candidates:
        with candidate:
            losses.append(score(model))
    es.tell(candidates, losses)
    assert_same(model, before)


def test_what_is_changed_between_populations_is_kept():
    """A user may recalibrate statistics after an update, also through .data, and may choose train or eval mode."""
    model = tricky()
    es = esfast.ES(model, sigma=0.1, population_size=2)
    for member in es.population():
        member.reward = score(model)
    es.step()
    score(model)
    model.norm.running_mean.data.fill_(3.0)
    before = state(model)
    for member in es.population():
        member.reward = float(model.norm.running_mean.sum())
        model.norm.running_mean.data = torch.zeros(3)
        model.norm.running_var.resize_(1)
        model.count = torch.tensor(1)
        model.eval()
    assert [m.reward for m in es.members] == [9.0, 9.0]
    kept = dict(model.named_buffers())
    assert all(torch.equal(kept[n], b) for n, b in before[0].items() if n != "average") and model.count == 8
    assert not model.training and not model.norm.training


def test_in_inference_mode():
    with torch.inference_mode():
        made = torch.nn.BatchNorm1d(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), made)
    model[2].weight, model[2].bias = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    before = [b.clone() for b in model.buffers()]
    es = esfast.ES(model, population_size=2)
    for member in es.population():
        with torch.inference_mode():
            member.reward = model(X).sum().item()
    assert all(map(torch.equal, before, model.buffers()))


def test_constant_buffers_are_copied_once_and_large_ones_not_at_all(monkeypatch, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model.register_buffer("mask", torch.ones(1000))
    model.register_buffer("cache", torch.zeros(2000))
    monkeypatch.setattr("esfast.es.buffers.LEAST_BUDGET", 5000)
    es, copies = esfast.ES(model, population_size=3), []
    for _ in range(2):
        for member in es.population():
            member.reward = float(member.index)
            model.cache += 1
        es.step()
        copies.append(es._buffers._kept[id(model.mask)].copy)
        assert es._buffers._kept[id(model.cache)].copy is None
    assert copies[0] is copies[1] and torch.equal(copies[0], model.mask)
    assert model.mask._version == 0 and model.cache[0] == 6
    assert [r.message for r in caplog.records].count(
        "the buffer 'cache', which a member changed, is too large to be copied and stays as it is now"
    ) == 1


def test_a_plan_of_tensors_has_no_buffers_and_a_part_neither():
    model = tricky()
    assert esfast.Plan(model.named_parameters()).module is None
    assert esfast.Plan(model, include="linear*").module is model and esfast.Plan(model).subset([0]).module is None
    nothing = Buffers(esfast.Plan(model.named_parameters()))
    nothing.note()
    score(model)
    nothing.put_back()
    assert model.count == 8


def test_processes_of_a_team_end_equal(tmp_path):
    """Two processes score different members, in train mode."""
    store = torch.distributed.HashStore()
    models = [tricky() for _ in range(2)]

    def work(rank):
        # with Adam each process calculates all of an update, and no process group is needed
        es = esfast.ES(models[rank], sigma=0.1, population_size=5, optimizer="adam", team=esfast.Team(store, rank, 2))
        for _ in range(2):
            for member in es.population():
                member.reward = score(models[rank])
            es.step()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    alone = tricky()
    es = esfast.ES(alone, sigma=0.1, population_size=5, optimizer="adam")
    for _ in range(2):
        for member in es.population():
            member.reward = score(alone)
        es.step()
    for model in models:
        assert_same(model, state(tricky())[:2] + ([id(b) for b in model.buffers()], 4))
        assert all(map(torch.equal, model.parameters(), alone.parameters()))


# ---- weights that somebody else writes -----------------------------------------------------------------------------------


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Linear(5, 3, dtype=dtype)


def evaluate(es):
    for member in es.population():
        member.reward = float(member.index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["base", "master", "host"])
def test_es_does_not_undo_what_was_loaded(weights, dtype):
    model = linear(dtype)
    es = esfast.ES(model, lr=0.1, population_size=4, weights=weights)
    evaluate(es)
    es.step()
    # Loading the same bits is no change.
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()})
    evaluate(es)
    other = {name: p + 1 for name, p in model.state_dict().items()}
    model.load_state_dict(other)
    for call in (es.step, es.population):
        with pytest.raises(RuntimeError, match="the weights were changed since ES last wrote them"):
            call()
    assert all(torch.equal(p, other[name]) for name, p in model.named_parameters())
    es = esfast.ES(model, lr=0.1, population_size=4, weights=weights)
    evaluate(es)
    assert all(torch.equal(p, other[name]) for name, p in model.named_parameters())


def test_candidates_do_not_undo_what_was_loaded():
    model = linear()
    es = AskTell(model, population_size=2)
    first, second = es.ask()
    with first:
        pass
    with torch.no_grad():
        model.weight.fill_(3.0)
    with pytest.raises(RuntimeError, match="member 1: the weights were changed since ES last wrote them"), second:
        pass
    assert (model.weight == 3.0).all()
    with pytest.raises(RuntimeError, match="the weights were changed since ES last wrote them"):
        es.ask()


def test_inplace_takes_the_weights_as_they_are():
    model = linear()
    es = esfast.ES(model, population_size=4, weights="inplace")
    evaluate(es)
    with torch.no_grad():
        model.weight.fill_(3.0)
    evaluate(es)
    torch.testing.assert_close(model.weight, torch.full((3, 5), 3.0))
