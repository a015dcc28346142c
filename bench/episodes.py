"""`esfast bench episodes`: the embedded model learns a game of three turns; what the endpoint costs beside its answers.

Learning: `esfast train --task guess` with its own settings for each seed, in a process and a run folder of its own. A
row passes if the reward on held-out problems rose by more than five standard errors of the difference within five
minutes of one core's time.

Overhead: the same conversations held twice, in turn: by episodes through the endpoint, and by a loop that renders the
chats and calls the engine itself. The answers are compared. Times are those of one core, so that other work of the
machine does not count.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ..rollout import TransformersEngine, chat
from ..rollout.completion import Asked
from ..rollout.episodes import Episodes
from ..tasks import embedded
from .countdown import call, train_command
from .kept_runs import add_keep, run_folder
from .outcomes import HEADERS, REWARD, cells, outcome, rose_by

LIMIT = 300  # seconds of a core
ERRORS = 5
TURNS = 3
# (episodes, tokens of an answer)
SHAPES = ((64, 4), (64, 32))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the runs")
    # The ratio of one pair has a standard deviation of 0.09 on a quiet machine; the median of 101 has 0.01.
    parser.add_argument("--repeats", type=int, default=101, help="pairs of conversations that are timed")
    add_keep(parser, "keep the run folders, as FOLDER/seed0, ...")


def run(args: argparse.Namespace) -> dict:
    path = str(embedded.cached(task="guess"))
    torch.set_num_threads(1)
    with run_folder(args) as runs:
        rows = [_learned(seed, runs / f"seed{seed}") for seed in args.seeds]
    return {"rows": rows, "overhead": [_overhead(path, args.repeats, *shape) for shape in SHAPES]}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = [
        "seed",
        *HEADERS,
        "turns before",
        "turns after",
        "generations",
        "seconds of a core",
    ]
    lines = [
        [
            str(r["seed"]),
            *cells(r),
            f"{r['turns_before']:.2f}",
            f"{r['turns_after']:.2f}",
            str(r["generations"]),
            f"{r['cpu_seconds']:.0f}",
        ]
        for r in result["rows"]
    ]
    return headers, lines


def overhead_table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = ["weights", "episodes", "turns", "tokens of an answer", "ms a request", "of them the endpoint", "ratio"]
    lines = [
        [
            f"{r['weights']:,}",
            str(r["episodes"]),
            str(r["turns"]),
            str(r["tokens"]),
            f"{r['ms']:.2f}",
            f"{r['ms'] - r['ms_direct']:.2f}",
            f"{r['ratio']:.2f}",
        ]
        for r in result["overhead"]
    ]
    return headers, lines


def _learned(seed: int, folder: Path) -> dict:
    before_run = resource.getrusage(resource.RUSAGE_CHILDREN)
    call("`esfast train --task guess`", train_command(seed, folder, ["--task", "guess"]), dict(os.environ))
    after_run = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after_run, t) - getattr(before_run, t) for t in ("ru_utime", "ru_stime"))
    found = outcome(folder, REWARD | {"turns": "eval_episode_turns"})
    return {"seed": seed, **found, "cpu_seconds": cpu, "pass": rose_by(found, ERRORS) and cpu <= LIMIT}


def _overhead(path: str, repeats: int, count: int, tokens: int) -> dict:
    from ..rollout.models import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(path), load_model(path)
    # Every answer has all of its tokens.
    model.generation_config.eos_token_id = None
    engine = TransformersEngine(model, _endless(tokenizer), tokens)
    episodes = Episodes(_talk, engine, tokenizer)
    rows = [{"prompt": f"{100 + i}-{106 + i}"} for i in range(count)]
    pairs = []
    for _ in range(repeats + 1):
        began = time.process_time()
        played = [[m["content"] for m in e.messages[1::2]] for e in episodes.generate(rows)]
        between = time.process_time()
        direct = _direct(engine, tokenizer, rows)
        pairs.append((between - began, time.process_time() - between))
        assert played == direct, "the endpoint's answers are not the engine's"
    # The first warms up.
    ours, theirs = zip(*pairs[1:], strict=True)
    requests = count * TURNS
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "episodes": count,
        "turns": TURNS,
        "tokens": tokens,
        "ms": 1e3 * statistics.median(ours) / requests,
        "ms_direct": 1e3 * statistics.median(theirs) / requests,
        "ratio": statistics.median(a / b for a, b in pairs[1:]),
        "ratios": [a / b for a, b in pairs[1:]],
    }


async def _talk(client: Any, row: dict) -> float:
    messages = [{"role": "user", "content": row["prompt"]}]
    for turn in range(TURNS):
        answer = await client.chat.completions.create(model=client.model, messages=messages)
        messages += [answer.choices[0].message, {"role": "user", "content": "<>"[turn % 2]}]
    return 1.0


def _direct(engine: TransformersEngine, tokenizer: Any, rows: list[dict]) -> list[list[str]]:
    talks: list[list[dict]] = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    said: list[list[str]] = [[] for _ in rows]
    for turn in range(TURNS):
        texts = chat.render([{"prompt": talk} for talk in talks], tokenizer)
        for i, answer in enumerate(engine.complete_texts(texts, None, Asked(engine.max_new_tokens, 0))):
            said[i].append(answer.text)
            talks[i] += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "<>"[turn % 2]}]
    return said


def _endless(tokenizer: Any) -> Any:
    """A copy of the tokenizer without a token that ends an answer."""
    endless = embedded.make_tokenizer()
    endless.chat_template, endless.eos_token = tokenizer.chat_template, None
    return endless
