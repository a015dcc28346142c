"""How much memory members in one batch may take, and what happens where it is not enough."""

import ctypes
import itertools
import logging
import os
import random
import subprocess
import sys

import pytest
import torch

import esfast
from esfast.bench.architectures import tiny_model
from esfast.rollout import fixed, population, probe, shared_batches
from esfast.rollout.engine import TransformersEngine
from esfast.rollout.evaluator import SequentialEvaluator
from esfast.rollout.memory import peak_bytes
from esfast.rollout.population import PopulationEvaluator
from esfast.rollout.stacked_model import StackedModel
from esfast.tasks import embedded
from esfast.utils import memory
from esfast.utils.memory import out_of_memory, own_memory, total_memory

TOKENIZER = embedded.make_tokenizer()
CPU = torch.device("cpu")
PROMPTS = ["a", "12+3=", "Name a colour, please: ", "xyz xyz", "12+4=", "b"]
UNLIMITED = 9223372036854771712


@pytest.fixture(autouse=True)
def one_thread(same_threads):
    torch.set_num_threads(1)


def make(noise="gaussian", members=7, tokens=4):
    es = esfast.ES(tiny_model("qwen2", TOKENIZER), sigma=0.1, population_size=members, noise=noise)
    return es, TransformersEngine(es.plan.module, TOKENIZER, tokens)


def answers(evaluator, es, prompts=PROMPTS, seeds=None):
    return {member.index: texts for member, texts in evaluator.evaluate(es.population(), prompts, seeds)}


# ---- how much there is -----------------------------------------------------------------------------------------------


def a_machine(folder, groups, files):
    """The files that Linux shows of a process's control groups."""
    (folder / "cgroup").write_text(groups)
    for name, limit in files.items():
        file = folder / "sys" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    return list(memory._cgroup_limits(str(folder / "cgroup"), str(folder / "sys")))


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        ("0::/\n", {"memory.max": 4096}, [4096]),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": 8192, "memory.max": "max"}, [8192]),
        ("0::/a/b\n", {"a/b/memory.max": 4096, "a/memory.max": 8192}, [4096, 8192]),
        ("0::/not/in/this/container\n", {"memory.max": 4096}, [4096]),
        ("5:cpu:/a\n4:memory:/a/b\n0::/\n", {"memory/a/b/memory.limit_in_bytes": 4096}, [4096]),
        ("4:memory:/of/the/host\n", {"memory/memory.limit_in_bytes": 4096}, [4096]),
        ("4:hugetlb,memory:/\n", {"memory/memory.limit_in_bytes": UNLIMITED}, [UNLIMITED]),
        ("4:cpu:/\n0::/\n", {"cpu/memory.max": 4096, "cpu/memory.limit_in_bytes": 4096}, []),
        ("0::/with:colon\n", {"with:colon/memory.max": 4096}, [4096]),
    ],
)
def test_control_groups(groups, files, limits, tmp_path):
    assert a_machine(tmp_path, groups, files) == limits


def test_a_system_without_control_groups(tmp_path):
    assert list(memory._cgroup_limits(str(tmp_path / "none"), str(tmp_path))) == []


def test_the_least_limit_counts(monkeypatch):
    monkeypatch.setattr(memory, "_process_limits", lambda: iter(()))
    monkeypatch.setattr(memory, "_cgroup_limits", lambda: iter((UNLIMITED,)))
    machine = total_memory(CPU)
    assert machine == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(memory, "_cgroup_limits", lambda: iter((UNLIMITED, 3000, 5000)))
    assert total_memory(CPU) == own_memory(CPU) == 3000
    monkeypatch.setattr(memory, "_process_limits", lambda: iter((2000,)))
    assert total_memory(CPU) == 2000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert own_memory(CPU) == 500 and total_memory(CPU) == 2000


