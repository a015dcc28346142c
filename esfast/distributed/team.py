"""Training in several processes: which process scores which member, and how rewards are exchanged.

Processes share torch.distributed's store, a table of small values. In a generation they exchange N rewards and nothing
else. Every process draws the same noise and takes the same step, so the weights stay equal to the bit. torchrun starts
the processes, on one machine or several:

    torchrun --nproc-per-node 8 -m esfast train ...
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ..update.updater import Updater, UpdateRecord
from ..utils.errors import BadState, BadValue
from ..utils.interrupts import Interrupted, signal_of
from ..utils.settings import check_int

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

# Seconds between two heartbeats of a process.
BEAT = 3.0
# A process without a heartbeat for so many seconds counts as dead.
SILENCE = 30.0
# Seconds that the other processes then have to notice it.
GRACE = 10.0


class Stopped(BadState):
    """Another process failed or died; the message names it."""


class Team:
    """The processes that train together; `Team()` is this process alone.

        with Team.join() as team:      # at the end all wait for each other; an error or Ctrl-C in one stops all
            es = ES(model, team=team)

    Attributes:
        rank: this process's number, from 0.
        size: the number of processes.
        shards: how many processes, of consecutive ranks, hold one model in shards and score its members together.
        restarted: whether torchrun started these processes after others died (--max-restarts); they then resume.
        at_work: whether this process is inside work that needs the others.
    """

    def __init__(self, store: dist.Store | None = None, rank: int = 0, size: int = 1, shards: int = 1):
        if size % check_int("shards", shards, 1, 2**31):
            raise BadValue(
                f"Team: {size} processes can't be grouped by {shards}; start a multiple of {shards} with torchrun"
            )
        self.rank, self.size, self.shards = rank, size, shards
        self._store: Any = store
        self._lost: str | None = None
        self._own_group, self._runs = False, 0
        self._ended, self._noticed = threading.Event(), threading.Event()
        self.restarted = self.at_work = False
        if size > 1:
            threading.Thread(target=self._beat, name="esfast-heartbeat", daemon=True).start()

    @classmethod
    def join(cls, device: torch.device | str = "cpu", shards: int = 1) -> Team:
        """The team of torch.distributed's default group or of torchrun's environment variables; without either, this
        process alone. Makes the default group if there is none: gloo, and NCCL for GPUs."""
        made, attempts = not dist.is_initialized(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if made:
            if int(os.environ.get("WORLD_SIZE", 1)) == 1:
                alone = cls(shards=shards)
                # After an elastic restart only this one process may be left.
                alone.restarted = attempts > 0
                return alone
            found, rank, size = next(rendezvous("env://"))
            # torchrun's store may outlive the processes. Those that it starts afterwards must not find the old keys.
            attempt = dist.PrefixStore(f"attempt {attempts}", found)
            device, backend = torch.device(device), "gloo"
            # Collectives over shards use the current device.
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
                backend = "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=attempt, rank=rank, world_size=size)
        store = dist.PrefixStore("esfast", dist.distributed_c10d._get_default_store())
        team = cls(store, dist.get_rank(), dist.get_world_size(), shards)
        team._own_group, team.restarted = made, attempts > 0
        return team

    def mesh(self, device: torch.device | str) -> DeviceMesh:
        """The `shards` processes that hold this process's model together, as a mesh of one dimension. All processes
        call it."""
        from torch.distributed.device_mesh import init_device_mesh

        shape = self.size // self.shards, self.shards
        return init_device_mesh(torch.device(device).type, shape, mesh_dim_names=("replicas", "shards"))["shards"]

    def unique_prefix(self) -> str:
        """A unique prefix of store keys. Call in the same order on all ranks."""
        self._runs += 1
        return f"run {self._runs}"

    @property
    def is_group_leader(self) -> bool:
        """Whether this process is the first of those that hold its model, and so reports for them."""
        return self.rank % self.shards == 0

    @property
    def shard_suffix(self) -> str:
        """Suffix of the names of files that hold a part of the model: which part, of how many."""
        return f"-{self.rank % self.shards + 1}of{self.shards}" if self.shards > 1 else ""

    def members(self, turn: str, count: int) -> Iterator[int]:
        """Hands out the numbers below `count`, each to one process (or one group of shards) of those that ask under
        this `turn`, as soon as it is free. A slow process gets fewer numbers."""
        for numbers in self.packets(turn, count, 1):
            yield from numbers

    def packets(self, turn: str, count: int, size: int) -> Iterator[range]:
        """As `members`, but `size` neighbouring numbers at once, the last time perhaps fewer. Processes may ask for
        different sizes."""
        if self.size == 1:
            yield from (range(start, min(start + size, count)) for start in range(0, count, size))
            return
        for asked in itertools.count():
            self.check()
            key = f"{turn}/group {self.rank // self.shards}/{asked}"
            if self.is_group_leader:
                start = self._store.add(f"{turn}/next", size) - size
                if self.shards > 1:
                    self._store.set(key, str(start))
            else:
                start = int(self._wait(key))
            if start >= count:
                return
            yield range(start, min(start + size, count))

    def exchange(self, turn: str, mine: Mapping[int, float | None], count: int) -> list[float | None]:
        """The rewards of all `count` members, from `mine` of each process. None stays None. A process sends 12 bytes
        for each of its own members and receives 8 for each member of all."""
        if self.size == 1:
            return [mine.get(i) for i in range(count)]
        # Each process writes one value to the store. One request per member would cost 100 us per member.
        if self.is_group_leader:
            parts = (struct.pack("<Id", i, math.nan if r is None else r) for i, r in mine.items())
            self._store.set(f"{turn}/from {self.rank}", b"".join(parts))
        if self.rank == 0:
            found = [math.nan] * count
            for rank in range(0, self.size, self.shards):
                for index, reward in struct.iter_unpack("<Id", self._wait(f"{turn}/from {rank}")):
                    found[index] = reward
                self._store.delete_key(f"{turn}/from {rank}")
            gathered = struct.pack(f"<{count}d", *found)
        values = struct.unpack(f"<{count}d", self.broadcast_from_rank0(f"{turn}/rewards", lambda: gathered))
        return [None if math.isnan(v) else v for v in values]

    def broadcast_from_rank0(self, key: str, value: Callable[[], bytes]) -> bytes:
        """Broadcasts `value()` from process 0 to all."""
        if self.size == 1:
            return value()
        if self.rank == 0:
            self._store.set(key, value())
        return self._wait(key)

    def gather(self, key: str, value: str) -> list[str]:
        """In process 0, the values of all processes by rank; elsewhere an empty list."""
        if self.rank:
            try:
                self._store.set(f"{key}/{self.rank}", value)
            except dist.DistError:
                # Raises with the name of the process that is gone.
                self.check()
                raise
            return []
        return [value] + [self._wait(f"{key}/{rank}").decode() for rank in range(1, self.size)]

    def assert_equal_on_all_ranks(self, what: str, value: str) -> None:
        """RuntimeError in process 0, which stops all, if the value differs between processes."""
        for rank, other in enumerate(self.gather(what, value)):
            if other != value:
                raise BadState(f"{what}: {value} in process 0, but {other} in process {rank}")

    def fail(self, error: BaseException) -> None:
        """Tells the others why this process stops. If the error is a broken connection, raises Stopped with the name of
        the process that died."""
        if self.size > 1 and not isinstance(error, Stopped) and self._lost is None:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                until = time.monotonic() + SILENCE + 2 * BEAT
                while time.monotonic() < until:
                    self.check()
                    time.sleep(BEAT / 10)
            text = f"failed: process {self.rank} stopped with {type(error).__name__}: {error}"
            if isinstance(error, KeyboardInterrupt):
                signum = signal_of(error)
                text = f"interrupted {int(signum)}: process {self.rank} was interrupted by {signum.name}"
            try:
                # Only the first reason counts.
                self._store.compare_set("stop", "", text)
            except dist.DistError:
                pass

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """A block whose error also stops the other processes, and tells them why."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            if self.rank == 0 and self.size > 1:
                # Time for the others to read it: the store may end with this process.
                time.sleep(BEAT / 2)
            raise

    def check(self) -> None:
        """Raises Stopped, or Interrupted (a KeyboardInterrupt), if another process stopped."""
        if self._lost is not None:
            self._noticed.set()
            raise Stopped(self._lost)
        try:
            reason = self._store.get("stop").decode() if self._store.check(["stop"]) else ""
        except dist.DistError as error:
            raise Stopped(f"the process that keeps the store is gone (rank 0, or torchrun): {error}") from None
        if reason.startswith("interrupted "):
            signum, _, text = reason.removeprefix("interrupted ").partition(": ")
            raise Interrupted(int(signum), text)
        if reason:
            raise Stopped(reason.removeprefix("failed: "))

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A block in which this process is `at_work`."""
        self.at_work = True
        try:
            yield
        finally:
            self.at_work = False

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if error is None:
            self.close()
        else:
            self.fail(error)

    def close(self) -> None:
        """Waits for all processes, so that none leaves while another still needs it."""
        if self.size > 1 and self._lost is None:
            try:
                self.assert_equal_on_all_ranks("finished", "yes")
            finally:
                self._ended.set()
                if self._own_group:
                    dist.destroy_process_group()

    def _wait(self, key: str) -> bytes:
        while True:
            try:
                # Looks again well within the time that process 0 leaves for its reason to be read (see `telling`).
                self._store.wait([key], timedelta(seconds=0.5))
                return self._store.get(key)
            except dist.DistError:
                # The time is up, or the store is gone; check() raises the reason.
                self.check()

    def _beat(self) -> None:
        """Exits if a peer died while this process blocks in a collective, or in a long generation whose result nobody
        needs any more. Runs in a thread. The journal holds all generations that are complete."""
        self._watch()
        if self._lost and not self._noticed.wait(GRACE) and self.at_work:
            log.error("stopped: %s", self._lost)
            # Nothing else ends a collective that waits for a process which is gone: no exception reaches it.
            sys.stderr.flush()
            os._exit(1)

    def _watch(self) -> None:
        """Writes this process's heartbeat, and reads the others': rank 0 reads all, the others read rank 0's."""
        watched = [r for r in range(self.size) if r != self.rank and (self.rank == 0 or r == 0)]
        heard = {r: (b"", time.monotonic()) for r in watched}
        for number in itertools.count():
            try:
                self._store.set(f"beat/{self.rank}", str(number))
                for r in watched:
                    value = self._store.get(f"beat/{r}") if self._store.check([f"beat/{r}"]) else b""
                    if value != heard[r][0]:
                        heard[r] = value, time.monotonic()
                    elif time.monotonic() - heard[r][1] > SILENCE and not self._ended.is_set():
                        self._lost = f"process {r} has not been heard of for {SILENCE:.0f} s: it died, or hangs"
                        self._store.compare_set("stop", "", f"failed: {self._lost}")
                        return
            except dist.DistError as error:
                if not self._ended.is_set():
                    self._lost = f"the process that keeps the store is gone (rank 0, or torchrun): {error}"
                return
            if self._ended.wait(BEAT):
                return


