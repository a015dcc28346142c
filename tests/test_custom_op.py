"""add_noise_ where torch.compile traces it, and the op that it becomes there."""

import pytest
import torch

from esfast import Plan, Slice, add_noise_
from esfast.core import custom_op


def two_plans(dtype=torch.bfloat16):
    a, b = torch.linspace(-1, 1, 300).to(dtype), torch.ones(7, 11).to(dtype)
    made = [Plan([("a", a.clone()), ("b", b.clone(), Slice((70, 11), (5, 0)))]) for _ in range(2)]
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"noise": "rademacher"}, {"rounding": "stochastic", "decay": 0.1}, {"noise": "low_rank", "rank": 3}],
    ids=str,
)
def test_opcheck(options):
    plan, _ = two_plans()
    base = plan.clone()
    rest = (
        options.get("noise", "gaussian"),
        options.get("rounding", "nearest"),
        "cpu",
        options.get("decay", 0.0),
        options.get("rank", 1),
    )
    for source in ([], base.tensors):
        torch.library.opcheck(custom_op.add_noise_op, (plan.tensors, source, plan.number, [1, -5], [0.5, 0.25], *rest))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_calls_give_the_same_bits(backend, same_bits):
    ours, theirs = two_plans()
    base = theirs.clone()

    def step(plan, x):
        add_noise_(plan, [1, 2**64 - 1], [0.5, 0.25], base=base)
        add_noise_(plan, [7], [0.125], noise="rademacher", rounding="stochastic", decay=0.01)
        add_noise_(plan, [7], [0.125], noise="low_rank", rank=2)
        return x + plan.tensors[0].float().sum()

    x = torch.ones(3)
    assert torch.equal(torch.compile(step, backend=backend, fullgraph=True)(ours, x), step(theirs, x))
    assert same_bits(ours.tensors, theirs.tensors)


def test_what_tracing_does_not_know_is_refused():
    plan, _ = two_plans()
    anchor = plan.clone()
    with pytest.raises(Exception, match="under torch.compile without anchor"):
        torch.compile(lambda: add_noise_(plan, [1], [1.0], decay=0.1, anchor=anchor), backend="eager", fullgraph=True)()
