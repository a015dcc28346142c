"""`esfast bench drift`: what rounding does to weights over thousands of members, by the usual code and by each mode.

Weights are N(0, 0.02^2). Two runs of generations each, for every dtype and way of changing weights:

    restore   members only. The weights should come back: the fraction that did not, and their RMS distance (drift)
    update    members, then an update with the coefficients of random rewards. How much of an update arrives: regression
              slope and correlation of the weights' change on the exact change, in one update and in all

and single updates with smaller and smaller learning rates. The exact result is computed in float64, as weights + sum_j
coefficient_j * noise_j, without the code under test. Its noise is drawn separately: ours by add_noise_ into zeros,
compared with the reference; the usual code's by torch.randn in the dtype.

A way that claims to be exact passes if no bit differs after any population. "master" also needs weights that are no
farther from the exact result than one rounding. Stochastic rounding passes if its slope is 1 within five standard
errors.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..core.ops import add_noise_
from ..core.plan import Plan
from ..es.es import member_seed, zscore
from ..es.weights import MODES, InplaceWeights
from ..update.updater import Rule, UpdateRecord
from . import BenchmarkError, add_choices, count
from .usual import UsualWeights

# Standard deviation of the weights.
SCALE = 0.02
# Standard errors by which the noise may deviate.
LIMIT = 5.0
# Factors of lr in the single updates.
RATES = (1.0, 0.3, 0.1, 0.03, 0.01)


@dataclass(frozen=True)
class Way:
    name: str
    # makes a weight mode for a plan
    make: Callable[[Plan], Any]
    unbiased: bool = False
    exact: bool = False
    usual: bool = False


def _mode(name: str, rounding: str = "nearest") -> Callable[[Plan], Any]:
    return lambda plan: MODES[name](plan, Rule(rounding=rounding))


class _Moved(InplaceWeights):
    """Moves from member to member in one pass, with half the traffic. Its rows show why `inplace` doesn't do so."""

    def perturb(self, seed: int, coeff: float, rounding: str = "nearest") -> None:
        self._move([(seed, coeff)], rounding)


