"""The page of a report."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .charts import COLOURS, Line, histograms, lines, shares
from .probes import forgotten
from .runs import Run, is_number
from .text import escaped, response

STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:#1c2530;background:#f4f5f7;margin:0;padding:1.2rem;overflow-wrap:anywhere}
main{max-width:1240px;margin:auto}h1{font-size:1.5rem;margin:.2rem 0 1rem}h2{font-size:1.15rem;margin:1.8rem 0 .6rem}
.grid-of-charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:1rem}
figure,.table{background:#fff;border:1px solid #dde1e6;border-radius:8px;margin:0;padding:.8rem}
figcaption{font-weight:600;margin-bottom:.3rem}svg{display:block;width:100%;height:auto}
svg text{font-size:13px;fill:#4a5563}.grid{stroke:#e6e9ed}
.legend span{margin-right:1rem;font-size:.85rem;white-space:nowrap;display:inline-block;max-width:100%;overflow:hidden;
text-overflow:ellipsis}.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em}
.table{overflow-x:auto;max-width:100%}table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.3rem .7rem .3rem 0;border-bottom:1px solid #eceff2;vertical-align:top;min-width:5.5rem}
th{overflow-wrap:normal}td:first-child{min-width:9em}
td.number,th.number{text-align:right}.differs{background:#fff4d6}
pre{margin:0;white-space:pre-wrap;font:13px/1.4 ui-monospace,monospace}.blank{color:#a3202c;background:#fdeeee}
.findings{background:#fff4d6;border:1px solid #e8d9a8;border-radius:8px;padding:.5rem .8rem .5rem 1.8rem}
.sample{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:.8rem;background:#fff;
border:1px solid #dde1e6;border-radius:8px;padding:.8rem;margin-bottom:.7rem}.sample b{font-size:.85rem;color:#4a5563}
.turn{border-left:3px solid #dde1e6;padding-left:.5rem;margin:.35rem 0}.turn i{font-size:.75rem;color:#4a5563}
"""


# Metrics of evaluations that the generic charts leave out: they have a chart of their own, or none.
_OWN_CHARTS = ("eval_reward", "eval_reward_se", "eval_accuracy", "eval_kl_to_base", "eval_length")


