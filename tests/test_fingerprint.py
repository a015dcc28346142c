"""The fingerprint: equal for equal weights however they lie, and different after any change that an accident makes."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import esfast
from esfast import Plan, Slice
from esfast.core import fingerprint
from esfast.core.noise import noise, tensor_id

MASK = 2**64 - 1


def mix(x: int) -> int:
    """SplitMix64, as its authors publish it."""
    x = (x + 1) * 0x9E3779B97F4A7C15 & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def slowly(name: str, whole: torch.Tensor) -> int:
    """The definition in the module's docstring, an element at a time."""
    columns = whole.shape[-1] if whole.dim() else 1
    ints = whole.contiguous().view(torch.int32 if whole.element_size() == 4 else torch.int16).view(-1).tolist()
    return (
        sum(
            (mix(mix(tensor_id(name)) + i // columns & MASK) | 1) * (mix(i % columns) | 1) * bits
            for i, bits in enumerate(ints)
        )
        & MASK
    )


def test_splitmix_is_the_published_one():
    assert [mix(x) for x in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("chunk", (2, 7, 64, 2**20))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_it_is_its_definition(dtype, chunk, monkeypatch):
    monkeypatch.setitem(fingerprint._CHUNK, "cpu", chunk)
    shapes = ((), (1,), (9,), (5, 7), (7, 1), (2, 3, 4), (2, 1, 3, 2))
    tensors = [(f"t{i}", noise(i, "x", s).to(dtype)) for i, s in enumerate(shapes)]
    expected = sum(slowly(name, t) for name, t in tensors) & MASK
    assert Plan(tensors).fingerprint() == f"{expected:016x}"


def test_it_is_frozen():
    """Journals hold it: a change of this value is a change of their format."""
    plan = Plan([("weight", noise(1, "x", (300, 200)).bfloat16()), ("bias", noise(2, "x", 300))])
    assert plan.fingerprint() == "4c70b5ddd6372a21"


@given(st.data())
def test_slices_add_up_to_the_whole(data):
    """The fingerprint of slices with any strides, cut at any places and given in any order, is that of the whole."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    whole = noise(3, "x", tuple(shape))
    order = data.draw(st.permutations(range(len(shape))))
    lying = whole.permute(order).contiguous().permute([order.index(d) for d in range(len(shape))])
    cuts = [sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=2))) if n > 1 else [] for n in shape]
    spans = [list(itertools.pairwise([0, *c, n])) for c, n in zip(cuts, shape, strict=True)]
    parts = [
        ("w", lying[tuple(slice(*s) for s in place)], Slice(tuple(shape), tuple(a for a, _ in place)))
        for place in itertools.product(*spans)
    ]
    plan, cut = Plan([("w", whole)]), Plan(data.draw(st.permutations(parts)))
    assert cut.fingerprint() == plan.fingerprint() and cut.layout == plan.layout


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_flipped_bit_is_seen(dtype):
    t = noise(4, "x", (3, 5)).to(dtype)
    ints = t.view(torch.int32 if dtype is torch.float32 else torch.int16)
    plan = Plan([("w", t)])
    seen = {plan.fingerprint()}
    for place in itertools.product(range(3), range(5)):
        for bit in range(8 * t.element_size()):
            before = ints[place].clone()
            ints[place] ^= 1 << bit if bit < 8 * t.element_size() - 1 else -(1 << bit)
            seen.add(plan.fingerprint())
            ints[place] = before
    assert len(seen) == 1 + 15 * 8 * t.element_size()


def test_exchanged_elements_rows_columns_and_tensors_are_seen():
    t = torch.arange(48).view(6, 8).bfloat16()  # all different
    print_of = lambda a, b=t: Plan([("a", a.contiguous()), ("b", b.clone())]).fingerprint()  # noqa: E731
    seen = [print_of(t)]
    for i, j in itertools.combinations(range(48), 2):
        flat = t.clone().view(-1)
        flat[[i, j]] = flat[[j, i]]
        seen.append(print_of(flat.view(6, 8)))
    seen += [print_of(t[[1, 0, 2, 3, 4, 5]]), print_of(t[:, [1, 0, 2, 3, 4, 5, 6, 7]]), print_of(t.flip(0))]
    other = noise(6, "x", (6, 8)).bfloat16()
    seen += [print_of(t, other), print_of(other, t)]
    assert len(set(seen)) == len(seen)


def test_a_master_has_that_of_the_float32_weights_that_it_is():
    wide = noise(7, "x", (33, 17))
    master = Plan([("w", wide.bfloat16()), ("v", wide[0, :5].half())]).master()
    esfast.add_noise_(master, [1], [1e-3])
    exact = Plan([("w", wide.bfloat16().float()), ("v", wide[0, :5].half().float())])
    esfast.add_noise_(exact, [1], [1e-3])
    assert master.fingerprint() == exact.fingerprint()


def test_layout_is_of_the_whole_tensors():
    whole = torch.zeros(6, 4)
    plan = Plan([("w", whole), ("b", torch.zeros(3))])
    assert plan.layout == "29841d0b"  # journals hold it
    cut = [("w", whole[:2], Slice((6, 4), (0, 0))), ("w", whole[2:], Slice((6, 4), (2, 0))), ("b", torch.zeros(3))]
    assert Plan(cut).layout == Plan([cut[1], cut[2]]).layout == plan.layout
    assert Plan([("w", torch.zeros(2, 4)), ("b", torch.zeros(3))]).layout != plan.layout
    assert Plan([("w", whole.half()), ("b", torch.zeros(3))]).layout != plan.layout
