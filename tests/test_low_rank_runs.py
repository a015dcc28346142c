"""Runs with low-rank noise: what ES, the journal, the command line and drop-ins make of it; and factors alone."""

import json
import math

import pytest
import torch
from life import FEW, trainer

import esfast
from esfast import ES, Plan, Slice, add_noise_, cli
from esfast.core import kinds
from esfast.integrations.mezo import ZOParameters, zo_perturb_parameters, zo_update
from esfast.journal.export import pack
from esfast.journal.journal import read, replay
from esfast.update.updater import Rule

SHAPES = {"embed": (40, 9), "norm": (9,), "proj": (9, 9), "experts": (3, 5, 9), "conv": (4, 2, 3, 3)}


def tensors(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return {n: (torch.randn(s, generator=generator) * 0.02).to(dtype) for n, s in SHAPES.items()}


def train(items, generations=3, **options):
    es = ES(items, sigma=1e-3, lr=5e-3, population_size=4, noise="low_rank", **options)
    for _ in range(generations):
        for member in es.population():
            member.reward = float(member.seed % 1000)
        es.step()
    return es


@pytest.mark.parametrize("weights", ["base", "master", "host", "inplace"])
def test_an_update_is_one_pass_of_add_noise(weights, same_bits):
    """And a member is the base plus its noise, in every mode."""
    mine, theirs = tensors(torch.float32), Plan(tensors(torch.float32).items())
    es = ES(mine.items(), 1e-3, 5e-3, population_size=4, noise="low_rank", rank=3, weights=weights)
    for member in es.population():
        wanted = theirs.clone()
        add_noise_(wanted, [member.seed], [1e-3], noise="low_rank", rank=3)
        exact = weights in ("base", "master") or member.index == 0
        close = [torch.allclose(a, b, atol=1e-7) for a, b in zip(mine.values(), wanted.tensors, strict=True)]
        assert all(close) and (same_bits(list(mine.values()), wanted.tensors) or not exact)
        member.reward = float(member.index)
    record = es.step()
    add_noise_(theirs, record.seeds, record.coeffs, noise="low_rank", rank=3)
    assert weights == "inplace" or same_bits(list(mine.values()), theirs.tensors)


def test_drift_is_measured_against_the_same_noise():
    """The sample that inplace watches is of matrices, not of vectors."""
    es = train(tensors(torch.float32).items(), 5, weights="inplace", rank=2)
    assert 0 < es.drift() < 1e-7


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2},
        {"rank": 3, "weights": "master", "mirrored": True},
        {"rounding": "stochastic", "optimizer": "adam"},
        {"groups": ["*proj*:sigma=2,lr=0.5"], "weight_decay": 1.0, "decay_to": "initial"},
        {"optimizer": "momentum"},
    ],
    ids=str,
)
def test_replay_and_export_give_the_same_bits(options, tmp_path, same_bits):
    es = train(tensors().items(), journal=tmp_path / "journal.jsonl", **options)
    es.record_fingerprint()
    header = read(tmp_path / "journal.jsonl").header
    assert (header["noise"], header["rank"]) == ("low_rank", options.get("rank", 1))
    pack(tmp_path / "journal.jsonl", tmp_path / "run.safetensors")
    for record in ("journal.jsonl", "run.safetensors"):
        for backend in ("cpu", "reference"):
            again = Plan(tensors().items())
            replay(again, tmp_path / record, backend=backend)
            assert same_bits(again.tensors, es.plan.tensors), (record, backend)
    assert Rule.from_json(es.rule.to_json()) == es.rule


def test_journals_of_other_kinds_are_as_before(tmp_path):
    es = ES(tensors().items(), population_size=2, journal=tmp_path / "journal.jsonl")
    header = json.loads((tmp_path / "journal.jsonl").read_text().rpartition(" ")[0])
    assert "rank" not in header and Rule.from_json(header) == es.rule


def test_a_reader_that_does_not_know_the_kind_refuses_it(tmp_path, monkeypatch, same_bits):
    """What esfast 0.1.0 without low-rank noise says: `check_kind` was the same, with fewer kinds."""
    train(tensors().items(), journal=tmp_path / "journal.jsonl")
    monkeypatch.setattr(kinds, "KINDS", kinds.ELEMENTWISE)
    again = Plan(tensors().items())
    with pytest.raises(ValueError, match="noise: expected one of 'gaussian', 'rademacher', got 'low_rank'"):
        replay(again, tmp_path / "journal.jsonl")
    assert same_bits(again.tensors, list(tensors().values()))


def test_another_rank_is_another_run(tmp_path):
    train(tensors().items(), journal=tmp_path / "journal.jsonl", rank=2)
    for options, words in (
        ({"noise": "low_rank", "rank": 3}, "is of a run with rank 2, this one has 3"),
        ({"noise": "low_rank"}, "is of a run with rank 2, this one has 1"),
        ({}, "is of a run with noise 'low_rank', this one has 'gaussian'"),
    ):
        with pytest.raises(ValueError, match=words):
            ES(tensors().items(), population_size=4, journal=tmp_path / "journal.jsonl", resume=True, **options)


