"""Environments whose client asks members of real vLLM engines: the rewards of the Hugging Face model's members."""

import pytest

import esfast

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests where it is")
pytest.importorskip("ray", reason="Ray is not installed here; `make test-vllm` runs these tests where it is")
pytestmark = pytest.mark.usefixtures("one_ray")

ROWS = [{"number": number} for number in range(6)]


class Talk:
    """Two turns, each with settings of its own, as a plain client script asks; the reward depends on both answers."""

    async def episode(self, client, row):
        messages = [{"role": "user", "content": f"What follows {row['number']}?"}]
        asked, said = [{"max_tokens": 3}, {"max_completion_tokens": 5, "temperature": 0.0}], []
        for settings in asked:
            answer = await client.chat.completions.create(model=client.model, messages=messages, **settings)
            said.append(answer.choices[0].message.content)
            assert answer.usage.completion_tokens <= 5
            messages += [{"role": "assistant", "content": said[-1]}, {"role": "user", "content": "And then?"}]
        written = await client.completions.create(model=client.model, prompt=said[0] + "x", max_tokens=2)
        return float(sum(map(ord, "".join(said) + written.choices[0].text)) % 101)


# What LoRA slots do not carry, and so stays as it is where members of an engine play at the same time.
WITHOUT_SLOTS = ["model.embed_tokens.weight:sigma=0,lr=0", "*bias:sigma=0,lr=0", "*norm.weight:sigma=0,lr=0"]


@pytest.mark.parametrize(("at_once", "groups"), [("1", []), ("auto", WITHOUT_SLOTS)])
def test_members_of_engines_play_as_the_hugging_face_model_s_do(folder, tmp_path, at_once, groups):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from esfast.integrations.fleet import FleetTrainer

    model = folder("qwen2-tied")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    given = {"train_dataset": ROWS, "eval_dataset": ROWS[:2], "environment": Talk(), "processing_class": tokenizer}

    def config(name):
        return esfast.ESConfig(
            output_dir=str(tmp_path / name),
            generations=2,
            population_size=4,
            sigma=0.05,
            lr=0.05,
            noise="low_rank",
            weights="base",
            groups=groups,
            members_at_once=at_once,
            max_completion_length=6,
            prompts_per_generation=6,
            eval_every=0,
            progress=False,
        )

    options = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8}
    FleetTrainer(model, None, config("fleet"), 2, dtype="float32", engine_options=options, **given).train()
    here = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    esfast.ESTrainer(here, args=config("here"), **given).train()
    fleet, wanted = (esfast.journal.read(tmp_path / name / "journal.jsonl").records for name in ("fleet", "here"))
    assert fleet == wanted and len({reward for record in wanted for reward in record.rewards}) > 4
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "fleet" / "model", dtype=torch.float32)
    assert esfast.Plan(saved).fingerprint() == esfast.Plan(here).fingerprint()
