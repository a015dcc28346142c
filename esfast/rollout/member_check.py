"""Finds out how several members share a model's operations on weights, with a few rows, before the first answer.

The module answers the same rows for each of two members alone, with ordinary tensors, and for both in one pass. The
answers must agree up to rounding. If an operation can't be shared, or a module's answers differ, the innermost module
with the fault is called for one member after another from then on, and the check runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.utils._pytree import tree_flatten, tree_map
from transformers import GenerationConfig

from ..es.perturbation import unchanged_buffers
from ..utils.errors import BadValue
from ..utils.memory import out_of_memory
from .encoding import embedded_tokens
from .member_modules import first_difference, modules_on_the_way, recorded, rows_of_one
from .member_tensor import Operations, Unsupported, label_of
from .probe import TOLERANCE, Carried, first_logits, same_but_for_rounding

if TYPE_CHECKING:
    from .stacked_model import StackedModel

PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
# What a prompt of the language models' check has, padded to the longest of them.
PROMPT_TOKENS = (5, 3, 4)
MODULES_TRIED = 24


class Learned:
    """What is known about a module.

    operations  how its operations on weights are done
    one_by_one  labels of the modules that are called for one member after another
    modules     for these, which arguments and results have rows
    calls       kinds of calls that were checked
    refusal     why it can't be done, once that is known
    """

    def __init__(self, short: Mapping[Callable, Callable]):
        self.operations = Operations(short)
        self.one_by_one: set[str] = set()
        self.modules: dict[tuple, tuple] = {}
        self.calls: set = set()
        self.refusal: str | None = None


def check_language_model(stack: StackedModel, learned: Learned) -> None:
    """Learns from a few tokens of text that the model generates in eval mode. Raises Unsupported."""
    model = stack.module
    usual = range(3, max(4, min(embedded_tokens(model), 200)))
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=ends)

    def run(rows: int, members: int) -> list[torch.Tensor]:
        lengths = [PROMPT_TOKENS[0] if equal else PROMPT_TOKENS[i % len(PROMPT_TOKENS)] for i in range(rows)]
        texts = [[usual[(31 * i + 17 * j) % len(usual)] for j in range(n)] for i, n in enumerate(lengths)]
        return [first_logits(model, config, texts * members)]

    equal = False
    with torch.no_grad():
        try:
            with stack.alone(0):
                run(2, 1)
        except Exception as error:
            if out_of_memory(error):
                raise
            # Some can't be given prompts of several lengths.
            equal = True
        _learn(stack, learned, run, _prime(stack.module), _same_logits)


def _same_logits(alone: list[torch.Tensor], together: list[torch.Tensor], dtype: torch.dtype) -> bool:
    return same_but_for_rounding(alone[0], together[0], dtype)


def check_module(stack: StackedModel, learned: Learned, args: tuple, kwargs: dict, members: int) -> None:
    """Learns from the arguments of a call, cut to a few rows. Raises Unsupported, ValueError for unequal rows."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor) and x.dim()]
    if not tensors:
        raise Unsupported(f"{type(stack.module).__name__} called without a tensor of rows")
    rows = len(tensors[0])
    if rows % members or not rows:
        raise BadValue(f"stacked: {rows} rows can't be shared by {members} members: pass as many for each")
    sizes = {size for x in tensors for size in x.shape[1:]}

    def run(each: int, count: int) -> list[torch.Tensor]:
        which = torch.arange(each).remainder(rows // members).repeat(count)

        def cut(x):
            return x[which.to(x.device)] if isinstance(x, torch.Tensor) and x.dim() and len(x) == rows else x

        own_args, own_kwargs = tree_map(cut, (args, kwargs))
        return [x for x in tree_flatten(stack.module(*own_args, **own_kwargs))[0] if isinstance(x, torch.Tensor)]

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        _learn(stack, learned, run, _prime(stack.module, sizes), _same_results)


def _same_results(alone: list[torch.Tensor], together: list[torch.Tensor], dtype: torch.dtype) -> bool:
    for one, other in zip(alone, together, strict=True):
        if one.shape != other.shape:
            return False
        one, other = one.double().nan_to_num(0, 0, 0), other.double().nan_to_num(0, 0, 0)
        if (one - other).square().mean().sqrt() > TOLERANCE.get(dtype, 0.06) * one.square().mean().sqrt():
            return False
    return True


def _prime(module: torch.nn.Module, sizes: Collection[int] = frozenset()) -> int:
    """A number of rows that divides no dimension of the module's tensors and no number in its configuration."""
    known = {size for t in (*module.parameters(), *module.buffers()) for size in t.shape} | set(sizes)
    config = getattr(module, "config", None)
    known.update(_numbers(config.to_dict() if hasattr(config, "to_dict") else {}))
    found = next((p for p in PRIMES if all(size % p or not size for size in known)), None)
    if found is None:
        raise Unsupported(f"{type(module).__name__}, whose dimensions are divisible by all of {PRIMES[0]}-{PRIMES[-1]}")
    return found


def _numbers(value) -> Iterator[int]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _learn(stack: StackedModel, learned: Learned, run: Callable, prime: int, same: Callable) -> None:
    """Tries until the members' joint answers equal those of each alone; stores what it learns in `learned`.

    run   (rows of each member, members) -> the module's results, rows in the same dimension
    same  (alone, together, dtype) -> whether they are the same but for rounding
    """
    if learned.refusal is not None:
        raise Unsupported(learned.refusal)
    carried, operations, reason = Carried(stack.module), learned.operations, ""
    known, modules, whole = dict(operations.known), dict(learned.modules), dict(operations.whole)

    def answers(rows: int, members: int) -> list[torch.Tensor]:
        carried.forget()
        return run(rows, members)

    def of_member(k: int, own: list[torch.Tensor], results: list[torch.Tensor]) -> list[torch.Tensor]:
        return [rows_of_one(k, one, both) for one, both in zip(own, results, strict=True)]

    def together() -> list[torch.Tensor]:
        operations.prime = prime
        operations.known, learned.modules, operations.whole = dict(known), dict(modules), dict(whole)
        try:
            with stack.first_two():
                return answers(prime, 2)
        finally:
            operations.prime = None

    try:
        with unchanged_buffers(stack.plan):
            alone = []
            for k in range(2):
                with stack.alone(k):
                    alone.append(answers(prime, 1))
                    carried.find()
            for _ in range(MODULES_TRIED):
                try:
                    results = together()
                # Each member alone raises nothing, so whatever is raised comes of their being together.
                except Exception as error:
                    if out_of_memory(error):
                        raise
                    reason = reason or _reason(error)
                    culprit = _outside(stack.module, modules_on_the_way(error), learned.one_by_one)
                else:
                    dtype = stack.plan.tensors[0].dtype
                    if all(same(own, of_member(k, own, results), dtype) for k, own in enumerate(alone)):
                        return
                    reason = reason or "it answers otherwise for members together than for each alone"
                    culprit = _first_to_differ(stack, answers, together, prime)
                if culprit is None or label_of(culprit) in learned.one_by_one:
                    break
                label = label_of(culprit)
                learned.one_by_one = {m for m in learned.one_by_one if not m.startswith(f"{label}.")} | {label}
        learned.refusal = f"members can't share a {type(stack.module).__name__}: {reason}"
        raise Unsupported(learned.refusal)
    finally:
        carried.forget()


def _reason(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return text if isinstance(error, Unsupported) else f"{type(error).__name__}: {text}"


def _outside(root: torch.nn.Module, chain: Sequence[torch.nn.Module], one_by_one: set[str]) -> str | None:
    """The path of the innermost module that is neither called one by one already nor inside such a module."""
    paths = {id(module): path for path, module in root.named_modules()}
    found = None
    for module in chain:
        path = paths.get(id(module))
        if path is None:
            continue
        if label_of(path) in one_by_one:
            break
        found = path or found
    return found


def _first_to_differ(stack: StackedModel, answers: Callable, together: Callable, prime: int) -> str | None:
    with stack.alone(0), recorded(stack.module) as alone:
        answers(prime, 1)
    with recorded(stack.module) as both:
        together()
    return first_difference([call for call in alone if not _is_inside(call[0], stack.learned.one_by_one)], both)


def _is_inside(path: str, one_by_one: set[str]) -> bool:
    label = label_of(path)
    return any(label == m or label.startswith(f"{m}.") for m in one_by_one)
