"""The optimizer protocol: an optimizer and an epilogue that only this file knows, through ES, journals and resumes."""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import esfast
from esfast import ES, Plan, journal
from esfast.core.epilogue import Epilogue
from esfast.core.noise import fma
from esfast.core.ops import AdamStep, add_noise_
from esfast.update import optimizer as protocol
from esfast.update.optimizer import OPTIMIZERS, Optimizer, State, Step
from esfast.update.updater import Rule

pytestmark = pytest.mark.filterwarnings("ignore:esfast uses its slow reference for")


@pytest.fixture(autouse=True)
def registry():
    """What a test registers is gone after it."""
    before = dict(OPTIMIZERS)
    yield
    OPTIMIZERS.clear()
    OPTIMIZERS.update(before)


@dataclass(frozen=True)
class LionStep(Epilogue):
    """w += lr sign(beta m + (1 - beta) g);  m += (1 - beta) (g - m)"""

    buffers: torch.Tensor
    lr: float
    beta: float

    def apply(self, x, g, buffers):
        (m,) = buffers
        direction = np.sign(fma(np.float32(1 - self.beta), g - m, m))
        m[:] = fma(np.float32(1 - self.beta), g - m, m)
        return fma(np.float32(self.lr), direction, x)


def lion():
    @dataclass(frozen=True)
    class Lion(Optimizer, name="lion"):
        beta: float = 0.9

        bytes_per_weight = 4
        lr_in_coeffs = False

        def allocate_state(self, plan):
            return State({"lion": torch.zeros(1, plan.flat_numel)})

        def step(self, state, record, lr):
            return Step(record.seeds, record.coeffs, LionStep(state.tensors["lion"], lr * record.lr, self.beta))

    return Lion


def weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [(name, torch.randn(7, 5, generator=generator).to(dtype)) for name in "ab"]


def steps(es, count):
    for _ in range(count):
        for member in es.population():
            member.reward = float(sum(t.float().sin().sum() for t in es.plan.tensors))
        es.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_of_ones_own_goes_through_all(tmp_path, dtype, same_bits):
    """Tries an optimizer that only this file knows: its arithmetic, a group's lr, its memory, journal, checkpoint,
    resume and replay."""
    kind = lion()
    options = {"sigma": 0.1, "lr": 0.125, "population_size": 4, "groups": ["b:lr=0.5"], "checkpoints": tmp_path / "c"}
    es = ES(weights(dtype), optimizer=kind(0.75), journal=tmp_path / "j", **options)
    assert es.rule.extra_bytes(es.plan) == 4 * es.plan.flat_numel
    steps(es, 1)
    moved = [(t - w).abs() for t, (_, w) in zip(es.plan.tensors, weights(dtype), strict=True)]
    assert torch.allclose(moved[0].float(), torch.tensor(0.125), atol=0.01)
    assert torch.allclose(moved[1].float(), torch.tensor(0.0625), atol=0.01)
    es.checkpoint()
    steps(es, 1)
    es.record_fingerprint()
    again = ES(weights(dtype), optimizer=kind(0.75), journal=tmp_path / "j", resume=True, **options)
    assert again.generation == 2 and same_bits(again.plan.tensors, es.plan.tensors)
    assert same_bits(again.store.updater.state.tensors["lion"], es.store.updater.state.tensors["lion"])
    assert journal.read(tmp_path / "j").header["optimizer"] == {"name": "lion", "beta": 0.75}
    plan = Plan(weights(dtype))
    journal.replay(plan, tmp_path / "j")
    assert same_bits(plan.tensors, es.plan.tensors)
    with pytest.raises(ValueError, match=r"optimizer \{'name': 'lion', 'beta': 0.75\}, this one has .*0.5"):
        ES(weights(dtype), optimizer=kind(0.5), journal=tmp_path / "j", resume=True, **options)
    # A replay without the optimizer's class is refused by its name, and no weight changes.
    OPTIMIZERS.pop("lion")
    with pytest.raises(ValueError, match="got 'lion'.* known once its module is imported"):
        journal.replay(plan := Plan(weights(dtype)), tmp_path / "j")
    assert same_bits(plan.tensors, [w for _, w in weights(dtype)])


def test_one_that_needs_no_other_arithmetic_has_all_backends(same_bits):
    """The optimizer here averages two generations: one pass of SGD over the seeds of both."""

    @dataclass(frozen=True)
    class Twice(Optimizer, name="twice"):
        def allocate_state(self, plan):
            return State(past=protocol.deque(maxlen=1))

        def step(self, state, record, lr):
            both = [record, *state.past]
            return Step([s for r in both for s in r.seeds], [lr * c / 2 for r in both for c in r.coeffs])

    found = {}
    for backend in ("cpu", "reference"):
        es = ES(weights(), optimizer="twice", sigma=0.1, lr=0.1, population_size=4, backend=backend)
        steps(es, 3)
        found[backend] = es.plan.tensors
    assert same_bits(found["cpu"], found["reference"])
    assert len(es.store.updater.state.past) == 1


