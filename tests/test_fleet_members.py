"""Members of a fleet as LoRA adapters, and engines that die, hang or run out of memory, on stand-ins for vLLM and Ray."""

import re
from types import SimpleNamespace

import pytest
import torch
import vllm_stand_in
from fleets import PROMPTS, ROWS, SETTINGS, letters, train_a_fleet, trainer
from fleets import folder as folder  # noqa: PLC0414  a fixture
from fleets import vllm as vllm  # noqa: PLC0414  a fixture
from transformers import Qwen2ForCausalLM

import esfast
from esfast import cli
from esfast.integrations import actors
from esfast.integrations import fleet as fleets
from esfast.integrations.actors import TimeLimits
from esfast.integrations.fleet import FleetStore
from esfast.integrations.ray import Fleet
from esfast.integrations.vllm_members import lora_options
from esfast.journal import journal
from esfast.tasks import embedded

LOW_RANK = {"noise": "low_rank", "rank": 2, "population_size": 6}


def alone(path, folder, groups, **changes):
    """The records of ESTrainer on the Hugging Face model, one member after another."""
    settings = SETTINGS | {"generations": 3, "members_at_once": "1"} | LOW_RANK
    model = Qwen2ForCausalLM.from_pretrained(folder)
    config = esfast.ESConfig(output_dir=str(path), groups=groups, **settings | changes)
    esfast.ESTrainer(model, letters, config, ROWS, ROWS[:2], embedded.make_tokenizer()).train()
    return journal.read(path / "journal.jsonl"), model


def test_members_in_slots_train_as_the_model_does(folder, tmp_path, same_bits):
    """What slots do not carry is frozen, in members and in updates. The journal says so: it replays by itself."""
    made = trainer(tmp_path / "fleet", folder(), ROWS, ROWS[:2], 2, generations=3, members_at_once="4", **LOW_RANK)
    made.train()
    assert made.evaluator.way == "at once" and {a for llm in vllm_stand_in.LLM.made for a in llm.adapters} >= {4, 2}
    found = journal.read(tmp_path / "fleet" / "journal.jsonl")
    assert [g[1:] for g in found.header["groups"]] == [[0.0, 0.0]] * len(found.header["groups"])
    wanted, model = alone(tmp_path / "alone", folder(), made.args.groups)
    assert found.records == wanted.records and found.header == wanted.header
    base = Qwen2ForCausalLM.from_pretrained(folder())
    for (name, tuned), before in zip(model.named_parameters(), base.parameters(), strict=True):
        carried = "proj.weight" in name
        assert torch.equal(tuned, before) != carried, name
    saved = Qwen2ForCausalLM.from_pretrained(tmp_path / "fleet" / "model")
    assert same_bits(list(saved.parameters()), list(model.parameters()))
    assert (
        cli.main(
            [
                "replay",
                str(tmp_path / "fleet" / "journal.jsonl"),
                "--base",
                str(folder()),
                "--out",
                str(tmp_path / "replayed"),
            ]
        )
        == 0
    )
    replayed = Qwen2ForCausalLM.from_pretrained(tmp_path / "replayed")
    assert same_bits(list(replayed.parameters()), list(model.parameters()))


