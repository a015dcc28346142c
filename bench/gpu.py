"""`esfast bench gpu`: add_noise_ over the parameters of real models, against ES code of today, a fused kernel on
Triton's generator and a plain copy.

First the backends are compared with the reference; one that differs in a bit is not timed. Then each round runs every
contender once, so that falling clocks slow all of them. A contender is queued behind a copy and timed by CUDA events.
So the device is busy while the host launches, as between the forward passes of a run, and a contender pays for its
launches only if they take longer than its work, as today's do. The host's own time, from the call to its return, is a
column of its own. Models are many times larger than the L2 cache, so it needs no flushing.

gpu_rows.py does the work in a process of its own: a failure there costs only its own rows, and the result is written
after every row. With --device cpu the same code runs on a machine without a GPU, by the wall clock; its rows say so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch

from ..core.kinds import KINDS
from ..utils.errors import BadValue
from . import BenchmarkError, add_choices, add_dtypes, clocks, count
from .clocks import Clocks
from .isolated import isolated
from .models import MODELS
from .noise import note

Table = tuple[list[str], list[list[str]]]

LABELS = {
    "perturb_base": "perturb from a base",
    "perturb": "perturb in place",
    "restore_base": "restore from a base",
    "perturb_restore_base": "perturb + restore from a base",
    "perturb_restore": "perturb + restore in place",
    "update": "update",
}
# The models that are measured first, in case there is no time for more.
FIRST = ("Qwen2.5-7B", "Qwen2.5-1.5B")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="where the weights are; cpu is for trying the benchmark, its figures say nothing of a GPU (default: cuda)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        metavar="MODEL",
        help=f"of {', '.join(MODELS)} (default: all but tiny; on a CPU, tiny)",
    )
    add_dtypes(parser)
    add_choices(parser, "--noise", KINDS, "kinds of noise (default: all; low_rank is of rank 1)")
    parser.add_argument("--backends", nargs="+", help="that are measured (default: all that are ready there)")
    parser.add_argument("--members", type=count, default=30, help="members of the update (default: 30)")
    parser.add_argument("--repeats", type=count, default=20, help="rounds of each row, at most (default: 20)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=240.0,
        help="for all, about: where it is short there are fewer rounds, and today's update runs with "
        "fewer members, which the row says (default: 240)",
    )


def run(args: argparse.Namespace) -> dict:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: PyTorch finds no CUDA device here")
    models = args.models or [m for m in MODELS if (m == "tiny") == (args.device == "cpu")]
    # A stable sort: models that are equal by this key keep their order.
    models = sorted(models, key=lambda m: m not in FIRST)
    job = {
        "device": args.device,
        "todo": [(m, d) for d in args.dtypes for m in models],
        "noise": args.noise,
        "members": args.members,
        "repeats": args.repeats,
        "backends": args.backends,
        "without": [],
        "had": [],
    }
    result = Result(args.save)
    with Clocks(args.device) as sampled:
        result.clocks = sampled.between
        deadline = time.monotonic() + args.seconds
        while job["todo"]:
            job["seconds"] = max(0.0, deadline - time.monotonic())
            if not result.take(isolated("gpu_rows", job), job):
                break
    return result.found()


class Result:
    """Rows and what is left out, saved after each event of the work."""

    def __init__(self, save: Callable[[dict], None]):
        self.rows: list[dict] = []
        self.left_out: list[dict] = []
        self.save, self.began = save, time.monotonic()
        self.clocks: Callable[[float, float], dict] = lambda began, ended: {}

    def found(self) -> dict:
        order, dtypes = list(MODELS), list(dict.fromkeys(r["dtype"] for r in self.rows))
        rows = sorted(self.rows, key=lambda r: (order.index(r["model"]), dtypes.index(r["dtype"])))
        seconds = round(time.monotonic() - self.began, 1)
        return {"rows": rows, "left_out": self.left_out, "seconds": seconds}

    def take(self, events: Iterator[dict], job: dict) -> bool:
        """Takes the events of a process. True if a new process must continue; the job then holds what is left."""
        at: dict = {}
        for event in events:
            for what, found in event.items():
                if what == "row":
                    self._row(found, job)
                elif what == "left_out":
                    if found.get("everywhere"):
                        job["without"].append(f"ours:{found['backend']}")
                    self._leave_out(found)
                elif what == "done":
                    job["todo"].remove(tuple(found))
                    job["had"] = []
                elif what == "at":
                    at = found
                elif what == "died":
                    return self._died(found, at, job)
        return False

    def _row(self, row: dict, job: dict) -> None:
        if row["op"] != "memory":
            row |= self.clocks(row["began"], row["ended"])
            job["had"].append((row["op"], row["noise"]))
        self.rows.append(row)
        self.save(self.found())

    def _leave_out(self, what: dict) -> None:
        where = ", ".join(str(what[k]) for k in ("model", "dtype", "op", "noise", "backend", "contender") if k in what)
        note(f"{where}: left out, {what['reason']}")
        if what.pop("everywhere", False):
            # The backend gives wrong bits, so none of its figures count.
            self.rows = [r for r in self.rows if r["backend"] != what["backend"]]
        # Each new process reports again which backends are not ready.
        if what not in self.left_out:
            self.left_out.append(what)
        self.save(self.found())

    def _died(self, reason: str, at: dict, job: dict) -> bool:
        """Excludes the contender that ran when the process died; if none ran, the model that was being made."""
        keys = ("model", "dtype", "op", "noise", "contender")
        self._leave_out({k: at[k] for k in keys if k in at} | {"reason": reason, "failed": True})
        if "contender" in at and at["contender"] not in job["without"]:
            job["without"].append(at["contender"])
        elif "op" in at and (at["op"], at["noise"]) not in job["had"]:
            job["had"].append((at["op"], at["noise"]))
        elif "model" in at:
            job["todo"].remove((at["model"], at["dtype"]))
            job["had"] = []
        else:
            return False
        return bool(job["todo"])


# ---- the tables ------------------------------------------------------------------------------------------------------


def table(result: dict) -> Table:
    headers = [
        "model",
        "operation",
        "noise",
        "dtype",
        "backend",
        "esfast, ms",
        "of copy's speed",
        "GB/s",
        "10^9 weights/s",
        "host, us",
        "today, ms",
        "times as fast",
        "today, cache kept, ms",
        "times as fast",
        "tl.randn4x, ms",
        "times as fast",
        "SM clock, MHz",
    ]
    lines = []
    for r in result["rows"]:
        where = r["backend"] if r["device"] == "cuda" else f"{r['backend']}, on a {r['device'].upper()}"
        if r["op"] == "memory":
            ours, theirs = (
                "?" if r[f"{whose}share_of_weights"] is None else f"{r[f'{whose}share_of_weights']:.2%}"
                for whose in ("", "today_")
            )
            what = [r["model"], "extra memory, of the weights", r["noise"], r["dtype"], where]
            lines.append([*what, ours, *[""] * 4, theirs, *[""] * 6])
            continue
        members = f", {r['members']} members" if r["op"] == "update" else ""
        scaled = f" ({r['today_members']} of {r['members']} members, scaled)" if r["today_scaled"] else ""
        lines.append(
            [
                r["model"],
                LABELS[r["op"]] + members,
                r["noise"],
                r["dtype"],
                where,
                _ms(r["ms_median"]),
                _share(r["share_of_copy"]),
                f"{r['gbytes_per_s']:.0f}",
                f"{r['weights_per_s'] / 1e9:.0f}",
                f"{r['host_us_median']:.0f}",
                _ms(r["today_ms_median"]) + scaled,
                _ratio(r["ratio_to_today"]),
                _ms(r["today_kept_ms_median"]) + scaled,
                _ratio(r["ratio_to_today_kept"]),
                _ms(r["randn4x_ms_median"]),
                _ratio(r["ratio_to_randn4x"]),
                clocks.text(r),
            ]
        )
    for r in result["left_out"]:
        what = [LABELS.get(r.get("op"), ""), r.get("contender", ""), f"left out: {r['reason']}"]
        cells = [r.get("model", ""), ", ".join(filter(None, what)), r.get("noise", ""), r.get("dtype", "")]
        lines.append([*cells, r.get("backend", ""), *[""] * 12])
    return headers, lines


def readme_table(result: dict) -> Table:
    """The table for a page about GPUs; ValueError for figures of anything else."""
    devices = {r["device"] for r in result["rows"]}
    if devices - {"cuda"}:
        raise BadValue(f"noise_gpu.json was measured on {' and '.join(sorted(devices))}, which is no GPU")
    return table(result)


def summary(result: dict) -> Table:
    """The short table: bfloat16 weights of one model, and every row where a rival is faster."""
    models = [r["model"] for r in result["rows"]]
    model = "Qwen2.5-7B" if "Qwen2.5-7B" in models else models[-1] if models else None

    def shown(r: dict) -> bool:
        ratios = [r.get(f"ratio_to_{rival}") for rival in ("today", "today_kept", "randn4x")]
        return (r["model"], r["dtype"]) == (model, "bfloat16") or any(x is not None and x < 1 for x in ratios)

    headers, lines = readme_table({"rows": [r for r in result["rows"] if shown(r)], "left_out": []})
    columns = [0, 1, 2, 3, 4, 5, 6, 10, 11, 13, 15]
    headers = [*headers[:13], f"{headers[13]}, cache kept", headers[14], f"{headers[15]} as tl.randn4x"]
    return [headers[c] for c in columns], [[line[c] for c in columns] for line in lines]


def short(result: dict) -> Table:
    """README's table: one large model in bfloat16, from a base, with the backend that "auto" takes."""
    kept = ("perturb_restore_base", "update")
    if {r["device"] for r in result["rows"]} != {"cuda"}:
        raise BadValue("noise_gpu.json was not measured on a GPU")
    rows = [r for r in result["rows"] if (r["model"], r["dtype"]) == ("Qwen2.5-7B", "bfloat16") and r["op"] in kept]
    backend = "cuda" if any(r["backend"] == "cuda" for r in rows) else "triton"
    headers = ["operation", "noise", "esfast, ms", "of copy's speed", "times as fast as today", "as tl.randn4x"]
    lines = []
    for r in (r for r in rows if r["backend"] == backend):
        members = f", {r['members']} members" if r["op"] == "update" else ""
        cells = [_ms(r["ms_median"]), _share(r["share_of_copy"]), _ratio(r["ratio_to_today"])]
        lines.append([LABELS[r["op"]] + members, r["noise"], *cells, _ratio(r["ratio_to_randn4x"])])
    return headers, lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"
