"""Measures two traits of a model that no configuration states, once before the first text: whether it ignores padding,
and how much memory a sequence's cache takes.

Batches are padded on the left. Most models ignore the padding. Recurrent models and some others read it as text, so the
longest prompt of a batch would change the answers to the others. Caches differ, too: keys and values of every token or
of the last ones, compressed or not, or a state of fixed size.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PretrainedConfig

from ..core.finite import check_finite
from ..utils.errors import BadValue
from ..utils.memory import out_of_memory, own_memory
from .sampling import LogitsError

log = logging.getLogger(__name__)

# Which prompts may be generated in one batch, so that each gets the text that it would get alone.
ANY, EQUAL_LENGTHS, ALONE = "any", "equal lengths", "alone"
TEXTS = ("One long text, which nothing is padded to.", "The sky is", "Once upon", "Two and two")
STEPS = 3
# By how much logits may differ, as a part of their spread: in 180 tiny architectures rounding gave at most 1e-6 in
# float32 and 0.01 in bfloat16, padding that was read at least 0.01 and 0.13 (but RoFormer's 0.01 in bfloat16).
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.06}
LENGTHS = 6, 18
# Rows at once for a model that keeps no cache, or hides it.
ROWS_UNKNOWN = 8
_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


_ABSENT = object()


class Carried:
    """Tensors that modules carry from one call to the next in plain attributes, neither parameters nor buffers, such as
    RecurrentGemma's states. Without care, the next text would begin with the state of the last one.

    Make it before a model's first text. After that text, `find` finds the attributes that changed; `forget` resets
    them.
    """

    def __init__(self, model: torch.nn.Module):
        self._before = [(vars(module), self._tensors(vars(module))) for module in model.modules()]
        self._changed: list[tuple[dict, str, object]] = []

    def find(self) -> None:
        for attributes, before in self._before:
            for name, value in self._tensors(attributes).items():
                if value is not None and before.get(name, _ABSENT) is not value:
                    self._changed.append((attributes, name, before.get(name, _ABSENT)))
        self._before = []

    def forget(self) -> None:
        for attributes, name, value in self._changed:
            if value is _ABSENT:
                attributes.pop(name, None)
            else:
                attributes[name] = value

    @staticmethod
    def _tensors(attributes: dict) -> dict[str, object]:
        return {name: value for name, value in attributes.items() if value is None or isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class Traits:
    """The measurements.

    together         which prompts may share a batch: ANY, EQUAL_LENGTHS or ALONE
    repeatable       whether the same prompt got the same logits twice; measured only if `together` is ALONE
    bytes_fixed      bytes of one sequence's cache that don't depend on its length; None if no cache was found
    bytes_per_token  further bytes for each token
    carried          state that its modules carry from one call to the next
    """

    together: str = ANY
    repeatable: bool = True
    bytes_fixed: int | None = None
    bytes_per_token: int | None = None
    carried: Carried | None = None

    def batchable(self, lengths: Sequence[int]) -> int:
        """How many of the prompts, from the first on, may be generated in one batch. Prompts of one length must be
        neighbours."""
        return {ANY: len(lengths), EQUAL_LENGTHS: lengths.count(lengths[0]), ALONE: 1}[self.together]

    def batch_that_fits(self, tokens: int, device: torch.device) -> int:
        """How many sequences of `tokens` tokens have their caches in a quarter of the device's memory; at least 1.

        This counts all memory, not what is free at the moment. The size of a batch can change the last bits of its
        results, and the same run on the same machine must give the same completions.
        """
        if self.bytes_fixed is None:
            return ROWS_UNKNOWN
        return max(1, own_memory(device) // 4 // max(1, self.bytes_fixed + self.bytes_per_token * tokens))


def probe_texts(
    encode: Callable[[Sequence[str]], list[list[int]]], vocabulary: int, limit: int | None
) -> list[list[int]]:
    """TEXTS as token ids that the model has embeddings for, short enough for its context."""
    room = None if limit is None else max(1, limit - max(STEPS, LENGTHS[1]))
    try:
        rows = encode(TEXTS)
    # of a vocabulary that knows no letters
    except Exception:
        rows = [list(range(20)), *([i, i + 1] for i in range(3))]
    return [[i % vocabulary for i in row][:room] or [0] for row in rows]


def traits_of(model, config: GenerationConfig, texts: list[list[int]]) -> Traits:
    """The result of `measure`, kept for each model while it stays where it is. A message says what will be slow.

    ValueError if the model can't generate a text.
    """
    place, kind = (model.device, model.dtype), type(model).__name__
    known = _KNOWN.get(model)
    if known is not None and known[0] == place:
        return known[1]
    try:
        traits = measure(model, config, texts)
    except Exception as error:
        if out_of_memory(error):
            raise
        check_finite(model.named_parameters())
        raise BadValue(f"model: this {kind} can't generate a text: {type(error).__name__}: {error!s:.300}") from error
    _KNOWN[model] = place, traits
    if traits.together == EQUAL_LENGTHS:
        log.info("a %s reads padding as text: only prompts of one length are generated together", kind)
    if traits.together == ALONE:
        log.info("a %s answers otherwise in a batch than alone: prompts are generated one by one", kind)
    if not traits.repeatable:
        log.warning(
            "a %s answers otherwise each time: it draws random numbers, and a run of it can't be repeated", kind
        )
    if traits.bytes_fixed is None and traits.together != ALONE:
        log.info("a %s shows no cache to measure: %d prompts are generated together", kind, ROWS_UNKNOWN)
    return traits


def measure(model, config: GenerationConfig, texts: list[list[int]]) -> Traits:
    """Measures a causal LM in eval mode.

    config  its generation config, with pad and end tokens
    texts   token ids of TEXTS, each with at least one token

    Exceptions that the model raises for a single text are passed on.
    """
    long, *short = texts
    short = [row[: min(map(len, short))] for row in short]
    carried, weights = Carried(model), _Samples(model)

    def logits(rows: list[list[int]]) -> torch.Tensor:
        """The logits of the last rows, as many as there are short texts."""
        carried.forget()
        return first_logits(model, config, rows)[-len(short) :]

    def alone() -> torch.Tensor:
        return torch.cat([logits([row])[-1:] for row in short])

    def as_alone(rows: list[list[int]]) -> bool:
        try:
            return same_but_for_rounding(expected, logits(rows), model.dtype)
        # ProphetNet raises an exception for a padded row.
        except Exception as error:
            if out_of_memory(error):
                raise
            return False

    with torch.no_grad():
        logits(short[:1])
        carried.find()
        weights.check()
        expected, together, repeatable = alone(), ANY, True
        if not as_alone([long, *short]):
            together = EQUAL_LENGTHS
            if not as_alone(short):
                together, repeatable = ALONE, torch.equal(expected, alone())
        carried.forget()
        found = Traits(together, repeatable, *_cache_bytes(model, long), carried)
        carried.forget()
    return found


class _Samples:
    """A copy of one row of each parameter, to detect a model that changes its own weights."""

    def __init__(self, model: torch.nn.Module):
        # of a DTensor its shard, which may be empty
        here = ((name, getattr(p, "_local_tensor", p)) for name, p in model.named_parameters())
        self._kept = [(name, p, p._version, self._row(p).clone()) for name, p in here if p.numel()]

    def check(self) -> None:
        """ValueError if one has changed."""
        for name, p, version, row in self._kept:
            if p._version != version and not torch.equal(row, self._row(p)):
                raise BadValue(
                    f"it changes its own weights when it generates ({name}); a RWKV does so unless its configuration "
                    "says rescale_every=0"
                )

    @staticmethod
    def _row(p: torch.Tensor) -> torch.Tensor:
        return p.detach()[(0,) * max(0, p.dim() - 1)]


def first_logits(model, config: GenerationConfig, rows: list[list[int]]) -> torch.Tensor:
    """Logits of greedy texts, generated in one batch that is padded on the left: float32 (rows, STEPS, vocabulary)."""
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    output = model.generate(
        input_ids=torch.tensor(
            [[config.pad_token_id] * n + row for n, row in zip(pads, rows, strict=True)], device=model.device
        ),
        attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in pads], device=model.device),
        generation_config=GenerationConfig(
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    logits = torch.stack(output.logits, 1).float()
    if not logits.amax(-1).isfinite().all():
        raise LogitsError("its logits are NaN or infinite")
    # Tokens that a model rules out itself are -inf, which can't be subtracted.
    return logits.clamp(min=-1e4)


def same_but_for_rounding(expected: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the logits are equal up to rounding.

    A step counts if the tokens before it are the same in both. In 16 bits rounding may send a token to another expert,
    which changes one text's logits by much; padding that is read as text changes those of all texts. So in 16 bits the
    text with the smallest difference decides. In float32 a single text decides, since some models differ in one only
    (DeepSeek's indexer picks tokens).
    """
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    differences = (expected - logits).square().mean(-1).sqrt() / spread.clamp(min=1e-30)
    agree = (expected.argmax(-1) == logits.argmax(-1)).cumprod(1).bool()
    differences[:, 1:][~agree[:, :-1]] = 0
    each_step = differences.amax(0) if dtype is torch.float32 else differences.amin(0)
    return bool(each_step.amax() <= TOLERANCE.get(dtype, 0.06))


