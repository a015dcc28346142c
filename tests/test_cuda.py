"""The CUDA backend without a GPU: its kernels run on the CPU, thread after thread, to the bit against the C++ backend; what
nvcc made of them for every architecture, and what is said where they can't run."""

import ctypes
import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import esfast
from esfast.core.backends import cuda as cuda_backend
from esfast.core.ops import AdamStep, Call, check_members

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gaussian", "rademacher", "low_rank")


class Job(ctypes.Structure):
    """csrc/cuda_job.h's CudaJob."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("tiles", "extras", "segments", "seeds", "coeffs", "low", "m", "v")),
        *((name, ctypes.c_int32) for name in ("members", "stochastic", "rank")),
        *((name, ctypes.c_float) for name in ("scale", "decay", "one_minus_beta1", "one_minus_beta2", "step", "eps")),
    ]


@pytest.fixture(scope="module")
def run_on_host(tmp_path_factory):
    """run_on_host(call): what cuda_backend.run does, the grid being a loop."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the kernels for the CPU with")
    library = tmp_path_factory.mktemp("cuda") / "on_host.so"
    fma = ["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []
    subprocess.run(
        [
            compiler,
            *"-O1 -std=c++17 -ffp-contract=off -fno-strict-aliasing -Wall -Wextra -shared -fPIC".split(),
            *fma,
            f"-I{CSRC}",
            ROOT / "tests" / "cuda_on_host.cpp",
            "-o",
            library,
        ],
        check=True,
    )
    host = ctypes.CDLL(str(library))

    def add_noise(*, tile_count, src_format, dst_format, kind, moments, adam, **numbers):
        betas = dict(zip(("one_minus_beta1", "one_minus_beta2", "step", "eps"), adam, strict=True))
        job = Job(m=moments[0], v=moments[1], **betas, **numbers)
        failed = host.run_grid(src_format, dst_format, kind, ctypes.byref(job), ctypes.c_int64(tile_count))
        assert not failed, "no such kernel"

    def copy_tiles(*, tiles, tile_count, size):
        copies.append(tile_count)
        host.copy_grid(size, ctypes.c_uint64(tiles), ctypes.c_int64(tile_count))

    copies = []

    def run(call):
        cuda_backend.run_with(call, add_noise, host.tile_size(), copy_tiles)

    run.copies = copies
    return run


def entries(dtype):
    """Whole tiles and tails, odd starts, slices with rows that are aligned and not, one beyond 2^32 blocks, a scalar."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(8, 9000, generator=generator).to(dtype)
    flat = torch.randn(40_000, generator=generator).to(dtype)
    return [
        ("plain", torch.randn(5, 5000, generator=generator).to(dtype)),
        ("odd start", flat[7:9036]),
        ("slice", matrix[2:5, 30:643], esfast.Slice((1000, 5000), (3, 700))),
        ("shard", matrix[:4, 1024:5120], esfast.Slice((4, 16384), (0, 4096))),
        ("far", flat[9040:29_700], esfast.Slice((2**40,), (2**34 - 100,))),
        ("scalar", torch.tensor(3.0).to(dtype)),
        ("column", matrix[:4, 8990:8991]),
        ("transposed", torch.randn(5, 3, generator=generator).to(dtype).t()),
        ("whole tiles", torch.randn(132, 264, generator=generator).to(dtype)),
        ("odd matrix", torch.randn(131, 53, generator=generator).to(dtype)),
        ("experts", torch.randn(3, 20, 40, generator=generator).to(dtype)),
        ("far rows", matrix[:8, 5200:5340], esfast.Slice((2**36, 2**13), (2**35 - 4, 3))),
        ("filters", matrix[6:8, 6000:6120].view(2, 5, 6, 4), esfast.Slice((9, 5, 7, 4), (3, 0, 1, 0))),
    ]


def members_of(count):
    return [2**64 - 1 - 12345 * j for j in range(count)], [0.01 * (-1) ** j / (j + 1) for j in range(count)]


def rank_of(kind):
    return 3 if kind == "low_rank" else 1


def call(plan, count=1, base=None, kind="gaussian", stochastic=False, decay=0.0, anchor=None, adam=None, rank=None):
    members = check_members(*members_of(count))
    return Call(plan, *members, base, kind, stochastic, np.float32(decay), anchor, adam, rank or rank_of(kind))


def expect(plan, count=1, base=None, kind="gaussian", stochastic=False, decay=0.0, anchor=None, adam=None, rank=None):
    esfast.add_noise_(
        plan,
        *members_of(count),
        base=base,
        noise=kind,
        rounding="stochastic" if stochastic else "nearest",
        backend="cpu",
        decay=decay,
        anchor=anchor,
        adam=adam,
        rank=rank or rank_of(kind),
    )


def assert_equal(ours, theirs, same_bits):
    for name, a, b in zip(ours.names, ours.tensors, theirs.tensors, strict=True):
        assert same_bits([a], [b]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_equals_the_cpu_backend(dtype, kind, inplace, stochastic, run_on_host, same_bits):
    source = esfast.Plan(entries(dtype))
    for count in (1, 3):
        ours, theirs = source.clone(), source.clone()
        options = {"kind": kind, "base": None if inplace else source, "stochastic": stochastic}
        run_on_host(call(ours, count, **options))
        expect(theirs, count, **options)
        assert_equal(ours, theirs, same_bits)


def test_memory_outside_the_plan_is_left_alone(run_on_host, same_bits):
    memory = torch.zeros(20_000, dtype=torch.bfloat16)
    for begin, end in ((1, 5), (13, 9001), (8, 8200), (100, 104)):
        before = memory.clone()
        run_on_host(call(esfast.Plan([("w", memory[begin:end])])))
        assert same_bits([memory[:begin], memory[end:]], [before[:begin], before[end:]])
        assert not torch.equal(memory[begin:end], before[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_restoring_copies_every_bit_in_one_launch(dtype, run_on_host, same_bits):
    """Restoring copies every bit of all tensors, also the payloads of NaNs, and changes no memory beside them."""
    base = esfast.Plan(entries(dtype))
    for t in base.tensors:
        numbers = t.new_empty(0).view(torch.int32 if dtype is torch.float32 else torch.int16).dtype
        t.copy_(
            torch.randint(-(2**15), 2**15, t.shape, generator=torch.Generator().manual_seed(2))
            .to(numbers)
            .view(dtype)
            .view(t.shape)
        )
    memory = torch.full((200_000,), 7.0).to(dtype)
    held, at = [], 3
    for e in base.entries:  # in one memory, at odd addresses and at aligned ones, with gaps
        held.append((e.name, memory[at : at + e.tensor.numel()].view(e.tensor.shape), e.window))
        at += e.tensor.numel() + (5 if len(held) % 2 else -(at + e.tensor.numel()) % 8)
    plan, launches = esfast.Plan(held), len(run_on_host.copies)
    run_on_host(call(plan, 0, base))
    assert len(run_on_host.copies) == launches + 1
    assert same_bits(plan.tensors, [t.contiguous() for t in base.tensors])
    for _, t, _ in held:
        t.fill_(7.0)
    assert (memory == 7.0).all()
    run_on_host(call(plan, 0)), run_on_host(call(plan, 0, plan))
    assert len(run_on_host.copies) == launches + 1, "nothing is to be done in place"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 2, 7, 64])
def test_member_counts(kind, count, run_on_host, same_bits):
    plan = esfast.Plan([("w", torch.linspace(-1, 1, 9000).bfloat16())])
    ours, theirs = plan.clone(), plan.clone()
    run_on_host(call(ours, count, plan, kind))
    expect(theirs, count, plan, kind)
    assert_equal(ours, theirs, same_bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "rank"), [(1, 1), (1, 4), (2, 2), (5, 1), (64, 1), (3, 16)])
def test_ranks(dtype, count, rank, run_on_host, same_bits):
    """The kernel adds four factors in each turn of its loop: tests one factor, whole turns, and a part of a turn, for
    one member and for several."""
    source = esfast.Plan([e for e in entries(dtype) if e[0] in ("whole tiles", "odd matrix", "experts", "scalar")])
    ours, theirs = source.clone(), source.clone()
    run_on_host(call(ours, count, source, "low_rank", rank=rank))
    expect(theirs, count, source, "low_rank", rank=rank)
    assert_equal(ours, theirs, same_bits)


def test_slots_without_a_factor_keep_the_sign_of_a_zero(run_on_host, same_bits):
    """A turn has four slots, and three factors are there."""
    ours, theirs = (esfast.Plan([("w", torch.full((128, 128), -0.0))]) for _ in range(2))
    run_on_host(Call(ours, *check_members([1], [0.0]), None, "low_rank", rank=3))
    esfast.add_noise_(theirs, [1], [0.0], noise="low_rank", backend="cpu", rank=3)
    assert same_bits(ours.tensors, theirs.tensors) and (theirs.tensors[0].signbit()).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_weight_decay(dtype, anchored, count, run_on_host, same_bits):
    source = esfast.Plan(entries(dtype))
    anchor = esfast.Plan([(e.name, e.tensor * 0.5, e.window) for e in source.entries]) if anchored else None
    ours, theirs = source.clone(), source.clone()
    for kind in KINDS:
        run_on_host(call(ours, count, decay=0.1, anchor=anchor, kind=kind))
        expect(theirs, count, decay=0.1, anchor=anchor, kind=kind)
        assert_equal(ours, theirs, same_bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_masters(dtype, kind, run_on_host, same_bits):
    """Updates of a master (split for bfloat16), and members written from it."""
    source = esfast.Plan(entries(dtype))
    results = []
    for run in (lambda *a, **k: run_on_host(call(*a, **k)), expect):
        master, plan = source.master(), source.clone()
        run(master, 3, kind=kind)
        run(master, 1, kind=kind, decay=0.01)
        run(plan, 1, base=master, kind=kind)
        results.append([*master.tensors, *plan.clone().tensors, *([] if master.low is None else [master.low])])
        run(plan, 2, base=master, kind=kind, stochastic=True)
        results[-1] += plan.tensors
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) if a.dtype is torch.int16 else same_bits(a, b)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_adam(dtype, kind, master, run_on_host, same_bits):
    source = esfast.Plan(entries(dtype))
    source = source.master() if master else source
    ours, theirs = source.clone(), source.clone()
    moments = [torch.zeros(2, source.flat_numel) for _ in range(2)]
    for t in range(1, 4):
        options = {
            "kind": kind,
            "stochastic": t == 2,
            "decay": 0.05 * (t == 3),
            "anchor": source.high() if t == 3 and not master else None,
        }
        adams = [AdamStep.at(t, m, 0.1, 0.9, 0.99, 1e-8) for m in moments]
        run_on_host(call(ours, t, adam=adams[0], **options))
        expect(theirs, t, adam=adams[1], **options)
        assert_equal(ours, theirs, same_bits)
        assert same_bits(*moments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_of_extreme_weights(dtype, run_on_host, same_bits):
    """Ties, subnormals, infinities and the overflow of float16; with noise of one bit so that sums are known."""
    bits = torch.arange(-32768, 32768, 7).to(torch.int16)
    values = bits.view(dtype) if dtype.itemsize == 2 else (bits.to(torch.int32) << 16 | 0x7FFF).view(torch.float32)
    plan = esfast.Plan([("w", values.clone())])
    for coeff in (1e-3, 2.0**-133, 3.0):
        for stochastic in (False, True):
            ours, theirs = plan.clone(), plan.clone()
            members = check_members([9], [coeff])
            run_on_host(Call(ours, *members, plan, "rademacher", stochastic, np.float32(0), None, None))
            rounding = "stochastic" if stochastic else "nearest"
            esfast.add_noise_(theirs, [9], [coeff], plan, "rademacher", rounding, "cpu")
            assert_equal(ours, theirs, same_bits)


# ---- what nvcc makes of them ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    """bench/sass_cuda.py, which reads the machine code in esfast._cuda, if it can."""
    pytest.importorskip("triton", reason="Triton, which brings a disassembler, is not installed")
    from esfast.bench import sass_cuda

    if reason := sass_cuda.missing():
        pytest.skip(f"the CUDA kernels can't be looked at: {reason}")
    return sass_cuda


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH: the CUDA kernels are not compiled")
def test_where_there_is_nvcc_the_kernels_are_built():
    assert importlib.import_module("esfast._cuda").ABSENT == ""


def test_every_architecture_has_every_kernel_and_none_spills(kernels):
    """Of those compiled: all that setup.py knows, unless ESFAST_CUDA_ARCHS chose some when the extension was built."""
    archs = re.findall(r"sm_(\d+)", importlib.import_module("esfast._cuda").ARCHITECTURES)
    assert "90" in archs
    for arch in archs:
        found = kernels.machine_code(int(arch))
        assert sum("add_noise_kernel" in name for name in found) == 54 and len(found) == 56, arch
        copies = [code for name, code in found.items() if "copy_tiles_kernel" in name]
        assert len(copies) == 2 and all("LDG.E.128" in c.sass and "STG.E.128" in c.sass for c in copies), arch
        for name, code in found.items():
            assert "STACK:0 " in code.resources and not re.search(r"\b(LDL|STL)\b", code.sass), (arch, name)


def test_every_kernel_is_within_its_budget(kernels):
    rows = kernels.rows(90)
    assert {(r["kernel"], r["noise"], r["dtype"]) for r in rows} == {
        (k, n, d) for k in ("perturb", "update") for n in KINDS for d in ("float32", "bfloat16", "float16")
    }
    for r in rows:
        assert r["pass"] is True and r["sass_per_weight"] <= kernels.BUDGETS[r["kernel"], r["noise"]], r
        assert r["spill_bytes"] == 0 and r["load_bits"] == r["store_bits"] == 128, r
        shared = set() if r["noise"] == "low_rank" else {"LDS", "STS"}
        assert not ({"LDL", "STL"} | shared) & {m.split(".")[0] for m in r["memory_instructions"]}, r
        # an fma, and what draws a number for each row and column of a tile
        least = 1.3 if (r["kernel"], r["noise"]) == ("update", "low_rank") else 2.5
        assert r["sass_per_weight"] > least, "too little to be true: the reader of machine code has lost its way"


# ---- what is said where they can't run ------------------------------------------------------------------------------


class Extension:
    """A stand-in for the extension module esfast._cuda."""

    ABSENT, ARCHITECTURES = "", "sm_80 and PTX of compute_80"

    def __init__(self, **attributes):
        self.__dict__.update(attributes)

    def unusable(self, device):
        return ""


@pytest.mark.parametrize(
    ("extension", "device", "message"),
    [
        (Extension(ABSENT="no nvcc was found"), "cuda:0", "not built: no nvcc was found"),
        (Extension(unusable=lambda device: "there is no NVIDIA driver"), "cpu", "there is no NVIDIA driver"),
        (Extension(unusable=lambda device: "" if device < 0 else "wrong architecture"), "cuda:1", "wrong architecture"),
        (Extension(), "cpu", "it needs tensors on a GPU, and these are on cpu"),
        (Extension(), "cuda:0", None),
    ],
)
def test_says_why_it_cant_run(extension, device, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "esfast._cuda", extension)
    cuda_backend.missing.cache_clear()
    try:
        found = cuda_backend.missing(torch.device(device))
    finally:
        cuda_backend.missing.cache_clear()
    assert found is None if message is None else message in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_error_says_what_is_missing():
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run: (not built|there is no|it needs|its extension)"):
        esfast.add_noise_(esfast.Plan([("w", torch.zeros(3))]), [1], [1.0], backend="cuda")


def test_builds_and_imports_without_nvcc(tmp_path):
    """setup.py on a machine that has no nvcc: a module that says so."""
    for name in ("csrc", "setup.py", "pyproject.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "setup.py").write_text(
        (tmp_path / "setup.py").read_text().replace("setup(\n", "find_nvcc = lambda: None\nsetup(\n")
    )
    code = (
        "import setuptools, sys\nsys.argv = ['setup.py', 'build_ext', '--build-lib', 'lib']\n"
        "original = setuptools.setup\n"
        "def setup(ext_modules, **rest):\n"
        "    original(name='x', packages=[], ext_modules=[e for e in ext_modules if e.name == 'esfast._cuda'], **rest)\n"
        "setuptools.setup = setup\nexec(open('setup.py').read())"
    )
    (tmp_path / "pyproject.toml").unlink()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the CUDA kernels are not built: no nvcc was found when esfast was built" in done.stdout
    (built,) = (tmp_path / "lib" / "esfast").glob("_cuda*")
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('_cuda', {str(built)!r}); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); print(m.ABSENT)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "no nvcc was found when esfast was built"
