"""On a GPU: the CUDA kernels against the C++ backend on the CPU, to the bit, and what only a device can show."""

import pytest
import torch

import esfast
from esfast import cuda_backend
from esfast.ops import Adam

REASON = cuda_backend.missing(torch.device("cuda", 0)) if torch.cuda.is_available() else "no CUDA device"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=f"{REASON}: test_cuda.py runs the kernels on the CPU"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gaussian", "rademacher")


def entries(dtype):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(300, 7000, generator=generator).to(dtype)
    flat = torch.randn(40_000, generator=generator).to(dtype)
    return [
        ("plain", torch.randn(513, 1025, generator=generator).to(dtype)),
        ("odd start", flat[7:20_000]),
        ("slice", matrix[2:105, 30:6043], esfast.Slice((1000, 50_000), (3, 700))),
        ("shard", matrix[:40, 1024:5120], esfast.Slice((40, 16384), (0, 4096))),
        ("far", flat[20_001:30_000], esfast.Slice((2**40,), (2**34 - 100,))),
        ("scalar", torch.tensor(3.0).to(dtype)),
        ("transposed", torch.randn(50, 30, generator=generator).to(dtype).t()),
    ]


def on_both(dtype):
    there = esfast.Plan(entries(dtype))
    return there, esfast.Plan([(e.name, e.tensor.cuda(), e.window) for e in there.entries])


def run(plan, *arguments, **options):
    esfast.add_noise_(plan, *arguments, **options, backend="cuda" if plan.device.type == "cuda" else "cpu")


def assert_equal(gpu, cpu, same_bits):
    for name, a, b in zip(cpu.names, gpu.tensors, cpu.tensors, strict=True):
        assert same_bits([a.cpu()], [b]), name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [1, 2, 30, 64])
def test_equals_the_cpu_backend(dtype, kind, members, rounding, same_bits):
    cpu, gpu = on_both(dtype)
    seeds, coeffs = [2**64 - 1 - j for j in range(members)], [0.01 * (-1) ** j for j in range(members)]
    bases = cpu.clone(), gpu.clone()
    for plan, base in zip((cpu, gpu), bases, strict=True):
        run(plan, seeds, coeffs, base=base, noise=kind, rounding=rounding)
        run(plan, seeds[:1], [0.5], noise=kind)  # in place
        run(plan, seeds, coeffs, noise=kind, decay=0.1, anchor=base)
    assert_equal(gpu, cpu, same_bits)
    assert_equal(bases[1], bases[0], same_bits)
    run(gpu, [], [], base=bases[1])
    assert_equal(gpu, bases[0], same_bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_and_adam_equal_the_cpu_backend(dtype, kind, same_bits):
    plans = on_both(dtype)
    masters = [p.master() for p in plans]
    moments = [torch.zeros(2, m.flat_numel, device=m.device) for m in masters]
    for t in (1, 2):
        for plan, master, moment in zip(plans, masters, moments, strict=True):
            run(master, [t, 5], [0.3, -0.2], noise=kind, adam=Adam.at(t, moment, 0.1, 0.9, 0.99, 1e-8), decay=0.01)
            run(master, [9], [0.1], noise=kind)
            run(plan, [t], [0.2], base=master, noise=kind)
    assert_equal(plans[1], plans[0], same_bits)
    assert_equal(masters[1], masters[0], same_bits)
    assert same_bits(moments[1].cpu(), moments[0])
    if masters[0].low is not None:
        assert torch.equal(masters[1].low.cpu(), masters[0].low)


def test_equals_triton(same_bits):
    pytest.importorskip("triton")
    _, cuda = on_both(torch.bfloat16)
    triton = cuda.clone()
    for kind in KINDS:
        run(cuda, [1, 2, 3], [0.5, -0.25, 0.1], noise=kind)
        esfast.add_noise_(triton, [1, 2, 3], [0.5, -0.25, 0.1], noise=kind, backend="triton")
    assert same_bits([t.cpu() for t in cuda.tensors], [t.cpu() for t in triton.tensors])


def test_replayed_cuda_graph_follows_its_tables(same_bits):
    cpu, gpu = on_both(torch.bfloat16)
    base, start = gpu.clone(), cpu.clone()
    seeds, coeffs = torch.tensor([1, -2], device="cuda"), torch.tensor([0.5, 0.25], device="cuda")
    run(gpu, seeds, coeffs, base=base)  # loads the code, and makes the table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(gpu, seeds, coeffs, base=base)
    seeds.copy_(torch.tensor([7, -1]))
    coeffs.copy_(torch.tensor([-0.125, 1.0]))
    graph.replay()
    run(cpu, [7, 2**64 - 1], [-0.125, 1.0], base=start)
    assert_equal(gpu, cpu, same_bits)


def test_the_current_stream_is_used(same_bits):
    cpu, gpu = on_both(torch.float32)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            streams[i % 2].wait_stream(streams[1 - i % 2])
            run(gpu, [i], [0.1])
        run(cpu, [i], [0.1])
    torch.cuda.synchronize()
    assert_equal(gpu, cpu, same_bits)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_is_used(same_bits):
    cpu, _ = on_both(torch.bfloat16)
    gpu = esfast.Plan([(e.name, e.tensor.to("cuda:1"), e.window) for e in cpu.entries])
    run(gpu, [4], [0.5])
    run(cpu, [4], [0.5])
    assert torch.cuda.current_device() == 0
    assert_equal(gpu, cpu, same_bits)


def test_more_than_2_to_the_31_elements(same_bits):
    count = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 3 * count:
        pytest.skip(f"needs {3 * count / 2**30:.0f} GiB of free GPU memory")
    whole = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    run(esfast.Plan([("w", whole)]), [3], [1.0])
    end = torch.zeros(6000, dtype=torch.bfloat16)
    run(esfast.Plan([("w", end, esfast.Slice((count,), (count - 6000,)))]), [3], [1.0])
    assert same_bits([whole[-6000:].cpu()], [end])


def test_a_failed_launch_names_the_kernel():
    from esfast import _cuda

    numbers = dict.fromkeys(("tiles", "extras", "seeds", "coeffs", "members", "low", "device", "stream"), 0)
    with pytest.raises(RuntimeError, match=r"add_noise_kernel \(gaussian, bfloat16\) on 0 tiles: cudaError"):
        _cuda.add_noise(
            **numbers, tile_count=0, src_format=1, dst_format=1, kind=0, stochastic=False, decay=0.0,
            moments=(0, 0), adam=(0.0,) * 4,
        )  # fmt: skip
