"""TRL's conventions: names of settings, chats, reward functions, datasets, adapters."""

import dataclasses
import inspect

import pytest
import torch

import esfast
from esfast.tasks import embedded
from esfast.trainer.trl_names import translate

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def model():
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    return embedded.make_model(tokenizer).eval(), tokenizer


def config(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "population_size": 4,
        "sigma": 0.05,
        "learning_rate": 0.05,
        "prompts_per_generation": 2,
        "max_completion_length": 4,
        "progress": False,
    }
    return esfast.ESConfig(**{**settings, **changes})


def test_names_that_mean_the_same():
    c = esfast.ESConfig(learning_rate=0.1, max_steps=7, eval_steps=3, warmup_steps=2, lr_scheduler_type="cosine")
    assert (c.lr, c.generations, c.eval_every, c.warmup_generations, c.lr_schedule) == (0.1, 7, 3, 2, "cosine")


def test_a_grpo_script_of_a_tutorial_starts_with_one_warning(caplog):
    c = esfast.ESConfig(
        output_dir="runs/x",
        learning_rate=1e-3,
        adam_beta1=0.9,
        adam_beta2=0.99,
        adam_epsilon=1e-7,
        weight_decay=0.1,
        warmup_ratio=0.1,
        lr_scheduler_type="constant_with_warmup",
        logging_steps=1,
        bf16=True,
        fp16=False,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        gradient_checkpointing=True,
        num_generations=4,
        temperature=0.9,
        max_prompt_length=256,
        max_completion_length=786,
        num_train_epochs=1,
        max_steps=250,
        save_steps=100,
        save_strategy="steps",
        eval_strategy="no",
        max_grad_norm=0.1,
        report_to="none",
        beta=0.0,
        log_on_each_node=False,
        use_vllm=False,
        vllm_gpu_memory_utilization=0.3,
        run_name="x",
        top_p=1.0,
        top_k=None,
        repetition_penalty=1.0,
        disable_tqdm=True,
        remove_unused_columns=False,
        optim="adamw_8bit",
        seed=3,
    )
    (record,) = caplog.records
    said = record.getMessage().split(": ")[-1].split(", ")
    assert set(said) == {
        "logging_steps",
        "bf16",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "max_prompt_length",
        "max_grad_norm",
        "vllm_gpu_memory_utilization",
        "run_name",
        "optim",
    }
    assert (c.generations, c.warmup_generations, c.lr_schedule, c.checkpoint_every) == (250, 25, "constant", 100)
    assert (c.eval_every, c.progress, c.adam_eps, c.report_to) == (0, False, 1e-7, None)


def test_a_learning_rate_for_gradients_is_noticed(caplog):
    esfast.ESConfig(learning_rate=1e-6)
    assert "is one for gradients" in caplog.text


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"beta": 0.04}, ValueError, "beta=0.04 can't be had: ES has no KL penalty; kl_to_base=True measures"),
        ({"use_vllm": True}, ValueError, "esfast train --engine vllm"),
        ({"num_train_epochs": 1}, ValueError, "give generations, or max_steps"),
        ({"top_p": 0.9}, ValueError, "sampled with a temperature alone"),
        ({"push_to_hub": True}, ValueError, "upload the folder"),
        ({"eval_strategy": "epoch"}, ValueError, "ESConfig.eval_strategy: expected 'steps' or 'no', got 'epoch'"),
        ({"warmup_ratio": 0.1}, ValueError, "a share of the generations: give their number"),
        ({"learning_rte": 1.0}, TypeError, "Did you mean 'learning_rate'?"),
        ({"siggma": 1.0}, TypeError, "Did you mean 'sigma'?"),
        ({"optimiser": "adam"}, TypeError, "Did you mean 'optimizer'?"),
        ({"learning_rate": 1.0, "lr": 1.0}, TypeError, "'learning_rate' is another name of 'lr'; give one of them"),
    ],
)
def test_other_names_are_refused_with_what_to_do(settings, error, message):
    with pytest.raises(error) as caught:
        esfast.ESConfig(**settings)
    assert message in str(caught.value)


def test_values_that_ask_for_nothing_may_be_texts():
    """YAML gives texts for values in quotes, and for 1e-1."""
    asked = {
        "beta": "0.0",
        "use_vllm": "false",
        "push_to_hub": "no",
        "top_p": "1.0",
        "top_k": "-1",
        "min_p": "none",
        "model_init_kwargs": "{}",
        "warmup_ratio": "0.0",
    }
    assert esfast.ESConfig(**asked) == esfast.ESConfig()
    assert esfast.ESConfig(warmup_ratio="1e-1", max_steps="50").warmup_generations == 5
    for name, value in (("beta", "0.04"), ("use_vllm", "true"), ("top_p", "0.9"), ("push_to_hub", "maybe")):
        with pytest.raises(ValueError, match=f"{name}='{value}' can't be had"):
            esfast.ESConfig(**{name: value})


