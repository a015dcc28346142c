"""A generation on many workers: a simulation, and a measurement with real processes that sleep instead of generating.

The simulation follows esfast.Team. A worker asks the store for a member, scores it, and asks again. At the end it
writes its rewards to the store; process 0 collects them from one worker after another, and every process reads all of
them. The store is one queue: it answers a request after `operation` seconds of work, and all other requests wait.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..distributed.team import BEAT, Team
from ..utils.child import child

# Requests to the store for each member that a process asks for: whether another process stopped, and the next number.
REQUESTS = 2
# Requests to the store for each heartbeat of a process: its own, rank 0's look at it, and its look at rank 0.
BEATS = 5


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds, except for `bandwidth` (bytes per second)."""

    # how long one request keeps the store busy
    operation: float
    # a request that waits for no other
    round_trip: float
    # an update of all weights, per member
    member: float
    # bytes of the weights
    weights: float
    # bytes per second of every machine's network
    bandwidth: float


def dynamic(durations: np.ndarray, slowness: np.ndarray, costs: Costs) -> tuple[float, float]:
    """Seconds until the last worker is told that no member is left, and the mean wait for a member.

    durations: seconds of each member on a worker of slowness 1, in the order in which they are handed out.
    slowness: of each worker, 1 or more.
    """
    service, travel = _service(len(slowness), costs) * REQUESTS, costs.round_trip * REQUESTS / 2
    # Requests on their way to the store, ordered by the time of their arrival.
    asking = [(travel, worker) for worker in range(len(slowness))]
    free, end, waited = 0.0, 0.0, 0.0
    handed = iter(durations)
    while asking:
        arrival, worker = asking[0]
        free = max(free, arrival) + service
        answered = free + travel
        waited += answered - arrival + travel
        seconds = next(handed, None)
        end = max(end, answered)
        if seconds is None:
            heapq.heappop(asking)
        else:
            heapq.heapreplace(asking, (answered + seconds * slowness[worker] + travel, worker))
    return end, waited / (len(durations) + len(slowness))