def test_both_ways_are_measured_and_the_faster_one_is_kept(folder, tmp_path, caplog, monkeypatch):
    """Four generations try them in turn; then the run goes on as was faster. A resumed run has the same groups."""
    caplog.set_level("INFO")
    slow = {"at once": 0.0, "one by one": 0.0}
    now = [0.0]
    monkeypatch.setattr(fleets, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def taking(way, original):
        def method(*arguments):
            now[0] += slow[way]
            return original(*arguments)

        return method

    monkeypatch.setattr(Fleet, "packets", taking("at once", Fleet.packets))
    monkeypatch.setattr(Fleet, "members", taking("one by one", Fleet.members))
    records = []
    for way in slow:
        slow.update(dict.fromkeys(slow, 2.0), **{way: 1.0})
        vllm_stand_in.LLM.made.clear()
        made = trainer(tmp_path / way, folder(), generations=6, members_at_once="auto", **LOW_RANK)
        made.train()
        assert made.evaluator.way == way and f"members_at_once: {way} (6 members in one batch: " in caplog.text
        counts = [a for llm in vllm_stand_in.LLM.made for a in llm.adapters]
        turns = [6, *[0] * 6]
        assert counts == turns * 2 + (turns[:1] if way == "at once" else turns[1:]) * 2
        records.append(journal.read(tmp_path / way / "journal.jsonl").records)
    assert records[0] == records[1]
    for name in ("journal.jsonl", "metrics.jsonl"):
        path = tmp_path / way / name
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    groups = made.args.groups
    again = trainer(
        tmp_path / way, folder(), generations=6, resume=True, members_at_once="3", groups=groups, **LOW_RANK
    )
    assert again.args.groups == groups
    again.train()
    assert journal.read(tmp_path / way / "journal.jsonl").records == records[0]


def test_a_run_that_tunes_what_slots_do_not_carry_goes_on_one_after_another(folder, tmp_path):
    run = tmp_path / "run"
    wanted = trainer(run, folder(), generations=2, members_at_once="1", **LOW_RANK)
    wanted.train()
    records = journal.read(run / "journal.jsonl").records
    for name in ("journal.jsonl", "metrics.jsonl"):
        (run / name).write_bytes(b"".join((run / name).read_bytes().splitlines(keepends=True)[:2]))
    before = (run / "journal.jsonl").read_bytes()
    for at_once in ("auto", "3"):
        with pytest.raises(
            ValueError, match="and its members went one after another; set members_at_once to 1 to go on"
        ):
            trainer(run, folder(), generations=2, members_at_once=at_once, resume=True, **LOW_RANK)
    assert (run / "journal.jsonl").read_bytes() == before
    trainer(run, folder(), generations=2, members_at_once="1", resume=True, **LOW_RANK).train()
    assert journal.read(run / "journal.jsonl").records == records


def test_the_command_line_trains_and_goes_on(folder, tmp_path, same_bits):
    """Its folder's groups are those of the resumed run, which may take the other way."""
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(4)))
    options = "--noise low_rank --rank 2 --generations 3 --population-size 4 --engine-timeout 60".split()
    assert train_a_fleet(folder(), tmp_path, *options, "--members-at-once", "2") == 0
    run = tmp_path / "run"
    wanted = journal.read(run / "journal.jsonl")
    assert len(wanted.header["groups"]) > 3 and max(a for llm in vllm_stand_in.LLM.made for a in llm.adapters) == 2
    for name in ("journal.jsonl", "metrics.jsonl"):
        path = run / name
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert cli.main(["train", "--out", str(run), "--resume", "--members-at-once", "1"]) == 0
    found = journal.read(run / "journal.jsonl")
    assert found.records == wanted.records and found.header == wanted.header


def test_one_after_another_tunes_all_weights(folder, tmp_path):
    made = trainer(tmp_path / "run", folder(), generations=1, members_at_once="1", **LOW_RANK)
    assert made.args.groups is None and made.evaluator.way == "one by one"
    made.train()
    assert "groups" not in journal.read(tmp_path / "run" / "journal.jsonl").header


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"members_at_once": "2"}, r"members_at_once: .* hold noise='low_rank' alone, got noise='gaussian'"),
        (LOW_RANK | {"groups": ["*norm*:lr=2"]}, r"groups: '\*norm\*' has weights that members in LoRA slots leave"),
        (LOW_RANK | {"groups": ["*none*:lr=2"]}, r"groups: '\*none\*' has weights that members in LoRA slots leave"),
    ],
)
def test_settings_that_slots_can_not_follow(folder, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path / "run", folder(), **settings)
    assert not (tmp_path / "run").exists() and not any(llm.running for llm in vllm_stand_in.LLM.made)


def test_slots_of_the_user_s_that_are_too_small(folder, tmp_path):
    made = trainer(tmp_path / "run", folder(), engine_options={"max_lora_rank": 1, "max_loras": 2}, **LOW_RANK)
    with pytest.raises(
        esfast.EsfastError, match="rank 2 does not fit .* max_lora_rank is 1: start it with max_lora_rank=8"
    ):
        made.train()


# ---- engines that die, hang or run out of memory ---------------------------------------------------------------------


class OutOfMemoryError(RuntimeError): ...


def once(kind, method):
    """A trouble of the first such call."""
    seen = []

    def trouble(called, *arguments):
        if called != method or seen:
            return False
        seen.append(arguments)
        if kind != "hang":
            raise kind("of the engine\nmore")
        return True

    return trouble, seen


