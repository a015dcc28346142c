"""`esfast bench together`: members of a population in one batch, beside one after another and beside frozen weights.

    one by one   SequentialEvaluator: each member is perturbed, generates, and is restored
    together     PopulationEvaluator: the weights of all members are written, and all generate in the same batches
    batch        the same rows in the same batches, generated with weights that nobody changes

In the first two the texts end as the model ends them, and must be the same. For the comparison with frozen weights no
token ends a text, so that both generate equally many tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from ..es.es import ES
from ..rollout.engine import TransformersEngine
from ..rollout.evaluator import SequentialEvaluator
from ..rollout.models import load_model, load_tokenizer
from ..rollout.population import PopulationEvaluator
from ..tasks import countdown, embedded
from . import BenchmarkError, count
from .noise import note

# For each model (members, prompts, most new tokens). The first is the run of `esfast bench countdown`.
CASES = [("embedded", 30, 64, 16), ("embedded", 30, 16, 16), ("embedded", 8, 64, 16)]
SIGMA = 0.01
now = time.perf_counter
# The least that the gain and the most that the overhead may be, by model, members and prompts, for a row to pass.
LIMITS = {("embedded", 30, 64): (3.0, 1.15), ("embedded", 30, 16): (5.0, 1.15)}

Table = tuple[list[str], list[list[str]]]


class Frozen:
    """Stands for a StackedModel whose members are all the model as it is."""

    @staticmethod
    @contextlib.contextmanager
    def in_place() -> Iterator[None]:
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="a model's name or folder (default: the embedded model)")
    for name in ("members", "prompts", "new-tokens"):
        parser.add_argument(f"--{name}", type=count, help="of the only row then (default: three rows)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model is (default: cpu)")
    parser.add_argument("--repeats", type=count, default=9, help="rounds of each row (default: 9)")


def run(args: argparse.Namespace) -> dict:
    given = (args.members, args.prompts, args.new_tokens)
    cases = CASES
    if args.model or any(given):
        sizes = (n if n is not None else usual for n, usual in zip(given, CASES[0][1:], strict=True))
        cases = [(args.model or "embedded", *sizes)]
    rows: list[dict] = []
    for case in cases:
        note("{}, {} members, {} prompts, {} new tokens".format(*case))
        rows.append(measure(*case, args.repeats, args.device))
        args.save({"rows": rows})
    return {"rows": rows}


def measure(name: str, members: int, prompts: int, new_tokens: int, repeats: int, device: str = "cpu") -> dict:
    """A row of figures."""
    folder = embedded.cached(progress=False) if name == "embedded" else name
    model, tokenizer = load_model(folder).to(device).eval(), load_tokenizer(folder)
    texts = [row["prompt"] for row in countdown.problems(prompts, 0, "train", "compact")]
    engine = TransformersEngine(model, tokenizer, new_tokens)
    endless = TransformersEngine(model, tokenizer, new_tokens)
    endless.generation_config = copy.copy(engine.generation_config)
    endless.generation_config.eos_token_id = None
    es = ES(model, sigma=SIGMA, population_size=members)
    one_by_one, together = SequentialEvaluator(engine), PopulationEvaluator(engine, members)
    forced = PopulationEvaluator(endless, members)
    figures, rounds = _seconds(es, texts, one_by_one, together, forced, repeats)
    gain = figures["one by one"] / figures["together"]
    overhead = figures["together, all tokens"] / figures["batch, all tokens"]
    least, most = LIMITS.get((name, members, prompts), (0.0, float("inf")))
    return {
        "model": name,
        "device": device,
        "members": members,
        "prompts": prompts,
        "new_tokens": new_tokens,
        "at_once": together.at_once,
        "bytes": together.need,
        "drops": together._way.drops,
        "seconds": figures,
        "all_seconds": rounds,
        "times_as_fast": gain,
        "overhead_ratio": overhead,
        "pass": gain >= least and overhead <= most,
    }


def _seconds(
    es: ES,
    prompts: list[str],
    one_by_one: SequentialEvaluator,
    together: PopulationEvaluator,
    forced: PopulationEvaluator,
    repeats: int,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Medians, and those of all rounds. BenchmarkError if texts of float32 weights differ."""

    def ask(evaluator) -> list:
        return [texts for _, texts in evaluator.evaluate(es.population(), prompts, None)]

    contenders: dict[str, Callable[[], object]] = {
        "one by one": lambda: ask(one_by_one),
        "together": lambda: ask(together),
        "together, all tokens": lambda: ask(forced),
        "batch, all tokens": lambda: forced._answers(Frozen(), es.population_size, prompts, None),
    }
    # what is tried out and imported once
    found = {contender: work() for contender, work in contenders.items()}
    if es.plan.tensors[0].dtype is torch.float32 and found["one by one"] != found["together"]:
        raise BenchmarkError("members together give other texts than one after another. No figures are given")
    rounds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for _ in range(repeats):
        for contender, work in contenders.items():
            began = now()
            work()
            rounds[contender].append(now() - began)
    return {contender: median(values) for contender, values in rounds.items()}, rounds


def table(result: dict) -> Table:
    headers = [
        "model",
        "members, prompts, most new tokens",
        "one after another, s",
        "together, s",
        "times as fast",
        "overhead over frozen weights in the same batch",
        "weights and texts, MB",
    ]
    lines = []
    for r in result["rows"]:
        s = r["seconds"]
        lines.append(
            [
                r["model"],
                f"{r['members']}, {r['prompts']}, {r['new_tokens']}",
                f"{s['one by one']:.3g}",
                f"{s['together']:.3g}",
                f"{r['times_as_fast']:.2f}",
                f"{r['overhead_ratio']:.3f}",
                f"{r['bytes'] / 1e6:.0f}",
            ]
        )
    return headers, lines
