"""How a member of the population is scored: prompts in, completions out.

ES spends nearly all its time here. An engine is made once a run, asked for completions once a member, and closed:

    engine = TransformersEngine(model, tokenizer, max_new_tokens=256)
    completions = engine.generate(prompts)
    engine.close()

Any function from prompts to completions is an engine, too. In between the weights change in place.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from transformers import GenerationConfig

from ..core.dtensors import in_shards
from ..utils.errors import BadType, BadValue
from ..utils.names import DECODINGS
from .decoding import WAYS, automatic
from .encoding import PromptReader, context_limit, embedded_tokens
from .models import check_generates
from .probe import ANY, Traits, probe_texts, traits_of
from .sampling import LogitsError, SeededSampling

log = logging.getLogger(__name__)

WEIGHTS_FOR_THREADS = 10_000_000


class Engine(Protocol):
    """What the trainer needs. Two may be absent: `tokens`, how many it has generated so far, which is then not
    reported, and `check(prompts)`, which raises what `generate(prompts)` would raise because of a prompt, at the cost
    of no more than tokenizing them. With it, prompts of fixed data are looked at before a run begins."""

    tokens: int

    def generate(self, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[str]:
        """A completion for each prompt, in their order, of the model as it is now: nothing that depends on the weights
        may be kept from one call to the next. Where responses are sampled, `seeds` holds a number below 2^64 for each,
        which decides it together with the weights; else it is None, and the likeliest tokens are taken."""

    def close(self) -> None:
        """Frees what was kept between calls."""


class CallableEngine:
    """An engine of a function: f(prompts) -> completions, and f(prompts, seeds=...) where responses are sampled."""

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
    """The engine itself, or one of a function, or of an object that has no more than `generate`.

    Raises TypeError for anything else, a model included.
    """
    if isinstance(engine, torch.nn.Module) or not (callable(engine) or callable(getattr(engine, "generate", None))):
        raise BadType(
            f"engine: expected an object with generate(prompts) -> completions, or a function of prompts, "
            f"got {type(engine).__name__}"
        )
    if hasattr(engine, "close") and callable(getattr(engine, "generate", None)):
        return engine
    wrapped = CallableEngine(getattr(engine, "generate", engine))
    if callable(getattr(engine, "check", None)):
        wrapped.check = engine.check
    return wrapped


class TransformersEngine:
    """Completions from a Hugging Face causal LM, in mini-batches of similar length, padded on the left.

    The model's weights are only read, and read anew at each call: change them in place between two calls and the next
    completions are those of the changed model. Its generation_config is not consulted, except for the tokens that end
    a text: a member is judged by its weights, not by sampling settings that a checkpoint happens to carry.

    model           any causal LM with `generate`; it generates in eval mode and is left in the mode it was in
    tokenizer       its tokenizer; without a pad token that the model has an embedding for, the eos token pads, else 0
    max_new_tokens  longest completion, in tokens
    batch_size      most prompts at once; None takes as many as have their caches in a quarter of the memory. When that
                    runs out nevertheless it is halved, and stays so; not with a model in shards
    temperature     of completions that are asked for with seeds
    decoding        "plain", "static" or "continuous", see decoding.py; "auto" takes plain on a CPU, and on a GPU
                    the fastest that works there, and says so where it passes one over

    A few tokens are generated at once, to measure what a batch may hold (probe.py): prompts of one length where the
    model reads padding as text.

    Raises ValueError if an argument is out of range, or if the model is no causal LM or can't generate a text.
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
        # All processes of a model in shards generate together, and so measure it when they do.
        self._traits = None if self._in_shards else self._measure()
        padded = self._traits is not None and self._traits.together == ANY
        if decoding == "static" and not padded:
            raise BadValue(
                f"decoding: a {type(model).__name__} reads padding as text, which decoding='static' fills prompts up "
                "with; take 'plain'"
            )
        self._ways = [decoding] if decoding != "auto" else list(automatic(model)) if padded else ["plain"]
        self._way = None if len(self._ways) > 1 else WAYS[self._ways[0]](model, self.generation_config)

    def generate(self, prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[str]:
        """The completion of each prompt, in the order given, without the prompt and without special tokens.

        With `seeds`, one for each prompt, completions are sampled, each as its seed decides; equal prompts may have
        different ones. Without, they are greedy.

        Raises TypeError for prompts that are not strings, ValueError for one that is empty, that no UTF-8 can hold,
        that has a token without an embedding, or that leaves no room for max_new_tokens in the model's context,
        esfast.rollout.sampling.LogitsError (a ValueError) where the model's logits are NaN or infinite, and
        torch.OutOfMemoryError if not even a single prompt fits in memory.
        """
        encoded = self.prompts(prompts)
        if seeds is not None and len(seeds) != len(prompts):
            raise BadValue(f"seeds: expected one for each of {len(prompts)} prompts, got {len(seeds)}")
        # Longest first: if memory is short it shows in the first mini-batch, before work is done that would be lost.
        order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
        completions = [""] * len(prompts)
        self._traits = self._traits or self._measure()
        longest = max(map(len, encoded), default=0) + self.max_new_tokens
        fitting = self._traits.batch_that_fits(longest, self.model.device)
        with self._own_settings():
            done = 0
            while done < len(order):
                most = min(self.batch_size or fitting, len(order))
                batch = order[done : done + most]
                batch = batch[: self._traits.batchable([len(encoded[i]) for i in batch])]
                texts = self._try_batch([encoded[i] for i in batch], most, seeds and [seeds[i] for i in batch])
                if texts is None:
                    self.batch_size = len(batch) // 2
                    log.warning("out of memory with %d prompts at once: going on with %d", len(batch), self.batch_size)
                    continue
                for i, text in zip(batch, texts, strict=True):
                    completions[i] = text
                done += len(batch)
        return completions

    def check(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt of which `generate` would."""
        self.prompts.check(prompts)

    def close(self) -> None:
        """Frees caches and captured graphs; the engine may be used again, and makes them anew."""
        if self._way is not None:
            self._way.close()

    def _try_batch(self, rows: list[list[int]], most: int, seeds: list[int] | None) -> list[str] | None:
        """Completions of one mini-batch, None if it does not fit in memory but fewer rows may."""
        sampling = None
        if seeds is not None:
            sampling = SeededSampling(seeds, self.temperature, self.max_new_tokens, self.model.device)
        if self._traits is not None and self._traits.carried is not None:
            self._traits.carried.forget()
        try:
            new = self._decode(rows, most, sampling)
        except torch.OutOfMemoryError:
            if len(rows) == 1 or self._in_shards:  # where others may have had enough, and wait for this one
                raise
        else:
            self.tokens += sum(map(len, new))
            return self.tokenizer.batch_decode(new, skip_special_tokens=True)
        # Outside the except block, whose traceback keeps the failed batch's tensors alive.
        self.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _decode(self, rows: list[list[int]], most: int, sampling: SeededSampling | None) -> list[list[int]]:
        while self._way is None:  # decoding="auto" on a GPU, not settled yet
            name = self._ways.pop(0)
            try:
                way = WAYS[name](self.model, self.generation_config)
                new = way(rows, most, sampling)
            except (torch.OutOfMemoryError, LogitsError):
                self._ways.insert(0, name)
                raise
            except Exception as error:
                if not self._ways:
                    raise
                log.warning("%s decoding doesn't work here, going on with %s: %s", name, self._ways[0], error)
            else:
                self._way = way
                return new
        return self._way(rows, most, sampling)

    def _measure(self) -> Traits:
        texts = probe_texts(self.prompts.encode, self.prompts.vocabulary, self.prompts.limit)
        with self._own_settings():
            return traits_of(self.model, self.generation_config, texts)

    @contextlib.contextmanager
    def _own_settings(self) -> Iterator[None]:
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
    """The model in eval mode and with this generation config; as it was after the block.

    To give generate a config is not enough: it fills what that leaves open from the model's (a repetition penalty). In
    a model that wraps another, as PEFT's do, each has one, and the wrapper's generate hands its own on.
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
    """Whether the model is on a CPU and so small that one thread does all the fastest: more wait for each other, the
    embedded model's by half again of the time it needs, and many times over if another process wants a core."""
    return model.device.type == "cpu" and sum(p.numel() for p in model.parameters()) < WEIGHTS_FOR_THREADS


def _end_tokens(model, tokenizer) -> list[int]:
    """Ids that end a text: the tokenizer's eos and those in the model's generation config (chat models: several)."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *configured] if i is not None))
