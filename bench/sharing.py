"""`esfast bench sharing`: which architectures of Transformers let several members of a population answer in one batch.

A tiny model of each one generates for five members, one after another and three at once, from prompts of several
lengths. The texts must be the same (float32, one thread).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from . import BenchmarkError
from .zoo import PROMPTS, REFUSED, TOKENS, WORKS, try_each

FAILS = "fails"
MEMBERS, AT_ONCE, SIGMA = 5, 3, 0.1

Table = tuple[list[str], list[list[str]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architectures", nargs="+", metavar="NAME", help="model types (default: all)")


def run(args: argparse.Namespace) -> dict:
    from .architectures import NOT_MADE, architectures

    return try_each(args.architectures, [name for name in architectures() if name not in NOT_MADE], trial)


def trial(name: str) -> dict:
    """The row of one architecture. Nothing is raised; `result` and `reason` say what happened."""
    from ..rollout.member_tensor import Unsupported

    row = {"architecture": name, "result": WORKS, "one_by_one": [], "drops": None, "reason": "", "pass": True}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return row | _compare(name)
    except Unsupported as error:
        return row | {"result": REFUSED, "reason": str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return row | {"result": FAILS, "reason": reason, "pass": False}
    finally:
        torch.set_num_threads(threads)


def _compare(name: str) -> dict:
    """Raises Unsupported where members can't share the model, BenchmarkError if texts differ."""
    from ..es.es import ES
    from ..rollout.engine import TransformersEngine
    from ..rollout.evaluator import SequentialEvaluator
    from ..rollout.member_tensor import Unsupported
    from ..rollout.population import PopulationEvaluator
    from ..tasks import embedded
    from .architectures import tiny_model

    tokenizer = embedded.make_tokenizer()
    try:
        model = tiny_model(name, tokenizer)
        engine = TransformersEngine(model, tokenizer, TOKENS)
    except ValueError as error:
        raise Unsupported(f"not trained at all: {error}") from error
    es = ES(model, sigma=SIGMA, population_size=MEMBERS)
    together = PopulationEvaluator(engine, AT_ONCE)
    alone, shared = (
        {member.index: texts for member, texts in evaluator.evaluate(es.population(), PROMPTS, None)}
        for evaluator in (SequentialEvaluator(engine), together)
    )
    if alone != shared:
        raise BenchmarkError(f"texts differ: {alone} and {shared}")
    return {"one_by_one": sorted(together.one_by_one), "drops": together.batches.way.drops}


def table(result: dict) -> Table:
    headers = ["architecture", "members in one batch", "called one by one", "ended texts leave the batch", "why not"]
    return headers, [
        [
            r["architecture"],
            r["result"],
            ", ".join(r["one_by_one"]),
            {True: "yes", False: "no", None: ""}[r["drops"]],
            r["reason"],
        ]
        for r in result["rows"]
    ]


def summary(result: dict) -> Table:
    """How many of each result."""
    rows: Sequence[dict] = result["rows"]
    work = [r for r in rows if r["result"] == WORKS]
    counts = [len(rows), len(work), sum(bool(r["one_by_one"]) for r in work), sum(bool(r["drops"]) for r in work)]
    counts += [sum(r["result"] == kind for r in rows) for kind in (REFUSED, FAILS)]
    headers = [f"architectures of Transformers {result['transformers']}", "work", "of them with a part one by one"]
    return [*headers, "and ended texts leave the batch", "refused", "fail"], [list(map(str, counts))]
