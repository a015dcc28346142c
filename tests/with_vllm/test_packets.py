"""Members at once in real engines that are Ray actors: five generations and their replay; one engine killed, one hung."""

import time

import pytest

import esfast
from esfast.integrations import actors

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests where it is")
ray = pytest.importorskip("ray", reason="Ray is not installed here; `make test-vllm` runs these tests where it is")
pytestmark = pytest.mark.usefixtures("one_ray")

ROWS = [{"prompt": f"{i} plus {i + 1} is"} for i in range(6)]


def letters(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 101) for text in completions]


def run(folder, path, engines, trouble=None, **settings):
    """A run with members of rank 1, two at once; `trouble` is called with the fleet after the first packet. Returns the
    journal's records, the fingerprint of the tuned model, and the numbers of the engines that were left."""
    from transformers import AutoModelForCausalLM

    from esfast.integrations.fleet import FleetTrainer

    settings = {"members_at_once": "2", "generations": 5} | settings
    config = esfast.ESConfig(
        output_dir=str(path),
        population_size=6,
        sigma=0.05,
        lr=0.05,
        noise="low_rank",
        max_completion_length=6,
        prompts_per_generation=6,
        eval_every=2,
        progress=False,
        **settings,
    )
    options = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8}
    trainer = FleetTrainer(
        folder, letters, config, engines, train_dataset=ROWS, eval_dataset=ROWS[:2], engine_options=options
    )
    fleet, left = trainer.engine, []
    if trouble is not None:
        packets = fleet.packets

        def troubled(*arguments):
            for i, answer in enumerate(packets(*arguments)):
                if i == 0 and len(fleet.alive) == engines:
                    trouble(fleet)
                yield answer

        fleet.packets = troubled
    close = fleet.close
    fleet.close = lambda: (left.extend(fleet.alive), close())
    trainer.train()
    saved = esfast.Plan(AutoModelForCausalLM.from_pretrained(path / "model"))
    return esfast.journal.read(path / "journal.jsonl").records, saved.fingerprint(), left


def kill_one_and_hang_another(fleet):
    numbers = list(fleet.alive)
    ray.kill(fleet._engines[numbers[0]])
    # Its next call waits behind this one.
    fleet._engines[numbers[1]].__ray_call__.remote(lambda engine: time.sleep(1000))
    fleet._actors._limits._given = 15.0


def test_five_generations_replay_and_engines_that_are_lost(folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = folder("qwen2-tied")
    wanted = run(model, tmp_path / "one", 1)
    assert len(wanted[0]) == 5 and wanted[2] == [0]
    replayed = esfast.Plan(AutoModelForCausalLM.from_pretrained(model))
    before = replayed.fingerprint()
    esfast.journal.replay(replayed, tmp_path / "one" / "journal.jsonl")
    assert replayed.fingerprint() == wanted[1] != before
    # It hangs in a packet, or else in the update.
    monkeypatch.setattr(actors, "LEAST_TOGETHER", 10.0)
    found = run(model, tmp_path / "three", 3, kill_one_and_hang_another)
    assert found[:2] == wanted[:2] and found[2] == [2]


def test_the_faster_way_is_measured(folder, tmp_path, caplog):
    """Resumed from where the first run was cut off; the journal leads to the weights, whichever way was taken."""
    from transformers import AutoModelForCausalLM

    caplog.set_level("INFO")
    model, path = folder("llama-untied"), tmp_path / "auto"
    records, tuned, _ = run(model, path, 1, members_at_once="auto")
    assert len(records) == 5 and "members in one batch: " in caplog.text
    replayed = esfast.Plan(AutoModelForCausalLM.from_pretrained(model))
    esfast.journal.replay(replayed, path / "journal.jsonl")
    assert replayed.fingerprint() == tuned
