"""N vLLM engines as Ray actors, trained by one process. An engine gets its next member as soon as it is free.

Only seeds, coefficients and prompts go to the engines, and only text comes back. Every engine applies every update, so
all engines hold the same weights to the bit, and so does the Hugging Face model that `replay` makes from the journal.
If an engine dies, hangs or runs out of memory, another engine does its members.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..es.es import Member
from ..rollout.completion import OWN, Asked, Completion
from ..rollout.encoding import PromptReader
from ..trainer.door import open_tokenizer
from ..update.updater import Rule, UpdateRecord
from ..utils.errors import BadImport, BadState, BadValue
from ..utils.interrupts import kept_handlers
from .actors import FIRST_LIMIT, Actors, Job, TimeLimits

# Prompts of an evaluation that one engine gets at a time, for any number of engines.
CHUNK = 256


class Fleet:
    """Several engines, used like one: completions, updates, fingerprints.

    Args:
        model: Hugging Face folder or name; a folder must be there wherever Ray may put an engine.
        max_new_tokens, temperature, dtype, options: of every engine, as in VLLMEngine.
        num_engines: number of engines.
        tensor_parallel_size: GPUs of each engine (processes, on a machine without GPUs).
        processing_class: the tokenizer that reads prompts, as in ESTrainer. Default: the engines' tokenizer.
        engine_timeout: seconds that a call of an engine may take before the engine is given up. Default: ten times the
            longest that such a call took before, at least five minutes; two hours for the first.

    Prompts are tokenized here, once for all engines, which get token ids.

    If no Ray runs, it is started on this machine; the environment variable RAY_ADDRESS names a cluster.

    Raises ValueError for numbers below 1 or beyond the GPUs that Ray has, RuntimeError if an engine can't start.
    """

    def __init__(
        self,
        model: str | Path,
        max_new_tokens: int,
        num_engines: int = 1,
        tensor_parallel_size: int = 1,
        temperature: float = 1.0,
        dtype: str = "auto",
        processing_class=None,
        engine_timeout: float | None = None,
        **options,
    ):
        limits = TimeLimits(engine_timeout)
        if num_engines < 1 or tensor_parallel_size < 1:
            raise BadValue(
                f"num_engines and tensor_parallel_size must be at least 1, got {num_engines} and {tensor_parallel_size}"
            )
        try:
            import ray
        except ImportError:
            raise BadImport("engine: vllm runs in processes of Ray's: pip install 'esfast[ray,vllm]'") from None
        from .vllm_engine import VLLMEngine

        own = options.get("tokenizer") or str(model)
        tokenizer = open_tokenizer(processing_class, own)
        if not ray.is_initialized():
            # Ray's handlers would end the process before the run is saved.
            with kept_handlers():
                ray.init(include_dashboard=False, log_to_driver=False)
        gpus = tensor_parallel_size if ray.cluster_resources().get("GPU") else 0
        if gpus:
            _check_room(ray, num_engines, gpus)
        actor = ray.remote(num_gpus=gpus, num_cpus=0)(VLLMEngine)
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | (
            {} if gpus else _on_cpu(num_engines, tensor_parallel_size)
        )
        arguments = (str(model), max_new_tokens, temperature, tensor_parallel_size, dtype)
        self.model, self.tokens, self._ray = str(model), 0, ray
        start = actor.options(runtime_env={"env_vars": environment}).remote
        engines = {number: start(*arguments, **options) for number in range(num_engines)}
        self._actors = Actors(ray, engines, limits)
        # An engine that can't start is an error: it would fail every time.
        for number, engine in list(engines.items()):
            try:
                ray.get(engine.__ray_ready__.remote(), timeout=FIRST_LIMIT)
            except ray.exceptions.RayError as error:
                self.close()
                raise BadState(f"engine {number} of {num_engines} can't start: {error}") from None
        self.prompts = PromptReader(tokenizer, max_new_tokens, **self._all("limits"))

    @property
    def alive(self) -> list[int]:
        """Numbers of the engines that answer."""
        return self._actors.alive

    @property
    def _engines(self) -> dict[int, Any]:
        return self._actors.running

    def describe(self) -> dict:
        """numel, layout and number of tensors of the Hugging Face model. All weights are compared with it first."""
        return self._all("call", "esfast_describe", True)

    def begin(self, rule: Rule, weights: str) -> None:
        """Chooses how weights are changed (esfast_begin)."""
        self._all("call", "esfast_begin", rule.to_json(), weights)

    def perturb(self, seed: int, coeff: float) -> None:
        """Makes the weights of every engine base + coeff * noise(seed), for loops that ask one member at a time of the
        whole fleet. `members` needs no such call."""
        self.restore()
        self._all("call", "perturb_self_weights", seed, coeff)

    def restore(self) -> None:
        """Takes the noise of `perturb` away."""
        self._all("call", "esfast_restore")

    def update(self, record: UpdateRecord) -> None:
        """Applies a generation in every engine."""
        self._all("call", "esfast_update", dataclasses.asdict(record))

    def fingerprint(self) -> str:
        """The fingerprint of the weights; RuntimeError if it differs between engines."""
        return self._all("call", "esfast_fingerprint")

    def adapters(self) -> dict[str, Any]:
        """What the engines' LoRA slots hold (WorkerExtension.esfast_adapters). `frozen` has the groups that a run with
        `packets` must have. RuntimeError if the engines were started without enable_lora."""
        return self._all("call", "esfast_adapters")

    def save(self, folder: str | Path) -> None:
        """Writes a Hugging Face folder; one engine does it."""
        list(self._actors.hand_out("call", [Job(folder, ("save_self_weights_to_disk", str(folder)))], given=False))

    def members(
        self, members: Iterable[Member], sigma: float, prompts: Sequence[str], seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[Member, list[str]]]:
        """Yields each member with its completions, as they are done. A member is taken when an engine is free for it.
        Errors of prompts as in `generate`."""
        # Sent to each engine once.
        rows = self._ray.put(self.prompts(prompts))
        jobs = (Job(m, (m.seed, m.sign * sigma, rows, seeds), len(prompts)) for m in members)
        for member, (completions, tokens) in self._actors.hand_out("member", jobs):
            self.tokens += tokens
            yield member, completions

    def packets(
        self,
        packets: Iterable[Sequence[Member]],
        sigma: float,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
    ) -> Iterator[tuple[Member, list[str]]]:
        """Like `members`, but an engine takes a packet of members, which answer in one batch, as LoRA adapters. If an
        engine runs out of memory, its packet is done in halves.

        The engines need enable_lora=True, and ES noise="low_rank" with the groups of `adapters()["frozen"]`.
        """
        rows = self._ray.put(self.prompts(prompts))

        def job(packet: Sequence[Member]) -> Job:
            pairs = [(m.seed, m.sign * sigma) for m in packet]
            return Job(packet, (pairs, rows, seeds), len(packet) * len(prompts))

        def halves(whole: Job) -> list[Job]:
            middle = (len(whole.key) + 1) // 2
            return [job(part) for part in (whole.key[:middle], whole.key[middle:]) if part]

        for packet, answers in self._actors.hand_out("members", map(job, packets), halves):
            for member, (completions, tokens) in zip(packet, answers, strict=True):
                self.tokens += tokens
                yield member, completions

    def complete_members(
        self,
        members: Sequence[tuple[int, float]],
        owners: Sequence[int],
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        asked: Asked = OWN,
    ) -> list[Completion]:
        """Like `complete_texts`, but prompt i is answered by the member with the number owners[i], each (seed, coeff),
        as a LoRA adapter. All engines share the prompts; those of one member stay together. The engines need what
        `packets` needs."""
        rows = self.prompts.of_call(prompts, asked)
        order = sorted(range(len(rows)), key=lambda i: owners[i])
        size = min(CHUNK, -(-len(rows) // max(1, len(self.alive))))

        def job(places: Sequence[int]) -> Job:
            some = sorted({owners[i] for i in places})
            numbers = [some.index(owners[i]) for i in places]
            own_seeds = None if seeds is None else [seeds[i] for i in places]
            part = [members[k] for k in some], numbers, [rows[i] for i in places], own_seeds, asked
            return Job(places, part, len(places))

        found: dict[int, Completion] = {}
        for places, completions in self._actors.hand_out(
            "complete_members", (job(order[i : i + size]) for i in range(0, len(order), size))
        ):
            found |= zip(places, completions, strict=True)
        self.tokens += sum(completion.tokens for completion in found.values())
        return [found[i] for i in range(len(rows))]

    def generate(self, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[str]:
        """Completions from the present weights; all engines share the prompts. Raises TypeError or ValueError for
        prompts, as PromptReader does."""
        return [completion.text for completion in self.complete_texts(prompts, seeds)]

    def complete_texts(
        self, prompts: Sequence[str], seeds: Sequence[int] | None = None, asked: Asked = OWN
    ) -> list[Completion]:
        """As `generate`, with settings of this call: a Completion for each prompt, in order. Raises ValueError also for
        settings that are out of range or exceed max_new_tokens."""
        rows = self.prompts.of_call(prompts, asked)
        starts = range(0, len(rows), CHUNK)
        parts = [(rows[i : i + CHUNK], seeds and seeds[i : i + CHUNK], asked) for i in starts]
        jobs = [Job(i, part, len(part[0])) for i, part in zip(starts, parts, strict=True)]
        found = dict(self._actors.hand_out("complete", jobs))
        completions = [completion for i in starts for completion in found[i]]
        self.tokens += sum(completion.tokens for completion in completions)
        return completions

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt that `generate` would refuse."""
        self.prompts.check(prompts)

    def close(self) -> None:
        self._actors.close()

    def _all(self, method: str, *args):
        """The answer of all engines; it must be the same from each."""
        return self._actors.all(method, *args)


def _check_room(ray, engines: int, gpus: int) -> None:
    """ValueError if the machines have too few GPUs: Ray would wait for more without a word."""
    found = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    room = sum(count // gpus for count in found)
    if room < engines:
        raise BadValue(
            f"num_engines: {engines} with {gpus} GPUs each (tensor_parallel_size), which must be on one machine; Ray "
            f"has room for {room}, its machines have {', '.join(map(str, found))}"
        )


def _on_cpu(engines: int, ranks: int) -> dict[str, str]:
    """Settings for engines without a GPU: they share the cores, and vLLM would let each pin all of them."""
    threads = max(1, len(os.sched_getaffinity(0)) // (engines * ranks))
    wanted = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {name: os.environ.get(name, value) for name, value in wanted.items()}
