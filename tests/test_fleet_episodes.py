"""Environments over vLLM engines, on stand-ins for vLLM and Ray: requests with settings of their own, and a run."""

import pytest
import vllm_stand_in
from fleets import LIMIT, ROWS
from fleets import folder as folder  # noqa: PLC0414  a fixture
from fleets import vllm as vllm  # noqa: PLC0414  a fixture
from transformers import AutoTokenizer, Qwen2ForCausalLM

import esfast
from esfast.integrations.fleet import FleetTrainer
from esfast.integrations.ray import Fleet
from esfast.integrations.vllm_engine import VLLMEngine
from esfast.journal import journal
from esfast.rollout.completion import Asked
from esfast.rollout.engine import TransformersEngine

ENGINES = pytest.mark.parametrize("kind", [VLLMEngine, Fleet])


class Talk:
    """Two turns; the reward depends on both."""

    async def episode(self, client, row):
        said, messages = [], [{"role": "user", "content": row["prompt"]}]
        for turn in range(2):
            answer = await client.chat.completions.create(model=client.model, messages=messages)
            said.append(answer.choices[0].message.content)
            messages += [{"role": "assistant", "content": said[-1]}, {"role": "user", "content": str(turn)}]
        return float(sum(map(ord, "".join(said))) % 101)


@pytest.mark.parametrize(
    "how", [{}, {"noise": "low_rank", "members_at_once": 3}], ids=["one after another", "at the same time"]
)
def test_members_of_a_fleet_play_episodes(folder, tmp_path, how):
    """All engines answer for the member that plays, or for three that play at the same time, as LoRA adapters. Each
    answers as the model here does."""
    pytest.importorskip("openai", reason="episodes ask through the package openai")
    model = folder()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    settings = {"generations": 2, "population_size": 4, "sigma": 0.1, "lr": 0.1, "prompts_per_generation": 6,
                "max_completion_length": 4, "eval_every": 0, "progress": False, "weights": "base"} | how  # fmt: skip
    options = {"train_dataset": ROWS, "eval_dataset": ROWS[:2], "environment": Talk(), "processing_class": tokenizer}
    fleet = FleetTrainer(model, None, esfast.ESConfig(output_dir=str(tmp_path / "fleet"), **settings), 2, **options)
    fleet.train()
    assert any(llm.asked for llm in vllm_stand_in.LLM.made)
    assert fleet.evaluator._places.way == ("at once" if how else "one by one")
    # What LoRA slots do not hold is frozen.
    settings["groups"], settings["members_at_once"] = fleet.args.groups, 1
    here = esfast.ESTrainer(str(model), args=esfast.ESConfig(output_dir=str(tmp_path / "here"), **settings), **options)
    here.train()
    rewards = [[r.rewards for r in journal.read(tmp_path / f / "journal.jsonl").records] for f in ("fleet", "here")]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 2 and len(set(rewards[0][0])) > 1


def test_members_that_share_an_engine_are_refused_at_the_door_where_it_holds_none(folder, tmp_path):
    """Before an engine starts."""
    settings = {"output_dir": str(tmp_path / "run"), "members_at_once": 3, "progress": False}
    vllm_stand_in.LLM.made.clear()
    with pytest.raises(ValueError, match="members_at_once: several members in one vLLM engine are LoRA adapters"):
        FleetTrainer(folder(), None, esfast.ESConfig(**settings), train_dataset=ROWS, environment=Talk())
    assert not vllm_stand_in.LLM.made and not (tmp_path / "run").exists()


class Particular:
    """Requests with settings of their own."""

    async def episode(self, client, row):
        message, said = [{"role": "user", "content": row["prompt"]}], []
        for asked in ({"max_tokens": 2}, {"temperature": 0.0}, {"max_completion_tokens": 3, "temperature": 0}):
            answer = await client.chat.completions.create(model=client.model, messages=message, **asked)
            said.append((answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.to_dict()))
        hot = await client.chat.completions.create(model=client.model, messages=message, temperature=1.5, top_p=0.9)
        assert hot.usage.completion_tokens <= 4
        row["said"].append(said)
        return 1.0


@ENGINES
def test_requests_of_episodes_have_settings_of_their_own(folder, kind):
    """As the model here answers them, in texts, numbers of tokens and reasons to end."""
    pytest.importorskip("openai", reason="episodes ask through the package openai")
    from esfast.rollout.episodes import Episodes

    model, tokenizer = folder(), AutoTokenizer.from_pretrained(folder())
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    heard = []
    for engine in (kind(model, 4), TransformersEngine(Qwen2ForCausalLM.from_pretrained(model), tokenizer, 4)):
        rows = [{**row, "said": []} for row in ROWS]
        played = Episodes(Particular(), engine, tokenizer).generate(rows)
        assert [episode.error for episode in played] == [None] * len(rows)
        heard.append([row["said"] for row in rows])
        engine.close()
    assert heard[0] == heard[1] and len({str(said) for said in heard[0]}) > 1
    assert any(said[0][1] == "length" for (said,) in heard[0])


@ENGINES
def test_settings_of_a_call_that_no_engine_takes(folder, kind):
    engine = kind(folder(), 4)
    for asked, words in ((Asked(max_tokens=5), "max_tokens: expected 1 to 4"), (Asked(top_p=0.0), "top_p: expected")):
        with pytest.raises(ValueError, match=words):
            engine.complete_texts(["1+1="], None, asked)
    with pytest.raises(ValueError, match="with 4 for the completion exceeds"):
        engine.complete_texts(["a" * (LIMIT - 2)])
    (short,) = engine.complete_texts(["a" * (LIMIT - 2)], None, Asked(max_tokens=2))
    assert 1 <= short.tokens <= 2 and engine.tokens == short.tokens
    with pytest.raises(ValueError, match="with 4 for the completion exceeds"):
        engine.generate(["a" * (LIMIT - 2)])
    engine.close()
