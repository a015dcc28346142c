"""The journal: a replay gives a run's weights to the bit, and damaged or foreign journals are refused."""

import json
import math
import os
import zlib

import pytest
import torch

from esfast import ES, NOISE_VERSION, Plan
from esfast.journal.journal import Journal, header_of, read, replay
from esfast.update.updater import Rule


def plan_of(dtype=torch.float32, size=50):
    torch.manual_seed(1)
    return Plan([("a", torch.randn(size).to(dtype)), ("b", (torch.randn(6, 7) * 0.02).to(dtype))])


def train(plan, path, generations=5, **options):
    es = ES(plan, sigma=0.02, lr=0.05, population_size=6, journal=path, **options)
    return es, [step(es) for _ in range(generations)]


def step(es):
    for member in es.population():
        member.reward = math.cos(member.seed % 10_000 + member.sign)
    return es.step()


def with_crc(fields) -> str:
    text = fields if isinstance(fields, str) else json.dumps(fields, separators=(",", ":"))
    return f"{text} {zlib.crc32(text.encode()):08x}"


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize(
    "options",
    ({}, {"mirrored": True}, {"noise": "rademacher", "seed": 2**64 - 1}, {"noise": "low_rank", "rank": 3}),
    ids=str,
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_replay_gives_the_weights_to_the_bit(dtype, options, backend, tmp_path, same_bits):
    plan, again = plan_of(dtype), plan_of(dtype)
    train(plan, tmp_path / "journal.jsonl", **options)
    assert not same_bits(plan.tensors, again.tensors)
    replay(again, tmp_path / "journal.jsonl", backend=backend)
    assert same_bits(plan.tensors, again.tensors)


def test_replay_of_the_first_generations(tmp_path, same_bits):
    path, plan, short = tmp_path / "journal.jsonl", plan_of(), plan_of()
    train(short, tmp_path / "short.jsonl", generations=2)
    train(plan, path, generations=4)
    for until, wanted in ((0, plan_of()), (2, short), (4, plan), (None, plan)):
        found = plan_of()
        replay(found, path, until=until)
        assert same_bits(found.tensors, wanted.tensors)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "folder" / "journal.jsonl"  # made on the way
    _, records = train(plan_of(), path, seed=2**63 + 1, mirrored=True)
    header, found, _ = read(path)
    assert header == {
        "esfast_journal": 2,
        "noise_version": NOISE_VERSION,
        "noise": "gaussian",
        "rounding": "nearest",
        "optimizer": {"name": "sgd"},
        "decay_to": "zero",
        "seed": 2**63 + 1,
        "weights": "base",
        "numel": 92,
        "layout": plan_of().layout,
        "base": plan_of().fingerprint(),
    }
    assert found == records
    assert [r.generation for r in found] == list(range(5))


def test_a_run_without_steps_is_a_journal(tmp_path, same_bits):
    train(plan_of(), tmp_path / "journal.jsonl", generations=0)
    plan = plan_of()
    replay(plan, tmp_path / "journal.jsonl")
    assert same_bits(plan.tensors, plan_of().tensors)


def test_a_reader_needs_no_64_bit_numbers(tmp_path):
    """Seeds are text, since many JSON readers keep 53 bits of a number; coefficients are float32 values."""
    train(plan_of(), tmp_path / "journal.jsonl", generations=1)
    line = json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[1].rpartition(" ")[0])
    assert all(len(s) == 16 and int(s, 16) < 2**64 for s in line["seeds"])
    assert all(torch.tensor(c, dtype=torch.float32).double().item() == c for c in line["coeffs"])


# ---- damage ---------------------------------------------------------------------------------------------------------


def bytes_of_lines(path):
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("number", (1, 2, 6))
@pytest.mark.parametrize("damage", ("digit", "cut", "checksum", "not utf-8", "blank"))
def test_a_damaged_line_is_refused_with_its_number(damage, number, tmp_path, same_bits):
    path = tmp_path / "journal.jsonl"
    train(plan_of(), path)
    lines = bytes_of_lines(path)
    assert len(lines) == 6
    line = lines[number - 1]
    middle = len(line) // 2
    changed = {
        "digit": line[:middle] + bytes([line[middle] ^ 1]) + line[middle + 1 :],
        "cut": line[:middle] + b"\n",
        "checksum": line[:-2] + bytes([line[-2] ^ 1]) + b"\n",
        "not utf-8": line[:middle] + b"\xff" + line[middle + 1 :],
        "blank": b"\n",
    }[damage]
    path.write_bytes(b"".join([*lines[: number - 1], changed, *lines[number:]]))
    plan = plan_of()
    with pytest.raises(ValueError, match=rf"journal: line {number} of .*journal\.jsonl is damaged"):
        replay(plan, path)
    assert same_bits(plan.tensors, plan_of().tensors)


