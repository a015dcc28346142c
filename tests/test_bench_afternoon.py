"""The rivals of `esfast bench noise` are fair: their noise has the right distribution, and they do the same work for a
member and an update."""

import pytest
import torch

from esfast.bench import afternoon

N = 2**18
SHAPES = [(N,), (8, N // 8), (1031,), (17,), (1,)]
WAYS = [(kind, name) for kind, named in afternoon.WAYS.items() for name in named if kind != "low_rank"]


@pytest.fixture(scope="module", params=WAYS, ids=[name for _, name in WAYS])
def way(request):
    kind, name = request.param
    return kind, afternoon.WAYS[kind][name]()


def drawn(way, seed, shapes=SHAPES):
    tensors = [torch.zeros(s) for s in shapes]
    way.perturb_(tensors, seed, 1.0)
    return [t.view(-1).double() for t in tensors]


def test_the_noise_is_of_the_right_law(way):
    kind, way = way
    first, second, *small = drawn(way, 1)
    (other,) = drawn(way, 2, SHAPES[:1])
    error = N**-0.5  # of a mean of numbers with variance 1
    for z in (first, second, other):
        assert abs(z.mean()) < 5 * error
        if kind == "rademacher":
            assert bool((z.abs() == 1).all())
        else:
            assert abs(z.var() - 1) < 5 * 2**0.5 * error
            assert abs((z**3).mean()) < 5 * 15**0.5 * error and abs((z**4).mean() - 3) < 5 * 96**0.5 * error
            assert 4 < z.abs().max() < 6.7
        for lag in (1, 2, 16, N // 32, N // 2):
            assert abs((z[lag:] * z[:-lag]).mean()) < 5 * (N - lag) ** -0.5, lag
    # independent between tensors, and between seeds; their sizes as well
    for a, b in ((first, second), (first, other), (second, other)):
        assert abs((a * b).mean()) < 5 * error
        assert kind == "rademacher" or abs(((a**2 - 1) * (b**2 - 1)).mean()) < 5 * 2 * error
    assert all(bool((z != 0).all()) and z.abs().max() < 6.7 for z in small)


# Compiling takes seconds, so of what is compiled one kind has one dtype and the other one the other.
COMPILED = {"gaussian": [torch.float32], "rademacher": [torch.bfloat16]}
MEMBERS = [
    pytest.param((kind, name), dtype, id=f"{name}-{dtype}")
    for kind, name in WAYS
    for dtype in (COMPILED[kind] if "compiled" in name else [torch.float32, torch.bfloat16])
]


@pytest.mark.parametrize(("way", "dtype"), MEMBERS, indirect=["way"])
def test_members_and_updates_are_those_of_the_noise(way, dtype):
    """A member is base + sigma noise, in place or from a base, and an update the sum over the same noise."""
    _, way = way
    one, two = drawn(way, 5), drawn(way, 6)
    base = [torch.full(s, 0.02, dtype=dtype) for s in SHAPES]
    place = [t.clone() for t in base]
    written = [torch.full_like(t, torch.nan) for t in base]
    updated = [t.clone() for t in base]
    way.perturb_(place, 5, 1e-3)
    way.perturb_(written, 5, 1e-3, base)
    # more members than a pass adds at once
    seeds, coeffs = [5, *range(10, 16), 6], [1e-3, *[0.0] * 6, -2e-3]
    way.update_(updated, seeds, coeffs)
    near = 1e-9 if dtype == torch.float32 else 2.0**-13  # half a place, of weights up to 1/16
    for b, p, w, u, z1, z2 in zip(base, place, written, updated, one, two, strict=True):
        start = b.view(-1).double()
        torch.testing.assert_close(p.view(-1).double(), start + 1e-3 * z1, rtol=1e-6, atol=near)
        torch.testing.assert_close(w, p, rtol=0, atol=0)
        torch.testing.assert_close(u.view(-1).double(), start + 1e-3 * z1 - 2e-3 * z2, rtol=1e-6, atol=near)


def test_code_compiled_for_other_vectors_is_not_taken_up(monkeypatch):
    """PyTorch's cache of graphs takes AVX2's code for AVX-512's: half of the numbers were added twice, the last ones
    beyond the end."""
    start, key, factor = torch.tensor(3, dtype=torch.int32), torch.tensor([5, 77], dtype=torch.int32), torch.tensor(0.5)
    wanted = [torch.zeros(2048) for _ in range(2)]
    afternoon._pairs_in_place(*wanted, start, key, factor)
    for capability in ("avx2", "avx512"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        torch.compiler.reset()
        afternoon._compiled.cache_clear()
        found = [torch.zeros(2048) for _ in range(2)]
        afternoon._compiled(afternoon._pairs_in_place)(*found, start, key, factor)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
    afternoon._compiled.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", afternoon.WAYS["low_rank"])
def test_low_rank_members_are_a_product_of_factors_each(name, dtype):
    """Of rank 1 with variance 1 for a member, of rank 2 for two; vectors full; independent between tensors and seeds."""
    way, shapes = afternoon.WAYS["low_rank"][name](), [(300, 500), (300, 500), (2000,)]

    def drawn(seeds, coeffs):
        tensors = [torch.zeros(s, dtype=dtype) for s in shapes]
        if len(seeds) == 1:
            base = [t.clone() for t in tensors]
            for t in tensors:
                t.fill_(torch.nan)
            way.perturb_(tensors, seeds[0], coeffs[0], base)
        else:
            way.update_(tensors, seeds, coeffs)
        return [t.double() for t in tensors]

    one, two, both = drawn([1], [1.0]), drawn([2], [1.0]), drawn([1, 2], [1.0, -0.5])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for a, b, c in zip(one, two, both, strict=True):
        torch.testing.assert_close(c, a - 0.5 * b, rtol=tolerance, atol=tolerance)
    for z in (one[0], one[1], two[0]):
        values = torch.linalg.svdvals(z)
        assert values[1] < 0.02 * values[0]
        # of a product of two means, and of two mean squares
        assert abs(z.mean()) < 5 * (1 / 300) ** 0.5 * (1 / 500) ** 0.5 * 3
        assert abs(z.square().mean() - 1) < 5 * (2 / 300 + 2 / 500) ** 0.5
    assert abs(one[2].var() - 1) < 5 * (2 / 2000) ** 0.5
    for x, y in ((one[0], one[1]), (one[0], two[0])):
        assert abs((x * y).mean()) < 5 * (1 / 300 / 500) ** 0.5 * 3