class SharedUpdates:
    """An Updater for a team. It keeps the faster of two ways, which give the same bits: every process updates all
    tensors, or each updates its share of the tensors and broadcasts it.

    The first four calls try each way twice, since the first call of either loads code; the slowest process decides.
    If the optimizer has tensors of its own, such as Adam's moments, every process updates all, since they stay in the
    process that computes them. `chosen` is the
    way: "all" or "share".
    """

    TRIED = ("all", "share") * 2

    def __init__(self, updater: Updater, team: Team, run: str):
        self._updater, self._team, self._prefix = updater, team, run
        self._seconds: list[float] = []
        self.chosen: str | None = "all"
        bounds = even_ranges([t.numel() for t in updater.plan.tensors], team.size)
        contiguous = all(t.is_contiguous() for t in updater.plan.tensors)
        if contiguous and not updater.state.tensors and not updater.plan.sharded:
            # Not measured yet.
            self.chosen = None
            self._parts = [updater.subset(range(*b)) for b in bounds]

    def __getattr__(self, name: str):
        return getattr(self._updater, name)

    def __call__(self, record: UpdateRecord) -> None:
        if self.chosen is not None:
            self._run(self.chosen, record)
            return
        began = time.perf_counter()
        self._run(self.TRIED[len(self._seconds)], record)
        if self._updater.plan.device.type == "cuda":
            torch.cuda.synchronize(self._updater.plan.device)
        self._seconds.append(time.perf_counter() - began)
        if len(self._seconds) == len(self.TRIED):
            self._choose()

    def _run(self, plan: str, record: UpdateRecord) -> None:
        if plan == "all":
            self._updater(record)
            return
        self._parts[self._team.rank](record)
        for rank, part in enumerate(self._parts):
            for e in part.plan.entries:
                dist.broadcast(e.tensor.detach().reshape(-1).view(torch.uint8), src=rank)
                if e.split:
                    low = part.plan.low[e.flat : e.flat + e.tensor.numel()]
                    dist.broadcast(low.view(torch.uint8), src=rank)

    def _choose(self) -> None:
        found = self._team.gather(f"{self._prefix}: update seconds", json.dumps(self._seconds[-2:]))
        worst = [max(each) for each in zip(*map(json.loads, found), strict=True)]
        best = self._team.broadcast_from_rank0(
            f"{self._prefix}: update plan", lambda: self.TRIED[-2:][worst.index(min(worst))].encode()
        )
        self.chosen = best.decode()
        if found:
            told = "updates: %s (every process all of it: %.3g s, its share and a broadcast: %.3g s)"
            log.info(told, self.chosen, *worst)


def even_ranges(sizes: list[int], count: int) -> list[tuple[int, int]]:
    """Divides the numbers of `sizes` into `count` ranges with about equal sums; a range may be empty."""
    ends, total, done = [], sum(sizes), 0
    limits = iter([total * (r + 1) / count for r in range(count - 1)])
    limit = next(limits, math.inf)
    for i, size in enumerate(sizes):
        while done + size / 2 > limit:
            ends.append(i)
            limit = next(limits, math.inf)
        done += size
    ends += [len(sizes)] * (count - len(ends))
    return list(zip([0, *ends[:-1]], ends, strict=True))
