"""`esfast bench simulate`: a generation on up to 10,000 workers, from costs that are measured here.

Measured are: the seconds of the embedded model's members (a distribution, from which simulated members are drawn), the
seconds of an update, the time of the store's answers, and the bytes on the wire. The simulation is compared with real
generations of four processes that sleep instead of generating. There are two scenarios:

    embedded model   all as measured, on machines like this one
    7.6B weights     the measured distribution stretched to --member-seconds; an update as fast as its instructions can
                     be issued on an H100 (--update-seconds: from `esfast bench sass`, not timed)

The network (--latency, --bandwidth) is an assumption, too.
"""

from __future__ import annotations

import argparse
import math
import statistics as stats
import sys
import time

import numpy as np

from ..utils.errors import BadValue
from . import fleet
from .fleet import Costs

WORKERS = (1, 8, 64, 512, 1000, 4000, 10_000)
PER_WORKER = (1, 4, 16)
SHOWN = (1, 8, 64, 1000, 10_000)
# The fraction of workers that are slow, and how many times as long they take.
SLOW_SHARE, SLOW = 0.01, 5.0
PARAMETERS = {"0.5B": 0.494e9, "7.6B": 7.616e9, "72B": 72.7e9}
# What all processes together receive in a generation (an optimizer step); W: the weights' bytes.
WAYS = {
    "esfast": "rewards and numbers of members",
    "esfast, shares": "the same, and W from each other process",
    "broadcast": "one engine updates and broadcasts W, as es-at-scale does",
    "all-reduce": "gradients in the weights' dtype, ring all-reduce: data-parallel RL, one optimizer step",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--members", type=int, default=64, help="members of the embedded model to time (default: 64)")
    parser.add_argument("--generations", type=int, default=5, help="generations to average over (default: 5)")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="how many workers")
    parser.add_argument("--member-seconds", type=float, default=30.0, help="of a 7.6B model (default: 30)")
    parser.add_argument(
        "--update-seconds",
        type=float,
        default=6.2e-3,
        metavar="S",
        help="of a 7.6B model's update, per member (default: 0.0062 = 7.6e9 weights x 24 instructions "
        "/ (132 x 128 lanes x 1.755 GHz))",
    )
    parser.add_argument("--latency", type=float, default=5e-5, help="seconds that a network adds to a round trip")
    parser.add_argument(
        "--bandwidth", type=float, default=12.5e9, help="bytes per second and machine (default: 12.5e9)"
    )


def run(args: argparse.Namespace) -> dict:
    if min(args.members, args.generations, *args.workers) < 1 or max(args.workers) > 100_000:
        raise BadValue("--members, --generations and --workers: expected at least 1, and at most 100000 workers")
    measured, update, nbytes = embedded_model(args.members)
    round_trip, operation = fleet.store_costs()
    round_trip += args.latency
    scenarios = {
        "embedded model": (measured, Costs(operation, round_trip, update, nbytes, args.bandwidth)),
        "7.6B weights": (
            measured * (args.member_seconds / measured.mean()),
            Costs(operation, round_trip, args.update_seconds, 2 * PARAMETERS["7.6B"], args.bandwidth),
        ),
    }
    rows = check(measured)
    for name, (seconds, costs) in scenarios.items():
        for workers in args.workers:
            for per_worker in PER_WORKER:
                for slow in (False, True) if workers > 1 else (False,):
                    rows.append(simulate(name, seconds, costs, workers, per_worker, slow, args.generations))
    rows += wire()
    result = {
        "rows": rows,
        "measured": {
            "members": len(measured),
            "member_seconds_mean": float(measured.mean()),
            "member_seconds_std": float(measured.std()),
            "member_seconds": measured.tolist(),
            "update_seconds_per_member": update,
            "weights_bytes": nbytes,
            "store_round_trip_seconds": round_trip - args.latency,
            "store_operation_seconds": operation,
        },
        "assumed": {
            "latency": args.latency,
            "bandwidth": args.bandwidth,
            "member_seconds_7B": args.member_seconds,
            "update_seconds_per_member_7B": args.update_seconds,
            "slow_share": SLOW_SHARE,
            "slow_factor": SLOW,
        },
    }
    return result


