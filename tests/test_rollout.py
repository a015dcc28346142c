import logging

import pytest
import torch
from transformers import GenerationConfig

from esfast.rollout.engine import TransformersEngine
from esfast.rollout.probe import ROWS_UNKNOWN, Traits
from esfast.tasks import countdown, embedded

PROMPTS = ["1 2 3=6\n<think>", "a", "12 34 56 78=90\n<think>", "\u00e9", "1 2 3=7\n<think>", "no tags here", "a"]


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)  # for a model of this size more threads only wait for each other


@pytest.fixture(scope="module")
def tiny():
    """Tokenizer and untrained model; its weights are enlarged so that completions differ and some end early."""
    tokenizer = embedded.make_tokenizer()
    torch.manual_seed(5)
    model = embedded.make_model(tokenizer).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
        weight = model.model.embed_tokens.weight  # end, tags and digits become likely enough to be seen
        weight[[tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<answer>", "7", "+"])]] *= 2.2
    return model, tokenizer


def greedy(model, tokenizer, prompt, max_new_tokens):
    """The definition of greedy decoding: one prompt, without a batch, padding or a cache."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + max_new_tokens:
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 100])
def test_batches_equal_prompts_one_by_one(tiny, batch_size):
    expected = [greedy(*tiny, prompt, 12) for prompt in PROMPTS]
    assert len({len(tiny[1](text)["input_ids"]) for text in expected}) > 1, "some should end before others"
    assert any("<answer>" in text for text in expected), "tags should be seen"
    assert TransformersEngine(*tiny, 12, batch_size).generate(PROMPTS) == expected


def test_nothing_to_do(tiny):
    assert TransformersEngine(*tiny, 4).generate([]) == []


def test_stops_when_all_have_ended(tiny, monkeypatch):
    model, tokenizer = tiny
    ending = [p for p in PROMPTS if len(tokenizer(greedy(*tiny, p, 40))["input_ids"]) < 30]
    assert ending
    calls = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    TransformersEngine(*tiny, 500).generate(ending)
    assert len(calls) <= 40


def test_leaves_no_trace_on_the_model(tiny):
    model, _ = tiny
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = model.generation_config
    engine = TransformersEngine(*tiny, 5)
    for training in (True, False):
        model.train(training)
        engine.generate(PROMPTS)
        assert model.training is training and model.generation_config is config
        with pytest.raises(TypeError):
            engine.generate([None])
        assert model.training is training and model.generation_config is config
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad and not weight.is_inference() for weight in model.parameters())
    assert not any(buffer.is_inference() for buffer in model.buffers())
    loss = model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum()
    loss.backward()  # training still works
    model.zero_grad()


def test_follows_weights_changed_in_place(tiny):
    model, tokenizer = tiny
    engine = TransformersEngine(*tiny, 8)
    first = engine.generate(PROMPTS)
    weight = model.model.embed_tokens.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    assert engine.generate(PROMPTS) == [greedy(*tiny, prompt, 8) for prompt in PROMPTS] != first
    with torch.no_grad():
        weight.copy_(original)
    assert engine.generate(PROMPTS) == first


def test_ignores_sampling_settings_of_the_checkpoint(tiny, monkeypatch):
    model, tokenizer = tiny
    expected = TransformersEngine(*tiny, 10).generate(PROMPTS)
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**settings, max_length=7, min_new_tokens=9))
    assert TransformersEngine(*tiny, 10).generate(PROMPTS) == expected


def test_further_end_tokens_of_the_checkpoint_end_a_text(tiny, monkeypatch):
    model, tokenizer = tiny
    text = greedy(*tiny, "a", 12)
    ends = tokenizer.convert_tokens_to_ids(text[1])
    config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, ends])
    monkeypatch.setattr(model, "generation_config", config)
    completion = TransformersEngine(*tiny, 12).generate(["a"])[0]
    assert len(completion) < len(text) and text.startswith(completion)


class Short:
    """A stand-in for a device that has memory for `rows` rows."""

    def __init__(self, model, rows, monkeypatch):
        self.sizes, generate = [], model.generate

        def limited(**arguments):
            self.sizes.append(len(arguments["input_ids"]))
            if self.sizes[-1] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate too much.")
            return generate(**arguments)

        monkeypatch.setattr(model, "generate", limited)


def test_out_of_memory_halves_the_batch(tiny, monkeypatch, caplog):
    expected = TransformersEngine(*tiny, 6).generate(PROMPTS)
    engine = TransformersEngine(*tiny, 6)
    device = Short(tiny[0], 2, monkeypatch)
    with caplog.at_level(logging.WARNING, "esfast.rollout.engine"):
        assert engine.generate(PROMPTS) == expected
    assert device.sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "7 prompts" in caplog.text and "going on with 3" in caplog.text and "going on with 1" in caplog.text
    device.sizes.clear()
    assert engine.generate(PROMPTS) == expected
    assert device.sizes == [1] * 7, "what was learnt is kept"


def test_out_of_memory_with_one_prompt_is_an_error(tiny, monkeypatch):
    engine = TransformersEngine(*tiny, 6)
    device = Short(tiny[0], 0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(PROMPTS)
    assert device.sizes == [7, 3, 1]


def test_prompts_are_tokenized_once(tiny):
    model, tokenizer = tiny
    counted = []

    class Counting(type(tokenizer)):
        def __call__(self, texts, *args, **kwargs):
            counted.append(len(texts))
            return super().__call__(texts, *args, **kwargs)

    engine = TransformersEngine(model, embedded.make_tokenizer(), 2)
    engine.tokenizer.__class__ = Counting
    for _ in range(3):
        engine.generate(PROMPTS)
    assert counted == [len(set(PROMPTS))]
    engine.generate(["new"])
    assert counted == [len(set(PROMPTS)), 1]


def test_pad_token_absent(tiny):
    model, _ = tiny
    tokenizer = embedded.make_tokenizer()
    expected = TransformersEngine(model, tokenizer, 8).generate(PROMPTS)
    tokenizer.pad_token = None
    assert TransformersEngine(model, tokenizer, 8).generate(PROMPTS) == expected
    tokenizer.eos_token = None
    model.generation_config, config = GenerationConfig(), model.generation_config
    try:  # with nothing that ends a text, a token pads that has an embedding: what is masked does not count
        endless = TransformersEngine(model, tokenizer, 8)
        assert endless.generate(PROMPTS) == [endless.generate([prompt])[0] for prompt in PROMPTS]
    finally:
        model.generation_config = config


@pytest.mark.parametrize("eos", [True, False])
def test_pad_token_that_the_model_has_no_embedding_for(tiny, eos):
    """tokenizer.pad_token = "<|pad|>" or add_special_tokens, and no model.resize_token_embeddings."""
    model, tokenizer = tiny[0], embedded.make_tokenizer()
    expected = TransformersEngine(model, tokenizer, 8).generate(PROMPTS)
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]
    model.generation_config, config = model.generation_config if eos else GenerationConfig(), model.generation_config
    try:
        found = TransformersEngine(model, tokenizer, 8).generate(PROMPTS)
        assert found == expected
    finally:
        model.generation_config = config


def test_prompt_with_a_token_that_the_model_has_no_embedding_for(tiny):
    model, tokenizer = tiny[0], embedded.make_tokenizer()
    tokenizer.add_tokens(["ponder"])
    engine = TransformersEngine(model, tokenizer, 8)
    with pytest.raises(
        ValueError, match=r"'7 ponder' has the token 'ponder' with the id \d+, .*resize_token_embeddings"
    ):
        engine.generate(["7", "7 ponder"])
    assert engine.generate(["7"])


@pytest.mark.parametrize("prompt", ["\ud83d", "7\udc00+1=", "x" * 100 + "\udfff"])
def test_prompt_with_half_a_character(tiny, prompt):
    with pytest.raises(ValueError, match=r"prompt: .*\\ud.* holds a lone surrogate.*surrogatepass"):
        TransformersEngine(*tiny, 8).generate(["7", prompt])
    repaired = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert TransformersEngine(*tiny, 8).generate([repaired])


def test_prompt_beyond_the_context(tiny):
    engine = TransformersEngine(*tiny, 48)
    assert len(engine.generate(["x" * 2000])) == 1
    with pytest.raises(
        ValueError, match=r"'xxx.*2001 tokens.* 48 for the completion.*context of 2048.*lower max_new_tokens"
    ):
        engine.generate(["short", "x" * 2001])


@pytest.mark.parametrize("arguments", [{"max_new_tokens": 0}, {"max_new_tokens": 4, "batch_size": 0}])
def test_sizes_below_one(tiny, arguments):
    with pytest.raises(ValueError, match="at least 1"):
        TransformersEngine(*tiny, **arguments)


@pytest.mark.parametrize("prompts", ["one text", [["chat"]], [1]])
def test_prompts_of_another_type(tiny, prompts):
    with pytest.raises(TypeError, match="list of strings"):
        TransformersEngine(*tiny, 4).generate(prompts)


def test_empty_prompt(tiny):
    with pytest.raises(ValueError, match="no tokens"):
        TransformersEngine(*tiny, 4).generate(["fine", ""])


def test_scores_countdown(tiny):
    rows = countdown.problems(5, 0, style="compact")
    completions = TransformersEngine(*tiny, 8).generate([row["prompt"] for row in rows])
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    assert len(countdown.reward([row["prompt"] for row in rows], completions, **columns)) == 5


def test_mini_batches_are_sized_for_the_memory(tiny, monkeypatch):
    model, tokenizer = tiny
    config = model.config
    per_token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * 16 * 4
    )  # keys and values, head width 16, float32
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS) + 12
    sizes = []
    original = TransformersEngine._try_batch
    monkeypatch.setattr(
        TransformersEngine, "_try_batch", lambda s, rows, *rest: sizes.append(len(rows)) or original(s, rows, *rest)
    )
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 4 * 3 * per_token * longest}.__getitem__)
    engine = TransformersEngine(model, tokenizer, 12)
    assert engine.traits.batch_that_fits(longest, model.device) == 3
    engine.generate(PROMPTS)
    assert sizes[0] == 3 and sum(sizes) == len(PROMPTS)
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert engine.traits.batch_that_fits(longest, model.device) == 1
    assert Traits().batch_that_fits(longest, model.device) == ROWS_UNKNOWN
