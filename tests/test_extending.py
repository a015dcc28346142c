"""docs/how-to/extend.md: the engine, evaluator, optimizers, noise kind and task that the page writes are tried here. A
file outside the package is all that each takes."""

import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from life import FEW

import esfast
from esfast import cli
from esfast.core import kinds
from esfast.core.ops import add_noise_
from esfast.tasks import embedded
from esfast.update.optimizer import OPTIMIZERS

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "extend.md"
ENGINE, EVALUATOR, OPTIMIZER, EPILOGUE, NOISE, TASK = re.findall(
    r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
)
ROWS = [{"prompt": f"{i}+{i}="} for i in range(6)]


@pytest.fixture(autouse=True)
def registries():
    """What the page registers is gone after the test."""
    holders = [OPTIMIZERS, kinds.USES, kinds.ADDED, kinds.DOMAINS, kinds.NUMBERS_PER_BLOCK]
    before, lists = [dict(h) for h in holders], [list(kinds.KINDS), list(kinds.ELEMENTWISE)]
    yield
    for holder, old in zip(holders, before, strict=True):
        holder.clear()
        holder.update(old)
    kinds.KINDS[:], kinds.ELEMENTWISE[:] = lists


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    return embedded.make_model(tokenizer).eval(), tokenizer


def run(*codes, scope=None):
    scope = {"__name__": "page"} if scope is None else scope
    sys.modules.setdefault("page", type(sys)("page"))  # where dataclasses look names up
    for code in codes:
        exec(code, scope)
    return scope


def length(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 97) for text in completions]


def config(folder, **changes):
    return esfast.ESConfig(
        output_dir=str(folder),
        **{
            "generations": 2,
            "population_size": 4,
            "sigma": 0.1,
            "lr": 0.1,
            "prompts_per_generation": 3,
            "max_completion_length": 1,
            "eval_every": 0,
            "progress": False,
            **changes,
        },
    )


