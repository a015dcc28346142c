"""`esfast bench dropin`: what a generation costs besides its evaluations, in others' loops, before and after esfast.

*Before* and *after* are the loops of recipes.md, coming-from.md and vllm.md in docs/how-to/. Rewards are made up, so
that only making members, restoring and updating are timed. `restored` is the fraction of weights that have the same
bits after a generation's members as before. With esfast it must be 1; otherwise there are no figures. A second part
trains a tiny OPT model by MeZO, before and after, and compares how far the loss falls.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from ..core.ops import add_noise_
from ..core.plan import Plan
from ..es.es import ES, zscore
from ..es.perturbation import perturbed
from ..es.weights import BaseWeights
from ..integrations.ask_tell import AskTell
from ..integrations.mezo import ZOParameters, zo_perturb_parameters, zo_update
from ..integrations.offsets import Offsets
from ..update.updater import Rule, UpdateRecord
from . import BenchmarkError, count, today
from .clocks import Clocks
from .isolated import isolated, reason_of
from .noise import milliseconds, note
from .workload import SIGMA, make_plan

LR = 5e-4
# Steps and learning rate of the comparison of how MeZO learns.
STEPS, RATE = 300, 3e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the weights are (default: cpu)")
    parser.add_argument("--numel", type=count, default=5_000_000, help="weights in all, about (default: 5e6)")
    parser.add_argument("--members", type=count, default=8, help="population size (default: 8)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (default: bfloat16)"
    )
    parser.add_argument("--repeats", type=count, default=3, help="generations of each loop (default: 3)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4], help="runs of MeZO (default: 0 to 4)")


def run(args: argparse.Namespace) -> dict:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: PyTorch finds no CUDA device here")
    rows, left_out = [], []
    # On a GPU each loop runs in a process of its own, so that a failure costs only its own figures.
    work = functools.partial(isolated, "dropin") if args.device == "cuda" else events
    with Clocks(args.device) as sampled:
        for name in LOOPS:
            began = time.time()
            job = {key: getattr(args, key) for key in ("device", "dtype", "numel", "members", "repeats")}
            for event in work({"name": name, **job}):
                if "row" in event:
                    rows.append(event["row"] | (sampled.between(began, time.time()) if args.device == "cuda" else {}))
                else:
                    note(f"{name}: left out, {event['died']}")
                    left_out.append({"loop": name, "reason": event["died"], "failed": True})
            args.save({"rows": rows, "left_out": left_out})
    if args.seeds:
        note("MeZO: 300 steps a seed, before and after")
        rows.append(_mezo_learns(args.seeds))
    return {"rows": rows, "left_out": left_out}


def events(job: dict) -> Iterator[dict]:
    """{"row": ...}, or {"died": reason}, of one loop."""
    try:
        yield {"row": _timed(job["name"], *LOOPS[job["name"]], argparse.Namespace(**job))}
    except (RuntimeError, ValueError) as error:
        yield {"died": reason_of(error)}


def table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = ["loop", "before, ms", "after, ms", "times as fast", "restored before", "restored after"]
    lines = []
    for r in result["rows"]:
        if r["op"] == "timing":
            lines.append([
                r["loop"], f"{r['before_ms']:.0f}", f"{r['after_ms']:.0f}", f"{r['ratio']:.1f}",
                f"{r['before_restored']:.2%}", f"{r['after_restored']:.0%}",
            ])  # fmt: skip
    for r in result.get("left_out", []):
        lines.append([r["loop"], f"left out: {r['reason']}", *[""] * 4])
    return headers, lines


def mezo_table(result: dict) -> tuple[list[str], list[list[str]]]:
    headers = ["MeZO, tiny OPT", "steps", "seeds", "loss before", "loss after", "standard deviation over seeds"]
    (r,) = [r for r in result["rows"] if r["op"] == "mezo"]
    return headers, [
        [name, str(r["steps"]), str(r["seeds"]), f"{r['loss_before']:.3f}", f"{statistics.mean(losses):.3f}",
         f"{statistics.stdev(losses) if len(losses) > 1 else 0.0:.3f}"]
        for name, losses in (("the original's moves", r["original"]), ("esfast", r["esfast"]))
    ]  # fmt: skip


class Loop:
    """One generation in steps: `members` makes and undoes each of them, `update` moves the weights."""

    def __init__(self, plan: Plan, population_size: int):
        self.plan, self.n = plan, population_size
        self.rewards = [float(i) for i in range(population_size)]
        self.generation = 0
        self.begin()

    def begin(self) -> None: ...

    def seeds(self) -> list[int]:
        return [1000 * self.generation + i for i in range(self.n)]

    def members(self) -> None:
        raise NotImplementedError

    def update(self) -> None:
        raise NotImplementedError


class Randn(Loop):
    def members(self) -> None:
        for seed in self.seeds():
            today.perturb_(self.plan.tensors, seed, SIGMA, "gaussian")
            today.perturb_(self.plan.tensors, seed, -SIGMA, "gaussian")

    def update(self) -> None:
        for seed, z in zip(self.seeds(), zscore(self.rewards), strict=True):
            today.perturb_(self.plan.tensors, seed, LR / self.n * z, "gaussian")


class Worker(Randn):
    """The worker of es-at-scale v1.0.0, which sums the update in float32."""

    def update(self) -> None:
        coeffs = [LR / self.n * z for z in zscore(self.rewards)]
        today.update_(self.plan.tensors, self.seeds(), coeffs, "gaussian")


class Generators(Loop):
    def begin(self) -> None:
        self.saved = [t.clone() for t in self.plan.tensors]

    def members(self) -> None:
        for seed in self.seeds():
            for p, saved in zip(self.plan.tensors, self.saved, strict=True):
                p.copy_(saved + SIGMA * self._noise(p, seed))
        for p, saved in zip(self.plan.tensors, self.saved, strict=True):
            p.copy_(saved)

    def update(self) -> None:
        for p, saved in zip(self.plan.tensors, self.saved, strict=True):
            for seed, z in zip(self.seeds(), zscore(self.rewards), strict=True):
                saved.add_(self._noise(p, seed), alpha=LR / self.n * z)
            p.copy_(saved)

    def _noise(self, p: torch.Tensor, seed: int) -> torch.Tensor:
        generator = torch.Generator(p.device).manual_seed(seed)
        return torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)


class FunctionalCall(Loop):
    """functional_call without the call: makes the dict of perturbed parameters."""

    def members(self) -> None:
        self.noises = []
        for _ in range(self.n):
            self.noises.append([torch.randn_like(p) for p in self.plan.tensors])
            [p + SIGMA * z for p, z in zip(self.plan.tensors, self.noises[-1], strict=True)]

    def update(self) -> None:
        for noise, z in zip(self.noises, zscore(self.rewards), strict=True):
            for p, eps in zip(self.plan.tensors, noise, strict=True):
                p.add_(eps, alpha=LR / self.n * z)


class StateDicts(Loop):
    def members(self) -> None:
        self.center, self.states = [t.clone() for t in self.plan.tensors], []
        for _ in range(self.n):
            self.states.append([v + SIGMA * torch.randn_like(v) for v in self.center])
            self._load(self.states[-1])
        self._load(self.center)

    def update(self) -> None:
        z = zscore(self.rewards)
        step = LR / self.n / SIGMA
        members = zip(*self.states, strict=True)
        self._load([v + step * sum(w * (m - v) for w, m in zip(z, ms, strict=True))
                    for v, ms in zip(self.center, members, strict=True)])  # fmt: skip

    def _load(self, tensors: list[torch.Tensor]) -> None:
        for p, t in zip(self.plan.tensors, tensors, strict=True):
            p.copy_(t)


class FlatVectors(Loop):
    def begin(self) -> None:
        self.mean = torch.cat([t.reshape(-1) for t in self.plan.tensors])

    def members(self) -> None:
        self.vectors = [self.mean + SIGMA * torch.randn_like(self.mean) for _ in range(self.n)]
        for vector in self.vectors:
            self._write(vector)
        self._write(self.mean)

    def update(self) -> None:
        weighted = sum(z * (v - self.mean) for z, v in zip(zscore(self.rewards), self.vectors, strict=True))
        self.mean = self.mean + LR / self.n / SIGMA * weighted
        self._write(self.mean)

    def _write(self, vector: torch.Tensor) -> None:
        for p, part in zip(self.plan.tensors, vector.split([t.numel() for t in self.plan.tensors]), strict=True):
            p.copy_(part.view(p.shape))


class OurES(Loop):
    def begin(self) -> None:
        self.es = ES(self.plan, sigma=SIGMA, lr=LR, population_size=self.n)

    def members(self) -> None:
        for member in self.es.population():
            member.reward = self.rewards[member.index]

    def update(self) -> None:
        self.es.step()


class OurSeeds(Loop):
    def begin(self) -> None:
        self.base = self.plan.clone()

    def members(self) -> None:
        for seed in self.seeds():
            with perturbed(self.plan, seed, SIGMA, base=self.base):
                pass

    def update(self) -> None:
        add_noise_(self.base, self.seeds(), [LR / self.n * z for z in zscore(self.rewards)])
        add_noise_(self.plan, [], [], base=self.base)


class OurAskTell(Loop):
    def begin(self) -> None:
        self.es = AskTell(self.plan, sigma=SIGMA, lr=LR, population_size=self.n)

    def members(self) -> None:
        self.candidates = self.es.ask()
        for candidate in self.candidates:
            with candidate:
                pass

    def update(self) -> None:
        self.es.tell(self.candidates, self.rewards)


class OurWorker(Loop):
    """WorkerExtension's work for the calls of es-at-scale's trainer, without vLLM."""

    def begin(self) -> None:
        self.mode = BaseWeights(self.plan, Rule())
        self.offsets = Offsets(self.mode)

    def members(self) -> None:
        for seed in self.seeds():
            self.offsets.add(seed, SIGMA)
            self.offsets.add(seed, -SIGMA)

    def update(self) -> None:
        coeffs = [LR / self.n * z for z in zscore(self.rewards)]
        self.mode.update(UpdateRecord(self.generation, self.seeds(), coeffs, [], SIGMA, LR))


class MeZO(Loop):
    """One step: three moves, and the update."""

    def members(self) -> None:
        for factor in (1, -2, 1):
            today.perturb_(self.plan.tensors, self.generation, factor * SIGMA, "gaussian")

    def update(self) -> None:
        today.perturb_(self.plan.tensors, self.generation, -LR * 0.3, "gaussian")


class OurMeZO(Loop):
    def begin(self) -> None:
        self.zo = ZOParameters(self.plan, SIGMA)

    def members(self) -> None:
        for factor in (1, -2, 1):
            zo_perturb_parameters(self.zo, self.generation, factor)

    def update(self) -> None:
        zo_update(self.zo, self.generation, 0.3, LR)


LOOPS: dict[str, tuple[type[Loop], type[Loop]]] = {
    "randn tensor by tensor": (Randn, OurES),
    "a generator for each tensor, from a copy": (Generators, OurSeeds),
    "functional_call": (FunctionalCall, OurES),
    "copies of the state dict": (StateDicts, OurES),
    "ask and tell, flat vectors": (FlatVectors, OurAskTell),
    "es-at-scale's worker, v1.0.0": (Worker, OurWorker),
    "MeZO, one step": (MeZO, OurMeZO),
}


def _timed(name: str, before: type[Loop], after: type[Loop], args: argparse.Namespace) -> dict:
    note(f"{name}: before and after")
    row: dict = {"op": "timing", "loop": name, "device": args.device, "dtype": args.dtype, "numel": args.numel,
                 "members": args.members, "repeats": args.repeats}  # fmt: skip
    loops = {}
    for when, kind in (("before", before), ("after", after)):
        plan = make_plan(args.numel, 30, getattr(torch, args.dtype), args.device)
        loops[when] = loop = kind(plan, args.members)
        saved = [t.clone() for t in plan.tensors]
        loop.members()  # which also warms up
        same = sum(int((a == b).sum()) for a, b in zip(plan.tensors, saved, strict=True))
        row[f"{when}_restored"] = same / plan.numel
        if when == "after" and same < plan.numel:
            raise BenchmarkError(f"{name}: ours does not restore the weights. No figures are given")
        loop.update()
    times: dict[str, list[float]] = {"before": [], "after": []}
    # Before and after take turns, so that a busy machine slows both.
    for _ in range(args.repeats):
        for when, loop in loops.items():
            loop.generation += 1
            times[when].append(milliseconds(loop.members) + milliseconds(loop.update))
    for when, values in times.items():
        row[f"{when}_ms"] = statistics.median(values)
    row["ratio"] = row["before_ms"] / row["after_ms"]
    return row


def _mezo_learns(seeds: list[int]) -> dict:
    from transformers import OPTConfig, OPTForCausalLM

    threads = torch.get_num_threads()
    # For a model of this size more threads would only wait for each other.
    torch.set_num_threads(1)
    finals: dict[str, list[float]] = {"original": [], "esfast": []}
    starts = []
    try:
        for seed in seeds:
            ids = torch.randint(0, 16, (8, 16), generator=torch.Generator().manual_seed(seed))
            for who, final in finals.items():
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = OPTForCausalLM(OPTConfig(
                        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
                        max_position_embeddings=64, word_embed_proj_dim=32,
                    )).eval()  # fmt: skip

                @torch.no_grad()
                def loss(model=model, ids=ids) -> float:
                    return model(input_ids=ids, labels=ids).loss.item()

                starts.append(loss())
                _mezo(model, loss, who == "esfast")
                final.append(loss())
    finally:
        torch.set_num_threads(threads)
    return {"op": "mezo", "steps": STEPS, "seeds": len(seeds), "loss_before": statistics.mean(starts), **finals}


def _mezo(model: torch.nn.Module, loss: Callable[[], float], ours: bool) -> None:
    zo, tensors = ZOParameters(model, SIGMA), [p.detach() for p in model.parameters()]

    def move(seed: int, factor: float) -> None:
        if ours:
            zo_perturb_parameters(zo, seed, factor)
        else:
            today.perturb_(tensors, seed, factor * SIGMA, "gaussian")

    for step in range(STEPS):
        move(step, 1)
        plus = loss()
        move(step, -2)
        gradient = (plus - loss()) / (2 * SIGMA)
        move(step, 1)
        if ours:
            zo_update(zo, step, gradient, RATE)
        else:
            today.perturb_(tensors, step, -RATE * gradient, "gaussian")
