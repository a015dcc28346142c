"""The tests of the Triton kernels would notice: with any other constant, and in any other order, the numbers differ."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_triton import EXACT_FMA, triton_backend
from test_triton import pytestmark as of_the_interpreter

import esfast
from esfast.core.backends.tiles import tile_table

pytestmark = [
    *of_the_interpreter,
    pytest.mark.skipif(not EXACT_FMA, reason="gaussian noise needs the exact fma of Triton 3.9's interpreter"),
]

KERNELS = Path(triton_backend.add_noise_kernel.fn.__code__.co_filename).parent
SOURCE = (KERNELS / "noise.py").read_text()
BODY = SOURCE[SOURCE.index("@triton.jit") :]
GAUSSIAN_BODY = BODY[: BODY.index("def add_signed")]  # what rademacher adds is held by the tests above
NUMBERS = list(re.finditer(r"0x[0-9A-F]+|-?\d+\.\d+", GAUSSIAN_BODY))
SWAPS = [
    ("x0 = (p1 >> 32)", "x0 = (p0 >> 32)"),
    ("^ x1 ^ k0", "^ x3 ^ k0"),
    ("static_range(7)", "static_range(6)"),
    ("e * _LN)", "e * (_LN * 1.0000001))"),
    ("w = tl.fma(tl.fma(-f, f, f), q, e * _LN)", "w = (f - f * f) * q + e * _LN"),
    (
        "return tl.fma(s * d, tl.fma(0.37602824, d, 0.501085818), s)",
        "return s * d * tl.fma(0.37602824, d, 0.501085818) + s",
    ),
    ("(r * h) * s", "r * (h * s)"),
    ("d = tl.fma(-s, y, 1.0)", "d = 1.0 - s * y"),
    ("(a | 1)", "a"),
]


def mutated(tmp_path, text):
    """The kernels with another noise.py, as a package of its own."""
    folder = tmp_path / "mutant"
    folder.mkdir()
    for file in KERNELS.glob("*.py"):
        (folder / file.name).write_text(file.read_text())
    (folder / "noise.py").write_text(SOURCE[: SOURCE.index("@triton.jit")] + text)
    name = f"mutant{abs(hash(text))}"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{name}.add_noise").add_noise_kernel


def numbers_of(kernel, kind):
    count = 2**15
    plan = esfast.Plan([("w", torch.zeros(count))])
    tiles = torch.from_numpy(tile_table(plan.table().rows, count)[0])
    kernel[(1,)](
        tiles,
        tiles,
        torch.tensor([77]),
        torch.ones(1),
        1,
        0,
        0,
        0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        KIND=kind,
        SRC=0,
        DST=0,
        TILE=count,
        STOCHASTIC=False,
        DECAY=0,
        ADAM=False,
    )
    return plan.tensors[0]


@pytest.fixture(scope="module")
def unmutated():
    plan = esfast.Plan([("w", torch.zeros(2**15))])
    esfast.add_noise_(plan, [77], [1.0], backend="cpu")
    return plan.tensors[0]


def test_original_is_equal(tmp_path, unmutated):
    assert torch.equal(numbers_of(mutated(tmp_path, BODY), 0), unmutated)


@pytest.mark.parametrize("place", range(len(NUMBERS)), ids=lambda i: f"{i}:{NUMBERS[i][0]}")
def test_another_constant_is_noticed(place, tmp_path, unmutated):
    m = NUMBERS[place]
    if m[0].startswith("0x"):
        other = hex(int(m[0], 16) ^ (1 << 16))
    else:
        other = repr(float(np.nextafter(np.float32(m[0]), np.float32(9))))
    text = BODY[: m.start()] + other + BODY[m.end() :]
    assert not torch.equal(numbers_of(mutated(tmp_path, text), 0), unmutated)


@pytest.mark.parametrize("swap", range(len(SWAPS)))
def test_another_order_is_noticed(swap, tmp_path, unmutated):
    old, new = SWAPS[swap]
    assert BODY.count(old) == 1, old
    assert not torch.equal(numbers_of(mutated(tmp_path, BODY.replace(old, new)), 0), unmutated)
