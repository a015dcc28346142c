"""The weight modes: where members are written from, and how the weights come back.

| mode    | copies         | after the population | an update                          |
|---------|----------------|----------------------|------------------------------------|
| master  | float32        | the same bits        | float32's, nothing is lost         |
| base    | one            | the same bits        | rounded once to the weights' dtype |
| host    | one, elsewhere | the same bits        | as with base                       |
| inplace | none           | rounding errors stay | as with base, and on top of them   |

Each mode states its memory and traffic in `cost`, which `esfast bench modes` measures. For float32 weights master and
base are the same. `host` keeps the base in (pinned) host memory and copies it back once a generation. Its members are
made in place, each from the one before, so they carry the rounding errors of these moves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..core.finite import check_finite
from ..core.ops import add_noise_, get_backend
from ..core.plan import Plan
from ..core.segments import Slice
from ..update.updater import Rule, Updater, UpdateRecord
from ..utils.changes import same_bits, versions
from ..utils.interrupts import defer_sigint
from ..utils.memory import in_bytes, total_memory
from .store import LocalStore

log = logging.getLogger(__name__)

# The fraction of the device's memory that `auto` gives to weights and their copies. The rest is for generating.
WEIGHTS_SHARE = 0.6
# How many weights of each tensor `inplace` observes, to measure drift.
DRIFT_SAMPLE = 256


class Cost(NamedTuple):
    """Bytes that a mode needs for one weight of some dtype."""

    device: int  # kept beside the weights, on their device
    host: int  # kept in host memory
    member: int  # read and written to make a member; noise is calculated, never read
    restore: int  # read and written when the population is left
    update: int  # read and written by an update of however many members, after which the weights are restored


class _Stored(LocalStore):
    """Shared by the modes with a copy: detects that something else wrote the live weights, which the copy would
    undo."""

    _seen: Any

    def _stored(self, i: int) -> torch.Tensor:
        """The bits of live tensor i when no member is in place."""
        raise NotImplementedError

    def changed_elsewhere(self) -> bool:
        """Whether something else changed the live weights since this mode last wrote them. Call it between members.

        It detects writes that PyTorch counts (esfast.utils.changes), but not writes to DTensors. Without a write it
        takes microseconds. After one, it compares the weights with the copy; equal bits count as unchanged.
        """
        super().changed_elsewhere()
        tensors = self.plan.tensors
        if self.plan.sharded or (now := versions(tensors)) == self._seen:
            return False
        if not all(same_bits(t, self._stored(i)) for i, t in enumerate(tensors)):
            return True
        self._seen = now
        return False

    def _note(self) -> None:
        self._seen = versions(self.plan.tensors)


class BaseWeights(_Stored):
    """Members are written from a read-only copy, the base, so nothing is ever subtracted. Restoring copies the base:
    whatever interrupts a member, `restore` gives back the bits.
    """

    mode = "base"
    tries_steps = True

    def __init__(self, plan: Plan, rule: Rule, backend: str = "auto"):
        super().__init__(plan, rule)
        self.base = self._make_base(plan)
        # The plan that members are written from.
        self._source = self.base.high() if self.base.low is not None else self.base
        self.updater = Updater(self.base, rule, backend)
        self._parts = rule.by_group(plan, self._source)
        self._options = {**rule.noise_options, "backend": backend}
        self._note()

    @property
    def source_of_members(self) -> Plan:
        return self._source

    @staticmethod
    def cost(dtype: torch.dtype) -> Cost:
        size = dtype.itemsize
        return Cost(device=size, host=0, member=2 * size, restore=2 * size, update=4 * size)

    def _make_base(self, plan: Plan) -> Plan:
        return plan.clone()

    def perturb(self, seed: int, coeff: float, rounding: str = "nearest") -> None:
        self.place({seed: coeff}, rounding)

    def place(self, terms: Mapping[int, float], rounding: str = "nearest") -> None:
        """Writes the base plus the noise of any number of seeds, each times its coefficient, into the live weights."""
        for group, plan, base in self._parts:
            seeds, coeffs = group.noise_of(terms.items())
            add_noise_(plan, seeds, coeffs, base=base, rounding=rounding, **self._options)

    def try_step(self, terms: Mapping[int, float]) -> None:
        for group, plan, base in self._parts:
            seeds, coeffs = group.noise_of(terms.items(), group.lr)
            add_noise_(plan, seeds, coeffs, base=base, **self._options)

    def restore(self) -> None:
        add_noise_(self.plan, [], [], base=self.base, **self._options)
        self._note()

    def adopt(self) -> None:
        """Takes the live weights, which something else has written, as the new base."""
        for mine, live in zip(self.base.tensors, self.plan.tensors, strict=True):
            mine.copy_(live.detach())
        if self.base.low is not None:
            self.base.low.zero_()
        self._note()

    def _stored(self, i: int) -> torch.Tensor:
        """The bits of live tensor i when no member is in place."""
        copy = self.plan.subset([i]).clone()
        add_noise_(copy, [], [], base=self.base.subset([i]), **self._options)
        return copy.tensors[0]

    def update(self, record: UpdateRecord) -> None:
        self.updater(record)
        self.sync_live_weights()

    def sync_live_weights(self) -> None:
        self.restore()


class MasterWeights(BaseWeights):
    """The base is float32 (Plan.master), so updates are not rounded to 16 bits. Members are written from its upper
    halves. Between generations the live weights are the master, rounded once."""

    mode = "master"

    @staticmethod
    def cost(dtype: torch.dtype) -> Cost:
        """Members of float16 weights read 4 bytes: a float32 can't be split into a float16 and 16 bits
        (Plan.master)."""
        size, base, upper = dtype.itemsize, 4, 2 if dtype is torch.bfloat16 else 4
        return Cost(device=base, host=0, member=upper + size, restore=base + size, update=3 * base + size)

    def _make_base(self, plan: Plan) -> Plan:
        return plan.master()


class _MovingWeights(LocalStore):
    """Members are made in place, in the live weights; between populations these are the only copy."""

    def __init__(self, plan: Plan, rule: Rule, backend: str = "auto"):
        LocalStore.__init__(self, plan, rule)
        self.base = plan
        self.updater = Updater(plan, rule, backend)
        self._parts = rule.by_group(plan)
        self._options = {**rule.noise_options, "backend": backend}
        self._applied: list[tuple[int, float]] = []

    def update(self, record: UpdateRecord) -> None:
        self.restore()
        self.updater(record)
        self.sync_live_weights()

    def _move(self, target: list[tuple[int, float]], rounding: str = "nearest") -> None:
        terms = [(s, -c) for s, c in self._applied] + target
        # The weights and the note of what was added to them must stay consistent.
        with defer_sigint():
            # All terms of a weight are added in one pass, and rounded once.
            for group, plan in self._parts if terms else ():
                seeds, coeffs = group.noise_of(terms)
                add_noise_(plan, seeds, coeffs, rounding=rounding, **self._options)
            self._applied = target


class InplaceWeights(_MovingWeights):
    """Members are made in place, and their noise is subtracted again. Not exact: rounding errors stay.

    The subtraction is a pass of its own. Then most weights come back, since the noise that is subtracted was just added
    and rounded. Moving from member to member in one pass would drift much farther: after 3000 members of sigma 1e-3,
    bfloat16 weights of scale 0.02 are off by 3.4e-4 and by 1.8e-3 (`esfast bench drift`).

    `drift()` measures the rounding errors of members and updates, on a sample of the weights.
    """

    mode = "inplace"

    def __init__(self, plan: Plan, rule: Rule, backend: str = "auto"):
        super().__init__(plan, rule, backend)
        self._watched = sample(plan)
        copies = [(name, t.to(torch.float32, copy=True), w) for name, t, w in self._watched]
        self._exact = Updater(Plan(copies), rule, backend) if copies else None

    @staticmethod
    def cost(dtype: torch.dtype) -> Cost:
        size = dtype.itemsize
        return Cost(device=0, host=0, member=4 * size, restore=2 * size, update=2 * size)

    def perturb(self, seed: int, coeff: float, rounding: str = "nearest") -> None:
        self.restore()
        self._move([(seed, coeff)], rounding)

    def restore(self) -> None:
        self._move([])

    def update(self, record: UpdateRecord) -> None:
        super().update(record)
        if self._exact is not None:
            self._exact(record)

    def adopt(self) -> None:
        """Takes the present live weights as the point from which drift is measured, since something else wrote them."""
        for (_, live, _), exact in zip(self._watched, self._exact.plan.tensors if self._exact else (), strict=True):
            exact.copy_(live)

    def drift(self) -> float | None:
        """RMS distance of the sampled weights from the weights that exact restoring and float32 updates would give.
        Call it between members. None if no tensor is contiguous and whole."""
        if self._exact is None:
            return None
        exact = self._exact.plan.tensors
        apart = [(t.float() - e).double().reshape(-1) for (_, t, _), e in zip(self._watched, exact, strict=True)]
        return float(torch.cat(apart).square().mean().sqrt())


class HostWeights(_Stored, _MovingWeights):
    """Members are made in place, each from the one before in one pass. When the population is left, the weights come
    back from a copy in host memory. A member carries the rounding errors of the moves before it. So in a team a reward
    may depend, in its last bits, on which process scored which members. The update depends on the rewards alone."""

    mode = "host"
    tries_steps = True

    def __init__(self, plan: Plan, rule: Rule, backend: str = "auto"):
        super().__init__(plan, rule, backend)
        pinned = plan.device.type == "cuda"
        self._host = [torch.empty_like(t, device="cpu", pin_memory=pinned) for t in self.plan.tensors]
        self.sync_live_weights()

    @staticmethod
    def cost(dtype: torch.dtype) -> Cost:
        """Restoring, and so an update, counts the bytes on both sides of the copy between host and device."""
        size = dtype.itemsize
        return Cost(device=0, host=size, member=2 * size, restore=2 * size, update=6 * size)

    def perturb(self, seed: int, coeff: float, rounding: str = "nearest") -> None:
        self._move([(seed, coeff)], rounding)

    def try_step(self, terms: Mapping[int, float]) -> None:
        for group, plan in self._parts:
            seeds, coeffs = group.noise_of(terms.items(), group.lr)
            add_noise_(plan, seeds, coeffs, **self._options)

    def restore(self) -> None:
        with defer_sigint():
            for t, mine in zip(self.plan.tensors, self._host, strict=True):
                # The copy is complete before the next kernel.
                t.detach().copy_(mine)
            self._applied = []
        self._note()

    def sync_live_weights(self) -> None:
        for t, mine in zip(self.plan.tensors, self._host, strict=True):
            mine.copy_(t.detach())
        self._note()

    adopt = sync_live_weights

    def _stored(self, i: int) -> torch.Tensor:
        return self._host[i].to(self.plan.device)


def sample(plan: Plan) -> list[tuple[str, torch.Tensor, Slice]]:
    """Up to DRIFT_SAMPLE neighbouring weights from the middle of each whole, contiguous tensor, as views."""
    views = []
    for e in plan.entries:
        t = e.tensor.detach()
        if t.is_contiguous() and tuple(t.shape) == e.window.shape:
            offset = [0] * t.dim()
            for d, n in enumerate(e.window.shape):
                kept = max(1, min(n, DRIFT_SAMPLE // math.prod(e.window.shape[d + 1 :])))
                offset[d] = (n - kept) // 2
                t = t.narrow(d, offset[d], kept)
            views.append((e.name, t, Slice(e.window.shape, tuple(offset))))
    return views


# Each is called with a plan, a rule and a backend.
MODES: dict[str, Any] = {store.mode: store for store in (BaseWeights, MasterWeights, HostWeights, InplaceWeights)}


def open_store(plan: Plan, rule: Rule, mode: str, backend: str) -> LocalStore:
    """A store of this mode for weights in this process; with "auto" the most exact one that fits in memory.

    Raises RuntimeError if the backend can't run here, ValueError for weights that are NaN or infinite. No weight has
    changed."""
    get_backend(backend, plan.device, rule.noise)
    check_finite((e.name, e.tensor) for e in plan.entries)
    return MODES[choose_mode(plan, rule) if mode == "auto" else mode](plan, rule, backend)


def choose_mode(plan: Plan, rule: Rule) -> str:
    """The most exact mode whose copies, with the weights, take at most WEIGHTS_SHARE of the device's memory.

    This counts all memory, not what is free at the moment, so that the same run on the same machine takes the same
    mode.
    """
    total = total_memory(plan.device)
    room = WEIGHTS_SHARE * total - plan.nbytes - rule.extra_bytes(plan)
    extra = {m: sum(MODES[m].cost(t.dtype).device * t.numel() for t in plan.tensors) for m in ("master", "base")}
    if extra["base"] < extra["master"] <= room:
        mode = "master"
    else:
        # On a CPU a copy in host memory saves nothing.
        mode = "base" if extra["base"] <= room else "host" if plan.device.type != "cpu" else "inplace"
    log.info('weights="auto" takes %r: %s of weights, %s of memory', mode, in_bytes(plan.nbytes), in_bytes(total))
    return mode
