"""Static decoding for several members: a step over fixed tensors gives the texts of one after another, and can be
captured as a CUDA graph. tape.py stands in for the graph."""

import inspect
import logging
import os
import re
from types import SimpleNamespace

import pytest
import torch
from tape import taped
from test_population import PROMPTS, answers, told, train

import esfast
from esfast.bench.architectures import NOT_MADE, architectures, tiny_model
from esfast.rollout import static_steps
from esfast.rollout.dropping import Dropping
from esfast.rollout.encoding import context_limit
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.evaluator import SequentialEvaluator
from esfast.rollout.low_rank_model import LowRankModel
from esfast.rollout.member_tensor import Unsupported
from esfast.rollout.population import PopulationEvaluator, asking
from esfast.rollout.sampling import LogitsError, SeededSampling
from esfast.rollout.stacked_model import StackedModel
from esfast.rollout.static_steps import StaticSteps
from esfast.tasks import embedded

TOKENIZER = embedded.make_tokenizer()
SEEDS = list(range(40, 46))
MODELS = {"gaussian": StackedModel, "low_rank": LowRankModel}


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


@pytest.fixture
def graphs(monkeypatch):
    """The tapes that were recorded, as on a GPU."""
    made, init = [], StaticSteps.__init__

    def with_graphs(self, plain):
        init(self, plain)
        self._captures = True

    monkeypatch.setattr(StaticSteps, "__init__", with_graphs)
    monkeypatch.setattr(static_steps, "captured", lambda *a: (made.append(taped(*a)), made[-1])[1])
    return made


def make(name="qwen2", noise="gaussian", tokens=12, population=7, sigma=0.1, **options):
    """Of a tiny model that ends some texts early: the ES, and an engine for each decoding."""
    model = tiny_model(name, TOKENIZER)
    es = esfast.ES(model, sigma=sigma, population_size=population, noise=noise)
    engines = [TransformersEngine(model, TOKENIZER, tokens, decoding=way, **options) for way in ("plain", "static")]
    for engine in engines:
        engine.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(0, 200, 3)]
        engine._way._ends = torch.tensor(engine.generation_config.eos_token_id)
    return es, *engines


# rotary, learned and relative positions; windows shorter than the texts; experts
MODELS_OF_NOISE = [
    ("qwen2", "gaussian"),
    ("qwen2", "low_rank"),
    ("gpt2", "low_rank"),
    ("bloom", "gaussian"),
    ("gemma3_text", "gaussian"),
    ("qwen3_moe", "low_rank"),
]


@pytest.mark.parametrize(("name", "noise"), MODELS_OF_NOISE)
def test_texts_are_those_of_one_after_another(name, noise, graphs):
    es, plain, static = make(name, noise, population=4)
    evaluator = PopulationEvaluator(static, 3)
    for seeds in (None, SEEDS):
        expected = answers(SequentialEvaluator(plain), es, seeds)
        assert answers(evaluator, es, seeds) == expected
        assert evaluator.tokens == plain.tokens
        lengths = [len(text) for texts in expected.values() for text in texts]
        assert min(lengths) < max(lengths), "some end early"
    assert graphs and evaluator.batches.way.drops and not evaluator.batches.way.failed


@pytest.mark.skipif(not os.environ.get("ESFAST_LONG_TESTS"), reason="takes minutes: set ESFAST_LONG_TESTS=1")
def test_every_architecture_gives_the_same_texts_or_is_refused_by_name(graphs):
    captured = 0
    for name in sorted(set(architectures()) - NOT_MADE.keys()):
        graphs.clear()
        try:
            es, plain, static = make(name, population=3)
            found = answers(PopulationEvaluator(static, 3), es)
        except (ValueError, Unsupported) as error:
            assert re.search(r"[A-Z]\w+(LM|Model|Decoder|Generation)\w*", str(error)), error
            continue
        assert found == answers(SequentialEvaluator(plain), es), name
        captured += bool(graphs)
    assert captured >= 100


def test_a_step_without_a_graph_gives_the_same_texts():
    es, plain, static = make(population=4)
    evaluator = PopulationEvaluator(static, 4)
    assert answers(evaluator, es, SEEDS) == answers(SequentialEvaluator(plain), es, SEEDS)
    assert isinstance(evaluator.batches.way, StaticSteps) and not evaluator.batches.way._graphs


