"""`esfast bench iteration`: a whole generation of ES, compared with generating its text alone, and with the loop of
today's ES code on plain PyTorch.

In one process, on one model, each round runs these once:

    esfast      ESTrainer's generation, one member after another: perturb, generate, score, restore, journal, update
    together    the same with members in one batch, where `esfast train` does so by itself
    frozen      the same engine generates as many times with frozen weights, and nothing is scored
    plain       torch.randn added and subtracted for every member, model.generate on all prompts at once, torch.randn
                for every member once more for the update

The overhead ratio is esfast / frozen. All texts have the same number of tokens: no token ends one. All models but the
embedded one have random weights. The plain loop and the frozen weights generate with as many threads as esfast does for
one member: for the embedded model with one, which is fastest at this size. With float32 weights both engines must give
the same texts, which is checked before the rounds.
"""

from __future__ import annotations

import argparse
import functools
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from transformers import GenerationConfig

from ..rollout.engine import TransformersEngine
from ..rollout.evaluator import SequentialEvaluator
from ..rollout.population import PopulationEvaluator, asking
from ..tasks import countdown, embedded
from ..trainer.clock import PHASES
from ..trainer.config import ESConfig
from ..trainer.trainer import ESTrainer
from . import BenchmarkError, clocks, count, today
from .clocks import Clocks
from .isolated import isolated, reason_of
from .made import model_of
from .models import MODELS
from .noise import note

Table = tuple[list[str], list[list[str]]]
# model: dtype, members, prompts, tokens of a prompt (None: the task's), new tokens
# The last has texts as long as people use, of which two cores make a generation in some minutes.
CPU = [
    ("embedded", ("float32", 30, 64, None, 16)),
    ("Qwen2.5-0.5B", ("bfloat16", 4, 2, 32, 16)),
    ("Qwen2.5-0.5B", ("bfloat16", 2, 4, 200, 256)),
]
# What says most comes first; longer texts if time is left.
GPU = [
    *((name, ("bfloat16", 4, 64, 128, 64)) for name in ("Qwen2.5-1.5B", "Qwen2.5-7B")),
    *((name, ("bfloat16", 4, 200, 128, 256)) for name in ("Qwen2.5-1.5B", "Qwen2.5-7B", "Qwen2.5-0.5B")),
]
TINY = ("bfloat16", 2, 2, 8, 4)
# The most that the overhead ratio, and the least that the gain over the plain loop may be, for a row to pass. Limits of
# a number of new tokens come first.
LIMITS = {
    ("cpu", "embedded"): (1.05, 1.0),
    ("cpu", "Qwen2.5-0.5B"): (None, 2.5),
    ("cpu", "Qwen2.5-0.5B", 256): (1.05, 1.0),
    ("cuda", "Qwen2.5-0.5B"): (None, 3.0),
    ("cuda", "Qwen2.5-1.5B"): (1.02, 3.0),
    ("cuda", "Qwen2.5-7B"): (1.02, 3.0),
}

now = time.perf_counter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model is (default: cpu)")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=["embedded", *MODELS],
        metavar="MODEL",
        help=f"of embedded, {', '.join(MODELS)} (default: what the page Benchmarks shows)",
    )
    for name, text in {
        "members": "of a generation",
        "prompts": "of each member",
        "prompt-tokens": "of a prompt",
        "new-tokens": "of each text",
    }.items():
        parser.add_argument(f"--{name}", type=count, help=f"{text} (default: depends on model and device)")
    parser.add_argument("--decoding", default="auto", help="see `esfast train --help` (default: auto)")
    parser.add_argument(
        "--repeats",
        type=count,
        default=40,
        help="rounds of each model, at most: of seven of a second "
        "each, the medians' ratio varied by 0.03 (default: 40)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=600.0,
        help="for all, about: a model has at least one round, but is left out if time is up before it (default: 600)",
    )


def run(args: argparse.Namespace) -> dict:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: PyTorch finds no CUDA device here")
    rows, left_out, deadline = [], [], now() + args.seconds
    given = (args.members, args.prompts, args.prompt_tokens, args.new_tokens)
    jobs = [
        {
            "name": name,
            "dtype": dtype,
            "device": args.device,
            "decoding": args.decoding,
            "repeats": args.repeats,
            **dict(
                zip(
                    ("members", "prompts", "prompt_tokens", "new_tokens"),
                    (g if g is not None else n for g, n in zip(given, numbers, strict=True)),
                    strict=True,
                )
            ),
        }
        for name, (dtype, *numbers) in _cases(args)
    ]
    # on a GPU each in a process of its own: what fails there takes no other model's figures along
    work = functools.partial(isolated, "iteration") if args.device == "cuda" else events
    with Clocks(args.device) as sampled:
        for i, job in enumerate(jobs):
            what = {"model": job["name"], "prompts": job["prompts"], "new_tokens": job["new_tokens"]}
            job["seconds"] = (deadline - now()) / (len(jobs) - i)
            note(f"{job['name']}, {job['dtype']}, {job['prompts']} prompts, {job['new_tokens']} new tokens")
            if job["seconds"] < 0:
                left_out.append(what | {"reason": f"no time was left of {args.seconds:g} s"})
                continue
            began = time.time()
            for event in work(job):
                if "row" in event:
                    rows.append(event["row"] | sampled.between(began, time.time()))
                else:
                    reason = event["died"]
                    left_out.append(what | {"reason": reason, "failed": "out of memory" not in reason})
                    note(f"left out: {reason}")
            args.save({"rows": rows, "left_out": left_out})
    return {"rows": rows, "left_out": left_out}


