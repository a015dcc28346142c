"""A run is its journal: from the base weights and a few kilobytes of seeds and coefficients come the same bits."""

import argparse
import tempfile
from pathlib import Path

import torch

import esfast
from esfast.journal.journal import replay

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="a few generations only")
quick = parser.parse_args().quick


def base_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(8, 8)


model, x = base_model(), torch.ones(4, 8)
with tempfile.TemporaryDirectory() as folder:
    journal = Path(folder) / "journal.jsonl"
    es = esfast.ES(model, sigma=0.05, lr=0.05, population_size=16, journal=journal)
    for _ in range(3 if quick else 50):
        for member in es.population():
            member.reward = model(x).sum().item()
        es.step()

    again = base_model()
    replay(esfast.Plan(again), journal)
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    print(f"journal: {journal.stat().st_size} bytes, the same weights: {same}")
if not same:
    raise SystemExit(1)