def test_graphs_follow_the_weights_of_the_next_members(graphs):
    """Populations with other weights, batches with fewer members, and other prompts use graphs that are there."""
    es, plain, static = make(population=4)
    evaluator = PopulationEvaluator(static, 3)
    answers(evaluator, es)
    made, seen = len(graphs), []
    assert made < 12, "packets of 3 members and of 1, batches of 6, 3, 2 and 1 rows for each"
    for sigma in (0.1, 0.05, 0.02):
        es.sigma = sigma
        for prompts in (PROMPTS, PROMPTS[::-1]):
            seen.append(answers(evaluator, es, None, prompts))
            assert seen[-1] == answers(SequentialEvaluator(plain), es, None, prompts)
    assert len({str(each) for each in seen}) == 6
    shapes = {key[0] for key in evaluator.batches.way._graphs}
    assert {rows for rows, *_ in shapes} <= {18, 9, 6, 3, 2, 1} and len(graphs) < 12


def test_a_tape_that_keeps_old_weights_would_be_noticed(graphs, monkeypatch):
    es, plain, static = make(population=3)
    evaluator = PopulationEvaluator(static, 3)
    assert answers(evaluator, es) == answers(SequentialEvaluator(plain), es)
    copies = {}

    def with_copies(call):
        func, args, *rest = call
        args = tuple(
            copies.setdefault(id(x), x.clone()) if isinstance(x, torch.Tensor) and x.dim() == 3 and len(x) == 3 else x
            for x in args
        )
        return (func, args, *rest)

    for tape in graphs:
        tape.calls = [with_copies(call) if call[0]._schema.name == "aten::bmm" else call for call in tape.calls]
    es.sigma = 0.05
    assert answers(evaluator, es) != answers(SequentialEvaluator(plain), es)


def test_rows_that_have_ended_leave_the_batch(graphs):
    es, plain, static = make(population=4)
    evaluator = PopulationEvaluator(static, 4)
    assert answers(evaluator, es) == answers(SequentialEvaluator(plain), es)
    sizes = [key[0][0] for key in evaluator.batches.way._graphs]
    assert sizes[0] == 24 and len(sizes) > 1 and set(sizes[1:]) <= {12, 8, 4}


def test_rows_that_do_not_count_and_shapes_that_are_there(graphs):
    """A call may ask for fewer tokens than the config allows; a member may have fewer texts than another."""
    _, engine, _ = make()
    plain = Dropping(engine.model, engine.generation_config)
    static = StaticSteps(plain)
    rows = [[i + 3 * k for i in range(5, 6 + n)] for k, n in enumerate((3, 1, 2, 5, 1, 1, 2, 2, 4, 1, 3, 2))]
    drawn = lambda n: SeededSampling(list(range(n)), 0.7, 9)  # noqa: E731
    with engine.own_settings():
        for each, most, counts in ((6, 12, [True] * 12), (4, 9, [True] * 3 + [False] + [True] + [False] * 3)):
            for sampling in (None, drawn(2 * each)) if each == 4 else (None,):
                expected, fine = plain(rows[: 2 * each], 2, sampling, most, counts)
                found, numbers = static(rows[: 2 * each], 2, sampling, most, counts)
                compared = [(a, b) for a, b, own in zip(expected, found, counts, strict=True) if own]
                assert all(a == b for a, b in compared) and fine == numbers == [True, True]
    assert max(len(a) for a, _ in compared) == 9
    greedy = {rows for rows, _, drawn in static._steps if drawn is None}
    assert 12 in greedy and 8 not in greedy, "four rows of each take the shape for six"


def test_prompts_of_several_widths_share_the_memory(graphs):
    es, plain, static = make(population=3, tokens=6)
    evaluator = PopulationEvaluator(static, 3)
    for prompts in (["ab " * 30, "a"], ["a", "b"], ["ab " * 60, "ab " * 30], ["b", "ab " * 40]):
        assert answers(evaluator, es, None, prompts) == answers(SequentialEvaluator(plain), es, None, prompts)
    arena = evaluator.batches.way._arena._held
    for layer in next(iter(evaluator.batches.way._steps.values())).layers:
        assert layer.keys.data_ptr() == arena[layer.number, 0].data_ptr()
        assert layer.values.data_ptr() == arena[layer.number, 1].data_ptr()