def embedded_model(members: int) -> tuple[np.ndarray, float, float]:
    """Seconds of each of `members` members, perturbing included; seconds of an update, per member; bytes of the
    weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .. import tasks
    from ..core.ops import add_noise_
    from ..es.es import ES
    from ..rollout.engine import TransformersEngine
    from ..tasks import embedded

    folder = embedded.cached()
    model, task = AutoModelForCausalLM.from_pretrained(folder), tasks.get("countdown", style=embedded.STYLE)
    engine = TransformersEngine(model, AutoTokenizer.from_pretrained(folder), task.max_new_tokens)
    prompts = [row["prompt"] for row in task.train_rows(0, 32, 0)]
    es = ES(model, sigma=0.02, population_size=max(2, members))
    engine.generate(prompts)
    seconds, last = [], time.perf_counter()
    for _ in es.population():
        engine.generate(prompts)
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    seeds, coeffs = list(range(1, 101)), [0.0] * 100
    add_noise_(es.plan, seeds, coeffs)
    began = time.perf_counter()
    add_noise_(es.plan, seeds, coeffs)
    return np.array(seconds[:members]), (time.perf_counter() - began) / len(seeds), float(es.plan.nbytes)


def simulate(
    scenario: str, seconds: np.ndarray, costs: Costs, workers: int, per_worker: int, slow: bool, generations: int
) -> dict:
    members, random = workers * per_worker, np.random.default_rng(workers * per_worker)
    found: dict[str, list[float]] = {"static": [], "dynamic": [], "ideal": [], "wait": []}
    for _ in range(generations):
        durations = random.choice(seconds, members)
        slowness = np.ones(workers)
        if slow:
            slowness[random.choice(workers, max(1, round(SLOW_SHARE * workers)), replace=False)] = SLOW
        if workers == 1:
            end, wait = float(durations.sum()), 0.0
        else:
            end, wait = fleet.dynamic(durations, slowness, costs)
        found["dynamic"].append(end)
        found["wait"].append(wait)
        found["static"].append(fleet.static(durations, slowness))
        found["ideal"].append(fleet.ideal(durations, slowness))
    mean = {key: stats.fmean(values) for key, values in found.items()}
    exchanged, updates = fleet.exchange(members, workers, costs), fleet.update(members, workers, costs)
    plan = min(updates, key=updates.get)
    return {
        "kind": "generation",
        "scenario": scenario,
        "workers": workers,
        "members": members,
        "slow_workers": slow,
        "seconds_ideal": mean["ideal"],
        "seconds_static": mean["static"],
        "seconds_dynamic": mean["dynamic"],
        "seconds_wait_per_member": mean["wait"],
        "seconds_exchange": exchanged,
        "seconds_update_all": updates["all"],
        "seconds_update_share": updates["share"],
        "update_plan": plan,
        "efficiency": mean["ideal"] / (mean["dynamic"] + exchanged + updates[plan]),
    }


def check(measured: np.ndarray, generations: int = 4, members: int = 48, mean: float = 0.04) -> list[dict]:
    """Compares four processes that sleep with the simulation of the same members."""
    random, rows = np.random.default_rng(0), []
    round_trip, operation = fleet.store_costs(1000)
    costs = Costs(operation, round_trip, 0, 0, math.inf)
    durations = random.choice(measured, (generations, members)) * (mean / measured.mean())
    cases = [(slow, schedule) for slow in ([1.0] * 4, [1.0, 1.0, 1.0, SLOW]) for schedule in ("static", "dynamic")]
    found = fleet.measure([fleet.Job(d.tolist(), *case) for case in cases for d in durations])
    for number, (slow, schedule) in enumerate(cases):
        slowness = np.array(slow)
        seconds = stats.fmean(f["seconds"] for f in found[number * generations : (number + 1) * generations])
        simulated = stats.fmean(
            fleet.static(d, slowness) if schedule == "static" else fleet.dynamic(d, slowness, costs)[0]
            for d in durations
        )
        rows.append(
            {
                "kind": "check",
                "schedule": schedule,
                "workers": 4,
                "members": members,
                "slow_workers": slow[-1] > 1,
                "seconds_measured": seconds,
                "seconds_simulated": simulated,
                "seconds_ideal": stats.fmean(fleet.ideal(d, slowness) for d in durations),
                "pass": abs(seconds / simulated - 1) < 0.25,
            }
        )
    return rows


def wire() -> list[dict]:
    """Bytes of a generation for each way, P and N; esfast's are extrapolated from the loopback bytes of a few
    processes."""
    points = [(workers, members) for workers in (2, 4) for members in (32, 256)]
    try:
        bytes_ = [
            found["loopback_bytes"]
            for workers in (2, 4)
            for found in fleet.measure([fleet.Job([0.0] * n, [1.0] * workers) for n in (32, 256)], isolated=True)
        ]
    except (OSError, RuntimeError) as error:
        print(f"bytes on the wire were not measured, which takes Linux and root: {error}", file=sys.stderr)
        return []
    # Every process receives 8 bytes for each member. All else grows linearly with members or with processes.
    known = np.array([b - 8 * n * p for (p, n), b in zip(points, bytes_, strict=True)])
    (per_member, per_process), *_ = np.linalg.lstsq(np.array([(n, p) for p, n in points], float), known, rcond=None)
    rows = [
        {
            "kind": "loopback",
            "workers": p,
            "members": n,
            "bytes": b,
            "fitted": per_member * n + per_process * p + 8 * n * p,
        }
        for (p, n), b in zip(points, bytes_, strict=True)
    ]
    for model, parameters in PARAMETERS.items():
        for workers, members in ((8, 32), (64, 256), (1000, 4000)):
            ours, whole = per_member * members + per_process * workers + 8 * members * workers, 2 * parameters
            totals = dict(
                zip(
                    WAYS,
                    (ours, ours + whole * (workers - 1), whole * (workers - 1), 2 * whole * (workers - 1)),
                    strict=True,
                )
            )
            rows.append({"kind": "wire", "model": model, "workers": workers, "members": members, "bytes": totals})
    return rows


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Generations with 4 members a worker, for the numbers of workers that are shown."""
    headers = [
        "scenario",
        "workers",
        "members",
        "1 % of workers 5x slower",
        "ideal, s",
        "static",
        "dynamic",
        "wait for a member, ms",
        "rewards, s",
        "update, all, s",
        "update, shares, s",
        "efficiency",
    ]
    lines = [
        [
            r["scenario"],
            f"{r['workers']:,}",
            f"{r['members']:,}",
            "yes" if r["slow_workers"] else "no",
            f"{r['seconds_ideal']:.3g}",
            f"{r['seconds_static'] / r['seconds_ideal']:.2f}x",
            f"{r['seconds_dynamic'] / r['seconds_ideal']:.2f}x",
            f"{1e3 * r['seconds_wait_per_member']:.2f}",
            f"{r['seconds_exchange']:.2g}",
            f"{r['seconds_update_all']:.2g}",
            f"{r['seconds_update_share']:.2g}",
            f"{r['efficiency']:.0%}",
        ]
        for r in result["rows"]
        if r["kind"] == "generation" and r["workers"] in SHOWN and r["members"] == 4 * r["workers"]
    ]
    return headers, lines


def check_table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = ["handed out", "one process 5x slower", "members", "measured, s", "simulated, s", "measured / ideal"]
    return headers, [
        [
            r["schedule"],
            "yes" if r["slow_workers"] else "no",
            str(r["members"]),
            f"{r['seconds_measured']:.3f}",
            f"{r['seconds_simulated']:.3f}",
            f"{r['seconds_measured'] / r['seconds_ideal']:.2f}x",
        ]
        for r in result["rows"]
        if r["kind"] == "check"
    ]


def wire_table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = ["model", "processes", "members", *WAYS]
    return headers, [
        [r["model"], f"{r['workers']:,}", f"{r['members']:,}", *(_size(r["bytes"][way]) for way in WAYS)]
        for r in result["rows"]
        if r["kind"] == "wire"
    ]


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"
