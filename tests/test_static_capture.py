"""What a step of decoding does to memory, and how it is captured as a CUDA graph."""

import contextlib
from unittest import mock

import pytest
import torch
from tape import Tape, taped
from test_static_steps import MODELS, TOKENIZER, graphs, make, one_thread  # noqa: F401 (fixtures)
from transformers import Qwen2Config, Qwen2ForCausalLM

from esfast.bench.architectures import tiny_model
from esfast.rollout.fixed import Arena, Steps
from esfast.rollout.graphs import CaptureFailed, captured
from esfast.rollout.sampling import SeededSampling


def tape_of(model, members, rows=2, sampling=None):
    """Of a step for `members`, and its Steps."""
    steps = Steps(model, rows * members, 16, 6, torch.tensor([TOKENIZER.eos_token_id]), 0, sampling, Arena())
    with torch.no_grad():
        return taped(steps.blank, steps.step), steps


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_step_writes_nothing_but_its_own_tensors(sampled):
    """What it changes beside its own intermediate results are the Steps' tensors, at the same places in every step."""
    model = tiny_model("qwen2", TOKENIZER).eval()
    sampling = SeededSampling([1, 2], 0.7, 6, top_p=0.9) if sampled else None
    tape, steps = tape_of(model, 1, sampling=sampling)
    own = {x.untyped_storage().data_ptr() for x in vars(steps).values() if isinstance(x, torch.Tensor)}
    own |= {x.untyped_storage().data_ptr() for x in steps._states()}
    made, before = set(), [(x.data_ptr(), x.shape) for x in (*steps._states(), steps.texts, steps.ids)]
    for func, args, _, results, new in tape.calls:
        if func._schema.is_mutable:
            assert args[0].untyped_storage().data_ptr() in own | made, func
        made |= {x.untyped_storage().data_ptr() for x, n in zip(results, new, strict=True) if n}
    with torch.no_grad():
        steps.read([[5, 6, 7], [8]], sampling and sampling.numbers)
        texts = steps.texts.clone()
        tape.replay()
        tape.replay()
    assert (steps.texts != texts).any() and int(steps.done) == 3 and int(steps.where) == 18
    assert [(x.data_ptr(), x.shape) for x in (*steps._states(), steps.texts, steps.ids)] == before


def operations(layers, noise):
    """Of a step, for frozen weights or three members."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=128, num_hidden_layers=layers, **sizes)).eval()
    if noise is None:
        return len(tape_of(model, 3)[0].calls)
    together = MODELS[noise](model, 3)
    together.write([(1, 0.1), (2, 0.1), (3, 0.1)])
    together.check()
    with together.in_place():
        return len(tape_of(model, 3)[0].calls)


def test_members_cost_few_operations_more_than_frozen_weights():
    each = {noise: operations(3, noise) - operations(2, noise) for noise in (None, *MODELS)}
    assert each["gaussian"] <= each[None] + 4 and each["low_rank"] <= each[None] + 4 * 7
    assert each["gaussian"] < each["low_rank"]


@pytest.mark.parametrize("wrong", [None, "synchronizes", "memory", "memory of the graph", "warms up"])
def test_capturing(monkeypatch, wrong):
    """The calls of PyTorch, by stand-ins: what is prepared, captured and restored, also if the capture fails."""
    told = []

    class Graph:
        def pool(self):
            return f"pool of {self}"

    class Capture:
        def __init__(self, graph, pool=None, capture_error_mode="global"):
            told.append(("capture", pool, capture_error_mode))

        def __enter__(self):
            pass

        def __exit__(self, kind, error, trace):
            told.append("end")
            if error is not None:
                raise RuntimeError("capture invalidated")

    stream = mock.MagicMock()
    for name, value in {
        "current_stream": lambda: mock.MagicMock(),
        "Stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "set_stream": lambda s: told.append("restored"),
        "CUDAGraph": Graph,
        "graph": Capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def work():
        told.append("work")
        if wrong == "memory" or (wrong == "memory of the graph" and told.count("work") == 4):
            raise torch.OutOfMemoryError("no")
        if (wrong == "warms up" and told.count("work") == 2) or (wrong == "synchronizes" and told.count("work") == 4):
            raise RuntimeError("operation not permitted\nmore")

    beside = Graph()
    expected = {
        None: contextlib.nullcontext(),
        "synchronizes": pytest.raises(CaptureFailed, match="^RuntimeError: operation not permitted$"),
        "warms up": pytest.raises(CaptureFailed, match="^RuntimeError: operation not permitted$"),
    }
    with expected.get(wrong, pytest.raises(torch.OutOfMemoryError)):
        captured(lambda: told.append("prepare"), work, beside)
    assert told[-1] == "restored"
    if wrong is None:
        assert told[:6] == ["prepare", "work"] * 3
        assert told[6:] == [("capture", beside.pool(), "thread_local"), "work", "end", "restored"]


def test_the_tape_refuses_what_a_graph_cannot_hold():
    x = torch.arange(4.0)
    for work in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: torch.tensor([1.0]),
        lambda: x.nonzero(),
        lambda: x.unique(),
        lambda: bool((x > 1).all()),
    ):
        with pytest.raises(CaptureFailed), Tape():
            work()
