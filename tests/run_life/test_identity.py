"""Who resumes must resume the same run; damaged files of a run are named."""

import json

import pytest
from life import ROWS, contents, facts, make_model, other_value, stopped, trainer, value

from esfast import Plan, report
from esfast.journal.export import pack
from esfast.journal.journal import replay
from esfast.trainer.run_folder import RunFolder

# ---- what a run is --------------------------------------------------------------------------------------------------


class Counting:
    """A reward function that is an object."""

    def __call__(self, completions, **columns):
        return value(completions)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": other_value}, r"reward_funcs .*life:value.*, asked for is .*life:other_value"),
        ({"reward": [value, Counting()]}, r"reward_funcs .*Counting"),
        ({"rows": ROWS[:3]}, "train_dataset of 4 rows .* asked for is of 3 rows"),
        ({"rows": [{"prompt": "5"}, *ROWS[1:]]}, "train_dataset of 4 rows .* asked for is of 4 rows"),
        ({"rows": lambda generation, count: ROWS[:count]}, "train_dataset of 4 rows .* asked for is the function"),
        ({"sigma": 0.03}, "sigma 0.02, asked for is 0.03"),
    ],
    ids=["reward", "another reward", "fewer rows", "another row", "a function", "sigma"],
)
def test_what_a_run_is_must_be_the_same(changes, words, folder):
    before = contents(folder)
    with pytest.raises(ValueError, match=f"resume: the run has {words}"):
        trainer(folder, resume=True, generations=5, **changes)
    assert contents(folder) == before


def test_draws_must_be_the_same(folder):
    """A later version of esfast may draw rows in another way; it then writes another number into `draws`."""
    run = RunFolder(folder)
    run.identity.write_text(json.dumps(run.read_identity() | {"draws": 99}))
    with pytest.raises(ValueError, match="resume: the run has draws 99, asked for is 1"):
        trainer(folder, resume=True, generations=5)


def test_the_model_must_be_the_same(folder):
    class Other(type(make_model())):
        pass

    other = make_model()
    other.__class__ = Other
    with pytest.raises(ValueError, match=r"resume: the run has model Qwen2\w*, asked for is .*Other"):
        trainer(folder, resume=True, model=other)
    with pytest.raises(ValueError, match="resume: the run has model config: rms_norm_eps .*, asked for is 0.5"):
        trainer(folder, resume=True, model=make_model(rms_norm_eps=0.5))
    with pytest.raises(ValueError, match="is of a run with fingerprint of the base weights"):
        trainer(folder, resume=True, model=make_model(seed=1))


def test_what_says_how_a_run_is_looked_at_may_change_and_older_folders_say_less(folder, whole):
    model = make_model(_name_or_path="elsewhere", use_cache=False)
    trainer(folder, resume=True, generations=4, eval_rows=ROWS[:2], metrics={"more": value}, model=model, samples=1)
    (folder / "identity.json").unlink()
    assert trainer(folder, resume=True, generations=5, reward=value).train()["generations"] == 5
    assert json.loads((folder / "identity.json").read_text())["reward_funcs"] == ["life:value"]


# ---- damaged files --------------------------------------------------------------------------------------------------

DAMAGE = {"binary": b"\x00\xff\xfe\x80", "torn": b'{"a": [1, ', "of another kind": b"[1, 2]", "empty": b""}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "identity.json"])
def test_a_damaged_file_is_named_with_what_to_do(name, damage, folder):
    (folder / name).write_bytes(DAMAGE[damage])
    if name != "identity.json":
        with pytest.raises(ValueError, match=rf"{name}.*delete it"):
            report.load(folder)
    if name == "summary.json":  # a resumed run writes it anew
        return
    with pytest.raises(ValueError, match=rf"{name}.*delete it"):
        trainer(folder, resume=True)
    (folder / name).unlink()
    assert trainer(folder, resume=True, generations=5).train()["generations"] == 5


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b'{"generation": 2, "rew', b"[]", b""])
def test_a_damaged_line_of_metrics_is_named_and_written_anew(damage, folder, whole):
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    lines[2] = damage
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 3 is damaged .* resume the run, which writes it anew"):
        report.load(folder)
    trainer(folder, resume=True).train()
    found, expected = (facts(run)["rows"] for run in (folder, whole[0]))
    assert [r.get("reward_mean") for r in found] == [r.get("reward_mean") for r in expected]
    assert report.load(folder).metrics[2]["generation"] == 2


def test_damaged_samples_are_named_and_a_torn_line_is_cut_off(tmp_path):
    made = stopped(tmp_path, 2)
    whole = made.folder.samples.read_bytes()
    made.folder.samples.write_bytes(whole + b'{"generation": 2, "prom')
    assert len(report.load(tmp_path).samples) == 4
    trainer(tmp_path, resume=True).train()
    assert made.folder.samples.read_bytes().startswith(whole) and len(report.load(tmp_path).samples) == 8
    made.folder.samples.write_bytes(b"\xff\n" + whole)
    with pytest.raises(ValueError, match=r"samples\.jsonl: line 1 is damaged .*: delete the line"):
        report.load(tmp_path)


@pytest.mark.parametrize("cut", [10, 300])
def test_a_truncated_export_is_named(cut, folder):
    pack(folder / "journal.jsonl", folder / "e.safetensors")
    (folder / "e.safetensors").write_bytes((folder / "e.safetensors").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"e\.safetensors is damaged"):
        replay(Plan(make_model()), folder / "e.safetensors")


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(tmp_path):
    stopped(tmp_path, 3)
    rows = RunFolder(tmp_path).read_metrics()
    rows[1]["seconds_generate"] += 1000.0
    rows[0]["evaluate_seconds"] += 2000.0
    RunFolder(tmp_path).write_metrics(rows)
    seconds = trainer(tmp_path, resume=True).train()["seconds"]
    assert 1000 < seconds["generate"] < 1100 and 2000 < seconds["evaluate"] < 2100 and 3000 < seconds["total"] < 3200