@pytest.mark.parametrize("method", ["member", "members", "complete"])
@pytest.mark.parametrize("kind", ["hang", OutOfMemoryError, RuntimeError], ids=str)
def test_another_engine_does_what_one_did_not(folder, tmp_path, caplog, kind, method):
    settings = LOW_RANK | {"generations": 2, "members_at_once": "1" if method == "member" else "3"}
    records = []
    for name in ("well", "trouble"):
        made = trainer(tmp_path / name, folder(), ROWS, ROWS[:2], 2, engine_timeout=5.0, **settings)
        if name == "trouble":
            made._fleet._actors._limits._given = 0.05 if kind == "hang" else 5.0
            trouble, seen = once(kind, method)
            made._fleet._engines[0].trouble = trouble
            actor = made._fleet._engines[0]
        made.train()
        records.append(journal.read(tmp_path / name / "journal.jsonl"))
    assert seen and not actor.alive and records[0] == records[1]
    reason = f"{method} took longer than 0 seconds; engine_timeout" if kind == "hang" else "of the engine"
    assert re.search(f"engine 0 is gone, 1 are left: {reason}", caplog.text)
    sizes = [a for llm in vllm_stand_in.LLM.made[2:] for a in llm.adapters]
    if method == "members" and kind is OutOfMemoryError:
        assert 2 in sizes  # its packet of 3 in halves


def test_the_last_engine_s_trouble_ends_the_run(folder, tmp_path):
    made = trainer(tmp_path / "run", folder(), engine_timeout=0.05, members_at_once="3", **LOW_RANK)
    made._fleet._engines[0].trouble = lambda method, *a: method == "members"
    words = (
        "no engine is left; the last to go, 0, said: members took longer than 0 seconds; engine_timeout sets another"
    )
    with pytest.raises(esfast.EsfastError, match=words):
        made.train()


def test_an_engine_that_hangs_while_all_are_asked(folder, monkeypatch):
    fleet = Fleet(folder(), 3, num_engines=2)
    before = fleet.fingerprint()
    # The other engine's answer says how long it takes.
    monkeypatch.setattr(actors, "LEAST_TOGETHER", 0.05)
    fleet._engines[1].trouble = lambda method, *a: True
    assert fleet.fingerprint() == before and fleet.alive == [0]


def test_what_the_caller_did_wrong_costs_no_engine(folder):
    fleet = Fleet(folder(), 3, num_engines=2)
    with pytest.raises(esfast.EsfastError, match="the engine has no LoRA slots .*enable_lora=True"):
        list(fleet.packets([[esfast.es.Member(0, 1, 1)]], 0.1, ["a"]))
    assert fleet.alive == [0, 1]
    with pytest.raises(ValueError, match="engine_timeout: expected seconds"):
        Fleet(folder(), 3, engine_timeout=0)


def test_time_limits_follow_the_calls_of_before():
    limits = TimeLimits()
    assert limits.of("members", 8) == 7200
    limits.note("members", 8, 80.0)
    assert limits.of("members", 8) == 800 and limits.of("members", 1) == 300 and limits.of("complete") == 7200
    limits.note("members", 4, 20.0)
    assert limits.of("members", 8) == 800
    assert TimeLimits(7.0).of("members", 8) == 7 and TimeLimits(7.0).usual("update") == 7200


def test_a_loop_of_ones_own_over_packets(folder):
    """And evaluations between: the base is the base, and no member of before is used."""
    fleet = Fleet(folder(), 3, **lora_options(2, 4))
    plan = esfast.Plan(Qwen2ForCausalLM.from_pretrained(folder()))
    frozen = fleet.adapters()["frozen"]
    settings = {"sigma": 0.1, "lr": 0.1, "population_size": 4, "noise": "low_rank", "rank": 2, "groups": frozen}
    ours, theirs = esfast.ES(FleetStore(fleet), **settings), esfast.ES(plan, **settings)
    base = fleet.generate(PROMPTS)
    for _ in range(2):
        members = ours.population()
        for member, texts in fleet.packets(members.packets(3), ours.sigma, PROMPTS):
            member.reward = letters([], texts[:1])[0] + member.index
        theirs.population()
        for mine, other in zip(ours.members, theirs.members, strict=True):
            other.reward = mine.reward
        assert ours.step() == theirs.step() and fleet.fingerprint() == plan.fingerprint()
    assert fleet.generate(PROMPTS) != base
    (llm,) = vllm_stand_in.LLM.made
    assert not llm._worker.model_runner.lora_manager.members or len(llm._worker.model_runner.lora_manager.members) == 1