def test_old_graphs_are_given_up_with_their_tensors(graphs, monkeypatch):
    monkeypatch.setattr(static_steps, "MOST_GRAPHS", 3)
    es, plain, static = make(population=3, tokens=6)
    evaluator = PopulationEvaluator(static, 3)
    for words in (60, 30, 16, 8, 1, 16, 60):
        prompts = ["ab " * words, "a"]
        assert answers(evaluator, es, None, prompts) == answers(SequentialEvaluator(plain), es, None, prompts)
        way = evaluator.batches.way
        assert len(way._graphs) <= 3 and set(way._steps) == {shape for shape, _ in way._graphs}
    assert len(graphs) > 5


def test_widths_are_few_and_near_the_prompts():
    expected = {1: 16, 16: 16, 17: 32, 64: 64, 65: 96, 256: 256, 257: 320, 1000: 1024}
    for longest, width in expected.items():
        assert static_steps._width([3, longest]) == width
    assert len({static_steps._width([n]) for n in range(1, 1025)}) == 22


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma3_text"])
@pytest.mark.parametrize("tokens", [1, 9])
def test_texts_that_fill_the_context(name, tokens):
    """With padding they are longer than the model's context, or than its windows."""
    model = tiny_model(name, TOKENIZER)
    engine, limit = TransformersEngine(model, TOKENIZER, tokens), context_limit(model) or 300
    for longest in (limit - tokens, limit - tokens - 3):
        rows = [[3 + (7 * i + j) % 90 for j in range(longest - 5 * i)] for i in range(2)]
        with engine.own_settings():
            plain = Dropping(model, engine.generation_config)
            assert StaticSteps.instead_of(plain)(rows, 1) == plain(rows, 1)


def test_a_step_that_cannot_be_captured(graphs, caplog):
    """Falcon indexes with a list, which would be copied to the device."""
    es, plain, static = make("falcon", population=2, tokens=4)
    evaluator, expected = PopulationEvaluator(static, 2), answers(SequentialEvaluator(plain), es)
    for _ in range(2):
        assert answers(evaluator, es) == expected
    line = "static decoding doesn't work here for several members, going on plainly: aten.lift_fresh.default"
    assert caplog.text.count(line) == 1 and not graphs and not evaluator.batches.way._steps


@pytest.mark.parametrize(("name", "why"), [("mamba", "MambaForCausalLM"), ("jamba", "JambaForCausalLM")])
def test_models_with_other_states_are_refused_by_name(name, why):
    model = tiny_model(name, TOKENIZER)
    plain = TransformersEngine(model, TOKENIZER, 4)
    refused = rf"decoding='static' for several members: a {why} keeps other states than keys and values"
    with plain.own_settings(), pytest.raises(Unsupported, match=refused):
        StaticSteps.instead_of(Dropping(model, plain.generation_config))


def test_what_auto_takes_on_a_gpu(graphs, monkeypatch, caplog):
    """Graphs if the model can, else plain decoding, with a message."""
    monkeypatch.setattr("esfast.rollout.engine.choose_ways", lambda model: ["static", "plain"])
    for name, way in (("llama", StaticSteps), ("mamba", Dropping), ("gpt_neo", Dropping), ("moshi", Dropping)):
        model = tiny_model(name, TOKENIZER)
        evaluator = PopulationEvaluator(TransformersEngine(model, TOKENIZER, 4), 2)
        answers(evaluator, esfast.ES(model, sigma=0.01, population_size=2))
        assert type(evaluator.batches.way) is way
    assert graphs
    line = "several members generate plainly: decoding='static' for several members: a"
    assert caplog.text.count(f"{line} MambaForCausalLM keeps other states") == 1
    for name in ("GPTNeo", "Moshi"):
        # Their windows would hide other tokens.
        assert caplog.text.count(f"{line} {name}ForCausalLM does not support a static cache") == 1


