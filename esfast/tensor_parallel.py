"""A causal language model over several devices: each holds a part of every large matrix, and generates the same tokens.

The plan, which matrices are cut along which dimension, is the one that Transformers' models bring with them. The
parameters become DTensors, so `esfast.Plan` gives each part the noise that it has in the whole, and the forward pass
works on what lies here, with one sum over the devices for each pair of matrices. (Transformers' own loader cuts a model
over all processes there are; here groups of processes hold a model each. See esfast.distributed.Team.)
"""

from __future__ import annotations

import re
from collections import Counter
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import linear

# Transformers' names of the styles, of 4.56 and of 5
COLUMNS = ("colwise",)
COLUMNS_GATHERED = ("colwise_gather_output", "colwise_rep")
ROWS = ("rowwise",)
ROWS_OF_WHOLE = ("rowwise_split_input", "rowwise_rep")
WHOLE = ("replicated_with_grad_allreduce", "replicate", "embedding_rowwise")  # left as it is, which changes no result


class ColumnParallel(nn.Linear):
    """x -> x W^T + b, of which this device has some of the outputs: W is cut along dimension 0."""

    gathers: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight._local_tensor, None if self.bias is None else self.bias._local_tensor)
        if not self.gathers:
            return y
        parts = [torch.empty_like(y) for _ in range(self.weight.device_mesh.size())]
        dist.all_gather(parts, y, group=self.weight.device_mesh.get_group())
        return torch.cat(parts, -1)


class RowParallel(nn.Linear):
    """x -> x W^T + b, summed over devices which have some of the inputs each: W is cut along dimension 1."""

    splits: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mesh = self.weight.device_mesh
        if self.splits:
            x = x.chunk(mesh.size(), -1)[mesh.get_local_rank()]
        y = linear(x, self.weight._local_tensor)
        dist.all_reduce(y, group=mesh.get_group())  # the same bits everywhere
        return y if self.bias is None else y + self.bias


def shard(model, mesh: DeviceMesh, device: torch.device | str) -> None:
    """Cuts a Hugging Face model, which every process of the mesh has loaded whole, and moves it to the device.

    mesh    one dimension, of the processes that hold the model together; each calls this
    device  of this process

    An output matrix that is tied to the embedding, or that can't be cut into equal parts, stays whole, as embeddings
    and norms do. Gradients can't be taken any more.

    Raises ValueError, before anything is changed, if the model has no plan, or one of a style that isn't known here
    (mixtures of experts), or if its heads or matrices can't be cut into equal parts.
    """
    modules = _planned(model, mesh.size())
    model.requires_grad_(False)
    for module, style in modules:
        columns = style in COLUMNS + COLUMNS_GATHERED
        module.weight = _part(module.weight, mesh, device, 0 if columns else 1)
        if columns and module.bias is not None:
            module.bias = _part(module.bias, mesh, device, 0)
        module.__class__ = ColumnParallel if columns else RowParallel
        if columns:
            module.gathers = style in COLUMNS_GATHERED
        else:
            module.splits = style in ROWS_OF_WHOLE
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.to(device)


def _planned(model, count: int) -> list[tuple[nn.Linear, str]]:
    """The modules that are cut, each with its style."""
    name = type(model).__name__
    plan = getattr(model, "_tp_plan", None)
    if not plan:
        raise ValueError(f"tensor parallelism: {name} brings no plan for it")
    if unknown := sorted(set(plan.values()) - {*COLUMNS, *COLUMNS_GATHERED, *ROWS, *ROWS_OF_WHOLE, *WHOLE}):
        raise ValueError(f"tensor parallelism: {name} needs {', '.join(unknown)}, which esfast doesn't know")
    config = model.config.get_text_config()
    if set(plan.values()) & {*COLUMNS}:  # such projections are cut between heads
        for heads in ("num_attention_heads", "num_key_value_heads"):
            if (found := getattr(config, heads, None)) is not None and found % count:
                raise ValueError(f"tensor parallelism: {found} {heads} of {name} can't be shared by {count} devices")
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    styles = {path: plan.get(_of_all_layers(path)) for path, _ in (*model.named_modules(), *model.named_parameters())}
    found = []
    for path, style in styles.items():
        if style is None or style in WHOLE:
            continue
        module = attrgetter(path)(model)
        if type(module) is not nn.Linear:
            raise ValueError(f"tensor parallelism: {path} of {name} is a {type(module).__name__}, expected a Linear")
        size = module.out_features if style in COLUMNS + COLUMNS_GATHERED else module.in_features
        if uses[id(module.weight)] == 1 and size % count == 0:
            found.append((module, style))
        elif style not in COLUMNS_GATHERED:  # those have whole inputs and outputs, so nothing else depends on them
            raise ValueError(
                f"tensor parallelism: {path} of {name}, {tuple(module.weight.shape)}, can't be cut in {count}"
            )
    return found


def _of_all_layers(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _part(tensor: nn.Parameter, mesh: DeviceMesh, device: torch.device | str, dim: int) -> nn.Parameter:
    local = tensor.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()]
    local = local.to(device, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(DTensor.from_local(local, mesh, [Shard(dim)], run_check=False), requires_grad=False)
