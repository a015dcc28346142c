"""The Triton kernels under the interpreter, to the bit against the C++ backend; what they compile to is in test_sass.py.

Triton 3.9's interpreter has an exact fma. That of 3.6 computes fma(a, b, c) as a * b + c with two roundings, so there
only rademacher noise can be compared.
"""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import esfast
from esfast.core.ops import AdamStep, Call, check_members
from esfast.core.segments import FIELDS

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be interpreted")
from esfast.core.backends import triton as triton_backend  # noqa: E402
from esfast.core.backends.tiles import MATRIX_COLS  # noqa: E402
from esfast.kernels import low_rank  # noqa: E402

CANNOT = triton_backend.missing(torch.device("cpu")) if os.environ.get("TRITON_INTERPRET") == "1" else None
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU is here: kernels are compiled, not interpreted"
    ),
    pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT)),
]
EXACT_FMA = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GAUSSIAN = pytest.param(
    "gaussian",
    marks=pytest.mark.skipif(
        not EXACT_FMA, reason=f"the fma of Triton {triton.__version__}'s interpreter rounds twice"
    ),
)


def entries(dtype):
    """Whole tiles and tails, odd starts, a slice of columns, one beyond 2^32 blocks, a scalar, rows of one element."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(8, 700, generator=generator).to(dtype)
    flat = torch.randn(2600, generator=generator).to(dtype)
    return [
        ("plain", torch.randn(3, 400, generator=generator).to(dtype)),
        ("odd start", flat[7:1036]),
        ("slice", matrix[2:5, 30:643], esfast.Slice((1000, 5000), (3, 700))),
        ("far", flat[1040:1700], esfast.Slice((2**40,), (2**34 - 100,))),
        ("scalar", torch.tensor(3.0).to(dtype)),
        ("column", matrix[:4, 690:691]),
        ("transposed", torch.randn(5, 3, generator=generator).to(dtype).t()),
    ]


def both(dtype, kind, seeds, coeffs, inplace=False, tile=512):
    source = esfast.Plan(entries(dtype))
    ours, theirs = source.clone(), source.clone()
    triton_backend.run(Call(ours, *check_members(seeds, coeffs), None if inplace else source, kind), tile)
    esfast.add_noise_(theirs, seeds, coeffs, base=None if inplace else source, noise=kind, backend="cpu")
    return ours, theirs


# The interpreter takes seconds. Noise does not depend on the weights that it is added to, so that each dtype has one kind
# in place and the other from a base.
@pytest.mark.parametrize(
    ("dtype", "kind", "inplace"),
    [
        (torch.float32, "rademacher", False),
        pytest.param(torch.float32, *GAUSSIAN.values, True, marks=GAUSSIAN.marks),
        pytest.param(torch.bfloat16, *GAUSSIAN.values, False, marks=GAUSSIAN.marks),
        (torch.bfloat16, "rademacher", True),
        (torch.float16, "rademacher", False),
        pytest.param(torch.float16, *GAUSSIAN.values, True, marks=GAUSSIAN.marks),
    ],
)
def test_equals_the_cpu_backend(dtype, kind, inplace, same_bits):
    ours, theirs = both(dtype, kind, [2**64 - 1, 5], [0.01, -0.3], inplace)
    for name, a, b in zip(ours.names, ours.tensors, theirs.tensors, strict=True):
        assert same_bits([a], [b]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_restoring_copies_every_bit_in_one_launch(dtype, monkeypatch, same_bits):
    """NaNs of any payload included, and nothing beside the weights."""
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    base = esfast.Plan(entries(dtype))
    for t in base.tensors:
        t.copy_(
            torch.randint(-(2**15), 2**15, t.shape, generator=torch.Generator().manual_seed(2)).to(integers).view(dtype)
        )
    memory, held, at = torch.full((9000,), 7.0).to(dtype), [], 3
    for e in base.entries:
        held.append((e.name, memory[at : at + e.tensor.numel()].view(e.tensor.shape), e.window))
        at += e.tensor.numel() + (5 if len(held) % 2 else -(at + e.tensor.numel()) % 8)
    launched, copy_tiles = [], triton_backend._copy_tiles
    monkeypatch.setattr(triton_backend, "_copy_tiles", lambda *a: launched.append(copy_tiles(*a)))
    plan = esfast.Plan(held)
    triton_backend.run(Call(plan, *check_members([], []), base), 512)
    assert len(launched) == 1 and same_bits(plan.tensors, [t.contiguous() for t in base.tensors])
    for _, t, _ in held:
        t.fill_(7.0)
    assert (memory == 7.0).all()
    triton_backend.run(Call(plan, *check_members([], [])), 512)
    assert len(launched) == 1, "nothing is to be done in place"


@pytest.mark.parametrize("kind", [GAUSSIAN, "rademacher"])
@pytest.mark.parametrize("members", [1, 3, 17])
def test_member_counts(kind, members, same_bits):
    plan = esfast.Plan([("w", torch.linspace(-1, 1, 600).bfloat16())])
    ours, theirs = plan.clone(), plan.clone()
    seeds, coeffs = list(range(members)), [0.01 * (-1) ** j / (j + 1) for j in range(members)]
    triton_backend.run(Call(ours, *check_members(seeds, coeffs), plan, kind), 512)
    esfast.add_noise_(theirs, seeds, coeffs, base=plan, noise=kind, backend="cpu")
    assert same_bits(ours.tensors, theirs.tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_extreme_weights(dtype, same_bits):
    """Ties, subnormals, infinities and the overflow of float16; with noise of one bit so that sums are known."""
    bits = torch.arange(-32768, 32768, 7).to(torch.int16)
    values = bits.view(dtype) if dtype.itemsize == 2 else (bits.to(torch.int32) << 16 | 0x7FFF).view(torch.float32)
    values = values[~values.isnan()]
    for coeff in (1e-3, 2.0**-133, 3.0):
        plan = esfast.Plan([("w", values.clone())])
        ours, theirs = plan.clone(), plan.clone()
        triton_backend.run(Call(ours, *check_members([9], [coeff]), plan, "rademacher"), 4096)
        esfast.add_noise_(theirs, [9], [coeff], base=plan, noise="rademacher", backend="cpu")
        assert same_bits(ours.tensors, theirs.tensors)


def test_public_call_mixed_dtypes_and_copy(same_bits):
    plan = esfast.Plan([(str(d), torch.randn(300).to(d)) for d in DTYPES])
    base, wanted = plan.clone(), plan.clone()
    esfast.add_noise_(plan, [3], [0.5], base=base, noise="rademacher", backend="triton")
    esfast.add_noise_(wanted, [3], [0.5], base=base, noise="rademacher", backend="cpu")
    assert same_bits(plan.tensors, wanted.tensors)
    esfast.add_noise_(plan, [], [], base=base, backend="triton")
    assert same_bits(plan.tensors, base.tensors)


def test_members_as_tensors(same_bits):
    plan = esfast.Plan([("w", torch.randn(300))])
    wanted = plan.clone()
    esfast.add_noise_(wanted, [2**64 - 2, 4], [0.5, 0.25], noise="rademacher", backend="cpu")
    seeds, coeffs = torch.tensor([-2, 4]), torch.tensor([0.5, 0.25])
    before = plan.tensors[0].clone()
    for bad in ((seeds.int(), coeffs), (seeds, coeffs.double()), (seeds, coeffs[:1]), (seeds, [0.5, 0.25])):
        with pytest.raises(TypeError, match="with a tensor of seeds, expected a contiguous torch"):
            esfast.add_noise_(plan, *bad, noise="rademacher", backend="triton")
    assert same_bits(plan.tensors, [before])
    esfast.add_noise_(plan, seeds, coeffs, noise="rademacher", backend="triton")
    assert same_bits(plan.tensors, wanted.tensors)


def test_tables_follow_the_base(same_bits):
    plan = esfast.Plan([("w", torch.randn(200))])
    for _ in range(2):
        base = esfast.Plan([("w", torch.randn(200))])
        esfast.add_noise_(plan, [1], [1.0], base=base, noise="rademacher", backend="triton")
        wanted = base.clone()
        esfast.add_noise_(wanted, [1], [1.0], noise="rademacher", backend="cpu")
        assert same_bits(plan.tensors, wanted.tensors)


def matrices(dtype):
    """Whole tiles and parts of one, odd rows and columns, a batch, filters, numbers beyond 2^34, a vector, a scalar."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(8, 600, generator=generator).to(dtype)
    return [
        ("whole", torch.randn(20, 136, generator=generator).to(dtype)),
        ("odd", torch.randn(3, 53, generator=generator).to(dtype)),
        ("row", wide[7:8, 100:230]),
        ("column", wide[:, 598:599]),
        ("batch", torch.randn(2, 3, 7, generator=generator).to(dtype)),
        ("filters", wide[:4, 200:260].view(4, 5, 3, 4), esfast.Slice((9, 5, 7, 4), (3, 0, 1, 0))),
        ("far", wide[:2, 30:70], esfast.Slice((2**36, 2**20), (2**34 - 3, 2**19 + 1))),
        ("vector", wide[6, 301:441]),
        ("scalar", torch.tensor(3.0).to(dtype)),
    ]


