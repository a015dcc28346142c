"""What low-rank noise refuses: at the door, by name, with weights, buffers and files as they were."""

import json
import zlib

import numpy as np
import pytest
import torch

import esfast
from esfast import ES, Plan, Slice, add_noise_, low_rank_factors, perturbed
from esfast.integrations.mezo import ZOParameters, zo_perturb_parameters, zo_update
from esfast.journal.export import pack
from esfast.journal.journal import read, replay
from esfast.utils.suggest import did_you_mean


def tensors():
    return {"w": torch.ones(4, 6), "v": torch.ones(5)}


def run(**options):
    es = ES(tensors().items(), 1e-3, 1e-2, population_size=2, noise="low_rank", **options)
    for _ in range(2):
        for member in es.population():
            member.reward = float(member.index)
        es.step()
    return es


def enter(plan, *args, **options):
    with perturbed(plan, *args, **options):
        pass


DOORS = {
    "noise": lambda plan, **o: esfast.noise(1, "w", (4, 6), o.pop("noise"), **o),
    "add_noise_": lambda plan, **o: add_noise_(plan, [1], [0.5], **o),
    "perturbed": lambda plan, **o: enter(plan, 1, 0.5, **o),
    "ES": lambda plan, **o: ES(plan, population_size=2, **o),
    "ESConfig": lambda plan, **o: esfast.ESConfig(**o),
    "MeZO": lambda plan, **o: ZOParameters(plan, **o),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "rank",
    [
        torch.tensor(True),
        np.array(True),
        torch.empty((), dtype=torch.long, device="meta"),
        True,
        1.5,
        None,
        0,
        257,
        "x",
    ],
    ids=repr,
)
def test_ranks_that_are_none(door, rank, same_bits):
    plan = Plan(tensors().items())
    with pytest.raises((TypeError, ValueError), match="rank: expected (an int, got|1 <= )"):
        DOORS[door](plan, noise="low_rank", rank=rank)
    assert same_bits(plan.tensors, list(tensors().values()))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("low-rank", " Did you mean 'low_rank'?"),
        ("LOW_RANK", " Did you mean 'low_rank'?"),
        ("lora", " Did you mean 'low_rank'?"),
        ("zz", ""),
        (np.array(["low_rank", "gaussian"]), ""),
        (["low_rank"], ""),
        (None, ""),
    ],
    ids=str,
)
def test_kinds_that_are_none(door, kind, hint):
    with pytest.raises((TypeError, ValueError)) as error:
        DOORS[door](Plan(tensors().items()), noise=kind)
    assert "noise: expected one of 'gaussian', 'rademacher', 'low_rank', got" in str(error.value)
    assert hint in str(error.value)


def test_a_hint_looks_at_letters_and_not_at_their_case():
    assert did_you_mean("GAUSIAN", ["gaussian", "Low"]) == " Did you mean 'gaussian'?"
    assert did_you_mean("low", ["Low"]) == " Did you mean 'Low'?" and did_you_mean("xyz", ["Low"]) == ""


@pytest.mark.parametrize("rank", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=repr)
def test_a_rank_of_numpy_or_torch_is_that_number_in_the_journal(rank, tmp_path, same_bits):
    es = run(rank=rank, journal=tmp_path / "journal.jsonl")
    assert read(tmp_path / "journal.jsonl").header["rank"] == 3
    again = ES(
        tensors().items(),
        1e-3,
        1e-2,
        population_size=2,
        noise="low_rank",
        rank=3,
        journal=tmp_path / "journal.jsonl",
        resume=True,
    )
    assert same_bits(again.plan.tensors, es.plan.tensors) and again.generation == 2


@pytest.mark.parametrize("kind", ["low_rank", "gaussian"])
@pytest.mark.parametrize("shape", [(2**62, 2), (2**40, 2**40), 2**63 - 1, (2**40, 2**18)], ids=str)
def test_noise_of_more_elements_than_memory_holds(shape, kind):
    with pytest.raises(ValueError, match="elements, and memory can't hold a number for each; add_noise_ adds"):
        esfast.noise(1, "w", shape, kind)
    assert esfast.noise(1, "w", (2**62, 0), kind).shape == (2**62, 0)


