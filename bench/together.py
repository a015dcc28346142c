"""`esfast bench together`: members of a population in one batch, beside one after another and beside frozen weights.

    one by one   SequentialEvaluator: each member is perturbed, generates, and is restored
    together     PopulationEvaluator: the weights of all members are written, or with low-rank noise their factors, and
                 all generate in the same batches
    batch        the same rows in the same batches, generated with weights that nobody changes

In the first two the texts end as the model ends them, and must be the same; with low-rank noise nearly all of them. For
the comparison with frozen weights no token ends a text, so that both generate equally many tokens.

With --decoding static several members, and frozen weights, generate from fixed tensors, on a GPU by CUDA graphs. Of one
member at a time this row then compares Transformers' static decoding, which is compiled, with these graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from transformers import GenerationConfig

from ..core.kinds import KINDS
from ..es.es import ES
from ..rollout.engine import TransformersEngine
from ..rollout.evaluator import SequentialEvaluator
from ..rollout.models import load_model, load_tokenizer
from ..rollout.population import PopulationEvaluator
from ..tasks import countdown, embedded
from . import DTYPES, BenchmarkError, add_choices, count
from .made import model_of
from .models import MODELS
from .noise import note


class Case(NamedTuple):
    """What a row is about. `members` answer at once, `one_by_one` says whether they do so one after another, too."""

    model: str
    noise: str
    members: int
    prompts: int
    new_tokens: int
    dtype: str = "float32"
    device: str = "cpu"
    one_by_one: bool = True
    rank: int = 1
    decoding: str = "plain"


# The first is the run of `esfast bench countdown`.
CASES = [
    Case("embedded", "gaussian", 30, 64, 16),
    Case("embedded", "gaussian", 30, 16, 16),
    Case("embedded", "gaussian", 8, 64, 16),
    Case("embedded", "low_rank", 30, 64, 16),
    Case("embedded", "low_rank", 30, 16, 16),
    Case("Qwen2.5-0.5B", "low_rank", 8, 2, 8),
]
SIGMA = 0.01
# of a model of random weights, whose texts change at once
SIGMA_OF_SHAPES = 1e-4
# Share of texts that must be equal with low-rank noise
SAME_LOW_RANK = 0.97
now = time.perf_counter
# By model, noise, members and prompts: the least that the gain and the most that the overhead may be for a row to pass
LIMITS = {
    ("embedded", "gaussian", 30, 64): (3.0, 1.15),
    ("embedded", "gaussian", 30, 16): (5.0, 1.15),
    ("Qwen2.5-0.5B", "low_rank", 8, 2): (1.0, 1.2),
}

Table = tuple[list[str], list[list[str]]]


class Frozen:
    """Stands for a StackedModel whose members are all the model as it is."""

    @staticmethod
    def choose(members: list[int]) -> list[int]:
        return members

    @staticmethod
    @contextlib.contextmanager
    def in_place() -> Iterator[None]:
        yield


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model is (default: cpu)")
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"embedded, a shape of {', '.join(MODELS)}, or a folder (default: what the page Rollouts shows)",
    )
    add_choices(parser, "--noise", KINDS, "kinds of noise, a row for each (default: gaussian)", ("gaussian",))
    parser.add_argument("--members", nargs="+", type=count, help="that answer at once (default: 30)")
    parser.add_argument("--prompts", type=count, help="of each member (default: 64)")
    parser.add_argument("--new-tokens", type=count, help="of each text, at most (default: 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument("--rank", type=count, default=1, help="of low_rank noise (default: 1)")
    add_choices(
        parser,
        "--decoding",
        ("plain", "static"),
        "how several members generate, a row for each (default: plain)",
        ("plain",),
    )
    parser.add_argument("--rates", action="store_true", help="only the rates of tokens: nothing one after another")
    parser.add_argument("--repeats", type=count, default=9, help="rounds of each row, at most (default: 9)")
    parser.add_argument("--seconds", type=float, default=1800.0, help="for all rows, about (default: 1800)")


def run(args: argparse.Namespace) -> dict:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: PyTorch finds no CUDA device here")
    cases = _cases(args)
    rows: list[dict] = []
    left_out: list[dict] = []
    deadline = now() + args.seconds
    made = functools.lru_cache(2)(_made)
    for i, case in enumerate(cases):
        note("{}, {} noise, {} members, {} prompts, {} new tokens".format(*case) + f", {case.decoding}")
        left = (deadline - now()) / (len(cases) - i)
        try:
            if left < 0:
                raise BenchmarkError(f"no time was left of {args.seconds:g} s")
            rows.append(measure(case, args.repeats, left, made))
            note("tokens/s {}, of frozen weights {}".format(*_rates(rows[-1])))
        except (torch.OutOfMemoryError, BenchmarkError) as error:
            if not args.rates:
                raise
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
            what = {"model": case.model, "noise": case.noise, "members": case.members, "decoding": case.decoding}
            left_out.append({**what, "reason": reason})
            note(f"left out: {reason}")
        gc.collect()
        args.save({"rows": rows, "left_out": left_out})
    return {"rows": rows, "left_out": left_out}


def _cases(args: argparse.Namespace) -> list[Case]:
    if not (args.models or args.members or args.prompts or args.new_tokens):
        return [case._replace(device=args.device) for case in CASES]
    usual = CASES[0]
    models, members = args.models or [usual.model], args.members or [usual.members]
    cases = [
        Case(
            model,
            noise,
            count,
            args.prompts or usual.prompts,
            args.new_tokens or usual.new_tokens,
            args.dtype,
            args.device,
            not args.rates,
            args.rank if noise == "low_rank" else 1,
            decoding,
        )
        for model in models
        for decoding in sorted(args.decoding, reverse=True)
        for noise in args.noise
        for count in members
        # One member at a time is the same for all kinds of noise, and generates statically on a GPU in any case
        if count > 1 or not args.rates or (noise == args.noise[0] and decoding == max(args.decoding))
    ]
    if not args.rates:
        return cases
    # What tells most comes first, since time may run out: graphs, the most members of each model, and one at a time
    few = [count for count in members if count not in (1, max(members))]
    usual_way = max(args.decoding)
    return sorted(
        cases, key=lambda c: (c.decoding != usual_way, c.members in few, models.index(c.model), c.members == 1)
    )


def _made(name: str, dtype: str, device: str) -> tuple:
    """A model and its tokenizer."""
    if name in ("embedded", *MODELS):
        return model_of(name, getattr(torch, dtype), device), embedded.make_tokenizer()
    return load_model(name).to(device, getattr(torch, dtype)).eval(), load_tokenizer(name)


def measure(case: Case, repeats: int, seconds: float = float("inf"), made: Callable[..., tuple] = _made) -> dict:
    """A row of figures, of `repeats` rounds or as many as fit in about `seconds`, at least one."""
    model, tokenizer = made(case.model, case.dtype, case.device)
    texts = [row["prompt"] for row in countdown.problems(case.prompts, 0, "train", "compact")]
    decoding = case.decoding if case.members > 1 else "static" if case.decoding == "static" else "auto"
    engine = TransformersEngine(model, tokenizer, case.new_tokens, decoding=decoding)
    endless = _endless(model, tokenizer, case.new_tokens, decoding)
    sigma = SIGMA_OF_SHAPES if case.model in MODELS else SIGMA
    # A population has two members at least; then one answers after the other.
    members = max(2, case.members)
    es = ES(model, sigma=sigma, population_size=members, noise=case.noise, rank=case.rank)
    together, forced = (PopulationEvaluator(each, case.members) for each in (engine, endless))
    one_by_one = SequentialEvaluator(engine) if case.one_by_one else None
    same, rounds = _rounds(es, texts, one_by_one, together, forced, repeats, now() + seconds)
    together.close(), forced.close()
    figures = {contender: median(values) for contender, values in rounds.items()}
    tokens = members * case.prompts * case.new_tokens
    overhead = figures["together, all tokens"] / figures["batch, all tokens"]
    gain = figures["one by one"] / figures["together"] if case.one_by_one else None
    least, most = LIMITS.get((case.model, case.noise, case.members, case.prompts), (0.0, float("inf")))
    return {
        **case._asdict(),
        "at_once": forced.at_once,
        "bytes": forced.need - forced.beside_tensors,
        "drops": forced.batches.way.drops,
        "same_texts": same,
        "seconds": figures,
        "all_seconds": rounds,
        "tokens_per_second": {name: tokens / figures[name] for name in figures if name.endswith("all tokens")},
        "times_as_fast": gain,
        "overhead_ratio": overhead,
        "pass": (gain is None or gain >= least) and overhead <= most,
    }


def _endless(model, tokenizer, new_tokens: int, decoding: str) -> TransformersEngine:
    """An engine for which no token ends a text."""
    tokenizer, before = copy.copy(tokenizer), model.generation_config
    tokenizer.eos_token, model.generation_config = None, GenerationConfig()
    try:
        return TransformersEngine(model, tokenizer, new_tokens, decoding=decoding)
    finally:
        model.generation_config = before


def _rounds(
    es: ES,
    prompts: list[str],
    one_by_one: SequentialEvaluator | None,
    together: PopulationEvaluator,
    forced: PopulationEvaluator,
    repeats: int,
    deadline: float,
) -> tuple[float | None, dict[str, list[float]]]:
    """The share of equal texts, and seconds of all rounds. BenchmarkError if texts of float32 weights differ."""
    same = None

    def ask(evaluator) -> list:
        return [texts for _, texts in evaluator.evaluate(es.population(), prompts, None)]

    def batches() -> None:
        owners = [k for k in range(forced.at_once) for _ in prompts]
        for _ in range(0, es.population_size, forced.at_once):
            forced.batches(Frozen(), owners, prompts * forced.at_once, None)

    contenders: dict[str, Callable[[], object]] = {
        "together, all tokens": lambda: ask(forced),
        "batch, all tokens": batches,
    }
    if one_by_one is not None:
        contenders = {"one by one": lambda: ask(one_by_one), "together": lambda: ask(together), **contenders}
    # what is tried out and imported once
    found = {contender: work() for contender, work in contenders.items()}
    if forced.at_once != int(forced.members_at_once):
        raise BenchmarkError(f"out of memory with {forced.members_at_once} members at once")
    if getattr(forced.batches.way, "failed", None):
        raise BenchmarkError(f"static decoding went on plainly: {forced.batches.way.failed}")
    if one_by_one is not None:
        pairs = [
            a == b
            for own, shared in zip(found["one by one"], found["together"], strict=True)
            for a, b in zip(own, shared, strict=True)
        ]
        same = sum(pairs) / len(pairs)
        least = SAME_LOW_RANK if es.rule.noise == "low_rank" else 1.0
        if es.plan.tensors[0].dtype is torch.float32 and same < least:
            raise BenchmarkError(
                f"{same:.1%} of the texts of members together are those of one after another. No figures are given"
            )
    rounds: dict[str, list[float]] = {contender: [] for contender in contenders}
    for done in range(repeats):
        for contender, work in contenders.items():
            began = _now(es)
            work()
            rounds[contender].append(_now(es) - began)
        if now() > deadline and done:
            break
    return same, rounds


def _now(es: ES) -> float:
    if es.plan.device.type == "cuda":
        torch.cuda.synchronize()
    return now()


def _rates(row: dict) -> list[str]:
    return [f"{row['tokens_per_second'][name]:,.0f}" for name in ("together, all tokens", "batch, all tokens")]


def _one_at_a_time(rows: list[dict]) -> dict[str, dict]:
    """By model, the row of one member at a time."""
    return {r["model"]: r for r in rows if r["members"] == 1}


def _times_one_at_a_time(rows: list[dict]) -> Callable[[dict], str]:
    """row -> its rate of tokens, as a multiple of that of one member at a time; "" where there is none."""
    alone, rate = _one_at_a_time(rows), lambda r: r["tokens_per_second"]["together, all tokens"]
    return lambda r: f"{rate(r) / rate(alone[r['model']]):.1f}" if r["model"] in alone else ""


def table(result: dict) -> Table:
    rates = all(r["times_as_fast"] is None for r in result["rows"])
    return _table_of_rates(result["rows"]) if rates else _table_of_times(result["rows"])


def _table_of_times(rows: list[dict]) -> Table:
    headers = [
        "model, noise",
        "members, prompts, most new tokens",
        "one after another, s",
        "together, s",
        "times as fast",
        "overhead over frozen weights in the same batch",
        "tokens/s together, of frozen weights",
        "weights and texts, MB",
    ]
    lines = []
    for r in rows:
        s = r["seconds"]
        lines.append(
            [
                f"{r['model']}, {r['noise']}" + (", static" if r.get("decoding") == "static" else ""),
                f"{r['members']}, {r['prompts']}, {r['new_tokens']}",
                *(f"{s[name]:.3g}" if name in s else "" for name in ("one by one", "together")),
                f"{r['times_as_fast']:.2f}" if r["times_as_fast"] else "",
                f"{r['overhead_ratio']:.3f}",
                ", ".join(_rates(r)),
                f"{r['bytes'] / 1e6:.0f}",
            ]
        )
    return headers, lines


def _table_of_rates(rows: list[dict]) -> Table:
    """One member at a time first, then more and more."""
    headers = [
        "model",
        "members, prompts, new tokens",
        "noise",
        "decoding",
        "tokens/s",
        "times one at a time",
        "tokens/s of frozen weights in the same batch",
        "overhead",
        "weights and texts, MB",
    ]
    times = _times_one_at_a_time(rows)
    models = list(dict.fromkeys(r["model"] for r in rows))
    lines = []
    for r in sorted(rows, key=lambda r: (models.index(r["model"]), r["decoding"] == "plain", r["members"])):
        together, frozen = _rates(r)
        several = r["members"] > 1
        lines.append(
            [
                r["model"],
                f"{r['members']}, {r['prompts']}, {r['new_tokens']}",
                r["noise"] if several else "any",
                r["decoding"],
                together,
                times(r),
                frozen,
                f"{r['overhead_ratio']:.3f}",
                f"{r['bytes'] / 1e6:.0f}" if several else "",
            ]
        )
    return headers, lines


def short(result: dict) -> Table:
    """The most members at once from graphs, beside one at a time."""
    rows = [r for r in result["rows"] if r["decoding"] == "static"]
    alone, times, most = _one_at_a_time(rows), _times_one_at_a_time(rows), max(r["members"] for r in rows)
    headers = ["model", "noise", "one at a time, tokens/s", f"{most} in one batch, tokens/s", "times as fast"]
    lines = [
        [r["model"], r["noise"], _rates(alone[r["model"]])[0], _rates(r)[0], times(r)]
        for r in rows
        if r["members"] == most and r["model"] in alone
    ]
    return headers, lines