WAYS = (
    Way("usual code", UsualWeights, usual=True),
    Way("usual code, summed", lambda plan: UsualWeights(plan, summed=True), usual=True),
    Way("inplace", _mode("inplace")),
    Way("inplace, one pass", lambda plan: _Moved(plan, Rule())),
    Way("host", _mode("host"), exact=True),
    Way("base", _mode("base"), exact=True),
    Way("base, stochastic", _mode("base", "stochastic"), unbiased=True, exact=True),
    Way("master", _mode("master"), exact=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numel", type=count, default=2**18, help="weights (default: 2**18)")
    parser.add_argument("--generations", type=count, default=100, help="of each run (default: 100)")
    parser.add_argument("--members", type=count, default=30, help="of a generation (default: 30)")
    parser.add_argument("--sigma", type=float, default=1e-3, help="of the perturbations (default: 1e-3)")
    parser.add_argument("--lr", type=float, default=5e-4, help="of the updates (default: 5e-4)")
    add_choices(parser, "--dtypes", ("bfloat16", "float16", "float32"), "of the weights (default: all)")


def run(args: argparse.Namespace) -> dict:
    for seed in (0, 2**64 - 1):
        if not torch.equal(draw(args.numel, seed), draw(args.numel, seed, "reference")):
            raise BenchmarkError(f"the noise of seed {seed} is not that of the reference. No figures are given")
    rows = []
    with tqdm(
        total=2 * len(WAYS) * len(args.dtypes) * args.generations, unit="gen", file=sys.stderr, disable=None
    ) as bar:
        for dtype in args.dtypes:
            for way in WAYS:
                bar.set_postfix_str(f"{dtype}, {way.name}")
                rows.append(
                    {
                        "dtype": dtype,
                        "way": way.name,
                        "numel": args.numel,
                        "members": args.members,
                        "sigma": args.sigma,
                        "lr": args.lr,
                        **measure(way, getattr(torch, dtype), args, bar.update),
                    }
                )
    return {"rows": rows}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers, lines = restore_table(result)
    more, others = update_table(result)
    verdicts = ["" if r["pass"] is None else "pass" if r["pass"] else "FAIL" for r in result["rows"]]
    return [*headers, *more[2:], ""], [[*a, *b[2:], v] for a, b, v in zip(lines, others, verdicts, strict=True)]


def restore_table(result: dict) -> tuple[list[str], list[list[str]]]:
    r = result["rows"][0]
    few, many = (r["members"] * r["restore"]["generation"][i] for i in (0, -1))
    headers = [
        "way",
        "dtype",
        f"changed after {few} members",
        f"after {many}",
        f"drift (RMS) after {few}",
        f"after {many}",
        "a member's error (RMS), the first",
        f"number {few}",
        f"number {many}",
    ]
    lines = []
    for r in result["rows"]:
        x = r["restore"]
        lines.append(
            [
                r["way"],
                r["dtype"],
                *(_share(x["changed"][i]) for i in (0, -1)),
                *(_rms(x["drift"][i]) for i in (0, -1)),
                *(_rms(x[f"{which}_member_error"]) for which in ("first", "early", "last")),
            ]
        )
    return headers, lines


def update_table(result: dict) -> tuple[list[str], list[list[str]]]:
    g = result["rows"][0]["update"]["generation"][-1]
    headers = [
        "way",
        "dtype",
        "one update: slope",
        "correlation",
        "weights that stay",
        f"{g} updates: slope",
        "correlation",
        "distance from the exact weights (RMS)",
        "which moved by (RMS)",
    ]
    lines = []
    for r in result["rows"]:
        x = r["update"]
        lines.append(
            [
                r["way"],
                r["dtype"],
                f"{x['slope'][0]:.3f}",
                f"{x['correlation'][0]:.3f}",
                _share(x["stayed"][0]),
                f"{x['total_slope'][-1]:.3f}",
                f"{x['total_correlation'][-1]:.3f}",
                _rms(x["distance"][-1]),
                _rms(x["true_move"][-1]),
            ]
        )
    return headers, lines


def rates_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """The slope of single updates with smaller and smaller learning rates, of 16-bit weights."""
    rows = [r for r in result["rows"] if r["dtype"] != "float32"]
    headers = ["way", "dtype", *(f"lr = {lr:.2g}" for lr in rows[0]["rates"]["lr"])]
    return headers, [[r["way"], r["dtype"], *(f"{s:.3f}" for s in r["rates"]["slope"])] for r in rows]


def _share(value: float) -> str:
    return "0" if not value else "<0.1%" if value < 0.0005 else f"{value:.1%}"


def _rms(value: float) -> str:
    return f"{value:.2g}" if value else "0"


def measure(way: Way, dtype: torch.dtype, args: argparse.Namespace, progress: Callable[[], Any]) -> dict:
    run = _Run(way, dtype, args)
    found = {"restore": run.restore(progress), "update": run.update(progress), "rates": run.rates()}
    verdicts = [found["restore"]["changed"] == [0.0] * len(found["restore"]["changed"])] if way.exact else []
    # Float32 weights are rounded after every term of an update, not once.
    if way.name == "master":
        found_and_best = zip(found["update"]["distance"], found["update"]["rounded_once"], strict=True)
        verdicts.append(dtype is torch.float32 or all(a <= 1.001 * b for a, b in found_and_best))
    if way.unbiased:
        verdicts.append(abs(found["update"]["slope"][0] - 1) <= LIMIT * found["update"]["slope_error"] + 1e-6)
    return {**found, "pass": all(verdicts) if verdicts else None}


class _Run:
    def __init__(self, way: Way, dtype: torch.dtype, args: argparse.Namespace):
        self.way, self.dtype, self.args = way, dtype, args

    def restore(self, progress: Callable[[], Any]) -> dict:
        plan, weights, mode = self._fresh()
        start, sigma = weights.clone(), float(np.float32(self.args.sigma))
        kept = _kept_generations(self.args.generations)
        found: dict = {"generation": kept, "changed": [], "drift": []}
        # Weights that ever changed: one that gets its old bits back by chance counts, too.
        changed = torch.zeros(len(weights), dtype=torch.bool)
        for g in range(self.args.generations):
            for i in range(self.args.members):
                seed = member_seed(0, g, i)
                mode.perturb(seed, sigma)
                which = {
                    (0, 0): "first",
                    (0, self.args.members - 1): "early",
                    (self.args.generations - 1, self.args.members - 1): "last",
                }.get((g, i))
                if which:
                    truth = start.double() + sigma * self._noise(seed)
                    found[f"{which}_member_error"] = _rounded(_root_mean_square(weights.double() - truth))
            # With a single member in a generation the first one is also the last.
            found.setdefault("early_member_error", found["first_member_error"])
            found.setdefault("last_member_error", found["early_member_error"])
            mode.restore()
            now = _bits(weights) != _bits(start)
            changed = (changed | now) if self.way.exact else now
            if g + 1 in kept:
                found["changed"].append(_rounded(changed.double().mean().item()))
                found["drift"].append(_rounded(_root_mean_square(weights.double() - start.double())))
            progress()
        return found

    def update(self, progress: Callable[[], Any]) -> dict:
        plan, weights, mode = self._fresh()
        start = weights.double()
        truth = start.clone()
        kept = _kept_generations(self.args.generations)
        names = (
            "slope",
            "correlation",
            "stayed",
            "total_slope",
            "total_correlation",
            "distance",
            "rounded_once",
            "true_move",
        )
        found: dict = {"generation": kept, **{name: [] for name in names}}
        for g in range(self.args.generations):
            seeds = [member_seed(0, g, i) for i in range(self.args.members)]
            coeffs = self._coefficients(g, self.args.lr)
            for seed in seeds:
                mode.perturb(seed, self.args.sigma)
            mode.restore()
            before = self._state(mode, weights)
            mode.update(UpdateRecord(0, seeds, coeffs, [], self.args.sigma, self.args.lr))
            after = self._state(mode, weights)
            moved, wanted = after - before, self._exact(seeds, coeffs)
            truth += wanted
            if g + 1 in kept:
                slope, correlation, error = regression(moved, wanted)
                total_slope, total_correlation, _ = regression(after - start, truth - start)
                values = (
                    slope,
                    correlation,
                    (moved == 0).double().mean().item(),
                    total_slope,
                    total_correlation,
                    _root_mean_square(weights.double() - truth),
                    _root_mean_square(truth.to(self.dtype).double() - truth),
                    _root_mean_square(truth - start),
                )
                for name, value in zip(names, values, strict=True):
                    found[name].append(_rounded(value))
                found.setdefault("slope_error", _rounded(error))
            progress()
        return found

    def rates(self) -> dict:
        """One update of fresh weights for each learning rate."""
        found: dict = {"lr": [], "slope": [], "correlation": [], "stayed": []}
        for share in RATES:
            plan, weights, mode = self._fresh()
            before, lr = weights.double(), share * self.args.lr
            seeds = [member_seed(1, 0, i) for i in range(self.args.members)]
            coeffs = self._coefficients(0, lr)
            mode.update(UpdateRecord(0, seeds, coeffs, [], self.args.sigma, self.args.lr))
            moved = self._state(mode, weights) - before
            slope, correlation, _ = regression(moved, self._exact(seeds, coeffs))
            values = lr, slope, correlation, (moved == 0).double().mean().item()
            for name, value in zip(found, values, strict=True):
                found[name].append(_rounded(value))
        return found

    def _fresh(self) -> tuple[Plan, torch.Tensor, Any]:
        weights = (SCALE * torch.randn(self.args.numel, generator=torch.Generator().manual_seed(0))).to(self.dtype)
        plan = Plan([("w", weights)])
        return plan, weights, self.way.make(plan)

    def _state(self, mode, weights: torch.Tensor) -> torch.Tensor:
        """The weights that the next update starts from, as float64: the master if there is one."""
        base = getattr(mode, "base", None)
        if base is None:
            return weights.double()
        kept = base.tensors[0]
        if base.low is not None:  # float32 in two halves; the upper one is rounded, so the lower one has a sign
            kept = ((kept.view(torch.int16).int() << 16) + base.low[: len(kept)].int()).view(torch.float32)
        return kept.double()

    def _coefficients(self, generation: int, lr: float) -> list[float]:
        rewards = np.random.default_rng(generation).standard_normal(self.args.members)
        return [float(np.float32(lr / len(rewards) * z)) for z in zscore(rewards.tolist())]

    def _exact(self, seeds: list[int], coeffs: list[float]) -> torch.Tensor:
        return sum(coeff * self._noise(seed) for seed, coeff in zip(seeds, coeffs, strict=True))

    def _noise(self, seed: int) -> torch.Tensor:
        """float64 values of the noise that this way adds."""
        if self.way.usual:
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(self.args.numel, dtype=self.dtype, generator=generator).double()
        return draw(self.args.numel, seed).double()


def draw(numel: int, seed: int, backend: str = "auto") -> torch.Tensor:
    z = torch.zeros(numel)
    add_noise_(Plan([("w", z)]), [seed], [1.0], backend=backend)
    return z


def regression(y: torch.Tensor, x: torch.Tensor) -> tuple[float, float, float]:
    """Slope and correlation of y on x, and the standard error of the slope."""
    x, y = x - x.mean(), y - y.mean()
    xx, xy, yy = (x * x).sum().item(), (x * y).sum().item(), (y * y).sum().item()
    slope = xy / xx
    residual = max(0.0, yy - slope * xy)
    return slope, xy / math.sqrt(xx * yy) if yy else 0.0, math.sqrt(residual / xx / len(x))


def _kept_generations(generations: int) -> list[int]:
    """About twenty generations, evenly spread on a logarithmic axis, with the first and the last."""
    return sorted({max(1, round(generations ** (i / 19))) for i in range(20)})


def _root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