def page(runs: Sequence[Run], samples: int = 5) -> str:
    """The report as HTML. Repeats of an experiment (runs that differ only in their seed) are one line with their
    spread. Each experiment has its colour."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    experiments = list(groups.values())
    evaluated = dict.fromkeys(name for run in runs for name in run.evaluated)
    others = [name for name in evaluated if name not in _OWN_CHARTS and not name.endswith("_se")]
    charts = [
        _chart("Training reward, mean of the population", experiments, "reward_mean", _population_band),
        _chart("Reward on held-out prompts", experiments, "eval_reward", _error_band),
        _chart("Accuracy on held-out prompts", experiments, "eval_accuracy"),
        *(_chart(f"{name.removeprefix('eval_')} on held-out prompts", experiments, name) for name in others),
        *(
            histograms(f"Rewards of the members: {_label(g)}", "generation", _rewards(g), COLOURS[i % len(COLOURS)])
            for i, g in enumerate(experiments)
        ),
        shares("Where the time went", [(run.name, _phases(run)) for run in runs]),
        _chart("Norm of the update", experiments, "update_norm"),
        _chart("Distance from the initial weights", experiments, "distance"),
        _chart("Drift from exact arithmetic, RMS", experiments, "drift"),
        _chart("KL divergence from the base model", experiments, "eval_kl_to_base"),
        _chart("Length of held-out responses, characters", experiments, "eval_length"),
    ]
    drawn = "".join(charts)
    body = [
        f"<h1>{escaped(', '.join(map(_label, experiments)))}</h1>",
        f'<div class="table">{_overview(runs)}</div>',
        forgotten(runs),
        *_findings(runs),
        f'<h2>Curves</h2><div class="grid-of-charts">{drawn}</div>' if drawn else "<p>Nothing was measured yet.</p>",
        "<h2>Responses before and after</h2>",
        *_samples(experiments, samples),
        f'<h2>Settings</h2><div class="table">{_settings(runs)}</div>',
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width,initial-scale=1"><title>esfast report</title><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _label(group: Sequence[Run]) -> str:
    name = group[0].name
    return name if len(group) == 1 else f"{name} and {len(group) - 1} repeat{'s' * (len(group) > 2)}"


def _rewards(group: Sequence[Run]) -> list[list[float]]:
    """For each generation, the rewards of the members of all repeats."""
    return [sum(parts, []) for parts in itertools.zip_longest(*(run.rewards for run in group), fillvalue=[])]


def _chart(
    title: str,
    experiments: Sequence[Sequence[Run]],
    name: str,
    band_of_one: Callable[[Run], list[tuple[float, float, float]]] = lambda run: [],
) -> str:
    """A chart with one line an experiment. For repeats the line is their mean, the band their standard deviation, and
    each repeat is a thin line; a single run has its own band."""
    drawn = []
    for i, group in enumerate(experiments):
        colour, series = COLOURS[i % len(COLOURS)], [run.series(name) for run in group]
        if len(group) == 1:
            drawn.append(Line(_label(group), series[0], colour, band_of_one(group[0])))
            continue
        values: dict[float, list[float]] = {}
        for x, y in (point for points in series for point in points):
            values.setdefault(x, []).append(y)
        # Only generations that all repeats have reached.
        full = sorted((x, ys) for x, ys in values.items() if len(ys) == len(group))
        means = [(x, statistics.fmean(ys)) for x, ys in full]
        band = [(x, m - s, m + s) for (x, ys), (_, m) in zip(full, means, strict=True) for s in [statistics.stdev(ys)]]
        drawn += [Line("", points, colour, thin=True) for points in series]
        drawn.append(Line(_label(group), means, colour, band))
    return lines(title, "generation", drawn)


def _population_band(run: Run) -> list[tuple[float, float, float]]:
    """For each generation, the rewards of the worst and the best member."""
    return run.together("reward_min", "reward_max")


def _error_band(run: Run) -> list[tuple[float, float, float]]:
    """For each evaluation, the reward minus and plus two standard errors."""
    return [(g, y - 2 * s, y + 2 * s) for g, y, s in run.together("eval_reward", "eval_reward_se")]


def _phases(run: Run) -> dict[str, float]:
    """Seconds by phase, from the summary; for a run that has none yet, summed over its generations."""
    done = isinstance(run.summary.get("seconds"), dict)
    rows, prefix = ([run.summary["seconds"]], "") if done else (run.metrics, "seconds_")
    phases: dict[str, float] = {}
    for key, value in (item for row in rows for item in row.items()):
        if key.startswith(prefix) and is_number(value):
            phases[key.removeprefix(prefix)] = phases.get(key.removeprefix(prefix), 0.0) + value
    phases.pop("total", None)
    return phases


def _overview(runs: Sequence[Run]) -> str:
    shown = {"held-out reward": "eval_reward", "accuracy": "eval_accuracy"}
    shown = {head: name for head, name in shown.items() if any(run.series(name) for run in runs)}
    rows = []
    for run in runs:
        cells = [("", run.name), ("number", run.generations)]
        for name in shown.values():
            series = run.series(name)
            cells.append(("number", f"{series[0][1]:.4g} → {series[-1][1]:.4g}" if series else ""))
        cells.append(("number", f"{sum(_phases(run).values()):.0f}"))
        rows.append("".join(f'<td class="{kind}">{escaped(text)}</td>' for kind, text in cells))
    head = "".join(f'<th class="number">{h}</th>' for h in ("generations", *shown, "seconds"))
    return f"<table><tr><th>run</th>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _findings(runs: Sequence[Run]) -> list[str]:
    items = [(run.name, finding) for run in runs for finding in run.findings]
    if not items:
        return []
    lines = (f"<li>{escaped(f'{name}, ' if len(runs) > 1 else '')}{escaped(finding)}</li>" for name, finding in items)
    return [f'<h2>What is wrong</h2><ul class="findings">{"".join(lines)}</ul>']


def _samples(experiments: Sequence[Sequence[Run]], count: int) -> list[str]:
    parts = []
    for group in experiments:
        run = group[0]
        if not run.samples:
            continue
        evaluations: dict[Any, list[dict[str, Any]]] = {}
        for sample in run.samples:
            evaluations.setdefault(sample.get("generation"), []).append(sample)
        first, *_, last = [*evaluations.values()] * 2
        for before, after in zip(first[:count], last[:count], strict=False):
            cells = [] if _turns(before) else [("prompt", f"<pre>{response(before.get('prompt', ''))}</pre>")]
            for s in (before, after):
                title = f"generation {s.get('generation')}, rewards {_numbers(s.get('rewards') or ())}"
                cells.append((title, _turns(s) or f"<pre>{response(s.get('completion', ''))}</pre>"))
            columns = (f"<div><b>{escaped(title)}</b>{said}</div>" for title, said in cells)
            parts.append(f'<div class="sample">{"".join(columns)}</div>')
    return parts or ["<p>No samples were kept.</p>"]


def _turns(sample: Mapping[str, Any]) -> str:
    """The messages of an episode, each with its role; empty for a single response."""
    messages = sample.get("messages")
    shown = []
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            text, calls = message.get("content"), message.get("tool_calls")
            said = "\n".join([*([] if text is None else [str(text)]), *([json.dumps(calls)] if calls else [])])
            shown.append(f'<div class="turn"><i>{escaped(message.get("role"))}</i><pre>{response(said)}</pre></div>')
    if shown and sample.get("error") is not None:
        shown.append(f'<pre class="blank">{escaped(sample["error"])}</pre>')
    return "".join(shown)


def _numbers(values: Sequence[Any]) -> str:
    return ", ".join("none" if v is None else f"{v:.4g}" if is_number(v) else str(v) for v in values)


def _settings(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    head = "".join(f"<th>{escaped(run.name)}</th>" for run in runs)
    rows = []
    for name in names:
        values = [str(run.config.get(name, "")) for run in runs]
        kind = ' class="differs"' if len(set(values)) > 1 else ""
        rows.append(f"<tr{kind}><td>{escaped(name)}</td>{''.join(f'<td>{escaped(v)}</td>' for v in values)}</tr>")
    return f"<table><tr><th>setting</th>{head}</tr>{''.join(rows)}</table>"
