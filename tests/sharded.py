"""Checks of sharded tensors, and `main`, which runs all that are registered on one rank and writes what came of each to
FOLDER/RANK.json, in a process whose arguments are RANK, WORLD and FOLDER. All ranks run the same checks in the same
order; see sharded_meshes.py, sharded_models.py and test_shards.py."""

import datetime
import json
import math
import re
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from esfast import ES, Plan, Slice, add_noise_
from esfast.core.noise import noise
from esfast.core.ops import AdamStep

CHECKS = {}
SHAPES = {"even": (8, 12), "uneven": (7, 5), "few": (2, 3), "row": (1, 6), "vector": (13,), "cube": (5, 4, 6)}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def check(worlds):
    def register(function):
        CHECKS[function.__name__] = (worlds, function)
        return function

    return register


def bits(t):
    return t.detach().contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def whole_tensors():
    items = list(SHAPES.items())
    return {name: noise(i, "weights", shape).to(DTYPES[i % 3]) for i, (name, shape) in enumerate(items)}


def reward_of(member):
    return math.cos(member.seed % 10_000 + member.sign)


class Twin:
    """Whole tensors and the same ones as DTensors, which every rank changes alike and compares."""

    def __init__(self, mesh, placements, tensors=None):
        self.whole = whole_tensors() if tensors is None else tensors
        self.placements = {n: p for n, t in self.whole.items() if (p := placements(t)) is not None}
        self.sharded = {n: distribute_tensor(self.whole[n].clone(), mesh, p) for n, p in self.placements.items()}
        self.mesh = mesh
        self.plans = Plan(self.sharded.items()), Plan([(n, self.whole[n]) for n in self.sharded])

    def compare(self, what):
        for name, found in self.sharded.items():
            expected = distribute_tensor(self.whole[name].clone(), self.mesh, self.placements[name]).to_local()
            assert same(found.to_local(), expected), f"{what}: {name} {self.placements[name]} differs on this rank"
            assert same(found.full_tensor(), self.whole[name]), f"{what}: {name} {self.placements[name]}, gathered"

    def run(self):
        sharded, whole = self.plans
        assert sharded.layout == whole.layout and sharded.whole_numel == whole.numel
        assert sharded.fingerprint() == whole.fingerprint()
        bases = sharded.clone(), whole.clone()
        for kind, rank in (("gaussian", 1), ("rademacher", 1), ("low_rank", 3)):
            for plan, base in zip(self.plans, bases, strict=True):
                add_noise_(plan, [2**63 + 5], [0.02], base=base, noise=kind, rank=rank)
            self.compare(f"perturb, {kind}")
        assert sharded.fingerprint() == whole.fingerprint()
        for plan, base in zip(self.plans, bases, strict=True):
            add_noise_(plan, [], [], base=base)
        self.compare("restore")
        for rounding, kind, rank in (
            ("nearest", "gaussian", 1),
            ("stochastic", "gaussian", 1),
            ("stochastic", "low_rank", 2),
        ):
            how = dict(rounding=rounding, noise=kind, rank=rank, decay=0.1)
            for plan, base in zip(self.plans, bases, strict=True):
                add_noise_(plan, [3, 4, 5], [0.01, -0.02, 0.03], anchor=base, **how)
            self.compare(f"update, {how}")


def along(dim):
    return lambda t: [Shard(dim)] if t.dim() > dim else None


# ---- one mesh dimension ---------------------------------------------------------------------------------------------


@check((2, 4))
def rows(world):
    Twin(world, along(0)).run()


@check((2, 4))
def columns(world):
    Twin(world, along(1)).run()


@check((2, 4))
def third_dimension(world):
    Twin(world, along(2)).run()


@check((2, 4))
def convolutions(world):
    """Low-rank noise takes the last dimensions of four for one, and any of them may be cut."""
    for dim in range(4):
        whole = {"conv": noise(1, "w", (5, 4, 3, 6)).bfloat16(), "patch": noise(2, "w", (4, 2, 7, 4))}
        Twin(world, along(dim), whole).run()


@check((2, 4))
def replicated(world):
    Twin(world, lambda t: [Replicate()]).run()


