"""`esfast bench zoo`: trains a tiny model of every architecture of Transformers for two generations, saves it, loads
it, and makes it again from its journal, to the bit; texts in batches are compared with texts alone.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from . import BenchmarkError

PROMPTS = ("a", "12+3=", "Name a colour, please: ", "xyz xyz", "12+4=")
TOKENS = 6
WORKS, REFUSED, NOT_MADE, FAILS = "works", "refused", "not made", "fails"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architectures", nargs="+", metavar="NAME", help="model types (default: all)")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the tiny models and runs there")


def run(args: argparse.Namespace) -> dict:
    from .architectures import architectures

    with tempfile.TemporaryDirectory(prefix="esfast-zoo-") as scratch:
        return try_each(
            args.architectures, architectures(), lambda name: trial(name, Path(args.keep or scratch) / name)
        )


def try_each(asked: Sequence[str] | None, known: Collection[str], trial: Callable[[str], dict]) -> dict:
    """The rows of the architectures that were asked for, of all known ones by default. BenchmarkError for others."""
    import transformers

    if unknown := sorted(set(asked or ()) - set(known)):
        raise BenchmarkError(f"transformers {transformers.__version__} has no causal LM of {', '.join(unknown)}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("esfast").setLevel(logging.ERROR)
    rows = []
    for name in asked or known:
        rows.append(trial(name))
        print(f"{name}: {rows[-1]['result']} {rows[-1]['reason']}", file=sys.stderr, flush=True)
    return {"transformers": transformers.__version__, "rows": rows}


def trial(name: str, folder: Path) -> dict:
    """The row of one architecture. Nothing is raised; `result` and `reason` say what happened."""
    from .architectures import NOT_MADE as REASONS

    row = {"architecture": name, "class": "", "weights": 0, "together": "", "result": NOT_MADE, "pass": True}
    if name in REASONS:
        return row | {"reason": REASONS[name]}
    try:
        return row | {"result": WORKS, "reason": "", **_train(name, folder)}
    except Refused as error:
        return row | {"class": error.kind, "result": REFUSED, "reason": str(error)}
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return row | {"result": FAILS, "reason": reason, "pass": False}


class Refused(Exception):
    """The trainer refused the model; the message is the reason."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


def _train(name: str, folder: Path) -> dict:
    """Trains a tiny model of the architecture, saves it, loads it, and replays its journal on the base model.

    Raises BenchmarkError if weights or completions differ, Refused if ESTrainer refuses the model."""
    from .. import ESConfig, ESTrainer, Plan
    from ..journal.journal import replay
    from ..rollout.engine import TransformersEngine
    from ..rollout.models import load_model
    from ..tasks import embedded
    from .architectures import tiny_model

    tokenizer = embedded.make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    made = tiny_model(name, tokenizer)
    made.save_pretrained(folder / "base")
    settings = ESConfig(
        output_dir=folder / "run",
        generations=2,
        population_size=4,
        sigma=0.2,
        lr=0.05,
        prompts_per_generation=3,
        max_completion_length=TOKENS,
        progress=False,
    )
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    try:
        model = load_model(folder / "base")
        trainer = ESTrainer(model, different_letters, settings, rows, processing_class=tokenizer)
    except ValueError as error:
        raise Refused(type(made).__name__, str(error).replace(str(folder / "base"), name)) from error
    base = trainer.es.plan.fingerprint()
    trainer.train()
    tuned = trainer.es.plan.fingerprint()
    if tuned == base:
        raise BenchmarkError("two generations changed no weight")
    if Plan(load_model(folder / "run" / "model")).fingerprint() != tuned:
        raise BenchmarkError("the saved model has other weights")
    again = Plan(load_model(folder / "base"))
    replay(again, folder / "run" / "journal.jsonl")
    if again.fingerprint() != tuned:
        raise BenchmarkError("the journal gives other weights")
    engine = TransformersEngine(model, tokenizer, TOKENS)
    together, alone = engine.generate(PROMPTS), [engine.generate([prompt])[0] for prompt in PROMPTS]
    if together != alone:
        raise BenchmarkError(f"texts in a batch differ from those alone: {together} and {alone}")
    traits = engine.traits
    return {
        "class": type(model).__name__,
        "weights": trainer.es.plan.numel,
        "together": traits.together,
        "cache_bytes": [traits.bytes_fixed, traits.bytes_per_token],
        "fingerprint": tuned,
    }


def different_letters(completions: Sequence[str], **columns) -> list[float]:
    """A reward that differs between members."""
    return [len(set(text)) + len(text) / 100 + (sum(map(ord, text)) % 97) / 1000 for text in completions]


TOGETHER = {"any": "of any lengths", "equal lengths": "of one length", "alone": "one by one", "": ""}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    return ["architecture", "class", "result", "prompts in a batch", "why"], [
        [r["architecture"], r["class"], r["result"], TOGETHER[r["together"]], r["reason"].partition(": hint")[0]]
        for r in result["rows"]
    ]


def summary(result: dict) -> tuple[list[str], list[list[str]]]:
    """The number of architectures for each result."""
    results = [r["result"] for r in result["rows"]]
    together = [r["together"] for r in result["rows"]]
    headers = [f"architectures of Transformers {result['transformers']}", "work", "of them with padded batches"]
    headers += ["with prompts of one length", "one by one", "refused", "not made", "fail"]
    return headers, [
        [
            str(len(results)),
            str(results.count(WORKS)),
            *(str(together.count(kind)) for kind in ("any", "equal lengths", "alone")),
            *(str(results.count(kind)) for kind in (REFUSED, NOT_MADE, FAILS)),
        ]
    ]
