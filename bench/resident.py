"""`esfast bench resident`: the memory that members in one batch are said to take, and by how much a process grew.

Each measurement is a new process that starts as by default, with one thread: it makes a model, chooses K, and asks all
members several times for texts that end at their limit only. Where freed tensors leave gaps on glibc's heap differs
from process to process, so each job has several. Linux only, since it reads /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from typing import NamedTuple

from ..utils.child import child
from . import BenchmarkError, count
from .memory import STATUS, growth

# By which users tune malloc
TUNED = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM")
# Of what is said, and bytes where that is more: by so much a process may differ from it.
TOLERANCE, TOLERATED = 0.1, 4_000_000


class Job(NamedTuple):
    """Noise, members, prompts of each, digits of a prompt and new tokens; width and layers of a model that is not the
    embedded one; with `give_back` esfast has glibc give freed memory back, as it does where members take much."""

    noise: str
    members: int
    prompts: int
    digits: int = 8
    tokens: int = 16
    width: int = 0
    layers: int = 0
    give_back: bool = False


JOBS = [
    Job("gaussian", 30, 64),
    Job("low_rank", 30, 64),
    Job("gaussian", 30, 16),
    Job("low_rank", 30, 16),
    Job("gaussian", 8, 64),
    Job("gaussian", 30, 64, digits=90, tokens=8),
    Job("gaussian", 30, 64, digits=90, tokens=8, give_back=True),
    Job("gaussian", 30, 32, digits=100, tokens=64, give_back=True),
    Job("low_rank", 30, 16, digits=300, tokens=40, give_back=True),
    Job("gaussian", 6, 8, digits=90, width=512, layers=8, give_back=True),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=count, default=5, help="processes of each job (default: 5)")


def run(args: argparse.Namespace) -> dict:
    rows: list[dict] = []
    for job in JOBS:
        found = [said_and_taken(job) for _ in range(args.repeats)]
        said, taken = found[0][0], sorted(taken for _, taken in found)
        rows.append(job._asdict() | {"said": said, "taken": taken, "pass": all(within(*each) for each in found)})
        args.save({"rows": rows})
    return {"rows": rows}


def within(said: int, taken: int) -> bool:
    return abs(taken - said) <= max(TOLERANCE * said, TOLERATED)


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = ["members x prompts", "noise", "prompt + new tokens", "freed memory", "said", "taken", "taken / said"]
    lines = []
    for row in result["rows"]:
        least, most = row["taken"][0], row["taken"][-1]
        lines.append(
            [
                f"{row['members']} x {row['prompts']}" + (f", width {row['width']}" if row["width"] else ""),
                row["noise"],
                f"{row['digits']} + {row['tokens']}",
                "given back" if row["give_back"] else "kept",
                f"{row['said'] / 1e6:.0f} MB",
                f"{least / 1e6:.0f} to {most / 1e6:.0f} MB",
                f"{least / row['said']:.2f} to {most / row['said']:.2f}",
            ]
        )
    return headers, lines


def said_and_taken(job: Job) -> tuple[int, int]:
    """In bytes. BenchmarkError if it can't be measured."""
    if not STATUS.exists():
        raise BenchmarkError("the memory of a process is read from /proc/self/status, which is not here")
    as_by_default = {name: value for name, value in os.environ.items() if not name.startswith(TUNED)}
    done = subprocess.run(
        child(f"from {__name__} import main; main()", json.dumps(job)),
        env=as_by_default | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise BenchmarkError(f"measuring memory failed: {done.stderr.strip()[-2000:]}")
    said, taken = json.loads(done.stdout)
    return said, taken


def main() -> None:
    """In the process that is measured."""
    import ctypes
    import gc
    import sys

    from ..es.es import ES
    from ..rollout import population
    from ..rollout.engine import TransformersEngine
    from ..tasks import embedded

    job = Job(*json.loads(sys.argv[1]))
    if job.give_back:
        population.LITTLE = 0.0
    tokenizer = embedded.make_tokenizer()
    model = embedded.make_model(tokenizer)
    if job.width:
        config = model.config
        config.hidden_size, config.intermediate_size = job.width, 3 * job.width
        config.num_hidden_layers, config.layer_types = job.layers, ["full_attention"] * job.layers
        config.max_position_embeddings = 4096
        model = type(model)(config)
    es = ES(model, sigma=1e-4, population_size=job.members, noise=job.noise)
    engine = TransformersEngine(model, tokenizer, job.tokens)
    engine.generation_config.eos_token_id = None
    prompts = [f"{i:0{job.digits}}" for i in range(job.prompts)]
    evaluator = population.PopulationEvaluator(engine, job.members)

    def answer() -> None:
        # Gaps grow in the first calls.
        for _ in range(8 if job.members * job.prompts * (job.digits + job.tokens) < 50_000 else 3):
            for _ in evaluator.evaluate(es.population(), prompts, None):
                pass

    evaluator._settle(es.population(), False, job.prompts, prompts)
    gc.collect()
    # what trying out left on the heap
    ctypes.CDLL(None).malloc_trim(0)
    taken = growth(answer)
    print(json.dumps([evaluator.need, taken]))