def test_ulimit_counts():
    code = (
        "import resource, torch; from esfast.utils.memory import total_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**33, resource.getrlimit(resource.RLIMIT_AS)[1]))\n"
        "assert total_memory(torch.device('cpu')) <= 2**33\n"
        "try: torch.empty(2**35)\n"
        "except Exception as error: from esfast.utils.memory import out_of_memory; print(out_of_memory(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr[-2000:]


def test_what_says_that_memory_ran_out():
    for error in (torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate")):
        assert out_of_memory(error)
    for error in (RuntimeError("shapes"), ValueError("DefaultCPUAllocator"), KeyboardInterrupt()):
        assert not out_of_memory(error)


class Libc:
    def __init__(self):
        self.calls = []

    def mallopt(self, *call):
        self.calls.append(call)
        return 1


def test_the_users_own_settings_of_malloc_are_kept(monkeypatch):
    libc = Libc()
    monkeypatch.setattr(memory, "_glibc", lambda: libc)
    for name in [name for name in os.environ if name.startswith("MALLOC_")] + ["GLIBC_TUNABLES"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in (("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            memory.give_back_freed_memory()
            assert libc.calls == []
    memory.give_back_freed_memory()
    assert (-3, 2**20) in libc.calls
    memory.keep_freed_memory()
    assert libc.calls[-2:] == [(-3, 2**25), (-1, 2**31 - 1)]
    # musl, macOS, Windows
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    memory.give_back_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    class Musl:
        malloc = None

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Musl())
    assert memory._glibc.__wrapped__() is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory._glibc.__wrapped__() is None


def with_peak(work, *args):
    found = []
    return found, peak_bytes(lambda: found.extend(work(*args).items()))


# ---- what auto takes of it -------------------------------------------------------------------------------------------


def with_memory(monkeypatch, size):
    for module in (population, shared_batches, probe):
        monkeypatch.setattr(module, "own_memory", lambda device: size)


@pytest.mark.parametrize("case", range(60 if os.environ.get("ESFAST_LONG_TESTS") else 3))
def test_auto_stays_in_its_share(case, monkeypatch):
    """Of tensors, for members, prompts, lengths, kinds of noise and amounts of memory that the number draws; prompts
    that come later may be longer."""
    draw = random.Random(case)
    noise = ("gaussian", "low_rank", "rademacher")[case % 3]
    es, engine = make(noise, draw.randint(2, 12), draw.choice([1, 3, 8]))
    size = int(10 ** draw.uniform(6.5, 8))
    with_memory(monkeypatch, size)
    evaluator, seeds = PopulationEvaluator(engine), None
    for longest in (40, 300):
        prompts = ["x" * draw.randint(1, longest) for _ in range(draw.randint(1, 12))]
        seeds = draw.choice([None, list(range(len(prompts)))])
        found, peak = with_peak(answers, evaluator, es, prompts, seeds)
        assert evaluator.need - evaluator.beside_tensors <= size / 2
        # a single row has to be answered, and two are needed to measure
        fits = evaluator.at_once == 1 or evaluator.batches.room(longest, False) > 2
        assert peak <= 1.1 * size / 2 or not fits, (size, evaluator.at_once)
        if noise != "low_rank":
            assert dict(found) == answers(SequentialEvaluator(engine), es, prompts, seeds)


@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
def test_where_two_members_do_not_fit_they_are_asked_one_after_another(noise, monkeypatch, caplog):
    es, engine = make(noise)
    expected = answers(SequentialEvaluator(engine), es)
    with_memory(monkeypatch, es.plan.nbytes)
    evaluator = PopulationEvaluator(engine)
    with caplog.at_level(logging.INFO):
        assert answers(evaluator, es) == expected
    assert evaluator.at_once == 1 and "members are asked one after another: t" in caplog.text
    # The weights of two are too many before any memory is taken for them.
    assert ("the weights of two take" if noise == "gaussian" else "to try out two") in caplog.text
    caplog.clear()
    if noise == "gaussian":
        monkeypatch.setattr(StackedModel, "_allocate", lambda *arguments: pytest.fail("memory was taken"))
        answers(PopulationEvaluator(engine), es)
        with_memory(monkeypatch, 7 * es.plan.nbytes)
        answers(PopulationEvaluator(engine), es)
        return
    # enough to try them out
    with_memory(monkeypatch, 40_000)
    monkeypatch.setattr(StackedModel, "bytes_to_check", 0)
    monkeypatch.setattr(population, "WEIGHTS_SHARE", 1e-3)
    monkeypatch.setattr(population, "TEXTS_SHARE", 1e9)
    evaluator = PopulationEvaluator(engine)
    with caplog.at_level(logging.INFO):
        assert answers(evaluator, es) == expected
    assert evaluator.at_once == 1 and "holds the weights of" in caplog.text


def test_a_number_is_not_reduced_and_says_what_it_takes(monkeypatch, caplog):
    es, engine = make()
    with_memory(monkeypatch, 4 * es.plan.nbytes)
    evaluator = PopulationEvaluator(engine, 7)
    expected = answers(SequentialEvaluator(engine), es)
    with caplog.at_level(logging.INFO):
        assert answers(evaluator, es) == expected
    assert evaluator.at_once == 7 and "members_at_once: 7 of 7 members answer together" in caplog.text


# ---- where it runs out -----------------------------------------------------------------------------------------------

ERRORS = [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]


def short_of_memory(monkeypatch, owner, name, error, times=1, skip=0):
    """Calls of `owner.name` with more than one member raise, `times` times, after `skip` calls."""
    genuine, calls = getattr(owner, name), itertools.count()

    def scarce(self, *args, **kwargs):
        if skip <= next(calls) < skip + times:
            raise error
        return genuine(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, scarce)


def moments():
    from esfast.rollout.cache import LayerWithRoom

    model = type(tiny_model("qwen2", TOKENIZER))
    return {
        "memory for the stack": (StackedModel, "_allocate", 0),
        "writing the stack": (StackedModel, "_write", 0),
        "prompts": (model, "forward", 0),
        "decoding": (model, "forward", 2),
        "the cache": (LayerWithRoom, "_with_room", 1),
        "compaction": (LayerWithRoom, "reorder_cache", 0),
    }


@pytest.mark.parametrize(
    ("moment", "error"), [(moment, ERRORS[i % 3]) for i, moment in enumerate(moments())], ids=[*moments()]
)
def test_whatever_runs_out_of_memory_is_asked_again_by_fewer(moment, error, monkeypatch, caplog, same_bits):
    es, engine = make(tokens=8)
    engine.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(0, 200, 3)]
    if engine._way is not None:
        engine._way._ends = torch.tensor(engine.generation_config.eos_token_id)
    expected, weights = answers(SequentialEvaluator(engine), es), [p.clone() for p in es.plan.tensors]
    evaluator = PopulationEvaluator(engine, 7)
    evaluator._settle(es.population(), False, len(PROMPTS), PROMPTS)
    owner, name, skip = moments()[moment]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        short_of_memory(patch, owner, name, error, skip=skip)
        assert answers(evaluator, es) == expected
    assert "out of memory with 7 members at once: going on with 4" in caplog.text
    assert evaluator.at_once == 4 and same_bits(es.plan.tensors, weights)
    assert answers(evaluator, es) == expected and caplog.text.count("out of memory") == 1, "it is remembered"
    assert not any(type(p) is not torch.nn.Parameter for p in engine.model.parameters())


# "read" is of static decoding, which is for a number of members alone.
@pytest.mark.parametrize(
    ("where", "at_once"), [("check", "auto"), ("check", 7), ("row_bytes", "auto"), ("row_bytes", 7), ("read", 7)]
)
def test_where_trying_out_runs_out_of_memory(where, at_once, monkeypatch, caplog, same_bits):
    es, engine = make()
    expected, weights = answers(SequentialEvaluator(engine), es), [p.clone() for p in es.plan.tensors]
    if where == "read":
        engine.ways = ["static"]
    owners = {"check": StackedModel, "row_bytes": shared_batches.SharedBatches, "read": fixed.Steps}
    short_of_memory(monkeypatch, owners[where], where, ERRORS[1])
    evaluator = PopulationEvaluator(engine, at_once)
    with caplog.at_level(logging.WARNING):
        assert answers(evaluator, es) == expected
    assert evaluator.at_once == 1 and "members are asked one after another" in caplog.text
    assert same_bits(es.plan.tensors, weights)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_one_member_that_does_not_fit_is_asked_with_fewer_prompts(error, monkeypatch, caplog):
    es, engine = make()
    expected = answers(SequentialEvaluator(engine), es)
    evaluator, forward = PopulationEvaluator(engine, 7), type(engine.model).forward
    evaluator._settle(es.population(), False, len(PROMPTS), PROMPTS)

    def scarce(self, input_ids, *args, **kwargs):
        if len(input_ids) > 3:
            raise error
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(engine.model), "forward", lambda self, **kw: scarce(self, kw.pop("input_ids"), **kw))
    with caplog.at_level(logging.WARNING):
        assert answers(evaluator, es) == expected == answers(evaluator, es)
    assert evaluator.at_once == 1 and engine.batch_size == 3
    monkeypatch.setattr(type(engine.model), "forward", lambda self, **kw: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        answers(PopulationEvaluator(engine, 7), es)
    assert not any(type(p) is not torch.nn.Parameter for p in engine.model.parameters())


def test_an_error_that_is_not_of_memory_ends_the_run(monkeypatch):
    es, engine = make()
    evaluator = PopulationEvaluator(engine, 7)
    short_of_memory(monkeypatch, StackedModel, "_write", RuntimeError("shapes"), skip=1)
    with pytest.raises(RuntimeError, match="shapes"):
        answers(evaluator, es)


# ---- odd prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [["x"], ["x"] * 3, ["a", "b" * 400, "c"], [" ", "\n", "é"]])
@pytest.mark.parametrize("members", [2, 5])
def test_few_and_long_prompts(prompts, members):
    es, engine = make(members=members)
    expected = answers(SequentialEvaluator(engine), es, prompts)
    for at_once in (3, 100):
        assert answers(PopulationEvaluator(engine, at_once), es, prompts) == expected


def test_a_text_without_tokens_is_refused_before_anything_changes(same_bits):
    es, engine = make()
    weights = [p.clone() for p in es.plan.tensors]
    with pytest.raises(ValueError, match="prompt"):
        answers(PopulationEvaluator(engine, 3), es, ["a", ""])
    assert same_bits(es.plan.tensors, weights)


@pytest.mark.parametrize(("share", "expected"), [(0.0, "give back"), (1.0, "keep")])
def test_where_there_is_plenty_time_counts_for_more_than_memory(monkeypatch, share, expected):
    chosen = []
    monkeypatch.setattr(population, "LITTLE", share)
    monkeypatch.setattr(population, "give_back_freed_memory", lambda: chosen.append("give back"))
    monkeypatch.setattr(population, "keep_freed_memory", lambda: chosen.append("keep"))
    es = esfast.ES(tiny_model("qwen2", TOKENIZER), sigma=0.1, population_size=4)
    evaluator = PopulationEvaluator(TransformersEngine(es.plan.module, TOKENIZER, 3), 4)
    list(evaluator.evaluate(es.population(), ["a", "b"], None))
    assert chosen == [expected]