def test_a_model_on_several_devices_is_refused(monkeypatch):
    es, _, static = make(population=2)
    weights = [*static.model.parameters(), torch.empty(1, device="meta")]
    monkeypatch.setattr(static.model, "parameters", lambda: iter(weights))
    with pytest.raises(Unsupported, match="this Qwen2ForCausalLM lies on several devices"):
        StaticSteps.instead_of(Dropping(static.model, static.generation_config))


def test_a_model_that_answers_otherwise_is_refused(monkeypatch):
    es, _, static = make(population=2)
    forward = static.model.forward

    def counts(*args, **options):
        output = forward(*args, **options)
        output.logits[:, :, ::2] += len(options["attention_mask"][0])
        return output

    counts.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(static.model, "forward", counts)
    with pytest.raises(
        Unsupported, match="a Qwen2ForCausalLM answers otherwise from fixed tensors; take decoding='plain'"
    ):
        answers(PopulationEvaluator(static, 2), es)


def test_a_member_without_numbers_is_named_and_costs_no_other(graphs, monkeypatch):
    """Neither in its batch nor in the next, whose keys and values lie where its own lay."""
    es, plain, static = make()
    expected = answers(SequentialEvaluator(plain), es)
    evaluator = PopulationEvaluator(static, 7)
    write = StackedModel.write

    def spoiled(self, members):
        write(self, members)
        if len(members) == 7:
            self._stacks[0][3].fill_(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(StackedModel, "write", spoiled)
        found = answers(evaluator, es)
    assert isinstance(found.pop(3), LogitsError) and found == {i: t for i, t in expected.items() if i != 3}
    assert answers(evaluator, es) == expected


def test_out_of_memory_frees_the_graphs(graphs, monkeypatch, caplog):
    es, plain, static = make()
    evaluator = PopulationEvaluator(static, 7)
    generate, states = StaticSteps._generate, []

    def scarce(self, rows, members, *more):
        found = generate(self, rows, members, *more)
        states.append(len(self._graphs))
        if members == 7:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(StaticSteps, "_generate", scarce)
    with caplog.at_level(logging.WARNING):
        assert answers(evaluator, es) == answers(SequentialEvaluator(plain), es)
    assert "out of memory with 7 members at once: going on with 4" in caplog.text and evaluator.at_once == 4
    assert states[0] and all(key[0][0] <= 24 for key in evaluator.batches.way._graphs)
    evaluator.close()
    assert not evaluator.batches.way._graphs and not evaluator.batches.way._arena._held


def test_a_run_is_the_same_as_of_one_after_another(graphs, tmp_path):
    """With responses that are sampled, evaluations between, and a last packet that is smaller."""
    settings = {"temperature": 1.0, "num_generations": 2}
    _, journal, metrics = train(tmp_path / "one", members_at_once=1, decoding="plain", **settings)
    trainer, found, numbers = train(tmp_path / "graphs", members_at_once=4, decoding="static", **settings)
    assert found == journal and told(numbers) == told(metrics)
    assert graphs and trainer.evaluator.batches.way.failed is None


def test_who_is_asked():
    _, plain, static = make(tokens=2)
    assert type(asking(static, 4)) is PopulationEvaluator and type(asking(static, 1)) is SequentialEvaluator
    assert type(asking(static, "auto")) is SequentialEvaluator, "not measured to be faster"
    static.decoding = "continuous"
    with pytest.raises(ValueError, match="decoding='plain' or 'static', not 'continuous'"):
        asking(static, 4)


@pytest.mark.parametrize("decoding", ["auto", "plain", "static", "continuous"])
@pytest.mark.parametrize("devices", [["cuda:1"], ["cuda:0", "cuda:1"], ["mps"]], ids=str)
def test_who_is_asked_on_a_gpu(devices, decoding):
    """Several members where that was measured: on one GPU."""
    weights = [SimpleNamespace(device=torch.device(name)) for name in devices]
    model = SimpleNamespace(device=weights[0].device, parameters=lambda: iter(weights))
    several = devices == ["cuda:1"] and decoding != "continuous"
    for noise in ("gaussian", "low_rank"):
        found = asking(SimpleNamespace(model=model, decoding=decoding), noise=noise)
        assert type(found) is (PopulationEvaluator if several else SequentialEvaluator)
