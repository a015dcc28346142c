"""Tensor parallelism: several devices hold parts of a causal language model's large matrices, and generate together.

The tensor-parallel plan of Transformers' models says which matrix is cut along which dimension. The parameters become
DTensors, so `esfast.Plan` gives each part the noise that it has in the whole. The forward pass works on the local
parts, with one sum over the devices for each pair of matrices. (Transformers' own loader cuts a model over all
processes; here each group of processes holds a model. See esfast.Team.)
"""

from __future__ import annotations

import re
from collections import Counter
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import linear

from ..utils.errors import BadValue


class ColumnParallel(nn.Linear):
    """A linear layer, x -> x W^T + b, with W cut along dimension 0: each device computes a part of the outputs.

    whole   True: gathers the outputs of all devices. False: each device keeps its part
    """

    dim = 0
    whole: bool
    weight: Any
    bias: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight._local_tensor, None if self.bias is None else self.bias._local_tensor)
        if not self.whole:
            return y
        parts = [torch.empty_like(y) for _ in range(self.weight.device_mesh.size())]
        dist.all_gather(parts, y, group=self.weight.device_mesh.get_group())
        return torch.cat(parts, -1)


class RowParallel(nn.Linear):
    """A linear layer, x -> x W^T + b, with W cut along dimension 1: each device multiplies its part of the inputs by
    its part of W, and the products are summed over the devices.

    whole   True: x has all inputs, and each device takes its part of them. False: x is that part already
    """

    dim = 1
    whole: bool
    weight: Any
    bias: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mesh = self.weight.device_mesh
        if self.whole:
            x = x.chunk(mesh.size(), -1)[mesh.get_local_rank()]
        y = linear(x, self.weight._local_tensor)
        # The sum has the same bits on all devices.
        dist.all_reduce(y, group=mesh.get_group())
        return y if self.bias is None else y + self.bias


# For each style of Transformers' tensor-parallel plans (names of 4.56 and of 5): the class for it, and its `whole`.
STYLES: dict[str, tuple[Any, bool] | None] = {
    "colwise": (ColumnParallel, False),
    "colwise_gather_output": (ColumnParallel, True),
    "colwise_rep": (ColumnParallel, True),
    "rowwise": (RowParallel, False),
    "rowwise_split_input": (RowParallel, True),
    "rowwise_rep": (RowParallel, True),
    # Layers of these styles stay whole; that changes no result.
    "replicated_with_grad_allreduce": None,
    "replicate": None,
    "embedding_rowwise": None,
}


def shard(model, mesh: DeviceMesh, device: torch.device | str) -> None:
    """Cuts a Hugging Face model into shards, in place, and moves this process's shard to the device.

    Embeddings and norms stay whole, and so does an output matrix that is tied to the embedding or can't be cut into
    equal parts. The model has no gradients afterwards.

    Args:
        model: a causal LM that every process of the mesh has loaded whole.
        mesh: the processes that hold the model together, one dimension (`Team.mesh`). Each calls this.
        device: this process's device.

    Raises:
        ValueError: the model has no tensor-parallel plan; the plan has a style that esfast doesn't know (mixtures of
            experts); or its heads or matrices can't be cut into equal parts. Nothing has changed.
    """
    modules = _planned(model, mesh.size())
    model.requires_grad_(False)
    for module, kind, whole in modules:
        module.weight = _part(module.weight, mesh, device, kind.dim)
        if kind is ColumnParallel and module.bias is not None:
            module.bias = _part(module.bias, mesh, device, 0)
        module.__class__, module.whole = kind, whole
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.to(device)


def _planned(model, count: int) -> list[tuple[Any, type[ColumnParallel | RowParallel], bool]]:
    """The modules to cut, each with the class of its style and the style's `whole`."""
    name = type(model).__name__
    plan = getattr(model, "_tp_plan", None)
    if not plan:
        raise BadValue(f"tensor parallelism: {name} brings no plan for it")
    if unknown := sorted(set(plan.values()) - set(STYLES)):
        raise BadValue(f"tensor parallelism: {name} needs {', '.join(unknown)}, which esfast doesn't know")
    config = model.config.get_text_config()
    # These projections are cut between attention heads.
    if "colwise" in plan.values():
        for heads in ("num_attention_heads", "num_key_value_heads"):
            if (found := getattr(config, heads, None)) is not None and found % count:
                raise BadValue(f"tensor parallelism: {found} {heads} of {name} can't be shared by {count} devices")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    styles = {path: plan.get(_of_all_layers(path)) for path, _ in (*model.named_modules(), *model.named_parameters())}
    found = []
    for path, style in styles.items():
        if STYLES.get(style) is None:
            continue
        module = attrgetter(path)(model)
        if type(module) is not nn.Linear:
            raise BadValue(f"tensor parallelism: {path} of {name} is a {type(module).__name__}, expected a Linear")
        kind, whole = STYLES[style]
        if uses[id(module.weight)] == 1 and module.weight.shape[kind.dim] % count == 0:
            found.append((module, kind, whole))
        # A layer with whole inputs and outputs may stay whole: nothing else depends on how it is cut.
        elif not (kind is ColumnParallel and whole):
            raise BadValue(
                f"tensor parallelism: {path} of {name}, {tuple(module.weight.shape)}, can't be cut in {count}"
            )
    return found


def _of_all_layers(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _part(tensor: nn.Parameter, mesh: DeviceMesh, device: torch.device | str, dim: int) -> nn.Parameter:
    local = tensor.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()]
    local = local.to(device, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(DTensor.from_local(local, mesh, [Shard(dim)], run_check=False), requires_grad=False)