def test_what_can_not_be_done_is_refused_before_a_weight_changes(same_bits):
    """Where groups cut the weights into several passes, none of them may have run."""
    collide = {"w": torch.ones(3, 3), "w/A": torch.ones(3)}
    scattered = {"w": torch.ones(3, 3), "v": torch.ones(2, 70_000).t()[:, ::2].t()}
    scattered["v"] = torch.ones(300, 300, 2).permute(1, 0, 2).transpose(1, 2)
    for items, words in ((collide, "have the same 32-bit id"), (scattered, "scattered over more than 65536 matrices")):
        for make in (
            lambda items: ES(items.items(), population_size=2, noise="low_rank", groups=["w:lr=2"]),
            lambda items: ZOParameters(items.items(), noise="low_rank"),
        ):
            before = {n: t.clone() for n, t in items.items()}
            with pytest.raises(ValueError, match=words):
                make(items)
            assert same_bits(list(items.values()), list(before.values()))


def test_mezo(same_bits):
    mine, before = tensors(), list(tensors().values())
    zo = ZOParameters(mine.items(), 1e-3, noise="low_rank", rank=2)
    plan = Plan(tensors().items())
    with esfast.perturbed(plan, 5, 1e-3, noise="low_rank", rank=2):
        wanted = [t.clone() for t in plan.tensors]
    for factor, found in ((1, wanted), (-1, before)):
        zo_perturb_parameters(zo, 5, factor)
        assert same_bits(list(mine.values()), found)
    zo_update(zo, [7, 8], [0.3, -0.5], 0.01)
    add_noise_(plan, [7, 8], [-0.01 * 0.3 / 2, 0.01 * 0.5 / 2], noise="low_rank", rank=2)
    assert same_bits(list(mine.values()), plan.tensors)


# ---- the trainer and the command line -------------------------------------------------------------------------------


