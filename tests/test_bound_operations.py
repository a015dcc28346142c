"""What is kept of an operation on a weight, with what was learned and for members in place, keeps no further memory."""

import gc
import types

import pytest
import torch
from test_member_linear import MEMBERS, SIZES, written
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from esfast.rollout.low_rank_model import LowRankModel
from esfast.rollout.member_tensor import MemberTensor
from esfast.rollout.stacked_model import StackedModel


class Scaled(nn.Module):
    """A weight from which something else is calculated in every call, as in Gemma's norms."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16))

    def forward(self, x):
        return x * (1 + self.weight)


def tensors_in(value, seen=None):
    """The tensors that an object keeps, in its attributes and those that a function refers to."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            yield from tensors_in(cell.cell_contents, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item, seen)
    elif isinstance(value, dict):
        yield from tensors_in([*value.keys(), *value.values()], seen)
    elif type(value).__module__.startswith("esfast"):
        yield from tensors_in(vars(value), seen)


@pytest.mark.parametrize("kind", [StackedModel, LowRankModel])
def test_what_is_kept_of_operations(kind):
    """With what was learned no tensor, and for members in place only what lies in the stacks: a CUDA graph that was
    captured in a block reads the same memory after it."""
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, **SIZES)).eval()
    stack, ids = written(kind, model), torch.randint(3, 200, (6, 1))
    assert stack.learned.operations.known and not list(tensors_in(stack.learned.operations.known))
    held = {
        part.untyped_storage().data_ptr()
        for stacked in stack._stacks
        for part in ([stacked] if isinstance(stacked, torch.Tensor) else stacked.parts)
    }
    with torch.no_grad(), stack.in_place():
        model(ids)
        bound = [of_rows for weight in stack._tensors for of_rows in weight.bound.values()]
        assert bound and {x.untyped_storage().data_ptr() for x in tensors_in(bound)} <= held


def test_weights_of_members_leave_memory_at_once():
    """They make no cycles: what a model calculates from weights in each step would add up."""
    model, x = Scaled(), torch.randn(6, 16)
    stack = StackedModel(model, len(MEMBERS))
    stack.write(MEMBERS)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), stack.in_place():
            for _ in range(5):
                model(x)
        assert not [value for value in gc.get_objects() if type(value) is MemberTensor]
    finally:
        gc.enable()