def _cases(args: argparse.Namespace) -> list[tuple[str, tuple]]:
    """(model, its members, prompts and lengths)."""
    known = CPU if args.device == "cpu" else GPU
    names = args.models or list(dict.fromkeys(name for name, _ in known))
    return [case for case in known if case[0] in names] + [(name, TINY) for name in names if name not in dict(known)]


def events(job: dict) -> Iterator[dict]:
    """{"row": ...}, or {"died": reason}, of one model."""
    job = dict(job)
    repeats, deadline = job.pop("repeats"), now() + job.pop("seconds")
    try:
        with Work(**job) as work:
            row = work.measure(repeats, deadline)
    except (RuntimeError, ValueError) as error:
        yield {"died": reason_of(error)}
    else:
        yield {"row": row}
    gc.collect()


class Asking:
    """The MemberEvaluator of the contender whose turn it is."""

    own_prompts = True

    def __init__(self, engine: TransformersEngine):
        self.engine, self.turn = engine, "esfast"
        self.ways = {"esfast": SequentialEvaluator(engine)}
        if isinstance(found := asking(engine), PopulationEvaluator):
            self.ways["together"] = found

    @property
    def tokens(self) -> int:
        return self.engine.tokens + sum(way.tokens - self.engine.tokens for way in self.ways.values())

    def evaluate(self, *arguments):
        return self.ways[self.turn].evaluate(*arguments)

    def close(self) -> None:
        for way in self.ways.values():
            way.close()