def _cache_bytes(model, tokens: list[int]) -> tuple[int | None, int | None]:
    """Bytes of one sequence's cache, fixed and for each token, from two lengths; (None, None) if none was found."""
    enough = (tokens * LENGTHS[1])[: LENGTHS[1]]
    small, large = (_bytes_of(model, enough[:length]) for length in LENGTHS)
    if large == 0:
        return None, None
    per_token = max(0, large - small) / (LENGTHS[1] - LENGTHS[0])
    return max(0, round(large - per_token * LENGTHS[1])), math.ceil(per_token)


def _bytes_of(model, tokens: list[int]) -> int:
    """Bytes of the cache that a forward pass over one sequence returns; 0 if it returns none."""
    try:
        output = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=True)
    except Exception as error:
        if out_of_memory(error):
            raise
        return 0
    kept = {name: value for name, value in output.items() if name not in ("loss", "logits")}
    return sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in _tensors(kept, set())}.values())


def _tensors(value, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors inside a cache of any class: in lists, mappings and attributes of objects."""
    if isinstance(value, torch.Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, (torch.nn.Module, PretrainedConfig, str, type)):
        seen.add(id(value))
        mapping = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
        for each in value if isinstance(value, (list, tuple)) else mapping.values():
            yield from _tensors(each, seen)
