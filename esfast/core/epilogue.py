"""Epilogues: an optimizer's arithmetic on the weighted sum of noise, in the same pass that computes the sum.

Without an epilogue, `add_noise_` adds the sum to the weight. With one, the sum starts at zero, and the epilogue makes
the new weight of the old one (after weight decay), the sum, and numbers of its own that it keeps for each weight.
"""

from __future__ import annotations

import abc
import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..utils.errors import BadState, BadType, BadValue
from .noise import fma
from .plan import Plan


class Epilogue(abc.ABC):
    """The arithmetic of one step, and the numbers that it keeps for each weight.

    `apply` is the definition, and the reference backend runs it. To make it fast, add kernels that give the same bits,
    next to `adam` in csrc/noise.h (CPU and CUDA) and kernels/add_noise.py (Triton).

    Attributes:
        buffers: float32 (k, plan.flat_numel) on the plan's device, any k; `apply` changes them.
        has_kernels: whether every backend implements it. If not, only the reference backend runs it.
    """

    has_kernels: ClassVar[bool] = False

    buffers: torch.Tensor

    @abc.abstractmethod
    def apply(self, x: np.ndarray, g: np.ndarray, buffers: np.ndarray) -> np.ndarray:
        """The new weights of n weights `x` whose sums are `g`, all float32 (n,). `buffers` is float32 (k, n), of the
        same weights, and changed in place. Each operation rounds to float32; `esfast.core.noise.fma` rounds once."""


@dataclass(frozen=True)
class AdamStep(Epilogue):
    """One step of Adam (Kingma and Ba, arXiv 1412.6980) up the gradient g = sum_j coeffs[j] * noise(seeds[j]):

        m += (1 - beta1) (g - m);  v += (1 - beta2) (g^2 - v);  weight += step * m / (sqrt(v) + eps)

    All of it is float32. `moments` keeps m and v between steps: a float32 tensor (2, plan.flat_numel) on the plan's
    device, zero at first. `step` and `eps` include the bias correction: see `AdamStep.at`.
    """

    has_kernels = True

    moments: torch.Tensor
    one_minus_beta1: np.float32
    one_minus_beta2: np.float32
    step: np.float32
    eps: np.float32

    @classmethod
    def at(cls, t: int, moments: torch.Tensor, lr: float, beta1: float, beta2: float, eps: float) -> AdamStep:
        """Step number t = 1, 2, ... with learning rate lr: lr' = lr sqrt(1 - beta2^t) / (1 - beta1^t) and
        eps' = eps sqrt(1 - beta2^t), which make m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) of the paper."""
        root = math.sqrt(1 - beta2**t)
        numbers = 1 - beta1, 1 - beta2, lr * root / (1 - beta1**t), eps * root
        return cls(moments, *(np.float32(x) for x in numbers))

    @property
    def numbers(self) -> tuple[float, float, float, float]:
        return float(self.one_minus_beta1), float(self.one_minus_beta2), float(self.step), float(self.eps)

    @property
    def buffers(self) -> torch.Tensor:  # type: ignore[override]
        return self.moments

    def apply(self, x: np.ndarray, g: np.ndarray, buffers: np.ndarray) -> np.ndarray:
        m, v = buffers
        m[:] = fma(self.one_minus_beta1, g - m, m)
        v[:] = fma(self.one_minus_beta2, g * g - v, v)
        return fma(self.step, m / (np.sqrt(v) + self.eps), x)


def check_epilogue(plan: Plan, base: Plan | None, epilogue: Epilogue, backend: str) -> str:
    """The backend that runs the epilogue. TypeError, ValueError or RuntimeError if none can, or if the buffers do not
    fit the plan."""
    name = "adam" if isinstance(epilogue, AdamStep) or not isinstance(epilogue, Epilogue) else type(epilogue).__name__
    if base is not None and base is not plan:
        raise BadValue(f"{name}: works in place, without a base")
    b = epilogue.buffers if isinstance(epilogue, Epilogue) else None
    if not (
        isinstance(b, torch.Tensor)
        and b.dtype is torch.float32
        and b.device == plan.device
        and b.is_contiguous()
        and b.dim() == 2
        and b.shape[1] == plan.flat_numel
        and (name != "adam" or b.shape[0] == 2)
    ):
        wanted = "an esfast.core.ops.AdamStep with moments" if name == "adam" else "buffers"
        rows = 2 if name == "adam" else "k"
        raise BadType(
            f"{name}: expected {wanted} = torch.zeros({rows}, plan.flat_numel) in float32 on {plan.device}, "
            f"got {epilogue!r:.80}"
        )
    if b.data_ptr() % 16:
        raise BadValue(
            f"{name}: the {'moments' if name == 'adam' else 'buffers'} begin at address {b.data_ptr():#x}, no multiple "
            f"of 16 bytes, and kernels read 128 bits at once; pass a tensor of its own, torch.zeros({len(b)}, "
            "plan.flat_numel), and no slice of another"
        )
    if epilogue.has_kernels:
        return backend
    if backend not in ("auto", "reference"):
        raise BadState(f"backend {backend!r} can't run: it has no kernels for {name}; take 'reference', or 'auto'")
    warnings.warn(
        f"esfast uses its slow reference for {name}: no backend has kernels for it", RuntimeWarning, stacklevel=4
    )
    return "reference"
