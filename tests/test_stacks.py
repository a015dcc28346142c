"""Members that are written to stacks in one call have the bits of `add_noise_`, member by member, wherever they lie."""

import numpy as np
import pytest
import torch

from esfast import Plan, Slice, add_noise_, stacked
from esfast.core import ops, stacks
from esfast.core.ops import check_members
from esfast.core.stacks import Stack, StackWriter, can_turn

CPU = torch.device("cpu")
SEEDS, COEFFS = [7, 2**64 - 1, 7], [0.5, -0.25, 0.0]
K = len(SEEDS)
SHAPES = {"a.weight": (37, 20), "b.bias": (5,), "c.weight": (3, 4, 5), "d.weight": (64, 48), "e.weight": (1, 300)}
needs_extension = pytest.mark.skipif(not can_turn(CPU), reason="the extension is not built")


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(stacks, "WORK_OF_THREADS", 1)
    yield request.param
    torch.set_num_threads(before)


def base_of(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return Plan([(name, torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()])


def stacks_of(base, both=(), turned=(), dtype=None):
    """A Stack for each tensor, filled with -1."""
    made = []
    for e in base.entries:
        dtype_of = dtype or e.tensor.dtype
        plain = torch.full((K, *e.tensor.shape), -1.0, dtype=dtype_of)
        lying = torch.full((K, *reversed(e.tensor.shape)), -1.0) if e.name in (*both, *turned) else None
        made.append(Stack(e.name, e.window, None if e.name in turned else plain, lying))
    return made


def check(made, base, seeds, coeffs, count=K, **options):
    """The first members are those of add_noise_, and the others are untouched."""
    for k in range(count):
        plan = Plan([(s.name, torch.empty_like(_first(s)), s.window) for s in made])
        noise = (seeds[k : k + 1], coeffs[k : k + 1]) if seeds else ([], [])
        add_noise_(plan, *noise, base=base, **options)
        for stack, want in zip(made, plan.tensors, strict=True):
            for found in _both(stack, k):
                assert torch.equal(found.view(torch.uint8), want.contiguous().view(torch.uint8)), (k, stack.name)
    for stack in made:
        for k in range(count, K):
            assert all((found == -1).all() for found in _both(stack, k))


def _first(stack):
    return stack.turned[0].mT.contiguous() if stack.stack is None else stack.stack[0]


def _both(stack, k):
    lying = [] if stack.turned is None else [stack.turned[k].mT.contiguous()]
    return lying if stack.stack is None else [stack.stack[k], *lying]


@needs_extension
@pytest.mark.parametrize("noise", ["gaussian", "rademacher", "low_rank"])
@pytest.mark.parametrize("count", [K, 2])
def test_members_have_the_bits_of_add_noise(noise, count, threads):
    base = base_of()
    made = stacks_of(base, both=["a.weight"], turned=["d.weight", "e.weight"])
    options = {"noise": noise, "rank": 2 if noise == "low_rank" else 1}
    writer = StackWriter(made, base, **options)
    writer.write(*check_members(SEEDS[:count], COEFFS[:count]), count)
    check(made, base, SEEDS, COEFFS, count, **options)
    assert writer.room == 4 * 64 * 48


@needs_extension
@pytest.mark.parametrize("stochastic", [False, True])
def test_16_bits_and_bases_of_more(stochastic, threads):
    for base in (base_of(torch.bfloat16), base_of(torch.bfloat16).master(), base_of()):
        made = stacks_of(base, dtype=torch.bfloat16)
        rounding = "stochastic" if stochastic else "nearest"
        StackWriter(made, base, rounding=rounding).write(*check_members(SEEDS, COEFFS), K)
        check(made, base, SEEDS, COEFFS, rounding=rounding)


@needs_extension
def test_without_noise_all_are_copies_of_the_base(threads):
    base = base_of()
    made = stacks_of(base, turned=["a.weight"])
    StackWriter(made, base).write(*check_members([], []), K)
    check(made, base, [], [])


@needs_extension
def test_bases_with_gaps_and_parts_of_tensors(threads):
    """Their tensors are several segments."""
    whole = torch.randn(6, 40, 30, generator=torch.Generator().manual_seed(2))
    tensors = [
        ("swapped", whole.permute(0, 2, 1), Slice((6, 30, 40), (0, 0, 0))),
        ("turned", torch.randn(30, 50).mT, Slice((50, 30), (0, 0))),
        ("part", torch.randn(8, 12)[::2, :10], Slice((100, 100), (3, 7))),
    ]
    base = Plan(tensors)
    made = stacks_of(base, both=["part"], turned=["turned"])
    for noise in ("gaussian", "low_rank"):
        StackWriter(made, base, noise=noise).write(*check_members(SEEDS, COEFFS), K)
        check(made, base, SEEDS, COEFFS, noise=noise)


@needs_extension
@pytest.mark.parametrize("streamed", [False, True])
def test_a_tensor_that_threads_share(streamed, threads):
    """It is taken in several parts; the large matrix, which is to be transposed, in one."""
    from esfast import _cpu

    tiles = {"long": (700_001,), "tall.weight": (1100, 513), "short": (3,)}
    base = base_of(shapes=tiles)
    made = stacks_of(base, turned=["tall.weight"])
    _cpu.set_streamed_from(0 if streamed else 2**26)
    try:
        StackWriter(made, base).write(*check_members(SEEDS, COEFFS), K)
    finally:
        _cpu.set_streamed_from(2**26)
    check(made, base, SEEDS, COEFFS)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_other_backends_write_member_by_member(backend, monkeypatch):
    if backend == "auto":
        monkeypatch.setattr(ops, "auto_backend", lambda device, kind="gaussian": "reference")
    base = base_of()
    made = stacks_of(base)
    StackWriter(made, base, backend=backend).write(*check_members(SEEDS[:2], COEFFS[:2]), 2)
    check(made, base, SEEDS, COEFFS, 2)
    assert not can_turn(CPU, backend)
    with pytest.raises(ValueError, match="only the CPU's extension lays matrices transposed"):
        StackWriter(stacks_of(base, turned=["a.weight"]), base, backend=backend)


def test_what_add_noise_refuses_is_refused():
    base = base_of()
    made = stacks_of(base)
    for options in ({"noise": "white"}, {"rounding": "down"}, {"backend": "none"}, {"noise": "low_rank", "rank": 0}):
        with pytest.raises(ValueError):
            StackWriter(made, base, **options)
    other = base_of(shapes=SHAPES | {"b.bias": (6,)})
    with pytest.raises(ValueError, match="must hold the same tensors"):
        StackWriter(made, other).write(*check_members(SEEDS, COEFFS), K)
    assert all((stack.stack == -1).all() for stack in made)


def test_a_base_that_moved_is_refused():
    base = base_of()
    made = stacks_of(base)
    writer = StackWriter(made, base)
    base.tensors[0].data = torch.zeros(37, 20)
    with pytest.raises(RuntimeError, match=r"memory of 'a\.weight' moved"):
        writer.write(*check_members(SEEDS, COEFFS), K)
    assert all((stack.stack == -1).all() for stack in made)


@needs_extension
def test_tables_of_another_shape_are_refused():
    from esfast import _cpu

    base = base_of()
    rows, instructions = base.table().rows, _cpu.instruction_sets()[0]
    seeds, coeffs = check_members(SEEDS, COEFFS)
    table = np.zeros((len(base), 6), dtype=np.int64)
    table[:, 0] = base.table().ends

    def call(rows=rows, table=table, members=K, seeds=seeds, coeffs=coeffs, kind=0, name=instructions):
        _cpu.write_stacks(rows, table, members, seeds, coeffs, kind, False, 0, 1, name)

    for changed, message in (
        ({"rows": rows[:, :5].copy()}, "field of a segment"),
        ({"table": table[:, :3].copy()}, "field of a stack"),
        ({"members": 2}, "as many as members"),
        ({"coeffs": coeffs[:2]}, "as many as members"),
        ({"kind": 9}, "no noise has the number 9"),
        ({"name": "avx1024"}, "no instruction set avx1024"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changed)


def test_segments_of_each_tensor_are_counted():
    base = Plan(
        [("flat", torch.ones(4, 3)), ("gaps", torch.ones(2, 3, 4, 5).permute(2, 0, 3, 1)), ("one", torch.ones(1))]
    )
    table = base.table()
    counts = np.diff(table.ends, prepend=0)
    assert table.ends[-1] == len(table.rows) and counts[0] == counts[2] == 1 < counts[1]


@needs_extension
def test_more_members_than_there_are_are_refused():
    base = base_of()
    made = stacks_of(base)
    for backend in ("auto", "reference"):
        writer = StackWriter(made, base, backend=backend)
        for seeds, members in ((SEEDS + [1], K + 1), (SEEDS, 2), ([], K + 1), ([], -1)):
            with pytest.raises(ValueError, match="at most 3 members, and a seed"):
                writer.write(*check_members(seeds, [0.1] * len(seeds)), members)
    assert all((stack.stack == -1).all() for stack in made)


def test_a_base_of_more_or_fewer_tensors_is_refused():
    model = torch.nn.Linear(3, 2)
    more = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    for base, error, message in (
        (Plan([("weight", torch.ones(2, 3))]), ValueError, "expected 2 tensors as in the model, got 1"),
        (Plan(more), ValueError, "expected 2 tensors as in the model, got 4"),
        ([torch.ones(2, 3)], TypeError, "expected a Plan .* got list"),
    ):
        with pytest.raises(error, match=message), stacked(model, [(1, 0.1)], base=base):
            pytest.fail("it was let in")
