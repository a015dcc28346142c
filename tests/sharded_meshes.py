"""Checks of tensors that are sharded along two mesh dimensions, and of groups of ranks that hold a model together; run as
those of sharded.py are."""

import sys
from pathlib import Path

import torch.distributed as dist
from sharded import Twin, along, check, reward_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from esfast import ES
from esfast.core.noise import noise
from esfast.distributed.team import Team
from esfast.journal.journal import replay


@check((4,))
def a_mesh_of_two_dimensions(world):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    both = [
        [Shard(0), Shard(1)],
        [Shard(1), Shard(0)],
        [Shard(0), Shard(0)],
        [Shard(1), Shard(1)],
        [Replicate(), Shard(0)],
        [Shard(1), Replicate()],
        [Replicate(), Replicate()],
    ]
    for placements in both:
        deepest = max(getattr(p, "dim", 0) for p in placements)
        Twin(mesh, lambda t, p=placements, d=deepest: p if t.dim() > d else None).run()
    even = {"a": noise(1, "w", (8, 3)).bfloat16(), "b": noise(2, "w", (12, 4))}
    Twin(mesh, lambda t: [_StridedShard(0, split_factor=2), Shard(0)], even).run()


@check((4,))
def groups_of_ranks(world):
    run_of_groups("gaussian")


@check((4,))
def groups_of_ranks_with_low_rank_noise(world):
    run_of_groups("low_rank", rank=2)


def run_of_groups(kind, **options):
    """A mesh of replicas x shards: the two ranks of a group hold a model together and get the same members; the groups
    get different ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    store = dist.distributed_c10d._get_default_store()
    team, other = (
        Team(dist.PrefixStore(n, store), dist.get_rank(), 4, shards=2) for n in (f"{kind} team", f"{kind} other")
    )
    twin = Twin(mesh["shards"], along(0))
    options |= dict(sigma=0.02, lr=0.1, population_size=6, mirrored=True, noise=kind)
    folder = Path(sys.argv[3])
    mine, alone = folder / f"groups-{kind}.jsonl", folder / f"alone-{kind}{dist.get_rank()}.jsonl"
    es = ES(twin.plans[0], team=team, journal=mine, **options)
    reference = ES(twin.plans[1], journal=alone, **options)
    for generation in range(3):
        scored = []
        for member in es.population():
            scored.append(member.index)
            assert member.index < 6
            told = [None, None]
            dist.all_gather_object(told, member.index, group=mesh["shards"].get_group())
            assert told == [member.index] * 2, "the ranks of a group must score the same member"
            member.reward = reward_of(member)
        for member in reference.population():
            member.reward = reward_of(member)
        everyone = [None] * 4
        dist.all_gather_object(everyone, scored)
        assert everyone[0] == everyone[1] and everyone[2] == everyone[3]
        assert sorted(everyone[0] + everyone[2]) == list(range(6))
        assert es.step() == reference.step()
        twin.compare(f"generation {generation}")
    es.record_fingerprint()
    reference.record_fingerprint()
    dist.barrier()
    assert mine.read_bytes() == alone.read_bytes()
    # sharded in another way, from the journal of whole tensors and back
    again = Twin(mesh["shards"], lambda t: [Shard(t.dim() - 1)])
    replay(again.plans[0], alone)
    replay(again.plans[1], mine)
    again.compare("replayed")
    resumed = ES(Twin(mesh["shards"], along(0)).plans[0], team=other, journal=mine, resume=True, **options)
    assert resumed.generation == 3 and resumed.plan.fingerprint() == reference.plan.fingerprint()
    team.close()
    other.close()