def static(durations: np.ndarray, slowness: np.ndarray) -> float:
    """Seconds of the last worker, if each of P workers has every P-th member."""
    workers = len(slowness)
    padded = np.zeros(-(-len(durations) // workers) * workers)
    padded[: len(durations)] = durations
    return float((padded.reshape(-1, workers).sum(0) * slowness).max())


def ideal(durations: np.ndarray, slowness: np.ndarray) -> float:
    """Seconds if the work could be divided without remainder; at least those of a member on the fastest worker."""
    return max(float(durations.sum() / (1 / slowness).sum()), float(durations.max() * slowness.min()))


def exchange(members: int, workers: int, costs: Costs) -> float:
    """Seconds from the last reward to every process having all of them."""
    if workers == 1:
        return 0.0
    service = _service(workers, costs)
    # For each process in turn, process 0 waits for its rewards, reads them, and deletes them.
    collected = workers * 3 * max(costs.round_trip, service)
    sent = workers * (2 * service + 8 * members / costs.bandwidth)
    return 3 * costs.round_trip + collected + sent


def update(members: int, workers: int, costs: Costs) -> dict[str, float]:
    """Seconds of an update in two ways: every worker updates all, or each its share, which is then sent to the
    others."""
    every = members * costs.member
    sent = costs.weights * (workers - 1) / workers / costs.bandwidth + math.ceil(math.log2(workers)) * costs.round_trip
    return {"all": every, "share": every / workers + sent}


def _service(workers: int, costs: Costs) -> float:
    """Seconds per request when the store also receives the heartbeats of all workers."""
    idle = 1 - min(0.99, BEATS * workers * costs.operation / BEAT)
    return costs.operation / idle


# ---- real processes -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """A generation to measure: seconds of each member, slowness of each process, and "static" or "dynamic"."""

    durations: list[float]
    slowness: list[float]
    schedule: str = "dynamic"


def measure(jobs: Sequence[Job], isolated: bool = False) -> list[dict]:
    """Runs generations in real processes, as many as there are slownesses, which sleep for each member's seconds.

    Returns for each generation: `seconds`, from when all are ready until the last hears that no member is left;
    `exchange`, from then until all have the rewards; and `loopback_bytes`, which means something only if `isolated`.
    That makes a network namespace, so it needs Linux and root.
    """
    command = child("from esfast.bench.fleet import lead; lead()", json.dumps([dataclasses.asdict(j) for j in jobs]))
    if isolated:
        command = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"', *command]
    limit = 120 + 2 * sum(sum(j.durations) * max(j.slowness) for j in jobs)
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"the workers failed: {done.stderr.strip()[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def lead() -> None:
    """Rank 0 and the parent of the others: prints what `measure` returns."""
    import torch.distributed as dist

    jobs = [Job(**fields) for fields in json.loads(sys.argv[1])]
    size = len(jobs[0].slowness)
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    code = "from esfast.bench.fleet import follow; follow()"
    others = [
        subprocess.Popen(child(code, sys.argv[1], str(rank), str(store.port)), stdout=subprocess.DEVNULL)
        for rank in range(1, size)
    ]
    try:
        mine = _work(store, 0, jobs)
    finally:
        for process in others:
            process.wait(60)
    everyone = [mine, *(json.loads(store.get(f"marks/{rank}")) for rank in range(1, size))]
    found = []
    for marks in zip(*everyone, strict=True):
        began, scored, exchanged = (max(m[i] for m in marks) for i in range(3))
        found.append({"seconds": scored - began, "exchange": exchanged - scored, "loopback_bytes": marks[0][3]})
    print(json.dumps(found))


def follow() -> None:
    import torch.distributed as dist

    jobs, rank = [Job(**fields) for fields in json.loads(sys.argv[1])], int(sys.argv[2])
    store = dist.TCPStore("127.0.0.1", int(sys.argv[3]), len(jobs[0].slowness), False, wait_for_workers=False)
    store.set(f"marks/{rank}", json.dumps(_work(store, rank, jobs)))


def _work(store, rank: int, jobs: list[Job]) -> list[tuple[float, float, float, float]]:
    """For each job: when it began, when the last member was scored here, when the rewards arrived here; its bytes."""
    size, marks = len(jobs[0].slowness), []
    team = Team(store, rank, size)
    for turn, job in enumerate(jobs):
        count = len(job.durations)
        members = range(rank, count, size) if job.schedule == "static" else team.members(str(turn), count)
        _meet(store, f"ready/{turn}", size)
        # By now no process asks any more whether all are there.
        time.sleep(0.01)
        before, mine = _loopback(), {}
        time.sleep(0.01)
        began = time.monotonic()
        for index in members:
            if job.durations[index]:
                time.sleep(job.durations[index] * job.slowness[rank])
            mine[index] = float(index)
        scored = time.monotonic()
        rewards = team.exchange(str(turn), mine, count)
        exchanged = time.monotonic()
        # By now the others have the rewards, too, and have not asked for a new member yet.
        time.sleep(0.1 if rank else 0.05)
        marks.append((began, scored, exchanged, _loopback() - before))
        if rewards != [float(i) for i in range(count)]:
            raise RuntimeError("rewards were lost")
        _meet(store, f"done/{turn}", size)
    team._ended.set()
    return marks


def _meet(store, key: str, size: int) -> None:
    store.add(key, 1)
    while store.add(key, 0) < size:
        time.sleep(0.002)


def _loopback() -> int:
    """Bytes that this network namespace has sent to itself."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def store_costs(requests: int = 4000) -> tuple[float, float]:
    """Seconds of a round trip to a store in another process, and seconds that keep it busy per request, from how many
    it answers when several processes ask at once."""
    code = "from esfast.bench.fleet import _serve; _serve()"
    server = subprocess.Popen(child(code), stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    port = int(server.stdout.readline())
    try:
        ask = "from esfast.bench.fleet import _ask; _ask()"
        seconds = []
        for clients in (1, 3):
            processes = [
                subprocess.Popen(child(ask, str(port), str(requests), str(clients)), stdout=subprocess.PIPE, text=True)
                for _ in range(clients)
            ]
            seconds.append([json.loads(p.communicate()[0]) for p in processes])
    finally:
        server.communicate("\n")
    ((_, round_trip),), crowded = seconds
    return round_trip, 1 / sum(requests / total for total, _ in crowded)


def _serve() -> None:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    print(store.port, flush=True)
    sys.stdin.readline()


def _ask() -> None:
    import torch.distributed as dist

    port, requests, clients = map(int, sys.argv[1:])
    store = dist.TCPStore("127.0.0.1", port, None, is_master=False, wait_for_workers=False)
    store.add(f"ready/{clients}", 1)
    while store.add(f"ready/{clients}", 0) < clients:
        pass
    times = [time.perf_counter()]
    for _ in range(requests):
        store.add("next", 1)
        times.append(time.perf_counter())
    print(json.dumps([times[-1] - times[0], float(np.median(np.diff(times)))]))
