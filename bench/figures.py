"""Figures of the docs from bench/results/: `python -m esfast.bench.figures docs/figures`, or `--plots` of a benchmark.

Each is an SVG with a checksum of the rows that it was drawn from, so that a test finds figures that are out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from statistics import mean, pstdev

import matplotlib
from matplotlib.figure import Figure

from ..utils.files import write_whole
from . import training

COLORS = {
    "usual code": "#c0392b",
    "usual code, summed": "#e67e22",
    "inplace": "#8e6c1f",
    "inplace, one pass": "#d4ac0d",
    "host": "#8e44ad",
    "base": "#2471a3",
    "base, stochastic": "#17a589",
    "master": "#111111",
    "float32 model": "#999999",
    "usual code, float32 model": "#e8a0a0",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "esfast",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def draw(result: dict, folder: Path) -> None:
    """Writes the figures of a result as folder/NAME.svg."""
    for name, (benchmark, make) in FIGURES.items():
        if benchmark == result["benchmark"]:
            write_whole(folder / f"{name}.svg", svg(make, result))


def svg(make: Callable[[dict], Figure], result: dict) -> str:
    import io

    with matplotlib.rc_context(STYLE):
        file = io.StringIO()
        metadata = {"Date": None, "Description": f"rows {checksum(result)}"}
        make(result).savefig(file, format="svg", metadata=metadata)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def checksum(result: dict) -> str:
    return f"{zlib.crc32(json.dumps(result['rows'], sort_keys=True).encode()):08x}"


def drift_restore(result: dict) -> Figure:
    figure, panels = _panels(result, 3)
    for axes, dtype in zip(panels, ("bfloat16", "float16", "float32"), strict=True):
        rows = {r["way"]: r for r in result["rows"] if r["dtype"] == dtype}
        for way in ("usual code", "inplace", "inplace, one pass"):
            r = rows[way]
            axes.loglog(
                [g * r["members"] for g in r["restore"]["generation"]],
                r["restore"]["drift"],
                color=COLORS[way],
                label=way,
            )
        exact = [w for w in ("base", "host", "master") if not any(rows[w]["restore"]["drift"])]
        axes.plot([], [], " ", label=f"exactly 0: {', '.join(exact)}")
        axes.set(title=dtype, xlabel="members")
    panels[0].set_ylabel("drift of the weights, RMS")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def drift_update(result: dict) -> Figure:
    figure, panels = _panels(result, 3)
    for axes, dtype in zip(panels, ("bfloat16", "float16", "float32"), strict=True):
        for r in (r for r in result["rows"] if r["dtype"] == dtype):
            axes.loglog(r["update"]["generation"], r["update"]["distance"], color=COLORS[r["way"]], label=r["way"])
        axes.loglog(r["update"]["generation"], r["update"]["true_move"], ":k", lw=1, label="what the updates moved")
        axes.set(title=dtype, xlabel="generations")
    panels[0].set_ylabel("distance from exact arithmetic, RMS")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def drift_rates(result: dict) -> Figure:
    figure, panels = _panels(result, 2)
    for axes, dtype in zip(panels, ("bfloat16", "float16"), strict=True):
        for r in (
            r
            for r in result["rows"]
            if r["dtype"] == dtype and r["way"] not in ("host", "inplace", "inplace, one pass")
        ):
            axes.semilogx(r["rates"]["lr"], r["rates"]["slope"], "o-", ms=3, color=COLORS[r["way"]], label=r["way"])
        axes.set(title=dtype, xlabel="learning rate")
    panels[0].set_ylabel("share of an update that arrives (slope)")
    panels[0].legend()
    return figure


def training_modes(result: dict) -> Figure:
    figure, (left, right) = _panels(result, 2)
    for way in training.MODES:
        rows = training.of(result, way.name)
        if rows:
            curves = [_smooth(r["reward"]) for r in rows]
            _band(left, range(1, len(curves[0]) + 1), curves, COLORS[way.name], way.name)
            _band(right, rows[0]["evaluated"], [r["accuracy"] for r in rows], COLORS[way.name], way.name)
    left.set(title="training reward, 5 generations' mean", xlabel="generation", ylabel="reward")
    right.set(title="accuracy on held-out problems", xlabel="generation")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def training_sweep(result: dict) -> Figure:
    figure, (left, right) = _panels(result, 2)
    for i, way in enumerate(training.SWEEP):
        rows = training.of(result, way.name)
        if rows:
            color, line = ("#2471a3", "#111111", "#c0392b")[i % 3], "-" if way.noise == "gaussian" else "--"
            curves = [r["accuracy"] for r in rows]
            each = rows[0]["rollouts"] / len(rows[0]["reward"])
            _band(left, rows[0]["evaluated"], curves, color, way.name, line)
            _band(right, [g * each for g in rows[0]["evaluated"]], curves, color, way.name, line)
    left.set(title="at equal generations", xlabel="generation", ylabel="accuracy on held-out problems")
    right.set(title="at equal rollouts", xlabel="rollouts")
    right.set_xscale("symlog", linthresh=1000)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def simulate_handout(result: dict) -> Figure:
    rows = [r for r in result["rows"] if r["kind"] == "generation" and r["members"] == 4 * r["workers"]]
    scenarios = list(dict.fromkeys(r["scenario"] for r in rows))
    figure, panels = _panels(result, len(scenarios))
    for axes, scenario in zip(panels, scenarios, strict=True):
        for schedule, line in (("static", "--"), ("dynamic", "-")):
            for slow, color in ((False, "#2471a3"), (True, "#c0392b")):
                mine = [r for r in rows if r["scenario"] == scenario and r["slow_workers"] == slow]
                ratios = [r[f"seconds_{schedule}"] / r["seconds_ideal"] for r in mine]
                label = f"{schedule}{', 1 % of workers 5x slower' * slow}"
                axes.plot([r["workers"] for r in mine], ratios, line, color=color, marker=".", label=label)
        axes.set(title=f"{scenario}, 4 members a worker", xscale="log", yscale="log", xlabel="workers")
        axes.set_yticks(ticks := [1, 2, 5, 10, 20], list(map(str, ticks)))
        axes.minorticks_off()
    panels[0].set_ylabel("time to score all members / ideal")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _panels(result: dict, count: int) -> tuple[Figure, list]:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, count))


def _band(axes, x, curves: list[list[float]], color: str, label: str, line: str = "-") -> None:
    """The mean over seeds, with a band of one standard deviation."""
    columns = list(zip(*curves, strict=True))
    middle, spread = [mean(c) for c in columns], [pstdev(c) for c in columns]
    axes.plot(x, middle, line, color=color, lw=1.2, label=label)
    low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=0.1, lw=0)


def _smooth(values: list[float], width: int = 5) -> list[float]:
    return [mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


FIGURES: dict[str, tuple[str, Callable[[dict], Figure]]] = {
    "drift-restore": ("drift", drift_restore),
    "drift-update": ("drift", drift_update),
    "drift-rates": ("drift", drift_rates),
    "training-modes": ("training", training_modes),
    "training-sweep": ("training", training_sweep),
    "simulate-handout": ("simulate", simulate_handout),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m esfast.bench.figures", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the figures go")
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of the JSON files")
    args = parser.parse_args(argv)
    for benchmark in sorted({b for b, _ in FIGURES.values()}):
        path = args.results / f"{benchmark}.json"
        if path.exists():
            draw(json.loads(path.read_text(encoding="utf-8")), args.folder)
        else:
            print(f"{path} isn't there: no figures of it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
