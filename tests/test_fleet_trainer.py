"""Runs of FleetTrainer and loops over fleets, on stand-ins for vLLM and Ray: the weights of one Hugging Face model."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import vllm_stand_in
from fleets import ROWS, letters, train_a_fleet, trainer
from fleets import folder as folder  # noqa: PLC0414  a fixture
from fleets import vllm as vllm  # noqa: PLC0414  a fixture
from transformers import Qwen2ForCausalLM

import esfast
from esfast import cli
from esfast.integrations.fleet import FleetStore
from esfast.integrations.ray import Fleet
from esfast.journal import journal
from esfast.tasks import embedded


def test_a_fleet_trains_as_one_model_does(folder, tmp_path, same_bits, monkeypatch):
    """One engine, two, and two of which one dies: the journal and the weights of ESTrainer on the Hugging Face model."""
    model = Qwen2ForCausalLM.from_pretrained(folder())
    config = esfast.ESConfig(
        output_dir=str(tmp_path / "plain"),
        generations=2,
        population_size=4,
        sigma=0.1,
        lr=0.1,
        prompts_per_generation=6,
        max_completion_length=4,
        eval_every=0,
        progress=False,
    )
    esfast.ESTrainer(model, letters, config, ROWS, ROWS[:2], embedded.make_tokenizer()).train()
    wanted = journal.read(tmp_path / "plain" / "journal.jsonl")
    for name, engines in (("one", 1), ("two", 2), ("dying", 2)):
        made = trainer(tmp_path / name, folder(), ROWS, ROWS[:2], engines)
        fleet, answers = made.engine, []
        if name == "dying":
            original = fleet._ray.wait

            def wait(references, num_returns, timeout=None, original=original, fleet=fleet, answers=answers):
                answers.extend([references] if len(references) > 1 else [])
                if len(answers) == 3 and len(references) > 1:
                    vllm_stand_in.kill(fleet._engines[0])  # which has a member in the works
                return original(references, num_returns, timeout)

            monkeypatch.setattr(fleet._ray, "wait", wait)
        made.train()
        found = journal.read(tmp_path / name / "journal.jsonl")
        assert found.records == wanted.records and found.header == wanted.header, name
        saved = Qwen2ForCausalLM.from_pretrained(tmp_path / name / "model")
        assert same_bits(list(saved.parameters()), list(model.parameters()))

    # a run that was cut off goes on to the same weights
    for name in ("journal.jsonl", "metrics.jsonl"):
        path = tmp_path / "two" / name
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    trainer(tmp_path / "two", folder(), ROWS, ROWS[:2], resume=True).train()
    assert journal.read(tmp_path / "two" / "journal.jsonl").records == wanted.records


def same_weights(path, other):
    ours, theirs = (Qwen2ForCausalLM.from_pretrained(p).state_dict() for p in (path, other))
    return all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_the_command_line_trains_a_fleet_resumes_it_and_leaves_it_when_it_is_done(folder, tmp_path, capsys, caplog):
    """The options ask for checkpoints, but none may be written: a fleet's run resumes from the journal alone."""
    lines = [f'{{"prompt": "{i}+1=", "split": "{"test" if i < 2 else "train"}"}}\n' for i in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    run = tmp_path / "run"
    options = "--num-engines 2 --generations 3 --population-size 3 --checkpoint-every 1".split()
    assert train_a_fleet(folder(), tmp_path, *options) == 0
    assert "after 3 generations, on 2 held-out prompts" in capsys.readouterr().out
    assert not list(run.glob("checkpoints/*")) and (run / "model" / "README.md").exists()
    wanted, before = journal.read(run / "journal.jsonl").records, len(vllm_stand_in.LLM.made)
    shutil.copytree(run, tmp_path / "whole")
    assert cli.main(["train", "--out", str(run), "--resume"]) == 0
    assert "is finished" in caplog.text and journal.read(run / "journal.jsonl").records == wanted
    for name in ("journal.jsonl", "metrics.jsonl"):
        path = run / name
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert cli.main(["train", "--out", str(run), "--resume"]) == 0
    assert journal.read(run / "journal.jsonl").records == wanted and same_weights(
        run / "model", tmp_path / "whole" / "model"
    )
    assert len(vllm_stand_in.LLM.made) == before + 4 and not any(llm.running for llm in vllm_stand_in.LLM.made)


def test_a_script_may_save_before_training_and_after(folder, tmp_path):
    made = trainer(tmp_path / "run", folder(), generations=1)
    made.save_model(tmp_path / "before")
    assert same_weights(tmp_path / "before", folder())
    made.train()
    for target in (None, tmp_path / "run", tmp_path / "after"):
        made.save_model(target)
    assert same_weights(tmp_path / "after", tmp_path / "run" / "model")
    assert not same_weights(tmp_path / "after", folder())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="holds other things than a model"):
        made.save_model(tmp_path / "other")
    for ask in (made.engine.fingerprint, lambda: made.engine.generate(["a"]), lambda: made.engine.save(tmp_path / "x")):
        with pytest.raises(esfast.EsfastError, match="the fleet is closed"):
            ask()

    def broken(prompts, completions, **columns):
        raise RuntimeError("no")

    stopped = trainer(tmp_path / "stopped", folder(), functions=broken)
    with pytest.raises(esfast.rewards.RewardError):
        stopped.train()
    with pytest.raises(
        esfast.EsfastError, match="train.., which saved no model: resume the run .* `esfast replay .*journal"
    ):
        stopped.save_model(tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_model_is_saved_by_an_engine_that_lives(folder, tmp_path):
    fleet = Fleet(folder(), 3, num_engines=2)
    vllm_stand_in.kill(fleet._engines[0])
    fleet.save(tmp_path / "saved")
    assert fleet.alive == [1] and same_weights(tmp_path / "saved", folder())


def test_members_are_taken_when_an_engine_is_free(folder):
    """Members are taken one at a time, so that in a team a slow process gets fewer of them."""
    taken, fleet = [], Fleet(folder(), 3, num_engines=2)

    def handed_out():
        for index in range(5):
            taken.append(index)
            yield esfast.es.Member(index, index, 1)

    answers = fleet.members(handed_out(), 0.1, ["a"])
    assert next(answers)[0].index == 0 and taken == [0, 1]
    assert [member.index for member, _ in answers] == [1, 2, 3, 4] and taken == [0, 1, 2, 3, 4]


def test_a_loop_of_ones_own_over_a_fleet(folder):
    """Members one after another in all engines at once: the weights of ES on the Hugging Face model at every moment."""
    fleet = Fleet(folder(), 3, num_engines=2)
    plan = esfast.Plan(Qwen2ForCausalLM.from_pretrained(folder()))
    settings = dict(
        sigma=0.1,
        lr=0.1,
        population_size=4,
        mirrored=True,
        weights="master",
        optimizer="adam",
        noise="low_rank",
        rank=2,
        groups=["*norm*:sigma=0.5,lr=2"],
    )
    ours, theirs = esfast.ES(FleetStore(fleet, "master"), **settings), esfast.ES(plan, **settings)
    base = fleet.fingerprint()
    for _ in range(2):
        for mine, other in zip(ours.population(), theirs.population(), strict=True):
            assert fleet.fingerprint() == plan.fingerprint() != base
            mine.reward = other.reward = letters([], fleet.generate(["1+1="]))[0] + mine.index
        assert ours.step() == theirs.step()
        assert fleet.fingerprint() == plan.fingerprint() != base
        base = fleet.fingerprint()
    for _ in ours.population():
        break
    assert fleet.fingerprint() == base
    with pytest.raises(ValueError, match="perturb_rounding: engines round members to the nearest"):
        for _ in esfast.ES(FleetStore(Fleet(folder(), 3)), perturb_rounding="stochastic").population():
            pass


def test_the_loops_of_the_docs(folder, tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "how-to" / "vllm.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)

    def short(code):
        code = re.sub(r'"Qwen/[^"]*"', repr(str(folder())), code).replace("range(100)", "range(2)")
        code = code.replace("max_new_tokens=256", "max_new_tokens=2").replace(
            "sigma=1e-3", "sigma=0.1, population_size=4"
        )
        return code.replace("FleetStore(fleet), noise", "FleetStore(fleet), population_size=3, noise")

    raw, loop, packets = map(short, blocks)
    exec(raw, found := {"prompts": [{"prompt_token_ids": [5, 6]}, {"prompt_token_ids": [7]}]})
    assert len(found["outputs"]) == 32 and vllm_stand_in.LLM.made[0].adapters == [16]
    names = {"prompts": ["1+1="], "reward": lambda completions: letters([], completions)[0]}
    exec(loop, names)
    plan = esfast.Plan(Qwen2ForCausalLM.from_pretrained(folder()))
    journal.replay(plan, tmp_path / "run.jsonl")
    assert plan.fingerprint() == esfast.Plan(Qwen2ForCausalLM.from_pretrained(tmp_path / "tuned")).fingerprint()
    exec(packets, names)
    assert all(member.reward is not None for member in names["members"].members)


@pytest.mark.parametrize("settings", [{}, {"noise": "low_rank", "members_at_once": "2"}], ids=["gaussian", "slots"])
def test_a_fleet_finds_sigma_and_lr(folder, tmp_path, settings):
    """Engines ask the search's members, and have the model's weights again afterwards."""
    tuned = trainer(tmp_path / "run", folder(), sigma="auto", lr="auto", generations=200, **settings)
    before = tuned.es.store.fingerprint()
    try:
        found = tuned._find()
        assert tuned.es.store.fingerprint() == before
    finally:
        tuned._close()
    assert found.rows and 0 < found.responses <= 0.05 * found.run
    assert found.settings == {"sigma": tuned.args.sigma, "lr": tuned.args.lr} and tuned.args.sigma > 0
    # The weights are the engines': no groups are made of them, beside those that slots freeze.
    assert all(group.frozen for group in tuned.es.rule.groups) and bool(tuned.es.rule.groups) == bool(settings)


def test_a_fleet_makes_no_groups(folder, tmp_path):
    with pytest.raises(ValueError, match="groups: 'auto' needs the weights in this process"):
        trainer(tmp_path / "run", folder(), groups="auto")
    # no engine was started
    assert vllm_stand_in.LLM.made == [] and not (tmp_path / "run").exists()


def test_more_engines_than_gpus_are_refused(folder, monkeypatch):
    """Ray would wait for further GPUs without a word."""
    import ray

    machines = [{"Alive": True, "Resources": {"GPU": 3.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 3.0})
    monkeypatch.setattr(ray, "nodes", lambda: machines, raising=False)
    with pytest.raises(ValueError, match="num_engines: 2 with 2 GPUs each .* Ray has room for 1, its machines have 3"):
        Fleet(folder(), 4, num_engines=2, tensor_parallel_size=2)
    assert not vllm_stand_in.LLM.made
    Fleet(folder(), 4, tensor_parallel_size=2).close()
