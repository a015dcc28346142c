"""What is measured of a model before its first text, and what follows: batches, their size, and logits that are numbers."""

import logging

import pytest
import torch
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperForCausalLM

import esfast
from esfast.rollout import probe
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.sampling import LogitsError, SeededSampling
from esfast.tasks import embedded

PROMPTS = ["a", "12+3=", "xyz xyz", "12+4=", "What is the meaning of life, the universe and all?", "b"]
TOKENIZER = embedded.make_tokenizer()
IDS = {
    "vocab_size": len(TOKENIZER),
    "pad_token_id": TOKENIZER.pad_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
    "bos_token_id": 1,
}
SIZES = IDS | dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2, state_size=8)),
    "jamba": lambda: JambaForCausalLM(
        JambaConfig(
            **SIZES, attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=8, use_mamba_kernels=False
        )
    ),
    "recurrent_gemma": lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SIZES | {"num_hidden_layers": 3})),
    "whisper": lambda: WhisperForCausalLM(
        WhisperConfig(
            **IDS,
            d_model=32,
            decoder_layers=2,
            decoder_attention_heads=4,
            decoder_ffn_dim=64,
            max_target_positions=99,
            decoder_start_token_id=1,
        )
    ),
    "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**IDS, hidden_size=32, num_hidden_layers=2, context_length=512)),
}
# ... what goes together, bytes of a cache, fixed and for each token
EXPECTED = {
    "llama": (probe.ANY, 0, 2 * 2 * 2 * 8 * 4),
    "mamba": (probe.ANY, 2 * 64 * (8 + 4) * 4, 0),
    "jamba": (probe.ANY, 64 * (8 + 4) * 4, 2 * 2 * 8 * 4),
    "recurrent_gemma": (probe.EQUAL_LENGTHS, None, None),
    "whisper": (probe.EQUAL_LENGTHS, 0, 2 * 2 * 32 * 4),
    "rwkv": (probe.ALONE, 5 * 32 * 2 * 4, 0),
}


def made(name):
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


@pytest.fixture(scope="module", params=MODELS)
def named(request):
    return request.param, made(request.param)


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


def greedy(model, prompt, count):
    """The definition of greedy decoding: one prompt, without a batch, padding or a cache."""
    ids = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and ids[-1] != TOKENIZER.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


def test_texts_of_batches_are_those_of_prompts_alone(named):
    name, model = named
    together = TransformersEngine(model, TOKENIZER, 6).generate(PROMPTS)
    assert together == [greedy(model, prompt, 6) for prompt in PROMPTS]
    for batch_size in (1, 2):
        assert TransformersEngine(model, TOKENIZER, 6, batch_size).generate(PROMPTS) == together


def test_traits(named):
    name, model = named
    traits = TransformersEngine(model, TOKENIZER, 6).traits
    assert (traits.together, traits.bytes_fixed, traits.bytes_per_token) == EXPECTED[name]
    assert traits.repeatable


def test_batches_are_as_large_as_the_memory_allows(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 4 * 1000}.__getitem__)
    cpu = torch.device("cpu")
    for traits, fits in (
        (probe.Traits(bytes_fixed=0, bytes_per_token=10), 10),
        (probe.Traits(bytes_fixed=100, bytes_per_token=0), 10),
        (probe.Traits(bytes_fixed=100, bytes_per_token=4), 7),
        (probe.Traits(bytes_fixed=5000, bytes_per_token=4), 1),
        (probe.Traits(), probe.ROWS_UNKNOWN),
    ):
        assert traits.batch_that_fits(10, cpu) == fits


def test_what_is_slow_is_said_once_for_a_model(caplog):
    model = made("rwkv")
    for _ in range(2):
        TransformersEngine(model, TOKENIZER, 4)
    assert caplog.text.count("a RwkvForCausalLM answers otherwise in a batch than alone") == 1
    TransformersEngine(made("recurrent_gemma"), TOKENIZER, 4)
    assert "a RecurrentGemmaForCausalLM reads padding as text: only prompts of one length" in caplog.text
    assert "a RecurrentGemmaForCausalLM shows no cache to measure: 8 prompts" in caplog.text


def test_a_static_cache_needs_padding():
    with pytest.raises(ValueError, match="WhisperForCausalLM reads padding as text.*'static'"):
        TransformersEngine(made("whisper"), TOKENIZER, 4, decoding="static")


def test_a_state_that_modules_keep_is_none_of_the_next_text():
    """RecurrentGemma takes a prompt of one token for the next one of the text before."""
    model = made("recurrent_gemma")
    expected = [greedy(model, prompt, 6) for prompt in ("a", "b")]
    engine = TransformersEngine(model, TOKENIZER, 6)
    for before in ("What is the meaning of life?", "xyz", "b"):
        engine.generate([before])
        assert engine.generate(["a"]) + engine.generate(["b"]) == expected


def test_a_model_that_changes_its_weights_is_refused():
    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(**IDS, hidden_size=32, num_hidden_layers=2, rescale_every=1)).eval()
    with pytest.raises(ValueError, match="RwkvForCausalLM can't generate.*changes its own weights.*rescale_every=0"):
        TransformersEngine(model, TOKENIZER, 4)


