"""docs/how-to/recipes.md is run: every loop, before and after, climbs the same hill, and none leaves noise behind."""

import copy
import random
import re
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import esfast
from esfast import zscore
from esfast.es.es import member_seed

TEXT = (Path(__file__).parent.parent / "docs" / "how-to" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(# (?:before|after)\n.*?)```", TEXT, re.DOTALL)


class FlatES:
    """What a flat-vector library offers, at its simplest."""

    def __init__(self, mean, sigma, population_size):
        self.mean, self.sigma, self.population_size = mean, sigma, population_size

    def ask(self):
        return [self.mean + self.sigma * torch.randn_like(self.mean) for _ in range(self.population_size)]

    def tell(self, vectors, losses):
        z = zscore([-loss for loss in losses])
        self.mean = self.mean + 0.1 / len(z) / self.sigma * sum(
            w * (v - self.mean) for w, v in zip(z, vectors, strict=True)
        )


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_loop_climbs(number):
    torch.manual_seed(0)
    random.seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(16, 4)
    target = torch.nn.Linear(4, 3)(x).detach()

    def score(y):
        return -(y - target).square().mean().item()

    def evaluate(model):
        with torch.no_grad():
            return score(model(x))

    scope = {
        "torch": torch,
        "random": random,
        "copy": copy,
        "esfast": esfast,
        "model": model,
        "x": x,
        "score": score,
        "evaluate": evaluate,
        "zscore": zscore,
        "sigma": 0.05,
        "lr": 0.1,
        "population_size": 16,
        "generations": 40,
        "my_seed": lambda generation, member: member_seed(0, generation, member),
        "make_es": FlatES,
        "parameters_to_vector": parameters_to_vector,
        "vector_to_parameters": vector_to_parameters,
    }
    before = evaluate(model)
    for _ in range(1 if "for generation" in BLOCKS[number] else 40):
        exec(BLOCKS[number], scope)
    assert evaluate(model) > 0.5 * before  # both negative


def test_every_recipe_has_both():
    assert [b.split("\n")[0] for b in BLOCKS] == ["# before", "# after"] * 5


def test_what_the_pages_say_of_coming_from_others_runs():
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate: pip install esfast[mezo]")
    text = (Path(__file__).parent.parent / "docs" / "how-to" / "coming-from.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3), torch.randn(16, 4)

    @torch.no_grad()
    def loss(model, batch):
        return (model(batch) - 1).square().mean().item()

    before, scope = loss(model, x), {"model": model, "loss": loss, "batches": [x] * 200, "lr": 0.02}
    for block in blocks:
        exec(block, scope)
    assert len(blocks) == 2 and loss(model, x) < 0.7 * before and scope["MyTrainer"].zo_eps == 1e-3