def test_which_backend_runs_an_epilogue():
    plan = Plan(weights())
    step = LionStep(torch.zeros(1, plan.flat_numel), 0.1, 0.9)
    with pytest.raises(RuntimeError, match="backend 'cpu' can't run: it has no kernels for LionStep"):
        add_noise_(plan, [1], [1.0], backend="cpu", epilogue=step)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        add_noise_(plan, [1], [1.0], backend="auto", epilogue=step)
    assert "slow reference for LionStep" in str(said[0].message)
    for wrong, error, words in (
        (torch.zeros(1, 3), TypeError, r"LionStep: expected buffers = torch.zeros\(k, plan.flat_numel\)"),
        (torch.zeros(1, plan.flat_numel, dtype=torch.float64), TypeError, "LionStep: expected buffers"),
    ):
        with pytest.raises(error, match=words):
            add_noise_(plan, [1], [1.0], epilogue=replace(step, buffers=wrong))
    with pytest.raises(ValueError, match="LionStep: works in place"):
        add_noise_(plan, [1], [1.0], plan.clone(), epilogue=step)
    with pytest.raises(TypeError, match="expected an esfast.core.ops.AdamStep"):
        add_noise_(plan, [1], [1.0], epilogue="adam")


def test_adam_is_its_epilogue(same_bits):
    """`adam=` and `epilogue=` give the same bits, and so does the reference backend, which runs the epilogue's
    `apply`."""
    plans = [Plan(weights()) for _ in range(3)]
    for plan, options in zip(plans, ("adam", "epilogue", "reference"), strict=True):
        moments = torch.zeros(2, plan.flat_numel)
        for t in (1, 2):
            step = AdamStep.at(t, moments, 0.1, 0.9, 0.99, 1e-8)
            given = {"adam": step} if options == "adam" else {"epilogue": step}
            add_noise_(plan, [t], [0.5], backend="reference" if options == "reference" else "cpu", **given)
    assert same_bits(plans[0].tensors, plans[1].tensors) and same_bits(plans[0].tensors, plans[2].tensors)


def test_names(monkeypatch):
    assert esfast.Adam.name == "adam" and list(OPTIMIZERS)[:3] == ["sgd", "momentum", "adam"]
    lion()
    lion()  # a notebook's cell that runs again
    with pytest.raises(ValueError, match="'lion' is the name of .*Lion; choose another"):

        class Other(Optimizer, name="lion"):
            pass

    with pytest.raises(TypeError, match="Stepless must have a method step"):

        class Stepless(Optimizer, name="stepless"):
            pass

    assert "stepless" not in OPTIMIZERS
    assert type(Optimizer) is type, "the metaclass of abc takes no argument called name in Python 3.10"

    class Nameless(Optimizer):
        def step(self, state, record, lr):
            return Step([], [])

    with pytest.raises(TypeError, match="optimizer: expected 'sgd'"):
        Rule(optimizer=Nameless())
    with pytest.raises(ValueError, match="Did you mean 'momentum'"):
        Rule.from_json(Rule().to_json() | {"optimizer": {"name": "momentun"}})
    OPTIMIZERS.pop("lion")

    class Point:
        name, load = "lion", staticmethod(lion)

    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group: [Point] if group == "esfast.optimizers" else []
    )
    assert ES(weights(), optimizer="lion", population_size=2).rule.optimizer.beta == 0.9


def test_settings_hold_it_as_text():
    """ESConfig holds an optimizer as text with its numbers, which config.yaml and the command line can hold."""
    kind = lion()
    for given in (kind(0.5), "lion:beta=0.5", "lion: beta=0.5"):
        config = esfast.ESConfig(optimizer=given)
        assert config.optimizer == "lion:beta=0.5" and config.make_optimizer() == kind(0.5)
    assert esfast.ESConfig(optimizer="lion").optimizer == "lion:beta=0.9"
    config = esfast.ESConfig(optimizer="adam:beta1=0.5")
    assert (config.optimizer, config.adam_beta1) == ("adam", 0.5) and config.make_optimizer() == esfast.Adam(0.5)
    for text, words in (
        ("lion:beat=0.5", "unknown field 'beat'.* Did you mean 'beta'"),
        ("lion:beta", "unknown field 'beta'|expected a number"),
        ("lion:beta=", "expected a number after beta="),
        ("lino", "ESConfig.optimizer: expected one of .* Did you mean 'lion'"),
        ("adam:beta1=2", "beta1: expected a number between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=words):
            esfast.ESConfig(optimizer=text)