def test_a_model_whose_answers_are_drawn_is_noticed(monkeypatch, caplog):
    model, forward = made("llama"), LlamaForCausalLM.forward

    def noisy(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits += torch.rand_like(output.logits)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", noisy)
    TransformersEngine(model, TOKENIZER, 4)
    assert "a run of it can't be repeated" in caplog.text


def test_rounding_is_not_taken_for_padding_that_is_read():
    torch.manual_seed(0)
    expected = torch.randn(3, 3, 99)
    for dtype, noise in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        assert probe.same_but_for_rounding(expected, expected + noise * torch.randn_like(expected), dtype)
        assert not probe.same_but_for_rounding(
            expected, expected + 10 * noise * torch.randn_like(expected) + 0.1 * expected.roll(1), dtype
        )
    # another expert for one of the texts, another first token, and what follows from it
    other = expected.clone()
    other[0] = torch.randn(3, 99)
    assert probe.same_but_for_rounding(expected, other, torch.bfloat16)
    assert not probe.same_but_for_rounding(expected, other, torch.float32)


def test_a_model_in_16_bits_is_measured_too():
    engine = TransformersEngine(made("llama").bfloat16(), TOKENIZER, 6)
    assert engine.traits.together == probe.ANY and engine.traits.bytes_per_token == EXPECTED["llama"][2] // 2
    assert TransformersEngine(made("whisper").bfloat16(), TOKENIZER, 6).traits.together == probe.EQUAL_LENGTHS


def test_a_vocabulary_without_letters_is_measured_too():
    def encode(texts):
        raise ValueError("no [UNK] token")

    rows = probe.probe_texts(encode, 5, 30)
    assert len(rows) == len(probe.TEXTS) and max(map(max, rows)) < 5 and len(rows[0]) == 12 and min(map(len, rows)) > 1
    assert probe.probe_texts(lambda texts: [[] for _ in texts], 5, None) == [[0]] * 4


def test_no_trace_is_left_on_the_model():
    model = made("recurrent_gemma").train()
    config, before = model.generation_config, {n: p.clone() for n, p in model.state_dict().items()}
    attributes = [{k for k, v in vars(m).items() if isinstance(v, torch.Tensor)} for m in model.modules()]
    TransformersEngine(model, TOKENIZER, 4)
    assert model.training and model.generation_config is config
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert attributes == [{k for k, v in vars(m).items() if isinstance(v, torch.Tensor)} for m in model.modules()]


@pytest.fixture
def broken():
    model = made("llama")
    engines = [TransformersEngine(model, TOKENIZER, 4, decoding=way) for way in ("plain", "static")]
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    return engines


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(broken, value):
    with torch.no_grad():
        broken[0].model.model.norm.weight.fill_(value)
    for engine in broken:
        for seeds in (None, list(range(len(PROMPTS)))):
            with pytest.raises(LogitsError, match="logits are NaN or infinite"):
                engine.generate(PROMPTS, seeds)


def test_a_base_model_whose_logits_are_no_numbers_is_refused():
    model = made("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="1 of .* tensors hold NaN or infinite weights: 'lm_head.weight'"):
            TransformersEngine(model, TOKENIZER, 4)
        model.lm_head.weight.fill_(60000)
    with pytest.raises(ValueError, match="LlamaForCausalLM can't generate a text: LogitsError"):
        TransformersEngine(model.half(), TOKENIZER, 4)


def test_logits_that_a_model_rules_out_are_fine():
    model = made("llama")
    forward = LlamaForCausalLM.forward

    class Ruling(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits[..., 5] = -torch.inf
            return output

    model.__class__ = Ruling
    assert len(TransformersEngine(model, TOKENIZER, 4).generate(PROMPTS)) == len(PROMPTS)


def test_sampling_from_what_is_no_number_takes_some_token():
    """Any token will do, but it must be one of the vocabulary: on a GPU an index beyond the end would end the
    process."""
    draw = SeededSampling([1, 2], 1.0, 1)
    scores = draw(torch.zeros(2, 0, dtype=torch.long), torch.full((2, 7), torch.nan))
    assert (scores.isfinite().sum(1) == 1).all()


def trainer_of(tmp_path, engine=None, dtype=torch.float32, **settings):
    args = esfast.ESConfig(
        output_dir=tmp_path / "run",
        **dict(
            generations=2,
            population_size=4,
            sigma=0.5,
            lr=0.1,
            prompts_per_generation=2,
            max_completion_length=4,
            progress=False,
        )
        | settings,
    )
    return esfast.ESTrainer(
        made("llama").to(dtype),
        lambda completions, **_: [float(len(c)) for c in completions],
        args,
        [{"prompt": "a"}, {"prompt": "b"}],
        processing_class=TOKENIZER,
        engine=engine,
    )


def test_a_broken_member_is_named_with_its_sigma(tmp_path):
    trainer = trainer_of(tmp_path, dtype=torch.float16, sigma=1e4)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(
        LogitsError, match=r"member 0 of generation 0 \(sigma 10000\) gives logits that are not numbers.*lower"
    ):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


class Breaking:
    """An engine some of whose calls find logits that are no numbers."""

    def __init__(self, calls):
        self.calls, self.count = calls, 0

    def generate(self, prompts, seeds=None):
        self.count += 1
        if self.count - 1 in self.calls:
            raise LogitsError("the model's logits are NaN or infinite")
        return [f"{self.count}" * (self.count % 5) for _ in prompts]

    def close(self):
        pass


def test_a_broken_member_is_set_aside(tmp_path, caplog):
    trainer = trainer_of(tmp_path, Breaking({1, 6}), on_reward_error="skip")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    rows = trainer.folder.read_metrics()[1:]
    assert [row["set_aside"] for row in rows] == [1, 1]
    assert "member 1 of generation 0 is set aside: member 1 of generation 0 (sigma 0.5) gives" in caplog.text


def test_an_evaluation_of_a_broken_model(tmp_path):
    trainer = trainer_of(tmp_path, Breaking({9}))
    trainer.eval_dataset = [{"prompt": "c"}]
    with pytest.raises(LogitsError, match="the model after generation 2 gives logits that are not numbers"):
        trainer.train()