LOW_RANK = [
    # dtype, members, rank, rounding, decay, Adam
    (torch.float32, 1, 1, "nearest", 0, False),
    (torch.float32, 2, 2, "nearest", 0, False),
    (torch.bfloat16, 2, 2, "nearest", 0, False),
    (torch.bfloat16, 1, 2, "stochastic", 2, False),
    (torch.bfloat16, 1, 2, "stochastic", 1, True),
    (torch.float16, 1, 1, "nearest", 0, False),
    (torch.float16, 1, 2, "stochastic", 2, False),
]


@pytest.mark.skipif(not EXACT_FMA, reason=f"the fma of Triton {triton.__version__}'s interpreter rounds twice")
@pytest.mark.parametrize(("dtype", "members", "rank", "rounding", "decay", "adam"), LOW_RANK)
def test_low_rank(dtype, members, rank, rounding, decay, adam, same_bits):
    source = esfast.Plan(matrices(dtype))
    ours, theirs, anchor = source.clone(), source.clone(), source.clone() if decay == 2 else None
    moments = [torch.zeros(2, source.flat_numel) for _ in range(2)]
    steps = [AdamStep.at(2, m, 0.1, 0.9, 0.99, 1e-8) if adam else None for m in moments]
    seeds, coeffs = [2**64 - 1 - j for j in range(members)], [0.3 / (j + 1) for j in range(members)]
    base, fraction = None if adam else source, 0.1 if decay else 0.0
    call = Call(
        ours,
        *check_members(seeds, coeffs),
        base,
        "low_rank",
        rounding == "stochastic",
        np.float32(fraction),
        anchor,
        steps[0],
        rank,
    )
    triton_backend.run(call, 16)
    esfast.add_noise_(
        theirs,
        seeds,
        coeffs,
        base,
        "low_rank",
        rounding,
        "cpu",
        decay=fraction,
        anchor=anchor,
        adam=steps[1],
        rank=rank,
    )
    for name, a, b in zip(ours.names, ours.tensors, theirs.tensors, strict=True):
        assert same_bits([a], [b]), name
    assert same_bits(*moments)


