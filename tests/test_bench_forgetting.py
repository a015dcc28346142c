"""`esfast bench forgetting`, with a model that is hardly trained."""

import json

from esfast import bench
from esfast.bench import forgetting
from esfast.tasks import embedded, gym


def test_each_decay_and_seed_is_a_row_and_both_tables_show_them(warm_python, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "CORPUS", 2)
    few = "--generations 1 --population-size 2 --prompts-per-generation 2 --eval-prompts 4 --max-completion-length 3"
    words = f"forgetting --seeds 3 --decays 0 10 --steps 2 --keep {tmp_path} --json {tmp_path / 'r.json'} -- {few}"
    assert bench.main(words.split()) == 0
    # Finished runs are not made again.
    assert bench.main(words.split()) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(r["decay"], r["seed"]) for r in result["rows"]] == [(0, 3), (10, 3)]
    assert all(r["generations"] == 1 and r["problems"] == 4 and r["distance"] >= 0 for r in result["rows"])
    headers, lines = forgetting.table(result)
    assert [line[:2] for line in lines] == [["0", "1"], ["10", "1"]] and all(len(x) == len(headers) for x in lines)
    headers, lines = forgetting.learned_table(result)
    assert [line[0] for line in lines] == ["3"] and all(len(x) == len(headers) for x in lines)


def test_the_probe_is_known_in_the_rewarded_form_and_the_task_at_times():
    pairs = forgetting.examples(0, 2)
    learned, known = pairs[:1000], pairs[1000:]
    assert all(completion.endswith("</answer>") for _, completion in known)
    assert 0.3 < sum(completion.endswith("</answer>") for _, completion in learned) / 1000 < 0.7
    rows = gym.problems(forgetting.PROBE.removeprefix(gym.PREFIX), 1000, "embedded/0/0", "train", "compact")
    assert [(r["prompt"], f"</think>\n<answer>{r['answer']}</answer>") for r in rows] == known
