"""The page of a report."""

from __future__ import annotations

import html
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from .charts import COLOURS, Line, histograms, lines, shares
from .runs import Run

STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:#1c2530;background:#f4f5f7;margin:0;padding:1.2rem;overflow-wrap:anywhere}
main{max-width:1240px;margin:auto}h1{font-size:1.5rem;margin:.2rem 0 1rem}h2{font-size:1.15rem;margin:1.8rem 0 .6rem}
.grid-of-charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1rem}
figure,.table{background:#fff;border:1px solid #dde1e6;border-radius:8px;margin:0;padding:.8rem}
figcaption{font-weight:600;margin-bottom:.3rem}svg{display:block;width:100%;height:auto}
svg text{font-size:13px;fill:#4a5563}.grid{stroke:#e6e9ed}.nothing p{color:#5b6470}
.legend span{margin-right:1rem;font-size:.85rem;white-space:nowrap;display:inline-block;max-width:100%;overflow:hidden;
text-overflow:ellipsis}.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em}
.table{overflow-x:auto;max-width:100%}table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.3rem .7rem .3rem 0;border-bottom:1px solid #eceff2;vertical-align:top;min-width:5.5rem}
th{overflow-wrap:normal}td:first-child{min-width:9em}
td.number,th.number{text-align:right}.differs{background:#fff4d6}
pre{margin:0;white-space:pre-wrap;font:13px/1.4 ui-monospace,monospace}
.sample{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:.8rem;background:#fff;
border:1px solid #dde1e6;border-radius:8px;padding:.8rem;margin-bottom:.7rem}.sample b{font-size:.85rem;color:#4a5563}
"""


def page(runs: Sequence[Run], samples: int = 5) -> str:
    """The report as HTML. Repeats of an experiment (runs that differ in their seed alone) are one line with their
    spread; different experiments get different colours."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    experiments = list(groups.values())
    charts = [
        _chart("Training reward, mean of the population", experiments, "reward_mean", _population_band),
        _chart("Reward on held-out prompts", experiments, "eval_reward", _error_band),
        _chart("Accuracy on held-out prompts", experiments, "eval_accuracy"),
        *(histograms(f"Rewards of the members: {_label(g)}", "generation", _rewards(g), COLOURS[i % len(COLOURS)])
          for i, g in enumerate(experiments)),
        shares("Where the time went", [(run.name, _phases(run)) for run in runs]),
        _chart("Norm of the update", experiments, "update_norm"),
        _chart("Distance from the initial weights", experiments, "distance"),
    ]  # fmt: skip
    optional = (("drift", "Drift from exact arithmetic, RMS"), ("eval_kl_to_base", "KL divergence from the base model"),
                ("eval_length", "Length of held-out responses, characters"))  # fmt: skip
    charts += [_chart(title, experiments, name) for name, title in optional if any(r.series(name) for r in runs)]
    body = [
        f"<h1>{html.escape(', '.join(map(_label, experiments)))}</h1>",
        f'<div class="table">{_overview(runs)}</div>',
        f'<h2>Curves</h2><div class="grid-of-charts">{"".join(charts)}</div>',
        "<h2>Responses before and after</h2>", *_samples(experiments, samples),
        f'<h2>Settings</h2><div class="table">{_settings(runs)}</div>',
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><title>esfast report</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _label(group: Sequence[Run]) -> str:
    name = group[0].name
    return name if len(group) == 1 else f"{name} and {len(group) - 1} repeat{'s' * (len(group) > 2)}"


def _rewards(group: Sequence[Run]) -> list[list[float]]:
    """Of every generation, the rewards of the members of all repeats."""
    return [sum(parts, []) for parts in itertools.zip_longest(*(run.rewards for run in group), fillvalue=[])]


def _chart(
    title: str,
    experiments: Sequence[Sequence[Run]],
    name: str,
    band_of_one: Callable[[Run], list[tuple[float, float, float]]] = lambda run: [],
) -> str:
    """One line an experiment: of repeats the mean, their standard deviation as the band, and each of them thin; of a
    single run its own band."""
    drawn = []
    for i, group in enumerate(experiments):
        colour, series = COLOURS[i % len(COLOURS)], [run.series(name) for run in group]
        if len(group) == 1:
            drawn.append(Line(_label(group), series[0], colour, band_of_one(group[0])))
            continue
        values: dict[float, list[float]] = {}
        for x, y in (point for points in series for point in points):
            values.setdefault(x, []).append(y)
        full = sorted((x, ys) for x, ys in values.items() if len(ys) == len(group))  # where all repeats have come to
        means = [(x, statistics.fmean(ys)) for x, ys in full]
        band = [(x, m - s, m + s) for (x, ys), (_, m) in zip(full, means, strict=True) for s in [statistics.stdev(ys)]]
        drawn += [Line("", points, colour, thin=True) for points in series]
        drawn.append(Line(_label(group), means, colour, band))
    return lines(title, "generation", drawn)


def _population_band(run: Run) -> list[tuple[float, float, float]]:
    """From the worst to the best member."""
    return [(r["generation"], r["reward_min"], r["reward_max"]) for r in run.metrics if "reward_min" in r]


def _error_band(run: Run) -> list[tuple[float, float, float]]:
    """Two standard errors to either side."""
    found = [(r["generation"], r["eval_reward"], r["eval_reward_se"]) for r in run.metrics if "eval_reward_se" in r]
    return [(g, y - 2 * s, y + 2 * s) for g, y, s in found]


def _phases(run: Run) -> dict[str, float]:
    if run.summary:
        return {k: v for k, v in run.summary["seconds"].items() if k != "total"}
    phases: dict[str, float] = {}
    for row in run.metrics:  # of a run that goes on
        for key, value in row.items():
            if key.startswith("seconds_"):
                phases[key.removeprefix("seconds_")] = phases.get(key.removeprefix("seconds_"), 0.0) + value
    return phases


def _overview(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        cells = [("", run.name), ("number", str(run.metrics[-1]["generation"]))]
        for name in ("eval_reward", "eval_accuracy"):
            series = run.series(name)
            cells.append(("number", f"{series[0][1]:.4g} → {series[-1][1]:.4g}" if series else ""))
        cells.append(("number", f"{sum(_phases(run).values()):.0f}"))
        rows.append("".join(f'<td class="{kind}">{html.escape(text)}</td>' for kind, text in cells))
    head = "".join(f'<th class="number">{h}</th>' for h in ("generations", "held-out reward", "accuracy", "seconds"))
    return f"<table><tr><th>run</th>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _samples(experiments: Sequence[Sequence[Run]], count: int) -> list[str]:
    parts = []
    for group in experiments:
        run = group[0]
        if not run.samples:
            continue
        generations = sorted({s["generation"] for s in run.samples})
        first, last = (
            [s for s in run.samples if s["generation"] == g][:count] for g in (generations[0], generations[-1])
        )
        for before, after in zip(first, last, strict=False):
            cells = [("prompt", before["prompt"])]
            for s in (before, after):
                cells.append((f"generation {s['generation']}, rewards {_numbers(s['rewards'])}", s["completion"]))
            columns = (f"<div><b>{html.escape(h)}</b><pre>{html.escape(t)}</pre></div>" for h, t in cells)
            parts.append(f'<div class="sample">{"".join(columns)}</div>')
    return parts or ["<p>No samples were kept.</p>"]


def _numbers(values: Sequence[Any]) -> str:
    return ", ".join("none" if v is None else f"{v:.4g}" for v in values)


def _settings(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = []
    for name in names:
        values = [str(run.config.get(name, "")) for run in runs]
        kind = ' class="differs"' if len(set(values)) > 1 else ""
        rows.append(f"<tr{kind}><td>{name}</td>{''.join(f'<td>{html.escape(v)}</td>' for v in values)}</tr>")
    return f"<table><tr><th>setting</th>{head}</tr>{''.join(rows)}</table>"