def test_an_engine_and_an_evaluator(tmp_path, model):
    page, rewards = run(ENGINE, EVALUATOR), {}
    before = [p.detach().clone() for p in model[0].parameters()]
    for name in ("engine", "evaluator"):
        for p, old in zip(model[0].parameters(), before, strict=True):
            p.data.copy_(old)
        engine = page["Greedy"](*model)
        made = {"engine": engine} if name == "engine" else {"evaluator": page["Twice"](engine)}
        trainer = esfast.ESTrainer(model[0], length, config(tmp_path / name), ROWS, ROWS, model[1], **made)
        trainer.train()
        rewards[name] = [r["reward_mean"] for r in trainer.folder.read_metrics()[1:]]
        members = 2 * 4 * 3 * (1 if name == "engine" else 2)
        assert engine.tokens == members + 2 * len(ROWS)  # and two evaluations
    assert rewards["engine"] != rewards["evaluator"]
    assert not all(torch.equal(p, old) for p, old in zip(model[0].parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore:esfast uses its slow reference")
@pytest.mark.parametrize("text", ["average:older=0.25", "sign_momentum"])
def test_optimizers(tmp_path, model, text, same_bits):
    """The page's optimizers, given as a setting's text, train; a replay of the journal gives the same weights."""
    run(OPTIMIZER, EPILOGUE)
    calls = itertools.count()

    def rising(completions, **columns):
        return [float(next(calls))] * len(completions)

    before = [(n, p.detach().clone()) for n, p in model[0].named_parameters()]
    settings = config(tmp_path / "run", optimizer=text, include=["*norm*"], lr=0.01)
    trainer = esfast.ESTrainer(model[0], rising, settings, ROWS, None, model[1])
    trainer.train()
    plan = esfast.Plan([(n, p.clone()) for n, p in before if "norm" in n])
    esfast.journal.replay(plan, trainer.folder.journal)
    assert same_bits(plan.tensors, trainer.es.plan.tensors)
    moved = torch.cat(
        [
            (t - old).flatten()
            for t, (_, old) in zip(trainer.es.plan.tensors, [(n, p) for n, p in before if "norm" in n], strict=True)
        ]
    )
    if text == "sign_momentum":  # two steps of 0.01, up or down
        assert torch.allclose(moved.abs().sort().values[-10:], torch.tensor(0.02), atol=1e-5)
    assert moved.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:esfast uses its slow reference")
def test_a_kind_of_noise(tmp_path, same_bits):
    page = run(NOISE)
    values = esfast.noise(7, "w", 200_000, "uniform").numpy()
    assert abs(values.mean()) < 0.01 and abs(values.var() - 1) < 0.01 and abs(values).max() < 3**0.5
    assert np.allclose(np.histogram(values, 10)[0], 20_000, rtol=0.05)
    assert torch.equal(esfast.noise(7, "w", (4, 5), "uniform").flatten(), torch.from_numpy(values[:20]))
    assert not np.isin(values[:100], esfast.noise(7, "w", 200_000).numpy()).any()
    weights = [("w", torch.zeros(3, 5))]
    es = esfast.ES(weights, sigma=0.1, lr=0.1, population_size=4, noise="uniform", journal=tmp_path / "j")
    for _ in range(2):
        for member in es.population():
            wanted = member.sign * np.float32(0.1) * esfast.noise(member.seed, "w", (3, 5), "uniform")
            if es.generation == 0:
                assert torch.allclose(es.plan.tensors[0], wanted, atol=1e-7)
            member.reward = float(es.plan.tensors[0].sum())
        es.step()
    plan = esfast.Plan([("w", torch.zeros(3, 5))])
    esfast.journal.replay(plan, tmp_path / "j")
    assert same_bits(plan.tensors, es.plan.tensors) and plan.tensors[0].any()
    with pytest.raises(RuntimeError, match="backend 'cpu' can't run: it has no kernels for 'uniform' noise"):
        add_noise_(plan, [1], [1.0], noise="uniform", backend="cpu")
    assert esfast.ESConfig(noise="uniform").noise == "uniform"
    with pytest.raises(ValueError, match="the name 'uniform' or the domain 70002 is taken"):
        kinds.add_kind("uniform", 70_002, 4, page["uniform"])
    with pytest.raises(ValueError, match="the name 'other' or the domain 70001 is taken"):
        kinds.add_kind("other", 70_001, 4, page["uniform"])
    with pytest.raises(ValueError, match="domain: "):
        kinds.add_kind("other", 9, 4, page["uniform"])


def test_a_task(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "parity.py").write_text(TASK, encoding="utf-8")
    from esfast import tasks

    task = tasks.get("parity:task")
    rows, held_out = task.train_rows(3, 50, 1), task.eval_rows(50)
    assert rows == task.train_rows(3, 50, 1) != task.train_rows(4, 50, 1)
    assert not {r["prompt"] for r in rows} & {r["prompt"] for r in held_out}
    assert task.reward_funcs[0](prompts=["", ""], completions=["even", "odd"], even=[True, True]) == [1.0, 0.0]
    options = ["--task", "parity:task", "--model", tiny, "--generations", "1", *FEW]
    assert cli.main(["train", *options, "--out", "run"]) == 0
    assert "parity" in capsys.readouterr().out + (tmp_path / "run" / "config.yaml").read_text()

    class Point:
        name = "parity"

        @staticmethod
        def load():
            return sys.modules["parity"].task

    monkeypatch.setattr(tasks, "entry_points", lambda group: [Point] if group == "esfast.tasks" else [])
    assert tasks.get("parity").name == "parity"
    (tmp_path / "nothing.py").write_text("def task(**options):\n    return 3\n")
    for name, error, words in (
        ("parit", ValueError, "unknown task 'parit'"),
        ("nothing:task", TypeError, "task: expected an esfast.tasks.Task from nothing:task, got 3"),
        ("nothing:other", ValueError, "task: nothing has no function 'other'"),
        ("nowhere:task", ImportError, "task: no module 'nowhere'"),
    ):
        with pytest.raises(error, match=words):
            tasks.get(name)
