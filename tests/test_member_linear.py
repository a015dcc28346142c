"""Linear layers that answer for all members at once, and how many operations a layer of a decoder takes."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from esfast.rollout.low_rank_model import LowRankModel
from esfast.rollout.member_linear import DirectLinear
from esfast.rollout.stacked_model import StackedModel, Unsupported

KINDS = [StackedModel, LowRankModel]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
MEMBERS = [(0, 0.1), (1, 0.1), (2, -0.1)]


class Count(TorchDispatchMode):
    """Counts operations that are a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ != "_unsafe_view":
            self.found[func.overloadpacket.__name__] += 1
        return result


def written(kind, model, members=MEMBERS):
    stack = kind(model, len(members))
    stack.write(members)
    stack.check()
    return stack


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_a_decoder_layer(kind):
    """Stacked members take as many as frozen weights, low-rank members one or two more for each linear layer."""
    counts = []
    for layers in (2, 3):
        model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **SIZES)).eval()
        stack, ids = written(kind, model), torch.randint(3, 200, (6, 1))
        with torch.no_grad(), Count() as frozen:
            model(ids)
        with torch.no_grad(), stack.in_place(), Count() as together:
            model(ids)
        counts.append((frozen.found, together.found))
    (few, few_together), (more, more_together) = counts
    layer, of_members = more - few, more_together - few_together
    products = "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"
    own = {name: of_members[name] for name in products if of_members[name]}
    assert layer["mm"] == 4 and layer["addmm"] == 3, "q, k and v have biases"
    # PyTorch 2.8 does the attention of one token by two batched products.
    attention = layer["bmm"]
    if kind is StackedModel:
        assert own == {"bmm": 4 + attention, "baddbmm": 3}
        assert sum(of_members.values()) == sum(layer.values())
    else:
        assert own == {"mm": 4, "addmm_": 3, "bmm": 7 + attention, "baddbmm": 3, "baddbmm_": 4}
        assert sum(of_members.values()) == sum(layer.values()) + 14


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_replaced_while_members_are_in_place(kind):
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    class Model(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    model = Model(nn.Linear(4, 5), Own(5, 5), nn.Linear(5, 3, bias=False))
    hooked = []
    model[0].register_forward_hook(lambda *_: hooked.append(1))
    stack, x = written(kind, model), torch.randn(6, 4)
    expected = []
    with torch.no_grad():
        for k in range(3):
            with stack.alone(k):
                expected.append(model(x[2 * k : 2 * k + 2]))
        with stack.in_place():
            model(x)  # learns
            direct = [type(vars(module).get("forward")) is DirectLinear for module in model]
            hooked.clear()
            got = model(x)
            # what was not learned: three dimensions
            with pytest.raises(Unsupported, match="linear of .* did not see"):
                model[0](torch.randn(6, 2, 4))
            # a weight of somebody else
            one_by_one = model[2]._parameters["weight"]
            model[2]._parameters["weight"] = nn.Parameter(torch.ones(3, 5))
            assert torch.equal(model[2](torch.ones(1, 5)), torch.full((1, 3), 5.0))
            model[2]._parameters["weight"] = one_by_one
    assert direct == [True, False, True] and hooked == [1]
    torch.testing.assert_close(got, torch.cat(expected))
    assert not any("forward" in vars(module) for module in model)
