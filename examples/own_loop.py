"""The primitive alone: perturb from a base, restore, update. The loop, the seeds and the shaping are yours."""

import argparse
from statistics import mean, pstdev

import torch

import esfast

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--quick", action="store_true", help="a few generations only")
quick = parser.parse_args().quick

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Linear(16, 16).to(torch.bfloat16)
x = torch.randn(64, 16, dtype=torch.bfloat16)
target = torch.nn.Linear(16, 16).to(torch.bfloat16)(x).detach()


@torch.no_grad()
def reward() -> float:
    return -(model(x) - target).float().square().mean().item()


sigma, lr, population_size = 0.05, 0.1, 32
plan = esfast.Plan(model)
# Updates accumulate in float32; members and the model itself are bfloat16.
master = plan.master()
print(f"before: {reward():.3f}")
for generation in range(5 if quick else 100):
    seeds = [generation * population_size + member for member in range(population_size)]
    rewards = []
    for seed in seeds:
        esfast.add_noise_(plan, [seed], [sigma], base=master)
        rewards.append(reward())
    centre, spread = mean(rewards), pstdev(rewards) or 1.0
    coeffs = [lr / population_size * (r - centre) / spread for r in rewards]
    esfast.add_noise_(master, seeds, coeffs)
    # With no seeds the call is a rounding copy: the model is the centre again.
    esfast.add_noise_(plan, [], [], base=master)
print(f"after:  {reward():.3f}")
