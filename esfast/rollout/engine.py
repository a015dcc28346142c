"""Engines: prompts in, completions out. ES spends nearly all of its time here.

An engine is made once a run, called once for every member, and closed. Between calls the weights change in place:

    engine = TransformersEngine(model, tokenizer, max_new_tokens=256)
    completions = engine.generate(prompts)
    engine.close()

A function from prompts to completions is an engine, too.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from ..core.dtensors import in_shards
from ..utils.errors import BadType, BadValue
from ..utils.memory import out_of_memory
from ..utils.names import DECODINGS
from .completion import OWN, Asked, Completion, check_asked, decoded
from .decoding import WAYS, choose_ways
from .encoding import PromptReader, context_limit, embedded_tokens
from .models import check_generates
from .probe import ANY, Traits, probe_texts, traits_of
from .sampling import LogitsError, SeededSampling

log = logging.getLogger(__name__)

WEIGHTS_FOR_THREADS = 10_000_000


class Engine(Protocol):
    """The interface that the trainer needs.

    Two members are optional. `tokens` is the number of tokens generated so far; without it tokens per second are not
    reported. `check(prompts)` raises what `generate(prompts)` would raise because of a prompt, without generating; with
    it the trainer checks fixed data before a run begins."""

    tokens: int

    def generate(self, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[str]:
        """A completion for each prompt, in order, from the model's present weights. The engine must keep nothing that
        depends on the weights from one call to the next. `seeds` is None for greedy decoding. For sampling it holds a
        number below 2^64 for each prompt, which with the weights determines the completion."""

    def close(self) -> None:
        """Frees the memory that is kept between calls."""


class CallableEngine:
    """An engine from a function: f(prompts) -> completions, and f(prompts, seeds=...) if responses are sampled."""

    def __init__(self, function: Callable[..., Sequence[str]]):
        self._function = function

    def generate(self, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[str]:
        name = getattr(self._function, "__name__", repr(self._function))
        completions = self._function(prompts) if seeds is None else self._function(prompts, seeds=seeds)
        if isinstance(completions, str) or not all(isinstance(text, str) for text in completions):
            raise BadType(f"engine {name}: expected a list of strings, got {completions!r:.80}")
        if len(completions) != len(prompts):
            raise BadValue(f"engine {name}: expected {len(prompts)} completions, got {len(completions)}")
        return list(completions)

    def close(self) -> None:
        pass


def as_engine(engine) -> Engine:
    """The engine itself, or an engine made from a function or from an object that has only `generate`.

    Raises TypeError for anything else, also for a model.
    """
    if isinstance(engine, torch.nn.Module) or not (callable(engine) or callable(getattr(engine, "generate", None))):
        raise BadType(
            f"engine: expected an object with generate(prompts) -> completions, or a function of prompts, "
            f"got {type(engine).__name__}"
        )
    if hasattr(engine, "close") and callable(getattr(engine, "generate", None)):
        return engine
    wrapped: Any = CallableEngine(getattr(engine, "generate", engine))
    if callable(getattr(engine, "check", None)):
        wrapped.check = engine.check
    return wrapped


class TransformersEngine:
    """Completions from a Hugging Face causal LM, in mini-batches of similar length, padded on the left.

    Each call reads the weights anew, so they may change in place between calls. Of the model's generation_config only
    the end tokens count: members are compared by their weights, not by sampling settings of a checkpoint. The
    constructor generates a few tokens, to measure which prompts may share a batch (see esfast.rollout.probe).

    Args:
        model: any causal LM with `generate`. It generates in eval mode; afterwards the model has its old mode.
        tokenizer: its tokenizer. If there is no pad token with an embedding, the eos token pads, or else token 0.
        max_new_tokens: longest completion, in tokens.
        batch_size: most prompts at once. None: as many as have their caches in a quarter of the device's memory. If
            memory runs out nevertheless, the number is halved from then on, but not for a model in shards.
        temperature: of completions that are asked for with seeds.
        decoding: "plain", "static" or "continuous" (see esfast.rollout.decoding), or "auto": plain on a CPU, and on a
            GPU the fastest that works, with a message if one does not.

    Attributes:
        traits: what was measured, esfast.rollout.probe.Traits; of a model in shards None before the first call.
        ways: the decodings that have not failed, the one that is tried first in front.

    Raises:
        ValueError: an argument is out of range, the model is not a causal LM, or it can't generate a text.
    """

    def __init__(
        self,
        model,
        tokenizer,
        max_new_tokens: int,
        batch_size: int | None = None,
        temperature: float = 1.0,
        decoding: str = "auto",
    ):
        if max_new_tokens < 1 or (batch_size is not None and batch_size < 1):
            raise BadValue(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
        if not temperature > 0:
            raise BadValue(f"temperature must be more than 0, got {temperature}")
        if decoding not in DECODINGS:
            raise BadValue(f"decoding must be one of {', '.join(DECODINGS)}, got {decoding!r}")
        check_generates(model)
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size, self.temperature = max_new_tokens, batch_size, temperature
        self.decoding = decoding
        self.top_p = 1.0
        self.tokens = 0
        ends = _end_tokens(model, tokenizer)
        vocabulary = embedded_tokens(model)
        # Any token that has an embedding can pad: padding is masked. A pad token that was added to the tokenizer alone
        # has none, and the model would read past the end of its table.
        pads = (i for i in (tokenizer.pad_token_id, *ends) if i is not None and i < vocabulary)
        self.pad_token_id = next(pads, 0)
        self.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=self.pad_token_id, eos_token_id=ends or None
        )
        self.prompts = PromptReader(tokenizer, max_new_tokens, vocabulary, context_limit(model))
        self._in_shards = in_shards(model)
        if self._in_shards and decoding not in ("auto", "plain"):
            raise BadValue(f"decoding: a model in shards generates plainly, got {decoding!r}")
        self._one_thread = is_small(model)
        # The processes of a sharded model must generate together, so it is measured at the first call.
        self.traits = None if self._in_shards else self._measure()
        padded = self.traits is not None and self.traits.together == ANY
        if decoding == "static" and not padded:
            raise BadValue(
                f"decoding: a {type(model).__name__} reads padding as text, which decoding='static' fills prompts up "
                "with; take 'plain'"
            )
        self.ways = [decoding] if decoding != "auto" else list(choose_ways(model)) if padded else ["plain"]
        self._way = None if len(self.ways) > 1 else WAYS[self.ways[0]](model, self.generation_config)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[str]:
        """The completion of each prompt, in order, without the prompt and without special tokens.

        Args:
            prompts: a list of str.
            seeds: one for each prompt: the completion is sampled, and its seed determines it. None: greedy.

        Raises:
            TypeError: a prompt is not a string.
            ValueError: a prompt is empty, is not valid UTF-8, has a token without an embedding, or leaves no room for
                max_new_tokens in the model's context.
            LogitsError: (esfast.rollout.sampling, a ValueError) the model's logits are NaN or infinite.
            torch.OutOfMemoryError: not even a single prompt fits in memory.
        """
        return [completion.text for completion in self.complete_texts(prompts, seeds)]

    def complete_texts(
        self, prompts: Sequence[str], seeds: Sequence[int] | None = None, asked: Asked = OWN
    ) -> list[Completion]:
        """As `generate`, with settings of this call: a Completion for each prompt, in order.

        Raises ValueError also for settings that are out of range or exceed max_new_tokens.
        """
        with self.as_asked(asked):
            return self._complete(prompts, None if asked.temperature == 0 else seeds)

    def _complete(self, prompts: Sequence[str], seeds: Sequence[int] | None) -> list[Completion]:
        encoded = self.prompts(prompts)
        if seeds is not None and len(seeds) != len(prompts):
            raise BadValue(f"seeds: expected one for each of {len(prompts)} prompts, got {len(seeds)}")
        # Longest first: if memory is short it shows in the first mini-batch, before work is done that would be lost.
        order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
        completions = [Completion("", 0, True)] * len(prompts)
        self.traits = self.traits or self._measure()
        longest = max(map(len, encoded), default=0) + self.max_new_tokens
        fitting = self.traits.batch_that_fits(longest, self.model.device)
        with self.own_settings():
            done = 0
            while done < len(order):
                most = min(self.batch_size or fitting, len(order))
                batch = order[done : done + most]
                batch = batch[: self.traits.batchable([len(encoded[i]) for i in batch])]
                found = self._try_batch([encoded[i] for i in batch], most, seeds and [seeds[i] for i in batch])
                if found is None:
                    self.batch_size = len(batch) // 2
                    log.warning("out of memory with %d prompts at once: going on with %d", len(batch), self.batch_size)
                    continue
                for i, completion in zip(batch, found, strict=True):
                    completions[i] = completion
                done += len(batch)
        return completions

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt that `generate` would refuse."""
        self.prompts.check(prompts)

    def close(self) -> None:
        """Frees caches and captured graphs. The engine can be used again, and then makes new ones."""
        if self._way is not None:
            self._way.close()

    def begin_batch(self, seeds: Sequence[int] | None) -> SeededSampling | None:
        """Forgets what the model's modules carry over from the batch before. Returns how to sample with a seed for each
        row; None without seeds."""
        if self.traits is not None and self.traits.carried is not None:
            self.traits.carried.forget()
        if seeds is None:
            return None
        return SeededSampling(list(seeds), self.temperature, self.max_new_tokens, self.model.device, self.top_p)

    def completions(self, rows: Sequence[Sequence[int]]) -> list[Completion]:
        """A Completion for each row of new tokens."""
        texts, ends = decoded(self.tokenizer, rows), self.generation_config.eos_token_id or ()
        return [Completion(t, len(ids), bool(ids) and ids[-1] in ends) for t, ids in zip(texts, rows, strict=True)]

    @contextlib.contextmanager
    def as_asked(self, asked: Asked) -> Iterator[None]:
        """In the block the settings are those of one call. Decodings read them from the generation config."""
        most = check_asked(asked, self.max_new_tokens, self.prompts.length_setting)
        own = self.max_new_tokens, self.temperature, self.top_p
        try:
            self._set(most, asked.temperature or self.temperature, asked.top_p)
            yield
        finally:
            self._set(*own)

    def _set(self, max_new_tokens: int, temperature: float, top_p: float) -> None:
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.generation_config.max_new_tokens = max_new_tokens
        self.prompts.set_longest(max_new_tokens)

    def _try_batch(self, rows: list[list[int]], most: int, seeds: Sequence[int] | None) -> list[Completion] | None:
        """The completions of one mini-batch; None if it doesn't fit in memory and fewer rows might."""
        sampling = self.begin_batch(seeds)
        try:
            new = self._decode(rows, most, sampling)
        except (RuntimeError, MemoryError) as error:
            # A model in shards: the other processes may have had enough memory, and wait for this one.
            if len(rows) == 1 or self._in_shards or not out_of_memory(error):
                raise
        else:
            self.tokens += sum(map(len, new))
            return self.completions(new)
        # Outside the except block, whose traceback keeps the failed batch's tensors alive.
        self.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _decode(self, rows: list[list[int]], most: int, sampling: SeededSampling | None) -> list[list[int]]:
        # With decoding="auto" on a GPU, the first call tries one decoding after another.
        while self._way is None:
            name, *others = self.ways
            try:
                way = WAYS[name](self.model, self.generation_config)
                new = way(rows, most, sampling)
            except (torch.OutOfMemoryError, LogitsError):
                raise
            except Exception as error:
                if not others:
                    raise
                self.ways = others
                log.warning("%s decoding doesn't work here, going on with %s: %s", name, others[0], error)
            else:
                self._way = way
                return new
        return self._way(rows, most, sampling)

    def _measure(self) -> Traits:
        texts = probe_texts(self.prompts.encode, self.prompts.vocabulary, self.prompts.limit)
        with self.own_settings():
            return traits_of(self.model, self.generation_config, texts)

    @contextlib.contextmanager
    def own_settings(self) -> Iterator[None]:
        """The model in eval mode, with the engine's generation config and number of threads."""
        threads = torch.get_num_threads()
        if self._one_thread:
            torch.set_num_threads(1)
        try:
            with generating(self.model, self.generation_config):
                yield
        finally:
            if self._one_thread:
                torch.set_num_threads(threads)


@contextlib.contextmanager
def generating(model, config: GenerationConfig) -> Iterator[None]:
    """In the block the model is in eval mode and has this generation config; after it, its old ones.

    Passing a config to generate is not enough: generate fills its gaps from the model's own (a repetition penalty). In
    a model that wraps another, as PEFT's do, each has a config, and the wrapper's generate passes on its own.
    """
    was_training, modules = model.training, list(model.modules())
    configured = {m: m.generation_config for m in modules if "generation_config" in vars(m)}
    model.eval()
    for module in (model, *configured):
        module.generation_config = config
    try:
        yield
    finally:
        for module in modules:
            vars(module).pop("generation_config", None)
        for module, own in configured.items():
            module.generation_config = own
        model.train(was_training)


def is_small(model) -> bool:
    """Whether the model is on a CPU and so small that one thread is fastest. With more threads, waiting adds half of
    the time for the embedded model, and many times that if another process wants a core."""
    return model.device.type == "cpu" and sum(p.numel() for p in model.parameters()) < WEIGHTS_FOR_THREADS


def _end_tokens(model, tokenizer) -> list[int]:
    """Ids that end a text: the tokenizer's eos and those in the model's generation config (chat models: several)."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *configured] if i is not None))