@pytest.mark.parametrize(
    "coeff", ["0.5", b"1", True, np.True_, torch.tensor(True), torch.empty((), device="meta")], ids=repr
)
def test_coefficients_that_are_no_numbers(coeff, same_bits):
    plan, out = Plan(tensors().items()), (torch.ones(1, 4), torch.ones(1, 6))
    with pytest.raises(TypeError, match="coeffs: expected numbers, got"):
        add_noise_(plan, [1], [coeff], noise="low_rank")
    with pytest.raises(TypeError, match="coeffs: expected numbers, got"):
        low_rank_factors(plan, 1, out={"w": out}, coeff=coeff)
    assert same_bits(plan.tensors, list(tensors().values())) and all((t == 1).all() for t in out)


@pytest.mark.parametrize("kind", ["gaussian", "low_rank"])
@pytest.mark.parametrize("name", ["", None, 3, b"w", "\ud800"], ids=repr)
def test_names_that_are_none(name, kind):
    """Low-rank noise makes two names of it: of None it made 'None/A'."""
    with pytest.raises((TypeError, ValueError), match="name: (expected a non-empty str|.* has no UTF-8 bytes)"):
        esfast.noise(1, name, (2, 3), kind)
    with pytest.raises((TypeError, ValueError), match="name"):
        Plan([(name, torch.ones(2, 3))])


@pytest.mark.parametrize("together", [esfast.low_rank, esfast.stacked])
@pytest.mark.parametrize("members", [None, 3, [1, 2], [(1,)], [(1, 0.1, 2)], ["ab"], {1: 0.1}], ids=repr)
def test_members_that_are_no_pairs(together, members, same_bits):
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    with (
        pytest.raises(TypeError, match=r"members: expected \(seed, sigma\) pairs such as"),
        together(model, members),
    ):
        pass
    assert same_bits([p.detach() for p in model.parameters()], before)


def test_nested_tensors():
    nested = torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)])
    with pytest.raises(TypeError, match="Plan: 'w' is a nested tensor; pass the tensors inside it"):
        Plan([("w", nested)])


# ---- factors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("shape", "held", "offset"),
    [
        ((4, 6), (0, 6), (4, 0)),
        ((4, 6), (4, 0), (0, 6)),
        ((3, 4, 6), (0, 4, 6), (3, 0, 0)),
        ((4, 2, 3), (4, 0, 3), (0, 2, 0)),
    ],
    ids=str,
)
def test_an_empty_shard_has_factors_of_which_one_is_empty(shape, held, offset, backend, same_bits):
    """As a rank without rows has, of a matrix with fewer rows than ranks; beside a matrix that it holds whole."""
    plan = Plan([("w", torch.empty(held), Slice(shape, offset)), ("m", torch.ones(3, 2))])
    batch = held[:1] if len(shape) == 3 else ()
    a, b = torch.full((2, *held[: 1 + len(batch)]), 7.0), torch.full((2, *batch, held[-1]), 7.0)
    pair = torch.full((2, 3), 7.0), torch.full((2, 2), 7.0)
    for out in ({"w": (a, b), "m": pair}, {"m": pair, "w": (a, b)}, {"w": (a, b)}):
        low_rank_factors(plan, 5, 2, out=out, backend=backend)
    assert same_bits(pair[1], esfast.noise(5, "m/B", (2, 2)))
    # Each shard is at a corner of its whole, so the factor that is not empty is the whole's.
    if a.numel():
        assert torch.allclose(a, esfast.noise(5, "w/A", a.shape) / 2**0.5, atol=1e-6)
    if b.numel():
        assert same_bits(b, esfast.noise(5, "w/B", b.shape))