def test_settings():
    assert esfast.ESConfig(noise="low_rank", rank=4).rank == 4
    for settings, words in (
        ({"noise": "low_rank", "rank": 0}, "ESConfig.rank: expected 1 <= ESConfig.rank < 257, got 0"),
        ({"rank": 2}, "ESConfig.rank: 'gaussian' noise has no rank, got 2; take 'low_rank' noise"),
        ({"noise": "low_rank", "rank": 1.5}, "ESConfig.rank: expected an int"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            esfast.ESConfig(**settings)


def test_a_trained_model_learns_and_resumes(tmp_path, same_bits):
    made = trainer(tmp_path / "run", noise="low_rank", rank=2)
    made.train()
    twin = trainer(tmp_path / "twin", noise="low_rank", rank=2, at=lambda m: stop_at(m, 2))
    with pytest.raises(ZeroDivisionError):
        twin.train()
    again = trainer(tmp_path / "twin", noise="low_rank", rank=2, resume=True)
    again.train()
    assert same_bits(again.es.plan.tensors, made.es.plan.tensors)


def stop_at(made, generation):
    if made.es.generation == generation and made.es._inside is not None:
        raise ZeroDivisionError("made to fail")


def test_the_commands(tiny, tmp_path, capsys):
    torch.set_num_threads(1)
    few = ["--model", tiny, "--reward-workers", "0", *FEW]
    out = tmp_path / "run"
    assert cli.main(["train", *few, "--out", str(out), "--rank", "2"]) == 1
    assert "--rank: 'gaussian' noise has no rank, got 2" in capsys.readouterr().err
    assert cli.main(["train", *few, "--noise", "low_rank", "--rank", "2", "--generations", "2", "--out", str(out)]) == 0
    assert "rank: 2" in (out / "config.yaml").read_text()
    assert cli.main(["train", "--out", str(out), "--resume", "--generations", "3", "--no-progress"]) == 0
    assert cli.main(["export", str(out), "--out", str(tmp_path / "e.safetensors")]) == 0
    for number, journal in enumerate((out / "journal.jsonl", tmp_path / "e.safetensors")):
        again = tmp_path / f"again{number}"
        assert cli.main(["replay", str(journal), "--base", tiny, "--out", str(again)]) == 0
        tuned = [(f / "model.safetensors").read_bytes() for f in (again, out / "model")]
        assert tuned[0] == tuned[1]


# ---- factors alone --------------------------------------------------------------------------------------------------


def buffers_of(shape, rank, dtype=torch.float32):
    if len(shape) == 3:
        return torch.full((rank, *shape[:2]), 7.0, dtype=dtype), torch.full(
            (rank, shape[0], shape[2]), 7.0, dtype=dtype
        )
    return torch.full((rank, shape[0]), 7.0, dtype=dtype), torch.full((rank, *shape[1:]), 7.0, dtype=dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rank", [1, 3])
def test_factors_are_what_add_noise_uses(rank, backend, same_bits):
    plan = Plan({n: torch.zeros(s) for n, s in SHAPES.items()}.items())
    out = {n: buffers_of(s, rank) for n, s in SHAPES.items() if len(s) > 1}
    esfast.low_rank_factors(plan, 5, rank, out=out, coeff=-0.25, backend=backend)
    for name, (a, b) in out.items():
        assert same_bits(b, esfast.noise(5, name + "/B", tuple(b.shape)))
        scale = torch.tensor(-0.25) * torch.tensor(1 / math.sqrt(rank))
        assert same_bits(a, scale * esfast.noise(5, name + "/A", tuple(a.shape)))
        shape = SHAPES[name]
        dense = torch.einsum(
            "qei,qek->eik",
            a.reshape(rank, -1, shape[1] if len(shape) == 3 else shape[0]).double(),
            b.reshape(rank, a[0].numel() // (shape[1] if len(shape) == 3 else shape[0]), -1).double(),
        )
        wanted = -0.25 * esfast.noise(5, name, shape, "low_rank", rank).double()
        torch.testing.assert_close(dense.reshape(shape), wanted, rtol=1e-5, atol=1e-6)


def test_factors_of_slices_go_into_lora_slots(same_bits):
    """Transposed and narrower than the slot, in bfloat16, of the rows and columns that a shard has."""
    part = Plan(
        [("w", torch.zeros(5, 6), Slice((50, 60), (10, 24))), ("e", torch.zeros(1, 4, 6), Slice((3, 8, 6), (2, 4, 0)))]
    )
    lora_a, lora_b = torch.full((8, 6), 7.0).bfloat16(), torch.full((5, 8), 7.0).bfloat16()
    experts = buffers_of((1, 4, 6), 2)
    esfast.low_rank_factors(part, 3, 2, out={"w": (lora_b[:, :2].T, lora_a[:2]), "e": experts})
    a, b = esfast.noise(3, "w/A", (2, 50)), esfast.noise(3, "w/B", (2, 60))
    scale = torch.tensor(1 / math.sqrt(2))
    assert same_bits(lora_a[:2], b[:, 24:30].bfloat16()) and same_bits(
        lora_b[:, :2].T.contiguous(), (scale * a[:, 10:15]).bfloat16()
    )
    assert (lora_a[2:] == 7).all() and (lora_b[:, 2:] == 7).all()
    assert same_bits(experts[0], scale * esfast.noise(3, "e/A", (2, 3, 8))[:, 2:, 4:])
    assert same_bits(experts[1], esfast.noise(3, "e/B", (2, 3, 6))[:, 2:])


def test_wrong_buffers_are_refused(same_bits):
    plan = Plan({"w": torch.ones(4, 5), "norm": torch.ones(4), "e": torch.ones(2, 4, 5)}.items())
    a, b = torch.full((1, 4), 7.0), torch.full((1, 5), 7.0)
    pieces = Plan([("w", torch.ones(2, 5), Slice((4, 5), (0, 0))), ("w", torch.ones(2, 5), Slice((4, 5), (2, 0)))])
    for of, out, words in (
        (plan, {}, "out: expected a dict of"),
        (plan, [(a, b)], "out: expected a dict of"),
        (plan, {"v": (a, b)}, "out: unknown tensor 'v'"),
        (plan, {"norm": (a, b)}, r"out: 'norm' \(4,\) float32 is no matrix"),
        (plan, {"w": a}, "out: expected a pair of buffers"),
        (plan, {"w": (a, [1])}, "out: b of 'w' must be a torch.Tensor, got list"),
        (plan, {"w": (b, a)}, r"out: a of 'w' must have the shape \(1, 4\) for 'w' \(4, 5\) float32, got \(1, 5\)"),
        (plan, {"w": (a, b.double())}, "float64, expected float32"),
        (plan, {"e": (a, b)}, r"out: a of 'e' must have the shape \(1, 2, 4\)"),
        (pieces, {"w": (a, b)}, "out: the plan has 'w' in 2 pieces"),
        (plan, {"w": (a, b), "e": (torch.ones(1, 2, 4), a[:, :1].expand(1, 10).view(1, 2, 5))}, "overlap"),
        ("model", {"w": (a, b)}, "plan: expected an esfast.Plan"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            esfast.low_rank_factors(of, 1, out=out)
    square = Plan({"p": torch.ones(4, 4), "q": torch.ones(4, 4)}.items())
    with pytest.raises(ValueError, match="a buffer is given twice"):
        esfast.low_rank_factors(square, 1, out={"p": (a, torch.ones(1, 4)), "q": (a, torch.ones(1, 4))})
    for options in ({"rank": 0}, {"seed": -1}, {"coeff": math.inf}, {"backend": "gpu"}):
        with pytest.raises(ValueError):
            esfast.low_rank_factors(plan, **{"seed": 1, "out": {"w": (a, b)}, **options})
    assert (a == 7).all() and (b == 7).all()
