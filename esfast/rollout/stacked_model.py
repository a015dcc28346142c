"""`stacked`: one model that answers for several members of a population in one forward pass.

    with esfast.stacked(model, [(seed, sigma) for seed in seeds]):
        y = model(x)      # x has K * B rows; rows k * B to (k + 1) * B are answered by member k

`add_noise_` writes the members' weights from the model's own into one tensor (K, *shape) for each weight, which takes K
times the memory of the weights. These tensors replace the parameters until the block is left; the parameters themselves
are never written. Before the first answer `member_check` finds out which operations on weights can be shared, and how.
A module that can't share is called for one member after another.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from ..core.ops import check_members
from ..core.plan import Plan
from ..core.stacks import Stack, StackWriter, can_turn
from ..es.perturbation import unchanged_buffers
from ..update.optimizers import Group, check_groups
from ..update.updater import Rule
from ..utils.errors import BadType, BadValue
from .member_check import Learned, check_language_model, check_module
from .member_factors import Factors
from .member_linear import direct
from .member_modules import OneByOne, Places
from .member_ops import SHORT
from .member_products import LARGEST
from .member_tensor import MemberTensor, Unsupported, label_of

__all__ = ["StackedModel", "Unsupported", "stacked"]

_LEARNED: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, Learned]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def stacked(
    model: torch.nn.Module | Plan,
    members: Iterable[tuple[int, float]],
    base: Plan | None = None,
    noise: str = "gaussian",
    rounding: str = "nearest",
    groups: Sequence[Group | str] = (),
    backend: str = "auto",
    rank: int = 1,
) -> Iterator[torch.nn.Module]:
    """Lets a model answer for K members at once, inside a `with` block.

    Inside the block the model takes K * B rows. It answers rows k * B to (k + 1) * B with member k's weights,
    round(weights + sigma * noise(seed)). The parameters are never written, and are back in their places after the
    block, however it is left.

    Args:
        model: an nn.Module, or a Plan of one. The tensors of its first call in a block must have the rows in dimension
            0. A language model generates a few tokens before the block, to find out how its operations are shared.
        members: (seed, sigma) for each of the K members; -sigma gives the mirrored member.
        base: what members are written from, as in `add_noise_`. Default: the model's weights.
        noise, rank, rounding, backend: as in `add_noise_`.
        groups: esfast.Group objects, whose factors of sigma apply, as in ES.

    Yields:
        The module.

    Raises:
        TypeError, ValueError: an argument is outside the above, or the model's weights can't be replaced.
        Unsupported: (esfast.rollout.stacked_model, a NotImplementedError) members can't share an operation on weights,
            which the message names; or the model's answers differ from those for each member alone.
    """
    members = check_pairs(members)
    rule = Rule(noise=noise, groups=check_groups(groups), rank=rank)
    model = StackedModel(model, len(members), base, rule, rounding, backend)
    model.write(members)
    model.check()
    with model.in_place():
        yield model.module


def check_pairs(members: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Members as a list of (seed, sigma). TypeError for anything else; what the numbers may be, `write` checks."""
    given: list = list(members) if isinstance(members, Iterable) else [members]
    if not all(isinstance(member, (tuple, list)) and len(member) == 2 for member in given):
        raise BadType(f"members: expected (seed, sigma) pairs such as [(1, 0.01), (2, 0.01)], got {given!r:.80}")
    return [(seed, sigma) for seed, sigma in given]


