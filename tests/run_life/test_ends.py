"""How a run begins and ends, and what a resume adds to a run that was cut off."""

import json
import shutil

import pytest
from life import ROWS, bits, contents, facts, fails_at, other_value, stopped, trainer

# ---- ends and new beginnings ----------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(folder, caplog):
    (folder / "tensorboard").mkdir()
    before, summary = contents(folder), json.loads((folder / "summary.json").read_text())
    for generations in (4, 3):
        made = trainer(folder, resume=True, generations=generations)
        assert made.train() == summary and "is finished, all of its 4 generations" in caplog.text
        assert contents(folder) == before
    assert trainer(folder, resume=True, generations=5).train()["generations"] == 5


def test_killed_in_its_last_evaluation(whole, tmp_path):
    def at(made):
        if made.es.generation == 4 and made.es._inside is None:
            raise ZeroDivisionError("made to fail")

    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path / "run", at=at).train()
    trainer(tmp_path / "run", resume=True).train()
    found, expected = facts(tmp_path / "run"), facts(whole[0])
    for run in (found, expected):
        # The journal does not hold these.
        for name in ("update_norm", "update_kept", "distance"):
            run["rows"][-1].pop(name, None)
    assert found == expected


@pytest.mark.parametrize("lost", ["summary.json", "summary.json model", "summary.json curves.png", "model"])
def test_killed_between_its_last_generation_and_its_end(lost, folder, whole):
    for name in lost.split():
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trainer(folder, resume=True).train()
    assert facts(folder) == facts(whole[0])


def test_killed_in_an_evaluation_on_the_way(tmp_path):
    def at(made):
        if made.es.generation == 2 and made.es._inside is None:
            raise ZeroDivisionError("made to fail")

    trainer(tmp_path / "whole", eval_every=2).train()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path / "run", eval_every=2, at=at).train()
    trainer(tmp_path / "run", eval_every=2, resume=True).train()
    evaluated = [
        [(r["generation"], r["eval_reward"]) for r in facts(folder)["rows"] if "eval_reward" in r]
        for folder in (tmp_path / "whole", tmp_path / "run")
    ]
    assert evaluated[0] == evaluated[1] and [g for g, _ in evaluated[0]] == [0, 2, 4]


def test_an_interrupted_run_does_not_call_an_earlier_evaluation_its_own(tmp_path):
    made = trainer(tmp_path, at=fails_at(3, KeyboardInterrupt()), eval_every=2)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["generations"] == 3 and summary["after_generation"] == 2
    assert "| before | after generation 2 |" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("missing", ["deleted", "empty"])
def test_metrics_that_were_lost_are_taken_from_the_journal(missing, tmp_path, whole, caplog):
    stopped(tmp_path, 3)
    (tmp_path / "metrics.jsonl").unlink() if missing == "deleted" else (tmp_path / "metrics.jsonl").write_text("")
    summary = trainer(tmp_path, resume=True).train()
    found, expected = facts(tmp_path), facts(whole[0])
    assert summary["before"] == {} and summary["after"] == expected["evaluations"]["after"]
    assert "evaluation of the base model is lost" in caplog.text
    assert [r["generation"] for r in found["rows"]] == list(range(5))
    assert [r.get("reward_mean") for r in found["rows"]] == [r.get("reward_mean") for r in expected["rows"]]
    assert "for 4 generations" in found["card"] and "| reward | not known |" in found["card"]


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_journal_that_goes_while_the_run_goes_on_stops_it(how, tmp_path):
    def at(made):
        if made.es.generation == 2:
            path = made.folder.journal
            if how == "replaced":
                path.write_bytes(b"")
            elif path.exists():
                path.unlink() if how == "deleted" else path.rename(tmp_path / "away.jsonl")

    made = trainer(tmp_path / "run", at=at)
    words = "was changed while" if how == "replaced" else "was deleted or moved away while the run went on"
    with pytest.raises((RuntimeError, FileNotFoundError), match=f"journal: .*{words}"):
        made.train()
    assert made.es.generation == 2 and not made.folder.journal.exists() or how == "replaced"
    if how == "moved":
        (tmp_path / "away.jsonl").rename(made.folder.journal)
        assert trainer(tmp_path / "run", resume=True).train()["generations"] == 4


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("header", [b"", b"\0" * 300, b'{"esfast_journal":2,"noi', b'{"esfast_jour\0\0\0\0'])
def test_a_journal_without_its_header_is_no_run(header, resume, tmp_path, whole):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal.jsonl").write_bytes(header)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"generation": 0, "eval_reward": 7.0}\n{"gener')
    made = trainer(tmp_path / "run", resume=resume)
    made.train()
    assert bits(made) == whole[1] and facts(tmp_path / "run") == facts(whole[0])


@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_header_with_generations_behind_it_is_refused(resume, folder):
    data = folder.joinpath("journal.jsonl").read_bytes()
    folder.joinpath("journal.jsonl").write_bytes(b"{" + data[2:])
    before = contents(folder)
    with pytest.raises((ValueError, FileExistsError), match="line 1 of .* is damaged" if resume else "holds a run"):
        trainer(folder, resume=resume)
    assert contents(folder) == before


@pytest.mark.parametrize("resume", [False, True])
def test_what_failed_in_its_first_generation_is_started_again_with_other_settings(resume, tmp_path, caplog):
    stopped(tmp_path / "run", 0)
    assert "nothing is lost, start it again" in caplog.text and "resume to go on" not in caplog.text
    rows = [{"prompt": "mended"}, *ROWS[1:]]
    made = trainer(tmp_path / "run", rows=rows, reward=other_value, seed=3, population_size=6, resume=resume)
    made.train()
    other = trainer(tmp_path / "other", rows=rows, reward=other_value, seed=3, population_size=6)
    other.train()
    assert bits(made) == bits(other) and facts(tmp_path / "run") == facts(tmp_path / "other")