@check((2, 4))
def halves_of_a_fused_matrix(world):
    """gate and up in one matrix: each rank holds a part of either, which in the whole are far from each other."""
    fused = {"gate_up": noise(1, "w", (24, 6)).bfloat16(), "bias": noise(2, "w", (16,))}
    twin = Twin(world, lambda t: [_StridedShard(0, split_factor=2)], fused)
    assert [e.name for e in twin.plans[0].entries] == ["gate_up", "gate_up", "bias", "bias"]
    twin.run()


@check((2, 4))
def a_fused_qkv_given_as_slices(world):
    """A fused matrix of a tensor-parallel engine, whose parts get the noise of the model's q, k and v."""
    rank, size = dist.get_rank(), dist.get_world_size()
    shapes = {"q": (16, 6), "k": (8, 6), "v": (8, 6)}
    whole = {n: noise(i, "w", s).bfloat16() for i, (n, s) in enumerate(shapes.items())}
    mine = [distribute_tensor(t, world, [Shard(0)]).to_local() for t in whole.values()]
    fused = torch.cat(mine)
    parts, at = [], 0
    for (name, shape), part in zip(shapes.items(), mine, strict=True):
        n = len(part)
        parts.append((name, fused[at : at + n], Slice(shape, (rank * n, 0))))
        at += n
    # and a DTensor that is itself a part of a whole
    wide = {"q": whole["q"], "kv": torch.cat([whole["k"], whole["v"]])}
    k, v = (distribute_tensor(whole[n].clone(), world, [Shard(0)]) for n in "kv")
    halves = [
        ("q", distribute_tensor(whole["q"].clone(), world, [Shard(0)])),
        ("kv", k, Slice((16, 6), (0, 0))),
        ("kv", v, Slice((16, 6), (8, 0))),
    ]
    for plan, expected in ((Plan(parts), whole), (Plan(halves), wide)):
        reference = Plan([(n, t.clone()) for n, t in expected.items()])
        assert plan.layout == reference.layout
        for p in (plan, reference):
            add_noise_(p, [1, 2], [0.1, 0.2])
        for entry in plan.entries:
            target = reference.tensors[reference.names.index(entry.name)]
            for d, (o, n) in enumerate(zip(entry.window.offset, entry.tensor.shape, strict=True)):
                target = target.narrow(d, o, n)
            assert same(entry.tensor, target), entry.name
        if plan.names != ["q", "k", "v"]:
            assert plan.fingerprint() == reference.fingerprint()
    assert size * fused.numel() == sum(t.numel() for t in whole.values())


def evolve(world, **options):
    """Two generations of the sharded and the whole weights, compared wherever a mode promises the bits."""
    twin = Twin(world, along(0))
    settings = dict(sigma=0.02, lr=0.05, population_size=4, seed=7, mirrored=True, weight_decay=0.1)
    runs = [ES(plan, **settings, **options) for plan in twin.plans]
    for _ in range(2):
        for members in zip(*(es.population() for es in runs), strict=True):
            twin.compare(f"{options}, member {members[0].index}")
            for m in members:
                m.reward = reward_of(m)
        for es in runs:
            es.step()
        twin.compare(f"{options}, after the update")


@check((2, 4))
def every_weight_mode(world):
    for mode in ("base", "master", "host", "inplace"):
        for rounding in ("nearest", "stochastic"):
            evolve(world, weights=mode, rounding=rounding)


@check((2, 4))
def every_optimizer(world):
    evolve(world, optimizer="momentum", decay_to="initial")
    evolve(world, optimizer="adam", weights="master")


@check((2, 4))
def low_rank_noise(world):
    for mode in ("base", "master", "host", "inplace"):
        evolve(world, noise="low_rank", rank=3, weights=mode, rounding="stochastic")
    evolve(world, noise="low_rank", optimizer="adam", weights="master", groups=["*e*:sigma=2,lr=0.5"])