@pytest.mark.skipif(not EXACT_FMA, reason=f"the fma of Triton {triton.__version__}'s interpreter rounds twice")
@pytest.mark.parametrize(("members", "rank"), [(5, 1), (64, 1), (2, 5)])
def test_low_rank_by_the_tiles_that_ship(members, rank, same_bits):
    """Four factors a turn: two turns with three slots empty, sixteen turns, and three of which the second has factors of
    both members."""
    plan = esfast.Plan([("w", torch.randn(129, 128, generator=torch.Generator().manual_seed(3)).bfloat16())])
    wanted, seeds, coeffs = plan.clone(), list(range(members)), [(-1) ** j * 0.1 * (j + 1) for j in range(members)]
    triton_backend.run(Call(plan, *check_members(seeds, coeffs), None, "low_rank", rank=rank))
    esfast.add_noise_(wanted, seeds, coeffs, noise="low_rank", backend="cpu", rank=rank)
    assert same_bits(plan.tensors, wanted.tensors)


@pytest.mark.skipif(not EXACT_FMA, reason=f"the fma of Triton {triton.__version__}'s interpreter rounds twice")
def test_low_rank_of_split_masters(same_bits):
    source = esfast.Plan([("w", torch.randn(16, 128, generator=torch.Generator().manual_seed(3)).bfloat16())])
    results = []
    for run in (triton_backend.run, None):
        master, plan = source.master(), source.clone()
        for target, base, members in ((master, None, 2), (plan, master, 1)):
            if run:
                run(Call(target, *check_members([1, 2][:members], [0.3, 0.2][:members]), base, "low_rank", rank=2), 16)
            else:
                esfast.add_noise_(
                    target, [1, 2][:members], [0.3, 0.2][:members], base, "low_rank", backend="cpu", rank=2
                )
        results.append((master.low, *master.tensors, *plan.tensors))
    assert torch.equal(results[0][0], results[1][0]) and same_bits(results[0][1:], results[1][1:])


