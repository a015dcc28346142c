"""`esfast bench playing`: members that play episodes at the same time, against one after another.

One generation of `--task guess`, the game of three turns, with the embedded model, played both ways in turn. Every
conversation and reward must be the same. Times are those of one core, so that other work of the machine does not count.
A row passes if playing at the same time is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ..es.es import ES
from ..rollout import TransformersEngine
from ..rollout.episodes import Episodes, EpisodesEvaluator, Limits, Settings
from ..rollout.episodes.evaluator import Places
from ..rollout.models import load_model, load_tokenizer
from ..rollout.population import asking
from ..tasks import embedded, guess

# (noise, members, rows, episodes at the same time)
SHAPES = (
    ("gaussian", 30, 32, 1024),
    ("gaussian", 30, 32, 256),
    ("gaussian", 30, 8, 1024),
    ("gaussian", 8, 32, 1024),
    ("low_rank", 30, 32, 1024),
)
SIGMA, TOKENS = 0.02, guess.RECIPE.settings["max_completion_length"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="pairs of generations that are timed")


def run(args: argparse.Namespace) -> dict:
    path = str(embedded.cached(task="guess"))
    torch.set_num_threads(1)
    return {"rows": [_row(path, args.repeats, *shape) for shape in SHAPES]}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = [
        "noise",
        "members, rows",
        "episodes at once",
        "requests",
        "one member after another, s",
        "at the same time, s",
        "times as fast",
    ]
    lines = [
        [
            r["noise"],
            f"{r['members']}, {r['rows']}",
            str(r["episodes_at_once"]),
            f"{r['requests']:,}",
            f"{r['alone']:.3g}",
            f"{r['together']:.3g}",
            f"{r['ratio']:.2f}",
        ]
        for r in result["rows"]
    ]
    return headers, lines


def _row(path: str, repeats: int, noise: str, members: int, count: int, at_once: int) -> dict:
    tokenizer, model = load_tokenizer(path), load_model(path)
    es = ES(model, sigma=SIGMA, population_size=members, noise=noise)
    rows, seeds = guess.problems(count, 0, style="compact"), list(range(count))
    settings = Settings(Limits(at_once=at_once))
    ways = []
    for members_at_once in (1, "auto"):
        engine = TransformersEngine(model, tokenizer, TOKENS)
        places: Places = asking(engine, members_at_once, noise)
        ways.append(EpisodesEvaluator(Episodes(guess.Guess("compact"), engine, tokenizer, settings), places))

    def generation(way: EpisodesEvaluator) -> tuple[float, dict]:
        began = time.process_time()
        found = {
            m.index: [(e.reward, e.turns, e.messages) for e in of]
            for m, of in way.evaluate(es.population(), rows, seeds)
        }
        return time.process_time() - began, found

    pairs = []
    for _ in range(repeats + 1):
        (alone, expected), (together, found) = map(generation, ways)
        assert found == expected, "members that play at the same time say something else"
        pairs.append((alone, together))
    # The first warms up.
    alone, together = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
    ratio = statistics.median(a / b for a, b in pairs[1:])
    return {
        "noise": noise,
        "members": members,
        "rows": count,
        "episodes_at_once": at_once,
        "requests": sum(turns for of in found.values() for _, turns, _ in of),
        "alone": alone,
        "together": together,
        "ratio": ratio,
        "ratios": [a / b for a, b in pairs[1:]],
        "pass": ratio > 1,
    }