@pytest.mark.parametrize("wrong", ("missing", "twice", "swapped"))
def test_generations_out_of_order_are_refused(wrong, tmp_path, same_bits):
    path = tmp_path / "journal.jsonl"
    train(plan_of(), path)
    lines = bytes_of_lines(path)
    order = {"missing": [0, 1, 3, 4, 5], "twice": [0, 1, 2, 2, 3], "swapped": [0, 1, 3, 2, 4]}[wrong]
    path.write_bytes(b"".join(lines[i] for i in order))
    plan = plan_of()
    with pytest.raises(ValueError, match=r"journal: line \d of .*journal\.jsonl.* generation"):
        replay(plan, path)
    assert same_bits(plan.tensors, plan_of().tensors)


HEADER = {
    "esfast_journal": 2,
    "noise": "gaussian",
    "noise_version": NOISE_VERSION,
    "seed": 0,
    "weights": "base",
    "numel": 92,
    "layout": "01234567",
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not begin with the header of an esfast journal of format 2"),
        (with_crc({**HEADER, "esfast_journal": 1}), "does not begin with the header of an esfast journal of format 2"),
        (with_crc({"generation": 0}), "does not begin with the header"),
        (with_crc([1, 2]), "does not begin with the header"),
        (with_crc({**HEADER, "noise_version": 7}), f"of noise version 7, this is {NOISE_VERSION}"),
        (with_crc({**HEADER, "weights": "inplace"}), 'of a run with weights="inplace", which can\'t be replayed'),
        (with_crc(HEADER), "with 92 weights and layout 01234567 .of names, shapes and dtypes., the plan has 92 and"),
    ],
)
def test_a_foreign_journal_is_refused(text, message, tmp_path, same_bits):
    path, plan = tmp_path / "journal.jsonl", plan_of()
    path.write_text(text and text + "\n")
    with pytest.raises(ValueError, match=f"journal: .*{message}"):
        replay(plan, path)
    assert same_bits(plan.tensors, plan_of().tensors)


def test_generations_that_the_journal_lacks_are_refused(tmp_path, same_bits):
    train(plan_of(), tmp_path / "journal.jsonl", generations=2)
    for until in (3, -1):
        plan = plan_of()
        with pytest.raises(ValueError, match="until"):
            replay(plan, tmp_path / "journal.jsonl", until=until)
        assert same_bits(plan.tensors, plan_of().tensors)


# ---- writing --------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_refused(tmp_path, same_bits):
    path = tmp_path / "journal.jsonl"
    path.write_text("something dear\n")
    plan = plan_of()
    with pytest.raises(FileExistsError, match="journal: .*journal.jsonl exists already; give the run another folder"):
        ES(plan, journal=path)
    assert path.read_text() == "something dear\n" and same_bits(plan.tensors, plan_of().tensors)


@pytest.mark.parametrize("fault", ("open", "fsync"))
def test_a_journal_that_can_not_be_written_changes_no_weight(fault, tmp_path, monkeypatch, same_bits):
    """If a line of the journal can't be written, no weight changes. Once there is room, the same step can be taken, and
    the journal holds it once."""
    path, plan = tmp_path / "journal.jsonl", plan_of()
    es, _ = train(plan, path, generations=1)
    before = [t.clone() for t in plan.tensors]
    for member in es.population():
        member.reward = member.index

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full) if fault == "fsync" else patch.setattr("builtins.open", full)
        with pytest.raises(OSError, match="No space left"):
            es.step()
    assert same_bits(plan.tensors, before) and es.generation == 1
    es.step()
    assert es.generation == 2
    again = plan_of()
    replay(again, path)
    assert same_bits(plan.tensors, again.tensors) and len(read(path)[1]) == 2


def test_the_record_is_on_disk_before_the_weights_change(tmp_path, monkeypatch):
    path, plan = tmp_path / "journal.jsonl", plan_of()
    es, _ = train(plan, path, generations=0)
    lines_then = []
    update = es.store.update
    monkeypatch.setattr(es.store, "update", lambda *a: lines_then.append(len(bytes_of_lines(path))) or update(*a))
    step(es)
    assert lines_then == [2]


def test_a_journal_grows_by_a_line_a_generation(tmp_path):
    path, plan = tmp_path / "journal.jsonl", plan_of()
    journal = Journal.create(path, header_of(Rule(), 0, "base", plan))
    es = ES(plan, population_size=2)
    for n in range(1, 4):
        before = path.read_bytes()
        journal.append(step(es))
        assert path.read_bytes().startswith(before) and len(bytes_of_lines(path)) == n + 1


@pytest.mark.parametrize("other", ["name", "dtype", "shape", "order"])
def test_a_model_of_another_layout_is_refused(other, tmp_path):
    ES(plan_of(), journal=tmp_path / "journal.jsonl")
    entries = [(e.name, e.tensor) for e in plan_of().entries]
    (name, tensor), rest = entries[0], entries[1:]
    changed = {
        "name": [(name + "_", tensor), *rest],
        "dtype": [(name, tensor.to(torch.float16 if tensor.dtype != torch.float16 else torch.float32)), *rest],
        "shape": [(name, tensor.reshape(1, *tensor.shape)), *rest],
        "order": [*rest, (name, tensor)],
    }[other]
    if other == "order":
        assert Plan(changed).layout != plan_of().layout  # of bits alike, but a journal names one model
    with pytest.raises(ValueError, match="is of a model with"):
        replay(Plan(changed), tmp_path / "journal.jsonl")
