"""Linear layers that answer for all members without the way through `__torch_function__`.

For a batch of few rows, and on a GPU for any, finding out how an operation is done takes longer than doing it. Most
operations on weights are those of `torch.nn.Linear`: while members are in place, such a module has a `forward` that
does what was learned at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .member_tensor import MemberTensor


class DirectLinear:
    """The `forward` of a torch.nn.Linear with MemberTensors in the places of its parameters.

    Inputs for which nothing was learned, and calls while its weight is another, go to the `forward` before.
    """

    def __init__(self, module: torch.nn.Linear, weight: MemberTensor, bias: MemberTensor | None):
        self._forward, self._parameters, self._weight = module.forward, module._parameters, weight
        label = None if bias is None else bias.label
        ways = {dims: weight.operations.known.get((F.linear, dims, weight.label, label)) for dims in (2, 3, 4)}
        self._bound = {dims: way.bind(weight, bias) for dims, way in ways.items() if hasattr(way, "bind")}

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        linear = self._bound.get(input.dim()) if type(input) is torch.Tensor else None
        if linear is None or self._parameters["weight"] is not self._weight:
            return self._forward(input)
        return linear(input)


def direct(module: torch.nn.Module) -> DirectLinear | None:
    """For a torch.nn.Linear with MemberTensors; else None."""
    if type(module) is not torch.nn.Linear:
        return None
    weight, bias = (module._parameters[name] for name in ("weight", "bias"))
    if type(weight) is not MemberTensor or not (bias is None or type(bias) is MemberTensor):
        return None
    return DirectLinear(module, weight, bias)
