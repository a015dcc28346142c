"""Two engines as Ray actors train to the same bits as one, and as ES on the Hugging Face model; one may die on the way."""

import os

import pytest

import esfast

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests where it is")
ray = pytest.importorskip("ray", reason="Ray is not installed here; `make test-vllm` runs these tests where it is")
pytestmark = pytest.mark.usefixtures("one_ray")

ROWS = [{"prompt": f"{i} plus {i + 1} is"} for i in range(6)]


def letters(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 101) for text in completions]


@pytest.fixture
def trained(folder, tmp_path, monkeypatch):
    """trained(name, engines, dies=False, **settings): the trainer, its run done, and the fingerprint of the engines."""
    from esfast.integrations.fleet import FleetTrainer

    def run(name, engines, dies=False, ranks=1, **settings):
        settings = {"generations": 2} | settings
        config = esfast.ESConfig(
            output_dir=str(tmp_path / name),
            population_size=5,
            sigma=0.05,
            lr=0.05,
            max_completion_length=6,
            prompts_per_generation=6,
            eval_every=0,
            progress=False,
            **settings,
        )
        trainer = FleetTrainer(
            folder("qwen2-tied"),
            letters,
            config,
            engines,
            ranks,
            train_dataset=ROWS,
            eval_dataset=ROWS[:2],
            engine_options={"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8},
        )
        fleet = trainer.engine
        if dies:
            original, answers = fleet.members, []

            def members(*arguments):
                for answer in original(*arguments):
                    answers.append(answer)
                    if len(answers) == 2:
                        ray.kill(fleet._engines[0])  # which has another member in the works
                    yield answer

            fleet.members = members
        prints = []
        step = trainer.es.step
        monkeypatch.setattr(trainer.es, "step", lambda **o: (step(**o), prints.append(fleet.fingerprint()))[0])
        if dies:
            with_left = []
            monkeypatch.setattr(fleet, "close", lambda close=fleet.close: (with_left.extend(fleet.alive), close()))
        trainer.train()
        if dies:
            assert with_left == [1]
        return trainer, prints

    return run


def test_one_two_and_one_that_dies(trained, folder, tmp_path, same_bits):
    from transformers import AutoModelForCausalLM

    one, wanted = trained("one", 1)
    assert len(set(wanted)) == 2
    for name, dies in (("two", False), ("dying", True)):
        _, found = trained(name, 2, dies)
        assert found == wanted
        assert esfast.journal.read(tmp_path / name / "journal.jsonl").records == one_records(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")
    assert esfast.Plan(saved).fingerprint() == wanted[-1]
    replayed = esfast.Plan(AutoModelForCausalLM.from_pretrained(folder("qwen2-tied")))
    esfast.journal.replay(replayed, tmp_path / "one" / "journal.jsonl")
    assert replayed.fingerprint() == wanted[-1]

    # a run that was cut off goes on to the same weights
    for name in ("journal.jsonl", "metrics.jsonl"):
        path = tmp_path / "two" / name
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:2]))
    _, found = trained("two", 1, resume=True)
    assert found == wanted[1:]


def test_engines_of_two_ranks(trained, folder, tmp_path):
    """Their texts may differ from one rank's in bfloat16, and so rewards; the journal leads to their weights anyway."""
    from transformers import AutoModelForCausalLM

    _, found = trained("ranks", 1, ranks=2, generations=1, groups=["*norm*:lr=4", "*v_proj*:sigma=0.5"])
    replayed = esfast.Plan(AutoModelForCausalLM.from_pretrained(folder("qwen2-tied")))
    esfast.journal.replay(replayed, tmp_path / "ranks" / "journal.jsonl")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ranks" / "model")
    assert found == [replayed.fingerprint()] == [esfast.Plan(saved).fingerprint()]


def one_records(tmp_path):
    return esfast.journal.read(tmp_path / "one" / "journal.jsonl").records


def test_what_is_refused(folder, tmp_path):
    from esfast.integrations.fleet import FleetTrainer

    for words, settings in (("kl_to_base", {"kl_to_base": True}), ("weights", {"weights": "inplace"})):
        with pytest.raises(ValueError, match=words):
            FleetTrainer(folder("qwen2-tied"), letters, esfast.ESConfig(output_dir=str(tmp_path), **settings))
    assert os.listdir(tmp_path) == []
    config = esfast.ESConfig(output_dir=str(tmp_path / "run"), max_completion_length=6)
    with pytest.raises(RuntimeError, match="(?s)engine 0 of 1 can't start.*no_such_option"):
        FleetTrainer(folder("qwen2-tied"), letters, config, train_dataset=ROWS, engine_options={"no_such_option": 1})


def test_a_loop_of_ones_own(folder):
    """All engines are one member after another; what they cached for the member before is not used."""
    from transformers import AutoModelForCausalLM

    from esfast.integrations.fleet import FleetStore
    from esfast.integrations.ray import Fleet

    fleet = Fleet(folder("qwen2-tied"), 6, 1, enforce_eager=True, max_model_len=128, max_num_seqs=8)
    try:
        plan = esfast.Plan(AutoModelForCausalLM.from_pretrained(folder("qwen2-tied")))
        settings = {"sigma": 0.05, "lr": 0.05, "population_size": 3, "noise": "low_rank", "rank": 2}
        ours, theirs = esfast.ES(FleetStore(fleet), **settings), esfast.ES(plan, **settings)
        seen, prompts = [], ["What is the sum of 3 and 4? " * 4]
        for mine, other in zip(ours.population(), theirs.population(), strict=True):
            assert fleet.fingerprint() == plan.fingerprint()
            seen += fleet.generate(prompts)
            mine.reward = other.reward = float(len(seen[-1]) + mine.index)
        assert ours.step() == theirs.step() and fleet.fingerprint() == plan.fingerprint()
        assert len(set(seen)) == 3, seen
    finally:
        fleet.close()
