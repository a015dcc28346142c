"""The extension's routines for members' matrices: the bits of PyTorch's, and used only where they are meant to be."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from esfast.core.plan import Plan
from esfast.rollout import member_products
from esfast.rollout.member_products import MOST_ROWS, product_of
from esfast.rollout.stacked_model import StackedModel
from esfast.update.optimizers import check_groups
from esfast.update.updater import Rule

needs_routine = pytest.mark.skipif(not member_products._is_there(), reason="the routine needs AVX-512")
K = 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """Numbers of rows for which the routine was called."""
    found = []

    class Spy:
        @staticmethod
        def products(*arguments):
            found.append(arguments[5])
            member_products.extension_before.products(*arguments)

    monkeypatch.setattr(member_products, "extension_before", member_products.extension, raising=False)
    monkeypatch.setattr(member_products, "extension", Spy)
    return found


class Tied(nn.Module):
    """An embedding that is the head, too."""

    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.mix(self.words(ids)).tanh())


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def weights(size, out, biased):
    return random(K, size, out), random(K, 1, out) if biased else None


def expected(x, w, b):
    mine = x.reshape(K, -1, w.shape[1])
    y = torch.bmm(mine, w) if b is None else torch.baddbmm(b, mine, w)
    return y.view(*x.shape[:-1], w.shape[2])


@needs_routine
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("size", "out"),
    [(64, 64), (64, 192), (192, 64), (7, 32), (1, 96), (500, 32), (64, 262), (64, 33), (20, 31), (64, 17), (20, 1)],
)
def test_products_have_the_bits_of_batched_products(size, out, biased, calls):
    w, b = weights(size, out, biased)
    product = product_of(w, b)
    # numbers of rows with all rests of the kernel's blocks
    for rows in range(1, MOST_ROWS + 2):
        x = random(K * rows, size)
        assert torch.equal(product(x), expected(x, w, b)), rows
        # with tokens, and with gaps: of each text the last token
        tokens = random(K * rows, 2, size)
        assert torch.equal(product(tokens), expected(tokens, w, b)), rows
        assert torch.equal(product(tokens[:, -1:]), expected(tokens[:, -1:], w, b)), rows
    if size == 64:
        assert {4, 12, 16, 31, MOST_ROWS} <= set(calls)


@needs_routine
def test_sums_are_one_fused_product_after_another(calls, monkeypatch):
    """In an order that the test chooses: sums of numbers of very different sizes show another order, a sum that is
    rounded before the bias is added shows it last."""
    monkeypatch.setattr(member_products, "_same_bits", lambda *_: True)
    w, b = weights(40, 32, True)
    w, b = (t * 10.0 ** torch.linspace(-4, 4, t.numel()).view(t.shape) for t in (w, b))
    x = random(K * 5, 40)
    got = product_of(w, b)(x).view(K, 5, 32)
    acc = torch.zeros(K, 5, 32, dtype=torch.float64)
    for i in range(40):
        # float64 holds a product of two float32 exactly; the sum is rounded twice, which rarely shows
        acc = (acc + x.view(K, 5, 40)[:, :, i, None].double() * w[:, None, i].double()).float().double()
    want = (acc + b.double()).float()
    assert calls == [5]
    assert (got != want).sum() <= 2


@needs_routine
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_share_the_members(threads, calls):
    w, b = weights(64, 96, True)
    x = random(K * 6, 64)
    want = expected(x, w, b)
    torch.set_num_threads(threads)
    product = product_of(w, b)
    # once bits of another number of threads are known, and once they are found out
    assert torch.equal(product(x), want)
    member_products._same_bits.cache_clear()
    assert torch.equal(product(x), want)
    assert calls[-1] == 6 and torch.get_num_threads() == threads


@needs_routine
def test_where_the_routine_is_used(calls, monkeypatch):
    def used(x, w, b=None):
        calls.clear()
        product_of(w, b)(x)
        return bool(calls)

    w, x = random(K, 64, 64), random(K * 8, 64)
    assert used(x, w)
    assert not used(random(K * (MOST_ROWS + 1), 64), w), "many rows"
    assert not used(x.double(), w.double()), "float64"
    assert not used(x, random(K, 64, 64).mT), "the other layout"
    assert not used(x, w, random(K, 1, 128)[:, :, ::2]), "a bias with gaps"
    assert not used(random(K * 8, 64).requires_grad_(), w), "a gradient is wanted"
    assert not used(random(K * 8, 512), random(K, 512, 256)), "matrices larger than the cache"
    with FlopCounterMode(display=False) as counted:
        assert not used(x, w), "operations are counted"
    assert counted.get_total_flops() == 2 * x.numel() * 64
    monkeypatch.setattr(member_products, "_same_bits", lambda *_: False)
    assert not used(x, w), "other bits"


@pytest.fixture
def told(monkeypatch):
    """The arguments of calls of a routine that does nothing."""
    found = []
    monkeypatch.setattr(member_products, "_same_bits", lambda *_: True)
    monkeypatch.setattr(member_products, "extension", SimpleNamespace(products=lambda *a: found.append(a)))
    return found


@needs_routine
@pytest.mark.parametrize("width", [32, 65, 128, 192])
def test_the_routine_gets_no_rows_of_another_width(width, told):
    """It would write beyond its result, or leave a part of it as it was."""
    product = product_of(random(K, 64, 64), None)
    product(random(K * 4, 64))
    assert len(told) == 1
    for x in (random(K * 4, width), random(K * 4, 2, width)):
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            product(x)
    assert len(told) == 1


@needs_routine
def test_the_routine_gets_no_memory_of_another_device(told):
    product_of(random(K, 64, 64), None)(torch.empty(K * 4, 64, device="meta"))
    assert told == []


@needs_routine
def test_the_routine_gets_no_numbers_whose_sign_is_a_bit_of_the_tensor():
    w, x = random(K, 64, 64), random(K * 4, 64)
    product = product_of(w, None)
    assert torch.equal(product(torch._neg_view(x)), product(-x))


@needs_routine
def test_what_does_operations_in_another_way_does_these_too(told):
    w, x = random(K, 64, 64), random(K * 4, 5, 64)
    product, tangent = product_of(w, None), random(K * 4, 5, 64)
    of_tangent = torch.bmm(tangent.reshape(K, -1, 64), w).view(x.shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(x).dtype is torch.bfloat16
    mapped = torch.vmap(product, in_dims=1, out_dims=1)(x)
    assert torch.allclose(mapped, expected(x, w, None), atol=1e-5)
    assert torch.equal(torch.func.jvp(product, (x,), (tangent,))[1], of_tangent)
    with forward_ad.dual_level():
        assert torch.equal(forward_ad.unpack_dual(product(forward_ad.make_dual(x, tangent))).tangent, of_tangent)
    traced = torch.jit.trace(product, x, check_trace=False)
    assert torch.equal(traced(tangent), of_tangent)
    assert told == []


@needs_routine
def test_bits_are_compared_whatever_the_default_dtype_is():
    """With a shorter one, the routine would write beyond the tensors that are compared."""
    member_products._same_bits.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert member_products._same_bits(8, 64, 64)
    finally:
        torch.set_default_dtype(torch.float32)
        member_products._same_bits.cache_clear()


@needs_routine
def test_other_bits_are_noticed(monkeypatch):
    member_products._same_bits.cache_clear()

    class Other:
        @staticmethod
        def products(x, w, b, y, *sizes):
            member_products.extension_before.products(x, w, 0, y, *sizes)

    monkeypatch.setattr(member_products, "extension_before", member_products.extension, raising=False)
    assert member_products._same_bits(8, 64, 64)
    member_products._same_bits.cache_clear()
    monkeypatch.setattr(member_products, "extension", Other)
    assert not member_products._same_bits(8, 64, 64)
    member_products._same_bits.cache_clear()


def test_a_coefficient_too_large_for_a_group_is_refused_before_anything_is_written():
    model = nn.Linear(4, 4)
    together = StackedModel(model, 2, rule=Rule(groups=check_groups(["bias:sigma=1e10", "*:sigma=1"])))
    together.write([(1, 0.1), (2, 0.1)])
    before = [stack.clone() for stack in together._stacks]
    with pytest.raises(ValueError, match="finite"):
        together.write([(3, 1e30), (4, 1e30)])
    assert all(torch.equal(a, b) for a, b in zip(before, together._stacks, strict=True))


def test_a_tied_head_lies_both_ways():
    """The copy for the linear layer is written with the weight, moved with it, and counted."""
    model = Tied().eval()
    together, place = StackedModel(model, 3), Plan(model).names.index("words.weight")
    weight, copies = together._stacks[place], together._tied[place]
    assert list(together._tied) == [place]
    assert together.bytes_of_member == sum(t.nbytes for t in Plan(model).tensors) + copies[0].nbytes
    together.write([(1, 0.1), (2, 0.05), (1, -0.1)])
    assert torch.equal(copies, weight.mT) and copies.is_contiguous()
    ids = torch.randint(50, (4, 6))
    with torch.no_grad(), together.in_place():
        model(torch.cat([ids] * 3))
        together_answers = model(torch.cat([ids] * 3)).unflatten(0, (3, -1))
    for k in range(3):
        with torch.no_grad(), together.alone(k):
            assert torch.allclose(model(ids), together_answers[k], atol=1e-5)
    together.choose([2, 0])
    assert torch.equal(copies, weight.mT)
    large = nn.Embedding(70000, 1)
    head = nn.Linear(1, 70000, bias=False)
    head.weight = large.weight
    assert not StackedModel(nn.Sequential(large, head), 2)._tied
