"""`esfast bench statistics`: is the gaussian noise N(0,1), the rademacher noise a fair coin, and low-rank noise right?

Over n numbers (of one tensor, seeds and tensor ids as stated), each row is a mean of terms with known expectation and
standard error under the hypothesis; a row passes within LIMIT standard errors. With z from N(0,1), independent:

    mean           mean of z                                expected 0   standard error sqrt(1 / n)
    variance       central                                  1            sqrt(2 / n)
    skewness       third central moment / variance^1.5      0            sqrt(6 / n)
    kurtosis       fourth central moment / variance^2       3            sqrt(24 / n)
    correlations   mean of x y over m pairs                 0            sqrt(1 / m)
    z^2            mean of (x^2 - 1) (y^2 - 1) / 2          0            sqrt(1 / m)

(Var z = 1, Var z^2 = 2; the asymptotic variances 6 and 24 are Fisher's; Var of a product of independents is the product
of their variances.) Signs have variance 1 too. Moments and correlations are summed in float64, chunk by chunk; lag
correlations take the pairs inside a chunk. The largest |z| of n has the distribution function erf(x / sqrt 2)^n: its
expected value is the median, its deviation the normal quantile of its probability. Last, z is compared with Box-Muller
in float64 of the same random bits.

Low-rank noise of rank r has mean 0 and variance 1 in each weight, and Var z^2 = 2 + 6 / r, since its numbers are sums
of products of normal ones. Weights that share neither row nor column are independent, so these are taken: the
diagonals of a batch of matrices, under one seed after another. Weights of one row or column are not independent, but
their mean product is 0; as they share a factor, a product has the variance 1 + 2 / r.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from statistics import NormalDist

import numpy as np
import torch
from tqdm import tqdm

from ..core.noise import DOMAINS, check_seed, philox, tensor_id
from ..core.ops import add_noise_
from ..core.plan import Plan, Slice
from ..utils.settings import check_int
from . import count

LIMIT = 5.0  # standard errors; one row in 1.7 million goes beyond it by chance
BOUND = 2e-4  # of |z - Box-Muller in float64|, from the definition of the noise
CHUNK = 2**20  # numbers at a time: their float64 copies stay in the cache
BOX_MULLER_NUMBERS = 2**24
LAGS = range(1, 9)
# Low-rank noise: how many independent numbers at most, from batches of so many square matrices of this size.
LOW_RANK_NUMBERS = 2**20
BATCH, SIDE = 64, 64
RANKS = (1, 4)
# Two names with neighbouring 32-bit ids: that of the second is that of the first + 1.
NAME, NEXT = "xvpcgfn", "gditoze"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numbers", type=count, default=2**30, help="how many of each kind (default: 2**30)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--backend", default="cpu", help="backend that is tested (default: cpu)")


def run(args: argparse.Namespace) -> dict:
    check_int("numbers", args.numbers, 1000, 2**40)
    check_seed(args.seed)
    check_seed(args.seed + 1)
    source = Source(args.numbers, args.seed, args.backend)
    rows = [{"noise": "gaussian", **r} for r in gaussian_rows(source)]
    rows += [{"noise": "rademacher", **r} for r in rademacher_rows(source)]
    for row in rows:
        row["numbers"] = args.numbers
    return {"rows": rows + [r for rank in RANKS for r in low_rank_rows(source, rank)]}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = ["statistic", "noise", "value", "expected", "standard error", "deviation", ""]
    lines = []
    for r in result["rows"]:
        expected = f"at most {r['bound']:g}" if r["bound"] is not None else f"{r['expected']:.6g}"
        error, deviation = (r[k] is not None for k in ("standard_error", "deviation"))
        lines.append(
            [
                r["name"],
                r["noise"],
                f"{r['value']:.3g}" if abs(r["value"]) < 0.1 else f"{r['value']:.8g}",
                expected,
                f"{r['standard_error']:.2g}" if error else "",
                f"{r['deviation']:+.2f}" if deviation else "",
                "pass" if r["pass"] else "FAIL",
            ]
        )
    return headers, lines


def summary(result: dict) -> dict:
    """The result with the lags of each kind as one row, the one that deviates most."""
    rows: list[dict] = []
    for row in result["rows"]:
        if not re.fullmatch(r"correlation at lag \d+", row["name"]):
            rows.append(row)
            continue
        worst = row | {"name": f"correlation at lags {LAGS[0]} to {LAGS[-1]}, the largest"}
        if rows and (rows[-1]["name"], rows[-1]["noise"]) == (worst["name"], worst["noise"]):
            worst = max(worst, rows.pop(), key=lambda r: abs(r["deviation"]))
        rows.append(worst)
    return result | {"rows": rows}


class Source:
    """Chunks of the noise of one large tensor, which is never made as a whole."""

    def __init__(self, numbers: int, seed: int, backend: str):
        self.numbers, self.seed, self.backend = numbers, seed, backend

    def chunks(self, kind: str):
        starts = range(0, self.numbers, CHUNK)
        with tqdm(total=self.numbers, unit="", unit_scale=True, desc=kind, file=sys.stderr, disable=None) as bar:
            for start in starts:
                size = min(CHUNK, self.numbers - start)
                yield start, size
                bar.update(size)

    def draw(self, kind: str, start: int, size: int, seed_offset: int = 0, name: str = NAME) -> torch.Tensor:
        z = torch.zeros(size)
        plan = Plan([(name, z, Slice((self.numbers,), (start,)))])
        add_noise_(plan, [self.seed + seed_offset], [1.0], noise=kind, backend=self.backend)
        return z


class Means:
    """Running means of products, by name."""

    def __init__(self):
        self.total: defaultdict[str, float] = defaultdict(float)
        self.terms: defaultdict[str, int] = defaultdict(int)

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        self.total[name] += float(torch.dot(x, y))
        self.terms[name] += len(x)

    def add_lags(self, z: torch.Tensor) -> None:
        for k in LAGS:
            self.add(f"correlation at lag {k}", z[:-k], z[k:])

    def pop(self, name: str) -> float:
        return self.total.pop(name) / self.terms.pop(name)

    def rows(self) -> list[dict]:
        """Rows of the remaining means, whose terms have mean 0 and variance 1."""
        return [_row(name, self.total[name] / n, 0, math.sqrt(1 / n)) for name, n in self.terms.items()]


def gaussian_rows(source: Source) -> list[dict]:
    means, largest, n = Means(), 0.0, source.numbers
    for start, size in source.chunks("gaussian"):
        z32 = source.draw("gaussian", start, size)
        largest = max(largest, float(z32.abs().max()))
        z = z32.double()
        square, one = z * z, torch.ones(1, dtype=torch.float64).expand(size)
        for power, (x, y) in enumerate(((z, one), (z, z), (square, z), (square, square)), start=1):
            means.add(f"power {power}", x, y)
        means.add_lags(z)
        first, second = z[: size - size % 2 : 2].contiguous(), z[1::2].contiguous()
        means.add("correlation in Box-Muller pairs", first, second)
        means.add("correlation of z^2 in pairs", (first * first - 1) / 2, second * second - 1)
        means.add("correlation of neighbouring seeds", z, source.draw("gaussian", start, size, seed_offset=1).double())
        means.add("correlation of neighbouring tensors", z, source.draw("gaussian", start, size, name=NEXT).double())
    s1, s2, s3, s4 = (means.pop(f"power {p}") for p in range(1, 5))
    variance = s2 - s1**2
    skewness = (s3 - 3 * s1 * s2 + 2 * s1**3) / variance**1.5
    kurtosis = (s4 - 4 * s1 * s3 + 6 * s1**2 * s2 - 3 * s1**4) / variance**2
    rows = [
        _row("mean", s1, 0, math.sqrt(1 / n)),
        _row("variance", variance, 1, math.sqrt(2 / n)),
        _row("skewness", skewness, 0, math.sqrt(6 / n)),
        _row("kurtosis", kurtosis, 3, math.sqrt(24 / n)),
    ]
    rows += means.rows()
    error = box_muller_error(source, min(n, BOX_MULLER_NUMBERS))
    return [*rows, _largest(largest, n), _bounded("distance from Box-Muller in float64", error, BOUND)]


def rademacher_rows(source: Source) -> list[dict]:
    means, others = Means(), 0
    for start, size in source.chunks("rademacher"):
        z = source.draw("rademacher", start, size)
        others += int((z.abs() != 1).sum())
        z = z.double()
        means.add("mean", z, torch.ones(1, dtype=torch.float64).expand(size))
        means.add_lags(z)
    return [*means.rows(), _bounded("numbers other than +1 and -1", others, 0)]


def low_rank_rows(source: Source, rank: int) -> list[dict]:
    draws = max(1, min(source.numbers, LOW_RANK_NUMBERS) // (BATCH * SIDE))
    total: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    before = None
    for j in range(draws):
        batch = _batch(source, j, rank)
        z = batch.diagonal(dim1=1, dim2=2)
        right, below = batch.diagonal(1, 1, 2), batch.diagonal(-1, 1, 2)
        products = {
            "mean": z,
            "variance": z * z,
            "correlation in a row": z[:, :-1] * right,
            "correlation in a column": z[:, :-1] * below,
            "correlation of neighbouring matrices of a batch": z[:-1] * z[1:],
            "correlation of neighbouring tensors": z * _batch(source, j, rank, NEXT).diagonal(dim1=1, dim2=2),
        }
        if before is not None:
            products["correlation of neighbouring seeds"] = z * before
        for name, values in products.items():
            total[name].append((float(values.sum()), values.numel()))
        before = z
    rows = []
    for name, sums in total.items():
        n = sum(count for _, count in sums)
        variance = {
            "variance": 2 + 6 / rank,
            "correlation in a row": 1 + 2 / rank,
            "correlation in a column": 1 + 2 / rank,
        }
        row = _row(name, sum(s for s, _ in sums) / n, float(name == "variance"), math.sqrt(variance.get(name, 1) / n))
        rows.append({"noise": f"low_rank, rank {rank}", **row, "numbers": n})
    return rows


def _batch(source: Source, number: int, rank: int, name: str = NAME) -> torch.Tensor:
    z = torch.zeros(BATCH, SIDE, SIDE)
    seed = (source.seed + number) % 2**64
    add_noise_(Plan([(name, z)]), [seed], [1.0], noise="low_rank", rank=rank, backend=source.backend)
    return z.double()


def box_muller_error(source: Source, numbers: int) -> float:
    """Largest |z - Box-Muller in float64 of the same bits| over the first `numbers`."""
    worst = 0.0
    for start in range(0, numbers, CHUNK):
        size = min(CHUNK, numbers - start)
        blocks = np.arange(start // 4, (start + size + 3) // 4, dtype=np.uint64)
        a0, b0, a1, b1 = philox(source.seed, blocks, tensor_id(NAME), DOMAINS["gaussian"])
        exact = np.stack([*_box_muller(a0, b0), *_box_muller(a1, b1)], axis=1).reshape(-1)[:size]
        z = source.draw("gaussian", start, size).numpy()
        worst = max(worst, float(np.abs(z - exact).max()))
    return worst


def _box_muller(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the definition: u = a | 1 rounded to float32, h = -1 + 2^-22 (low 23 bits of b), and the sign in bit 31."""
    u = (a | np.uint32(1)).astype(np.float32).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u / 2**32))
    angle = np.pi / 2 * ((b & np.uint32(0x7FFFFF)) / 2**22 - 1)
    return radius * np.sin(angle), radius * np.cos(angle) * np.where(b >> np.uint32(31), -1.0, 1.0)


def _row(name: str, value: float, expected: float, standard_error: float) -> dict:
    deviation = (value - expected) / standard_error
    return {
        "name": name,
        "value": value,
        "expected": expected,
        "standard_error": standard_error,
        "deviation": deviation,
        "bound": None,
        "pass": abs(deviation) <= LIMIT,
    }


def _bounded(name: str, value: float, bound: float) -> dict:
    return {
        "name": name,
        "value": value,
        "expected": None,
        "standard_error": None,
        "deviation": None,
        "bound": bound,
        "pass": value <= bound,
    }


def _largest(value: float, n: int) -> dict:
    normal = NormalDist()
    probability = math.exp(n * math.log1p(-math.erfc(value / math.sqrt(2)))) if value > 0 else 0.0
    deviation = normal.inv_cdf(min(max(probability, 1e-300), 1 - 1e-16))
    median = -normal.inv_cdf(-math.expm1(math.log(0.5) / n) / 2)
    return {
        "name": "largest |z|",
        "value": value,
        "expected": median,
        "standard_error": None,
        "deviation": deviation,
        "bound": None,
        "pass": abs(deviation) <= LIMIT,
    }
