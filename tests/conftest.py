"""Settings of every test: hypothesis draws the same examples in every run, torch.empty gives NaN, and the number of
threads is restored afterwards."""

import logging
import os
import signal
import time

import hypothesis
import pytest

# xdist starts a process for each core. Threads of their own would wait for each other: three times the CPU time, and more.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402

# A job in the background of a shell script ignores SIGINT, and Ctrl-C, which tests send, would do nothing there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton reads this variable when it is first imported, and then interprets its kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile(
    "esfast",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("esfast")

# Tests read what esfast logs. The command line sets this level; setting it here makes it hold in every order of tests.
logging.getLogger("esfast").setLevel(logging.INFO)

# Files whose tests take seconds to minutes each: they start processes and kill them, compile kernels or run them in an
# interpreter, run benchmarks, or go through all architectures. `make test` leaves them to `make test-all`.
SLOW = """
    test_arm64 test_bench test_bench_afternoon test_bench_cycles test_bench_drift test_bench_forgetting
    test_bench_gpu test_bench_gpu_failures test_bench_jobs test_bench_modes test_bench_ranks test_bench_together
    test_bench_training test_bench_tune test_bench_vllm test_build test_convergence test_cuda test_custom_op
    test_device_code test_distributed test_examples test_gpu_suite test_micro test_peft test_ptx test_ptx_faults
    test_ptx_machine test_resume test_sass test_shards test_signals test_site test_tensor_parallel
    test_together_memory test_together_teams test_triton test_triton_mutants test_tuning test_tuning_groups test_zoo
""".split()

# Files, slow or not, whose tests compile kernels or interpret them and measure nothing: .ci/run runs them beside the tests of
# vLLM.
COMPILES = """
    test_arm64 test_cuda test_device_code test_formats test_ptx test_ptx_faults test_ptx_machine test_sass
    test_thin_product test_triton test_triton_mutants
""".split()


def pytest_collection_modifyitems(items):
    for item in items:
        for mark, files in ((pytest.mark.slow, SLOW), (pytest.mark.compiles, COMPILES)):
            if item.path.stem in files:
                item.add_marker(mark)


INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that a test notices a weight that was never written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def warm_python():
    """sys.executable is a Python that has imported torch, transformers and esfast already: tests/warm.py says how."""
    import warm

    with warm.python():
        yield


@pytest.fixture(scope="session")
def cpu_seconds():
    """cpu_seconds(work): of this thread, for the fastest of three calls, so that other work of the machine hardly counts."""

    def measure(work) -> float:
        seconds = []
        for _ in range(3):
            began = time.thread_time()
            work()
            seconds.append(time.thread_time() - began)
        return min(seconds)

    return measure


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of an embedded model that has hardly been trained, for runs that only need one and do not change it."""
    import small_model

    return str(small_model.build(tmp_path_factory.mktemp("model") / "tiny", steps=2))


@pytest.fixture(scope="session")
def bits():
    """bits(tensor): its raw bits as integers, so that 0 differs from -0 and a NaN equals itself."""
    return lambda tensor: tensor.detach().contiguous().view(INTEGERS[tensor.dtype])


@pytest.fixture(scope="session")
def same_bits(bits):
    """same_bits(a, b): whether two tensors, or two sequences of tensors, agree to the bit."""

    def compare(a, b) -> bool:
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        return len(a) == len(b) and all(map(compare, a, b))

    return compare
