"""Problems with known answers, for ES to find: modules with `reward()`, higher is better, and `error()`, their
distance from the answer, which no reward tells."""

import torch
from torch import nn

from esfast import ES
from esfast.trainer.schedules import cosine


class Quadratic(nn.Module):
    """-|theta - optimum|^2. It begins at distance 1."""

    def __init__(self, dimension: int = 50):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dimension))
        self.optimum = torch.tensor([1.0, -1.0]).repeat(dimension // 2) / dimension**0.5

    def reward(self) -> float:
        return -float((self.theta - self.optimum).square().sum())

    def error(self) -> float:
        """Distance from the optimum."""
        return float((self.theta - self.optimum).double().norm())


class Rosenbrock(nn.Module):
    """-sum_i steepness (x_{i+1} - x_i^2)^2 + (1 - x_i)^2: a bent valley that leads to (1, ..., 1)."""

    def __init__(self, start: list[float], steepness: float):
        super().__init__()
        self.x, self.steepness = nn.Parameter(torch.tensor(start)), steepness

    def reward(self) -> float:
        x, following = self.x[:-1], self.x[1:]
        return -float((self.steepness * (following - x * x).square() + (1 - x).square()).sum())

    def error(self) -> float:
        """The largest distance of a coordinate from 1."""
        return float((self.x - 1).abs().max())


class LogisticRegression(nn.Module):
    """-(cross-entropy + 0.01 |w|^2) on 200 noisy examples of 5 inputs; the answer is that of L-BFGS."""

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(200, 5, generator=random)
        logits = self.inputs @ torch.randn(5, generator=random) + torch.randn(200, generator=random)
        self.labels = (logits > 0).float()
        self.w = nn.Parameter(torch.zeros(5))
        self.optimum = self._optimum()

    def _loss(self, w: torch.Tensor) -> torch.Tensor:
        fit = nn.functional.binary_cross_entropy_with_logits(self.inputs @ w, self.labels)
        return fit + 0.01 * w.square().sum()

    @torch.enable_grad()
    def _optimum(self) -> torch.Tensor:
        w = torch.zeros(5, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = self._loss(w)
            loss.backward()
            return loss

        optimizer.step(closure)
        return w.detach()

    def reward(self) -> float:
        return -float(self._loss(self.w))

    def error(self) -> float:
        """The largest distance of a coefficient from the optimum's, of which the largest is 1.8."""
        return float((self.w - self.optimum).abs().max())


class CartPole(nn.Module):
    """A pole on a cart, to be kept up for 100 steps of 20 ms by a network of 8 hidden units that pushes the cart.

    Dynamics, masses and limits of Barto, Sutton and Anderson (1983), but the push is any force from -10 to 10 N. A
    state is a column: position (m), speed, angle (rad) and its speed; columns are independent attempts. The reward is
    the share of the steps before position or angle leave their limits, on average over 16 first states.
    """

    STEPS, SECONDS = 100, 0.02
    LIMITS = torch.tensor([[2.4], [0.2095]])  # m, rad
    GRAVITY, MASS, POLE_MASS, HALF_LENGTH = 9.8, 1.1, 0.1, 0.5  # m/s^2; kg, cart and pole; kg; m

    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.starts, self.fresh_starts = self._starts(16, random), self._starts(64, random)
        self.hidden = nn.Parameter(0.3 * torch.randn(8, 4, generator=random))
        self.out = nn.Parameter(0.3 * torch.randn(8, generator=random))

    def _starts(self, count: int, random: torch.Generator) -> torch.Tensor:
        return (2 * torch.rand(4, count, generator=random) - 1) * torch.tensor([[0.5], [0.2], [0.1], [0.2]])

    def _step(self, state: torch.Tensor) -> torch.Tensor:
        _, speed, angle, turning = state
        push = 10 * torch.tanh(self.out @ torch.tanh(self.hidden @ state))
        sin, cos, pole = angle.sin(), angle.cos(), self.POLE_MASS * self.HALF_LENGTH
        pushed = (push + pole * turning * turning * sin) / self.MASS
        turned = (self.GRAVITY * sin - cos * pushed) / (
            self.HALF_LENGTH * (4 / 3 - self.POLE_MASS / self.MASS * cos * cos)
        )
        change = torch.stack((speed, pushed - pole / self.MASS * turned * cos, turning, turned))
        return state + self.SECONDS * change

    def steps_up(self, state: torch.Tensor) -> torch.Tensor:
        """How many steps each attempt lasts, STEPS at most."""
        path = []
        for _ in range(self.STEPS):
            state = self._step(state)
            path.append(state[0::2])
        within = (torch.stack(path).abs() < self.LIMITS).all(dim=1)
        return within.cumprod(dim=0).sum(dim=0)

    def reward(self) -> float:
        return float(self.steps_up(self.starts).float().mean()) / self.STEPS

    def error(self) -> float:
        """The share of 64 fresh first states from which the pole falls."""
        return float((self.steps_up(self.fresh_starts) < self.STEPS).float().mean())


@torch.no_grad()
def maximise(problem: nn.Module, generations: int, sigma: float, lr: float, **options) -> float:
    """Runs ES, lr ending at a fiftieth and sigma at a tenth of what is given; returns the problem's error."""
    es = ES(problem, sigma=sigma, lr=lr, **options)
    for generation in range(generations):
        es.lr = cosine(lr, generation, generations, 0.02)
        es.sigma = cosine(sigma, generation, generations, 0.1)
        for member in es.population():
            member.reward = problem.reward()
        es.step()
    return problem.error()