@check((2, 4))
def adam_keeps_its_moments_by_the_local_plan(world):
    twin = Twin(world, along(0))
    masters = [p.master() for p in twin.plans]
    moments = [torch.zeros(2, m.flat_numel) for m in masters]
    for t in (1, 2, 3):
        for plan, master, m in zip(twin.plans, masters, moments, strict=True):
            add_noise_(master, [t, t + 9], [0.5, -0.25], adam=AdamStep.at(t, m, 0.01, 0.9, 0.99, 1e-8))
            add_noise_(plan, [], [], base=master)
        twin.compare(f"step {t}")
    assert masters[0].fingerprint() == masters[1].fingerprint() and moments[0].numel() < moments[1].numel()


@check((2, 4))
def a_rank_that_holds_nothing(world):
    """A tensor of one row: all ranks but the first have an empty plan, and must take part in all collective calls."""
    twin = Twin(world, along(0), {"row": whole_tensors()["row"], "other": noise(9, "w", (1, 4)).half()})
    assert len(twin.plans[0]) == (2 if dist.get_rank() == 0 else 0) and twin.plans[0].names == twin.plans[0].names
    twin.run()
    for mode in ("base", "master", "host", "inplace"):
        es = ES(twin.plans[0], population_size=2, weights=mode)
        for member in es.population():
            member.reward = float(member.index)
        es.step()
        es.drift()


@check((2, 4))
def tied_weights(world):
    """Tied parameters, also as a state dict gives them: two DTensors over one memory. Both may be empty on this
    rank."""
    for shape in ((8, 6), (1, 6)):
        embed = distribute_tensor(noise(1, "w", shape), world, [Shard(0)])
        head = embed.detach()
        other = distribute_tensor(noise(2, "w", shape), world, [Shard(0)])
        reference = Plan([("embed", noise(1, "w", shape)), ("other", noise(2, "w", shape))])
        plan = Plan([("embed", embed), ("head", head), ("other", other)])
        assert plan.layout == reference.layout
        for p in (plan, reference):
            add_noise_(p, [1], [1.0])
        assert same(head.full_tensor(), reference.tensors[0]) and same(other.full_tensor(), reference.tensors[1])


@check((2, 4))
def what_is_refused(world):
    local = torch.ones(4, 4)

    def made(t, placement, shape):
        return DTensor.from_local(t, world, [placement], run_check=False, shape=shape, stride=(4, 1))

    cases = [
        (made(local, Partial(), (4, 4)), TypeError, "'w' is a DTensor placed as .*Partial"),
        (made(local.int(), Replicate(), (4, 4)), TypeError, "'w' is torch.int32"),
        (made(local.to("meta"), Replicate(), (4, 4)), ValueError, "'w' is on the meta device"),
        (made(local[:, :0], Replicate(), (4, 0)), ValueError, "'w' has no elements"),
        (made(local, _StridedShard(0, split_factor=2), (5, 4)), ValueError, "can't be split into 2 equal parts"),
        (made(local, Shard(0), (40, 4)), ValueError, "should have .* but its local tensor has"),
    ]
    for tensor, error, words in cases:
        try:
            Plan([("w", tensor)])
        except error as e:
            assert re.search(words, str(e)), e
        else:
            raise AssertionError(f"not refused: {words}")


@check((2, 4))
def replicas_that_differ_are_found(world):
    mine = DTensor.from_local(torch.full((3, 3), float(dist.get_rank())), world, [Replicate()], run_check=False)
    try:
        Plan([("good", torch.ones(2)), ("w", mine)]).fingerprint()
    except RuntimeError as e:
        assert "ranks hold different bits of 'w'" in str(e)
    else:
        raise AssertionError("not found")


@check((2, 4))
def moved_memory_is_refused(world):
    layer = nn.Linear(8, 8, bias=False)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), world, [Shard(0)]))
    plan = Plan(layer)
    add_noise_(plan, [1], [1.0])
    layer.half()
    try:
        add_noise_(plan, [1], [1.0])
    except RuntimeError as e:
        assert "the memory of 'weight' moved" in str(e)
    else:
        raise AssertionError("not refused")


def main(rank, size, folder):
    rank, size = int(rank), int(size)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {}
    try:
        world = init_device_mesh("cpu", (size,))
        for name, (worlds, function) in CHECKS.items():
            if size in worlds:
                function(world)
                results[name] = "ok"
    except BaseException:
        results[name] = traceback.format_exc()
        raise
    finally:
        (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
