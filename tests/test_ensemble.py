"""`esfast eval --members`: the members of a run's last generation, to the bit, and their vote."""

import json

import pytest
import torch

import esfast
from esfast import ESConfig, ESTrainer, cli
from esfast.tasks import embedded
from esfast.trainer.ensemble import LastGeneration, vote

TOKENIZER = embedded.make_tokenizer()
ROWS = [{"prompt": f"{i}="} for i in range(4)]


def model():
    torch.manual_seed(0)
    return embedded.make_model(TOKENIZER).eval()


def letters(prompts, completions, **columns):
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


@pytest.mark.parametrize(
    "settings",
    [{}, {"mirrored": True, "noise": "low_rank"}, {"groups": ["*embed*:sigma=0.5"], "optimizer": "momentum"}],
    ids=["plain", "mirrored", "groups"],
)
def test_members_are_those_of_the_run_and_the_best_come_first(tmp_path, settings):
    given = {"output_dir": str(tmp_path), "generations": 3, "population_size": 6, "sigma": 0.05, "lr": 0.05}
    given |= {"prompts_per_generation": 4, "max_completion_length": 3, "eval_every": 0, "progress": False}
    net, seen = model(), {}
    trainer = ESTrainer(net, letters, ESConfig(**given, **settings, members_at_once="1"), ROWS, None, TOKENIZER)
    enter = trainer.es._enter

    def watched(member):
        enter(member)
        seen[trainer.es.generation, member.index] = trainer.es.plan.fingerprint()

    trainer.es._enter = watched
    trainer.train()
    rewards = esfast.journal.read(trainer.folder.journal).records[-1].rewards
    plan = esfast.Plan(model())
    last = LastGeneration(plan, trainer.folder.journal, bool(settings.get("mirrored")))
    before = plan.fingerprint()
    order = sorted(range(6), key=lambda i: (-rewards[i], i))
    assert last.generation == 3 and [m.index for m in last.members] == order
    assert last.ask(4, plan.fingerprint) == [seen[2, i] for i in order[:4]]
    assert plan.fingerprint() == before
    with pytest.raises(ValueError, match="has 6 members, asked for are 7"):
        last.ask(7, plan.fingerprint)
    with pytest.raises(ValueError, match="are not those of its settings"):
        LastGeneration(esfast.Plan(model()), trainer.folder.journal, not settings.get("mirrored"))


@pytest.mark.parametrize(
    ("texts", "chosen"),
    [
        (["a", "b", "b"], "b"),
        (["a", "b", "c"], "a"),
        ([" 7 ", "8", "7"], " 7 "),
        (["x <answer>8</answer>", "y <answer>7</answer>", "z <answer> 7 </answer>"], "y <answer>7</answer>"),
        (["7", "7", "<answer>8</answer>"], "<answer>8</answer>"),
        (["", "", "a"], ""),
        (["<answer></answer>", "<answer></answer>", "<answer>1</answer>"], "<answer></answer>"),
    ],
)
def test_the_answer_that_most_give(texts, chosen):
    assert vote([[text] for text in texts]) == [chosen]


def test_each_prompt_has_its_own_vote():
    assert vote([["a", "b"], ["c", "b"], ["c", "d"]]) == ["c", "b"]


def test_the_command(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    rows = [{"prompt": f"{i}=", "id": str(i)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_letters.py").write_text(
        "def letters(prompts, completions, **columns):\n    return [sum(map(ord, t)) % 97 / 97 for t in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(folder), "--task", "file:rows.jsonl", "--reward", "my_letters:letters", "--out", "run"]
    options += ["--generations", "2", "--population-size", "4", "--prompts-per-generation", "4", "--sigma", "0.05"]
    options += ["--max-completion-length", "3", "--reward-workers", "0", "--no-progress", "--lr", "0.05"]
    assert cli.main(["train", *options]) == 0
    capsys.readouterr()
    assert cli.main(["eval", "--members", "3", "run", "--json", "--save", "said.jsonl"]) == 0
    tuned, best, voted = json.loads(capsys.readouterr().out)
    assert tuned["model"] == "run" and best["model"] == "best member of generation 2"
    assert voted["model"] == "vote of its best 3" and voted["samples"] == tuned["samples"]
    assert "reward_difference" in best and "reward_difference" in voted
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert {line["model"] for line in said} == {r["model"] for r in (tuned, best, voted)}
    for words in (["--members", "9", "run"], ["--members", "2"], ["--members", "2", str(folder)]):
        assert cli.main(["eval", *words]) == 1
    assert "--members" in capsys.readouterr().err
