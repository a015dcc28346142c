"""The ways to generate give the same texts, of the weights as they are; sampling is a function of seed and weights."""

import contextlib
import copy
import functools
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import StaticCache

from esfast.rollout import decoding, sampling
from esfast.rollout.engine import TransformersEngine, as_engine
from esfast.tasks import embedded

PROMPTS = ["1 2 3=6\n<think>", "a", "12 34 56 78=90\n<think>", "\u00e9", "1 2 3=7\n<think>", "no tags here", "a"]
LONG = ["the same beginning of sixteen tokens and more, " + tail for tail in ("one", "two", "one")]
HAS_CONTINUOUS = decoding._continuous_options() is not None
needs_continuous = pytest.mark.skipif(not HAS_CONTINUOUS, reason="this Transformers has no continuous batching to use")
CONTINUOUS = pytest.param("continuous", marks=needs_continuous)
WAYS = ["plain", "static", CONTINUOUS]


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Limits the paged cache of continuous batching to 64 blocks. Without a limit it takes most of the memory."""
    settings = decoding._continuous_options()
    size = (
        {"page_size" if "page_size" in inspect.signature(settings).parameters else "block_size": 16} if settings else {}
    )
    small = functools.partial(decoding.Continuous, **size, num_blocks=64, max_batch_tokens=256)
    monkeypatch.setitem(decoding.WAYS, "continuous", small)


@pytest.fixture(scope="module")
def tiny():
    tokenizer = embedded.make_tokenizer()
    torch.manual_seed(5)
    model = embedded.make_model(tokenizer).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
        model.model.embed_tokens.weight[tokenizer.eos_token_id] *= 3.0  # likely enough that some texts end
    return model, tokenizer


@pytest.fixture
def engine(tiny):
    made = []

    def make(**options):
        made.append(TransformersEngine(*tiny, 12, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@contextlib.contextmanager
def other_weights(model):
    """Changes the weights in place; after the block they are as before."""
    weight = model.model.layers[0].mlp.up_proj.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(weight.roll(1, 0))
    try:
        yield
    finally:
        weight.data.copy_(original)


def assert_follows_the_weights(model, engine, plain, prompts):
    first = engine.generate(prompts)
    with other_weights(model):
        expected = plain.generate(prompts)
        assert expected != first
        assert engine.generate(prompts) == expected
    assert engine.generate(prompts) == first


@pytest.mark.parametrize(
    ("way", "batch_size"), [("static", None), ("static", 3), pytest.param("continuous", None, marks=needs_continuous)]
)
def test_ways_give_the_same_texts_in_float32(tiny, engine, way, batch_size):
    plain, other = engine(), engine(decoding=way, batch_size=batch_size)
    expected = plain.generate(PROMPTS)
    tokens = plain.tokens
    lengths = {len(text) for text in expected}
    assert min(lengths) < 12 <= max(lengths), "some end early"
    for _ in range(2):
        assert other.generate(PROMPTS) == expected
    assert other.tokens == 2 * tokens == 2 * sum(count_tokens(*tiny, prompt) for prompt in PROMPTS)


def count_tokens(model, tokenizer, prompt):
    """The number of tokens of the greedy text, generated one at a time; the end token counts."""
    ids = tokenizer(prompt)["input_ids"]
    prompt_length = len(ids)
    while len(ids) < prompt_length + 12 and tokenizer.eos_token_id not in ids[prompt_length:]:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return len(ids) - prompt_length


@pytest.mark.parametrize("way", WAYS)
def test_every_way_follows_the_weights(tiny, engine, way):
    for prompts in (PROMPTS, LONG):
        assert_follows_the_weights(tiny[0], engine(decoding=way), engine(), prompts)


def test_a_graph_that_keeps_old_weights_would_be_noticed(tiny, engine):
    frozen = TransformersEngine(copy.deepcopy(tiny[0]), tiny[1], 12)
    with pytest.raises(AssertionError):
        assert_follows_the_weights(tiny[0], frozen, engine(), PROMPTS)


def test_compiled_code_reads_the_weights_where_they_lie(tiny, engine, monkeypatch):
    """The static cache as on GPUs, where Transformers compiles the forward pass, with the quickest backend."""
    model, _ = tiny
    compiled = torch.compile(model.forward, backend="eager", dynamic=False)
    calls = []
    monkeypatch.setattr(model, "get_compiled_call", lambda config: lambda **a: calls.append(1) or compiled(**a))
    static = lambda inputs, config: isinstance(inputs[decoding.CACHE], StaticCache)  # noqa: E731
    monkeypatch.setattr(model, "_valid_auto_compile_criteria", static)
    assert_follows_the_weights(model, engine(decoding="static"), engine(), PROMPTS)
    assert calls


@needs_continuous
def test_keys_and_values_of_another_member_would_be_noticed(tiny, engine, monkeypatch):
    """Shows that the test above can fail: with a cache that outlives its member, the same engines give other texts."""
    first = engine().generate(LONG)
    shared = functools.partial(decoding.WAYS["continuous"], allow_block_sharing=True)
    monkeypatch.setitem(decoding.WAYS, "continuous", shared)
    stale = {"continuous": engine(decoding="continuous"), "static": engine(decoding="static")}
    assert all(e.generate(LONG) == first for e in stale.values())
    monkeypatch.setattr(StaticCache, "reset", lambda self: None)
    with other_weights(tiny[0]):
        expected = engine().generate(LONG)
        assert stale["continuous"].generate(LONG) != expected != first
        with pytest.raises((AssertionError, IndexError, RuntimeError)):
            assert stale["static"].generate(LONG) == expected


def test_static_shapes_are_few(tiny, engine, monkeypatch):
    model, _ = tiny
    shapes, caches, generate = set(), set(), model.generate

    def watched(**arguments):
        shapes.add(tuple(arguments["input_ids"].shape))
        caches.add(id(arguments[decoding.CACHE]))
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", watched)
    e = engine(decoding="static", batch_size=3)
    e.generate(PROMPTS)
    e.generate(PROMPTS[:4])
    assert shapes == {(3, 64)} and len(caches) == 1


def test_auto_on_a_gpu_goes_on_with_a_way_that_works(tiny, engine, monkeypatch, caplog):
    model, _ = tiny
    monkeypatch.setattr("esfast.rollout.engine.choose_ways", lambda model: ["continuous", "static", "plain"])
    monkeypatch.setitem(decoding.WAYS, "continuous", lambda *a: (_ for _ in ()).throw(RuntimeError("no pages")))
    e = engine()
    assert e.generate(PROMPTS) == engine(decoding="plain").generate(PROMPTS)
    assert "continuous decoding doesn't work here, going on with static: no pages" in caplog.text
    assert isinstance(e._way, decoding.Static)


@needs_continuous
def test_a_session_that_cannot_begin_leaves_the_attention_as_it_was(tiny, engine, monkeypatch):
    model = tiny[0]
    before = model.config._attn_implementation

    def cannot(**options):
        model.set_attn_implementation("eager")
        raise RuntimeError("no pages")
        yield

    monkeypatch.setattr(model, "continuous_batching_context_manager", contextlib.contextmanager(cannot))
    with pytest.raises(RuntimeError, match="no pages"):
        engine(decoding="continuous").generate(["a"])
    assert model.config._attn_implementation == before


@needs_continuous
def test_memory_that_runs_out_in_continuous_batching(tiny, engine, monkeypatch):
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    def short(self):
        raise RuntimeError("CUDA out of memory. Tried to allocate too much.")

    monkeypatch.setattr(ContinuousBatchingManager, "_generation_step", short)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        engine(decoding="continuous").generate(["a"])


def test_sampled_texts_depend_on_their_seeds_alone(engine):
    seeds = sampling.response_seeds(3, 1, len(PROMPTS), 1)
    expected = engine(temperature=1.5).generate(PROMPTS, seeds)
    assert expected != engine().generate(PROMPTS) and expected[1] != expected[-1]
    for options in (
        {"batch_size": 1},
        {"batch_size": 3},
        {"decoding": "static"},
        {"decoding": "static", "batch_size": 2},
    ):
        assert engine(temperature=1.5, **options).generate(PROMPTS, seeds) == expected
    back = engine(temperature=1.5).generate(PROMPTS[::-1], seeds[::-1])
    assert back[::-1] == expected
    assert engine(temperature=1.5).generate(PROMPTS, [s ^ 1 for s in seeds]) != expected
    assert engine(temperature=1e-4).generate(PROMPTS, seeds) == engine().generate(PROMPTS)


@needs_continuous
def test_continuous_batching_has_no_seeds(engine):
    with pytest.raises(ValueError, match="no seeds"):
        engine(decoding="continuous").generate(["a"], [1])
    with pytest.raises(ValueError, match="one for each of 2 prompts, got 1"):
        engine().generate(["a", "b"], [1])


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -3.0]])
    rows, temperature = 20000, 0.7
    draw = sampling.SeededSampling(list(range(rows)), temperature, 3).after(4, rows)
    counts = torch.zeros(5)
    for step in range(3):
        scores = draw(torch.zeros(rows, 4 + step, dtype=torch.long), logits.expand(rows, -1))
        assert (scores.isfinite().sum(1) == 1).all()
        counts += torch.bincount(scores.argmax(1), minlength=5)
    p = torch.softmax(logits[0] / temperature, 0)
    error = ((counts / (3 * rows) - p).abs() / (p * (1 - p) / (3 * rows)).sqrt().clamp(min=1e-9)).max()
    assert counts[2] == 0 and error < 4.5, "standard errors"


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_ends_of_the_interval_pick_tokens_that_have_a_probability(number):
    draw = sampling.SeededSampling([0], 1.0, 1)
    draw._numbers = torch.tensor([[number]])
    scores = torch.full((1, 4096), -torch.inf)
    scores[0, 100:3000] = torch.linspace(-1, 3, 2900)
    assert 100 <= int(draw(torch.zeros(1, 0, dtype=torch.long), scores).argmax()) < 3000


def test_response_seeds_are_all_different():
    seeds = [s for g in range(3) for s in sampling.response_seeds(0, g, 50, 4)]
    assert len(set(seeds)) == 600 and all(0 <= s < 2**64 for s in seeds)
    assert sampling.response_seeds(0, 1, 50, 4)[:8] == sampling.response_seeds(0, 1, 2, 4)
    numbers = np.concatenate([sampling.uniforms(s, 100) for s in seeds])
    assert numbers.min() >= 0 and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 4.5 * (1 / 12 / len(numbers)) ** 0.5


def test_engines_of_functions():
    e = as_engine(lambda prompts, seeds=None: [p.upper() + str(seeds or "") for p in prompts])
    assert e.generate(["a"]) == ["A"] and e.generate(["a"], [7]) == ["A[7]"]
    for wrong, error in ((lambda p: "text", TypeError), (lambda p: [1], TypeError), (lambda p: [], ValueError)):
        with pytest.raises(error, match="engine <lambda>: expected"):
            as_engine(wrong).generate(["a"])
    for unusable in (torch.nn.Linear(1, 1), "vllm", None):
        with pytest.raises(TypeError, match="engine: expected an object with generate"):
            as_engine(unusable)
    own = TransformersEngine.__new__(TransformersEngine)
    assert as_engine(own) is own


def test_the_page_about_rollouts_runs(tiny):
    page = (Path(__file__).parent.parent / "docs" / "concepts" / "rollouts.md").read_text(encoding="utf-8")
    scope = dict(zip(("model", "tokenizer"), tiny, strict=True))
    engine, members, low_rank = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(engine, scope)
    assert len(scope["completions"]) == 1 and isinstance(scope["completions"][0], str)
    exec(members, scope := {})
    assert scope["es"].generation == 20 and max(m.reward for m in scope["members"]) > 0.6
    exec(low_rank, scope)
    assert scope["answers"].shape == (100, 200) and scope["answers"].unique(dim=0).shape == (100, 200)


def test_a_transformers_without_continuous_batching(engine, monkeypatch):
    monkeypatch.setattr(decoding, "_continuous_options", lambda: None)
    with pytest.raises(ValueError, match="has no continuous batching"):
        engine(decoding="continuous")