def test_buffers_in_the_memory_of_the_weights(same_bits):
    weights = torch.ones(4, 6)
    plan = Plan([("w", weights), ("v", torch.ones(5))])
    for out in ((weights[:1, :4], torch.ones(1, 6)), (torch.ones(1, 4), weights[3:])):
        with pytest.raises(ValueError, match="out: buffers can't be in the memory of the plan's weights"):
            low_rank_factors(plan, 1, out={"w": out})
    assert (weights == 1).all()


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "rank", "words"),
    [
        (2**64, 1, "seed: expected 0 <= seed"),
        (2**64 + 5, 1, "seed: expected 0 <= seed"),
        (-1, 1, "seed: expected 0 <= seed"),
        (1.5, 1, "seed: expected an int, got float"),
        (True, 1, "seed: expected an int, got bool"),
        (1, True, "rank: expected an int, got bool"),
        (1, 2.5, "rank: expected an int, got float"),
        (1, None, "rank: expected an int, got NoneType"),
    ],
)
def test_a_traced_call_checks_its_arguments_as_any_other(seed, rank, words, same_bits):
    """Seeds outside the range were folded into it, so other code's noise was drawn without a word."""
    plan = Plan(tensors().items())
    torch._dynamo.reset()
    compiled = torch.compile(lambda: add_noise_(plan, [seed], [0.5], noise="low_rank", rank=rank), backend="eager")
    with pytest.raises((TypeError, ValueError), match=words):
        compiled()
    assert same_bits(plan.tensors, list(tensors().values()))


# ---- journals -------------------------------------------------------------------------------------------------------


def rewritten(path, field):
    """The journal without one field of its header, with checksums that fit."""
    lines = path.read_text().splitlines(keepends=True)
    header = json.loads(lines[0].rpartition(" ")[0])
    del header[field]
    text = json.dumps(header, separators=(",", ":"))
    path.write_text("".join([f"{text} {zlib.crc32(text.encode()):08x}\n", *lines[1:]]))


@pytest.mark.parametrize(
    "field",
    ["rank", "noise", "rounding", "optimizer", "decay_to", "noise_version", "weights", "layout", "base"],
)
def test_a_header_without_a_field_is_refused_by_its_name(field, tmp_path, same_bits):
    run(rank=3, journal=tmp_path / "journal.jsonl")
    rewritten(tmp_path / "journal.jsonl", field)
    pack(tmp_path / "journal.jsonl", tmp_path / "run.safetensors")
    for name in ("journal.jsonl", "run.safetensors"):
        plan = Plan(tensors().items())
        with pytest.raises(ValueError, match=f"the header of .*{name} has no '{field}', which a replay needs"):
            replay(plan, tmp_path / name)
        assert same_bits(plan.tensors, list(tensors().values()))


# ---- MeZO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), None, "x", True, 1e-50, 4e38], ids=repr)
def test_a_zo_eps_that_is_none(value):
    with pytest.raises(ValueError, match="zo_eps: expected a positive finite number, got"):
        ZOParameters(tensors().items(), value, noise="low_rank")


@pytest.mark.parametrize("value", [-1, float("inf"), float("nan"), None, "x", True], ids=repr)
def test_a_weight_decay_that_is_none(value):
    with pytest.raises((TypeError, ValueError), match="weight_decay: expected a (finite )?number"):
        ZOParameters(tensors().items(), 1e-3, noise="low_rank", weight_decay=value)


def test_steps_of_mezo_that_are_none(same_bits):
    mine = tensors()
    zo = ZOParameters(mine.items(), 1e-3, noise="low_rank", rank=2)
    for arguments, words in (
        ((1, 1.0, float("nan")), "learning_rate: expected a finite number, got nan"),
        ((1, 1.0, None), "learning_rate: expected a number, got NoneType"),
        ((1, None, 0.1), "projected_grad: expected a number, got NoneType"),
        (([1, 2], [0.5, "x"], 0.1), "projected_grad: expected a number, got str"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            zo_update(zo, *arguments)
    with pytest.raises(TypeError, match="scaling_factor: expected a number, got NoneType"):
        zo_perturb_parameters(zo, 1, None)
    assert same_bits(list(mine.values()), list(tensors().values())) and zo.updates == 0
