"""The optimizers: SGD, Momentum and Adam, each with its numbers, its state and its step. Does not import torch.

| optimizer | step                                                        | extra memory     | work of an update     |
|-----------|-------------------------------------------------------------|------------------|-----------------------|
| SGD       | w += lr g, as in the paper                                  | none             | N members             |
| Momentum  | v = beta v + lr g;  w += v, the last `window` generations   | none             | up to window N members|
| Adam      | w += lr m / (sqrt(v) + eps), m and v running means          | 8 bytes a weight | N members             |

g is the reward-weighted noise of a generation. Each update is one fused pass over the weights.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..utils.errors import BadValue
from ..utils.settings import check_int
from .groups import Group, check_groups
from .optimizer import OPTIMIZERS, Optimizer, State, Step, check_optimizer

if TYPE_CHECKING:
    from ..core.plan import Plan
    from .updater import UpdateRecord

__all__ = ["OPTIMIZERS", "SGD", "Adam", "Group", "Momentum", "Optimizer", "check_groups", "check_optimizer"]


@dataclass(frozen=True)
class SGD(Optimizer, name="sgd"):
    """theta += lr g, the update of the paper; g is the reward-weighted noise. No state."""

    def step(self, state: State, record: UpdateRecord, lr: float) -> Step:
        return Step(record.seeds, [lr * c for c in record.coeffs])


@dataclass(frozen=True)
class Momentum(Optimizer, name="momentum"):
    """Momentum without a buffer: every update replays the seeds of the last `window` generations.

    Noise is a function of its seed, so the velocity is computed again from the seeds of the last generations, each
    times beta to the power of its age (Sutskever et al., ICML 2013).

    Args:
        beta: fraction of the velocity that is kept from one generation to the next, 0 < beta < 1.
        window: generations that are replayed, at least 2. A fraction beta^window of the velocity is dropped.

    Raises ValueError for a number outside the above.
    """

    beta: float = 0.9
    window: int = 10

    def __post_init__(self):
        _check_fraction("Momentum.beta", self.beta)
        check_int("Momentum.window", self.window, 2, 2**20)

    @property
    def travel(self) -> float:
        return (1 - self.beta**self.window) / (1 - self.beta)

    def allocate_state(self, plan: Plan) -> State:
        return State(past=deque(maxlen=self.window - 1))

    def step(self, state: State, record: UpdateRecord, lr: float) -> Step:
        import numpy as np

        seeds, coeffs = list(record.seeds), list(record.coeffs)
        for age, earlier in enumerate(state.past, start=1):
            seeds += earlier.seeds
            coeffs += [float(np.float32(self.beta**age * c)) for c in earlier.coeffs]
        return Step(seeds, [lr * c for c in coeffs])


@dataclass(frozen=True)
class Adam(Optimizer, name="adam"):
    """Adam over the estimated gradient g, with two float32 moments: 8 bytes a weight.

    The algorithm is that of Kingma and Ba (arXiv 1412.6980), with decoupled weight decay (Loshchilov and Hutter, arXiv
    1711.05101).

    Args:
        beta1, beta2: fractions of the running means of g and g^2 that a step keeps, 0 < beta < 1.
        eps: added to sqrt(v), at least 1e-30. The gradient is that of z-scored rewards, so its size is about 1/sqrt(N),
            whatever the scale of the rewards.

    Raises ValueError for a number outside the above.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    bytes_per_weight = 8
    # The step divides by the size of the gradient, so lr can't be a factor of the gradient.
    lr_in_coeffs = False

    def __post_init__(self):
        _check_fraction("Adam.beta1", self.beta1)
        _check_fraction("Adam.beta2", self.beta2)
        if not isinstance(self.eps, (int, float)) or not 1e-30 <= self.eps < math.inf:
            raise BadValue(f"Adam.eps: expected a positive number of at least 1e-30, got {self.eps!r}")

    def allocate_state(self, plan: Plan) -> State:
        import torch

        return State({"moments": torch.zeros(2, plan.flat_numel, dtype=torch.float32, device=plan.device)})

    def step(self, state: State, record: UpdateRecord, lr: float) -> Step:
        from ..core.epilogue import AdamStep

        numbers = lr * record.lr, self.beta1, self.beta2, self.eps
        return Step(record.seeds, record.coeffs, AdamStep.at(record.generation + 1, state.tensors["moments"], *numbers))


def _check_fraction(what: str, value) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise BadValue(f"{what}: expected a number between 0 and 1, got {value!r}")