class StackedModel:
    """Memory for the weights of `at_once` members of a model, which is written and used again and again.

    model           an nn.Module or a Plan of one
    at_once         most members at once, K
    base            what members are written from; default: the model's weights
    rule            its noise and groups apply
    rounding, backend  as in `add_noise_`

    Attributes: `module`, `plan`, `at_once`, `nbytes`, the memory that it takes between calls of
    `write`, and `bytes_of_member`.
    """

    short: Mapping[Callable, Callable] = SHORT
    # the kind of noise if no rule is given
    noise = "gaussian"
    # What a process takes on a CPU beside tensors and the gaps between them, for workspaces of matrix products and
    # Python's objects. 1 to 6 MB were measured; with 3 the jobs of `esfast bench resident` keep to what is said.
    workspaces = 3_000_000

    def __init__(
        self,
        model: torch.nn.Module | Plan,
        at_once: int,
        base: Plan | None = None,
        rule: Rule | None = None,
        rounding: str = "nearest",
        backend: str = "auto",
    ):
        self.plan = model if isinstance(model, Plan) else Plan(model)
        self.module, self.at_once = self.plan.module, at_once
        if self.module is None:
            raise BadType("stacked: the Plan must be made of an nn.Module, which is to answer")
        if self.plan.sharded:
            raise BadValue("stacked: the weights are in shards, of which each process has its own; ask one by one")
        if at_once < 1:
            raise BadValue("stacked: expected at least one member")
        self._places, self._layout = Places(self.module, self.plan), self.plan.layout
        rule, base = rule or Rule(noise=self.noise), self.plan if base is None else base
        if not isinstance(base, Plan):
            raise BadType(f"base: expected a Plan (for example plan.clone()), got {type(base).__name__}")
        if len(base) != len(self.plan):
            raise BadValue(f"base: expected {len(self.plan)} tensors as in the model, got {len(base)}")
        self._options = {**rule.noise_options, "rounding": rounding, "backend": backend}
        # Numbers of the weights that only lie transposed; and by number, copies that do, of those that lie both ways
        self._turned: set[int] = set()
        self._tied: dict[int, torch.Tensor] = {}
        self._stacks = self._allocate(at_once, rule)
        # of the weights that are written whole
        stacks = {i: self._stack_of(i) for i, held in enumerate(self._stacks) if isinstance(held, torch.Tensor)}
        parts = rule.by_group(base if len(stacks) == len(base) else base.subset(list(stacks))) if stacks else []
        self._writers = [
            (group, StackWriter([s for s in stacks.values() if rule.group_of(s.name) == group], part, **self._options))
            for group, part in parts
        ]
        self._count, self._order = 0, list[int]()
        self._tensors: list[MemberTensor] = []
        self._replaced: list[torch.nn.Module] = []

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in (*self._stacks, *self._tied.values()))

    @property
    def bytes_to_write(self) -> int:
        """Memory that `write` takes for a moment, for any number of members."""
        return torch.get_num_threads() * max((writer.room for _, writer in self._writers), default=0)

    @property
    def bytes_to_check(self) -> int:
        """Memory that `check` takes for a moment, beside that of two members: one member's whole weights, where the
        stacks don't hold them."""
        return sum(held.weight.nbytes for held in self._stacks if isinstance(held, Factors))

    @property
    def bytes_of_member(self) -> int:
        """Memory for each member: of its own tensors, and of matrices that operations make whole."""
        whole = sum(self.learned.operations.whole.values())
        return self.nbytes // self.at_once + whole

    def write(self, members: Sequence[tuple[int, float]]) -> None:
        """Writes the weights of at most `at_once` members. TypeError or ValueError, before any is written."""
        seeds, coeffs = check_members(*zip(*members, strict=True)) if members else ((), ())
        if not 1 <= len(seeds) <= self.at_once:
            raise BadValue(f"stacked: expected 1 to {self.at_once} members, got {len(seeds)}")
        terms = list(zip(seeds.tolist(), coeffs.tolist(), strict=True))
        # A group that is frozen has no noise.
        noise = [check_members(*group.noise_of(terms)) for group, _ in self._writers]
        self._write(terms, noise)
        self._count, self._order = len(seeds), list(range(len(seeds)))

    def _write(self, terms: list[tuple[int, float]], noise: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Members with these seeds and coefficients, and their noise in each group."""
        for (_, writer), members in zip(self._writers, noise, strict=True):
            writer.write(*members, len(terms))

    def choose(self, members: Sequence[int]) -> list[int]:
        """Lets `in_place` answer for these members, given by their numbers in `write`, until the next call. Returns
        them in the order of their rows. Weights are moved within the stacks, those of two members for each one that
        comes from behind."""
        wanted, order, count = set(members), self._order, len(members)
        front = [place for place in range(count) if order[place] not in wanted]
        behind = [place for place in range(count, len(order)) if order[place] in wanted]
        for i, j in zip(front, behind, strict=True):
            self._swap(i, j)
            order[i], order[j] = order[j], order[i]
        self._count = count
        return order[:count]

    def _swap(self, i: int, j: int) -> None:
        for held in (*self._stacks, *self._tied.values()):
            for part in held.parts if isinstance(held, Factors) else (held,):
                part[[i, j]] = part[[j, i]]

    def _allocate(self, at_once: int, rule: Rule) -> list[torch.Tensor | Factors]:
        """Memory for each weight of the plan.

        On a CPU the matrix products of small float32 matrices take half the time when the weights lie (in, out), so
        those of linear layers do. A small one that is also an embedding's lies both ways.
        """
        stacks: list[torch.Tensor | Factors] = []
        linear = self._places.numbers(_is_linear)
        others = self._places.numbers(lambda module, key: not _is_linear(module, key))
        turns = can_turn(self.plan.device, self._options["backend"], self._options["noise"])
        for i, tensor in enumerate(self.plan.tensors):
            options = {"dtype": tensor.dtype, "device": tensor.device}
            if not turns or tensor.dtype is not torch.float32 or i in others:
                stacks.append(torch.empty(at_once, *tensor.shape, **options))
            elif i in linear:
                self._turned.add(i)
                stacks.append(torch.empty(at_once, *reversed(tensor.shape), **options).mT)
            else:
                if tensor.dim() == 2 and tensor.numel() <= LARGEST:
                    self._tied[i] = torch.empty(at_once, *reversed(tensor.shape), **options)
                stacks.append(torch.empty(at_once, *tensor.shape, **options))
        return stacks

    def _stack_of(self, i: int) -> Stack:
        entry, held = self.plan.entries[i], self._stacks[i]
        if i in self._turned:
            return Stack(entry.name, entry.window, None, held.mT)
        return Stack(entry.name, entry.window, held, self._tied.get(i))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[torch.nn.Module]:
        """In the block the module answers for the members that were written last. After it the parameters are back in
        their places, and the buffers are as before."""
        # What a language model's check has learned holds for all of its calls.
        hook = (
            None
            if self._count == 1 or self._is_known
            else self.module.register_forward_pre_hook(self._before_call, with_kwargs=True)
        )
        try:
            with unchanged_buffers(self.plan):
                self._enter(self._count)
                yield self.module
        finally:
            try:
                self._leave()
            except KeyboardInterrupt:
                self._leave()
                raise
            finally:
                if hook is not None:
                    hook.remove()

    @contextlib.contextmanager
    def first_two(self) -> Iterator[None]:
        """In the block the module answers for the first two members, to learn its operations."""
        try:
            self._enter(2)
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def alone(self, k: int) -> Iterator[None]:
        """In the block the module answers for member k alone, with ordinary tensors."""
        try:
            self._places.put([stack[k] for stack in self._stacks])
            yield
        finally:
            self._places.restore()

    def check(self) -> None:
        """Finds out how the operations of a language model are shared, unless that is known.

        Raises Unsupported, and any exception of the model when it generates a text. For other modules, and for one
        member, it does nothing; the first call finds out.
        """
        if self._count < 2 or not callable(getattr(self.module, "generate", None)):
            return
        # Texts are generated in eval mode, in which a module may do other operations.
        was_training = self.module.training
        self.module.eval()
        try:
            learned = self.learned
            if "generate" not in learned.calls:
                check_language_model(self, learned)
                learned.calls.add("generate")
        finally:
            self.module.train(was_training)

    @property
    def learned(self) -> Learned:
        """What is known about the module in its present state."""
        first = self.plan.tensors[0]
        state = type(self), self._layout, first.dtype, first.device, self.module.training
        return _LEARNED.setdefault(self.module, {}).setdefault(state, Learned(self.short))

    @property
    def _is_known(self) -> bool:
        """Whether the module is a language model that was checked."""
        return "generate" in self.learned.calls

    def _enter(self, count: int) -> None:
        if count == 1 and not self._is_known:
            self._places.put([stack[0] for stack in self._stacks])
            return
        learned, stacks = self.learned, [stack[:count] for stack in self._stacks]
        names = map(label_of, self.plan.names)
        self._tensors = [MemberTensor.of(s, n, learned.operations) for s, n in zip(stacks, names, strict=True)]
        for i, copies in self._tied.items():
            self._tensors[i].turned = copies[:count].mT
        self._places.put(self._tensors)
        for path, module in self.module.named_modules():
            if label_of(path) in learned.one_by_one:
                one_by_one = OneByOne(
                    module, path, self._places, stacks, self._tensors, learned.operations, learned.modules
                )
                self._replaced.append((module, vars(module).get("forward")))
                module.forward = one_by_one
            elif learned.operations.prime is None and (forward := direct(module)) is not None:
                self._replaced.append((module, vars(module).get("forward")))
                module.forward = forward

    def _leave(self) -> None:
        for module, before in self._replaced:
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before
        self._replaced, self._tensors = [], []
        self._places.restore()

    def _before_call(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the module's first call with such arguments."""
        learned, leaves = self.learned, tree_flatten((args, kwargs))[0]
        call = tuple(x.dim() if isinstance(x, torch.Tensor) else None for x in leaves)
        learning = learned.operations.prime is not None or not self._tensors
        if learning or call in learned.calls:
            return
        self._leave()
        try:
            check_module(self, learned, args, kwargs, self._count)
            learned.calls.add(call)
        finally:
            self._enter(self._count)


def _is_linear(module: torch.nn.Module, key: object) -> bool:
    """Whether such an attribute of the module is the matrix of a linear layer."""
    return isinstance(module, torch.nn.Linear) and key == "weight"