def test_every_name_that_grpo_config_has_is_known():
    """Every name is accepted, or refused with a message; none raises TypeError, as an unknown name would."""
    trl = pytest.importorskip("trl", reason="needs trl, to compare with what it is today")
    for field in dataclasses.fields(trl.GRPOConfig):
        default = None if field.default is dataclasses.MISSING else field.default
        for value in (default, 0.5, "text", True):
            try:
                translate({field.name: value, "max_steps": 10} | {field.name: value}, ESCONFIG)
            except ValueError as error:
                assert field.name in str(error) and value is not default, field.name
            except TypeError as error:
                assert "expected" in str(error) and value is not default, field.name


ESCONFIG = [field.name for field in dataclasses.fields(esfast.ESConfig)]


def test_the_quick_start_of_grpo(tmp_path, model):
    """A script like that of TRL's quick start: reward functions that take completions and **kwargs, a column, or
    prompts, and weights for them."""
    net, tokenizer = model
    seen = {}

    def reward_num_unique_letters(completions, **kwargs):
        return [len(set(content)) for content in completions]

    def reward_column(completions, ground_truth, **kwargs):
        seen["truth"] = ground_truth
        return [1.0 if c == gt else 0.0 for c, gt in zip(completions, ground_truth, strict=True)]

    def reward_task(prompts, completions, task, **kwargs):  # one that has a say in some of the rows only
        return [float(len(c)) if t == "math" else None for c, t in zip(completions, task, strict=True)]

    rows = [{"prompt": f"{i}+1=", "ground_truth": str(i), "task": "math" if i % 2 else "coding"} for i in range(4)]
    functions = [reward_num_unique_letters, reward_column, reward_task]
    trainer = esfast.ESTrainer(
        model=net,
        reward_funcs=functions,
        args=config(tmp_path, reward_weights=[1.0, 2.0, 0.5]),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(seen["truth"]) == 2 and trainer.es.generation == 2
    with pytest.raises(ValueError, match="one for each of the 3 reward functions"):
        esfast.ESTrainer(net, functions, config(tmp_path / "b", reward_weights=[1.0]), rows, None, tokenizer)


def test_chats_go_through_the_template_and_come_back_as_messages(tmp_path, model):
    net, tokenizer = model
    tokenizer.chat_template = TEMPLATE
    asked, seen = [], []

    def engine(texts):
        asked.extend(texts)
        return ["yes"] * len(texts)

    def format_reward_func(completions, **kwargs):
        seen.extend(completions)
        return [1.0 if completion[0]["content"] == "yes" else 0.0 for completion in completions]

    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Is {i}?"}]}
        for i in range(2)
    ]
    trainer = esfast.ESTrainer(net, format_reward_func, config(tmp_path), rows, rows, tokenizer, engine=engine)
    summary = trainer.train()
    assert set(asked) == {f"<system>Be brief.\n<user>Is {i}?\n<assistant>" for i in range(2)}
    assert seen[0] == [{"role": "assistant", "content": "yes"}] and summary["before"]["eval_reward"] == 1.0
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        esfast.ESTrainer(net, format_reward_func, config(tmp_path / "b"), rows, rows, tokenizer, engine=engine).train()


def test_adapters_alone_are_tuned(tmp_path, model):
    peft = pytest.importorskip("peft", reason="needs peft, an optional package")
    net, tokenizer = model
    rows = [{"prompt": f"{i}\n"} for i in range(3)]
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    trainer = esfast.ESTrainer(
        net,
        lambda completions, **k: [float(hash(c) % 5) for c in completions],
        config(tmp_path),
        rows,
        None,
        tokenizer,
        peft_config=lora,
    )
    trainer.train()
    assert all("lora_" in name for name in trainer.es.plan.names) and len(trainer.es.plan) == 8
    after = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    assert any(p.abs().sum() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()


def test_the_first_arguments_are_those_of_grpo_trainer():
    trl = pytest.importorskip("trl", reason="needs trl, to compare with what it is today")
    theirs = list(inspect.signature(trl.GRPOTrainer.__init__).parameters)
    assert list(inspect.signature(esfast.ESTrainer.__init__).parameters)[:7] == theirs[:7]


def test_names_of_older_transformers_are_left_out_too(tmp_path, caplog):
    """TrainingArguments of Transformers 4.56 has these names, that of 5 does not; `make test-transformers-floor` tries
    all of them."""
    esfast.ESConfig(
        str(tmp_path), per_gpu_train_batch_size=8, half_precision_backend="auto", push_to_hub_model_id="x", _n_gpu=1
    )
    assert "left out" in caplog.text and "per_gpu_train_batch_size" in caplog.text