def test_columns_of_the_segment_table():
    names = {"DST_AT": "dst", "SRC_AT": "src", "ANCHOR_AT": "anchor"}
    found = {k: v.value for k, v in vars(low_rank).items() if names.get(k, k.lower()) in FIELDS and k != "COLS"}
    assert len(found) == 17 and all(FIELDS[v] == names.get(k, k.lower()) for k, v in found.items())
    assert low_rank.FIELDS.value == len(FIELDS) and low_rank.COLS.value == MATRIX_COLS


def test_an_interpreter_that_cannot_count_is_named(monkeypatch):
    def fails(*_):
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    probe = triton_backend._interpreter_fails.__wrapped__
    assert EXACT_FMA <= (probe() is None), "Triton 3.9 works with every NumPy"
    for broken, said in (
        (fails, "does not work with NumPy .*only 0-dimensional.*take Triton 3.9"),
        (lambda *_: None, "can't count here"),
    ):
        monkeypatch.setattr(triton_backend, "_count", {(1,): broken})
        assert re.search(said, probe())


def test_without_a_gpu_the_error_says_what_is_missing():
    code = (
        "import torch, esfast\nplan = esfast.Plan([('w', torch.zeros(3))])\n"
        "try: esfast.add_noise_(plan, [1], [1.0], backend='triton')\nexcept RuntimeError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "backend 'triton' can't run: it needs tensors on a GPU, and these are on cpu" in done.stdout


def test_autotune_only_reads_the_weights(same_bits, monkeypatch):
    """Autotuning keeps the fastest configuration and changes neither weights nor results. If it fails, the earlier
    choice stays."""
    plan = esfast.Plan([("w", torch.randn(300))])
    before = plan.clone()
    monkeypatch.setattr(triton_backend, "_tuned", {})
    slow = iter([5.0, 6.0, 4.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(triton_backend, "_milliseconds", lambda call: next(slow))
    times = triton_backend.autotune(plan, "rademacher", repeats=1)
    assert list(times) == list(triton_backend.CONFIGS) and list(triton_backend._tuned.values()) == [(4096, 8, 96)]
    assert same_bits(plan.tensors, before.tensors)
    monkeypatch.setattr(triton_backend, "_milliseconds", lambda call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        triton_backend.autotune(plan, "rademacher")
    assert list(triton_backend._tuned.values()) == [(4096, 8, 96)]
    esfast.add_noise_(plan, [1], [0.5], noise="rademacher", backend="triton")
    esfast.add_noise_(before, [1], [0.5], noise="rademacher", backend="cpu")
    assert same_bits(plan.tensors, before.tensors)