class Work:
    """One model and its contenders."""

    def __init__(
        self,
        name: str,
        dtype: str,
        device: str,
        decoding: str,
        members: int,
        prompts: int,
        prompt_tokens: int | None,
        new_tokens: int,
    ):
        self.name, self.dtype, self.device = name, dtype, device
        self.prompt_tokens, self.new_tokens, self.members = prompt_tokens, new_tokens, members
        self.tokenizer = embedded.make_tokenizer()
        self.tokenizer.eos_token = None  # no token ends a text
        self.model = model_of(name, getattr(torch, dtype), device)
        self.rows = countdown.problems(prompts, 0, "train", "compact")
        if prompt_tokens is not None:  # of bytes
            self.rows = [{**row, "prompt": (row["prompt"] * prompt_tokens)[:prompt_tokens]} for row in self.rows]
        self.prompts = [row["prompt"] for row in self.rows]
        self.engine = TransformersEngine(self.model, self.tokenizer, new_tokens, decoding=decoding)
        self.asking = Asking(self.engine)
        self.config = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
        )
        self._folder = tempfile.TemporaryDirectory(prefix="esfast-iteration-")
        args = ESConfig(
            output_dir=str(Path(self._folder.name) / "run"),
            generations=10**6,
            population_size=members,
            prompts_per_generation=prompts,
            max_completion_length=new_tokens,
            reward_workers=1,
            progress=False,
        )
        self.trainer = ESTrainer(
            self.model,
            countdown.reward,
            args,
            lambda generation, size: self.rows[:size],
            processing_class=self.tokenizer,
            evaluator=self.asking,
        )

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *exc) -> None:
        self.trainer.scorer.close()
        self.asking.close()
        self._folder.cleanup()

    def measure(self, repeats: int, deadline: float) -> dict:
        self.check()
        ours = {way: functools.partial(self.ours, way) for way in self.asking.ways}
        contenders = {**ours, "frozen": self.frozen, "plain": self.plain}
        for contender in ours.values():
            contender()  # what is compiled, captured or imported once a run
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        phases: list[dict] = []
        for _ in range(repeats):
            for name, contender in contenders.items():
                began, tokens = self._now(), self.asking.tokens
                result = contender()
                seconds[name].append(self._now() - began)
                if name == "plain":  # ES refuses to go on from weights that something else moved
                    self.trainer.es.store.restore()
                if name == "esfast":
                    phases.append(result)
                made = self.asking.tokens - tokens
                if name != "plain" and made != self.tokens:
                    raise BenchmarkError(f"{name}: expected {self.tokens} tokens, got {made}")
            if now() > deadline:
                break
        figures = {name: median(values) for name, values in seconds.items()}
        ratio, gain = figures["esfast"] / figures["frozen"], figures["plain"] / figures["esfast"]
        key = (self.device, self.name)
        most, least = LIMITS.get((*key, self.new_tokens), LIMITS.get(key, (None, None)))
        return {
            "model": self.name,
            "dtype": self.dtype,
            "device": self.device,
            "decoding": type(self.engine._way).__name__.lower(),
            "members": self.members,
            "prompts": len(self.prompts),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "rounds": len(phases),
            "seconds": figures,
            "all_seconds": seconds,
            "overhead_ratio": ratio,
            "times_as_fast": gain,
            "times_as_fast_together": figures["plain"] / figures["together"] if "together" in figures else None,
            "seconds_by_phase": {p: median(r[f"seconds_{p}"] for r in phases) for p in PHASES},
            "tokens_per_second": self.tokens / figures["esfast"],
            "tokens_per_second_frozen": self.tokens / figures["frozen"],
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if self.device == "cuda" else None,
            "pass": (most is None or ratio <= most) and (least is None or gain >= least),
        }

    @property
    def tokens(self) -> int:
        return self.members * len(self.prompts) * self.new_tokens

    def check(self) -> None:
        """Checks that both sides give the same completions with float32 weights. In 16 bits the order of a batch can
        change the last bit."""
        if self.dtype == "float32" and self.engine.generate(self.prompts) != self._generate():
            raise BenchmarkError(f"{self.name}: the plain loop gives other texts than the engine. No figures are given")

    def ours(self, way: str) -> dict:
        self.asking.turn = way
        return self.trainer._generation()

    def frozen(self) -> None:
        for _ in range(self.members):
            self.engine.generate(self.prompts)

    def plain(self) -> None:
        weights, sigma, rewards = list(self.model.parameters()), self.trainer.args.sigma, []
        seeds = [1000 + i for i in range(self.members)]
        columns = {key: [row[key] for row in self.rows] for key in self.rows[0] if key != "prompt"}
        with torch.no_grad():
            for seed in seeds:
                today.perturb_(weights, seed, sigma, "gaussian")
                texts = self._generate()
                rewards.append(sum(countdown.reward(self.prompts, texts, **columns)) / len(texts))
                today.perturb_(weights, seed, -sigma, "gaussian")
            scores = torch.tensor(rewards, dtype=torch.float64)
            scores = (scores - scores.mean()) / (scores.std(unbiased=False) + 1e-8)
            coeffs = (scores * self.trainer.args.lr / len(seeds)).tolist()
            today.update_(weights, seeds, coeffs, "gaussian")

    def _generate(self) -> list[str]:
        inputs = self.tokenizer(self.prompts, return_tensors="pt", padding=True, padding_side="left").to(self.device)
        with self.engine.own_settings():
            output = self.model.generate(**inputs, generation_config=self.config)
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return now()


def _together(row: dict) -> list[str]:
    """Cells of the members in one batch; empty where they were asked one after another alone."""
    if not row.get("times_as_fast_together"):
        return ["", ""]
    return [f"{row['seconds']['together']:.3g}", f"{row['times_as_fast_together']:.2f}"]


def table(result: dict) -> Table:
    headers = [
        "model",
        "dtype",
        "members, prompts, new tokens",
        "plain loop, s",
        "esfast, s",
        "times as fast",
        "members together, s",
        "times as fast",
        "frozen weights, s",
        "overhead ratio",
        "tokens/s",
        "of frozen's",
        "perturb",
        "score, wait",
        "update, journal",
    ]
    on_gpu = any(r["device"] == "cuda" for r in result["rows"])
    headers += ["SM clock, MHz"] * on_gpu
    lines = []
    for r in result["rows"]:
        s, p = r["seconds"], r["seconds_by_phase"]
        share = [
            f"{sum(p[k] for k in keys) / s['esfast']:.1%}"
            for keys in (("perturb",), ("score", "wait"), ("update", "journal"))
        ]
        lines.append(
            [
                r["model"],
                r["dtype"],
                f"{r['members']}, {r['prompts']}, {r['new_tokens']}",
                f"{s['plain']:.3g}",
                f"{s['esfast']:.3g}",
                f"{r['times_as_fast']:.2f}",
                *_together(r),
                f"{s['frozen']:.3g}",
                f"{r['overhead_ratio']:.3f}",
                f"{r['tokens_per_second']:.0f}",
                f"{r['tokens_per_second'] / r['tokens_per_second_frozen']:.1%}",
                *share,
                *[clocks.text(r)] * on_gpu,
            ]
        )
    for r in result.get("left_out", []):
        sizes = f"{r['prompts']} prompts, {r['new_tokens']} new tokens; " if "prompts" in r else ""
        lines.append([r["model"], f"left out: {sizes}{r['reason']}", *[""] * (len(headers) - 2)])
    return headers, lines
