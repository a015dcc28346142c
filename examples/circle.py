"""ES on any module and any function of it: a network learns which points lie in a circle, from an accuracy alone."""

import argparse

import torch

import esfast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="a few generations only")
quick = parser.parse_args().quick

# A network of this size is faster on one thread.
torch.set_num_threads(1)
torch.manual_seed(0)
points = torch.rand(512, 2) * 4 - 2
inside = points.norm(dim=1) < 1.6
model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    return ((model(points)[:, 0] > 0) == inside).float().mean().item()


print(f"accuracy before: {accuracy(model):.2f}")
es = esfast.ES(model, sigma=0.1, lr=0.1, population_size=50, mirrored=True)
for _ in range(10 if quick else 100):
    for member in es.population():
        member.reward = accuracy(model)
    es.step()
print(f"accuracy after:  {accuracy(model):.2f}")
