"""On a GPU: the Triton kernels against the C++ backend on the CPU, to the bit, and what only a device can show."""

import pytest
import torch

import esfast
from esfast import ops, triton_backend
from esfast.ops import Adam, Call, check_members

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: test_triton.py interprets the kernels"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gaussian", "rademacher")


@pytest.fixture(autouse=True)
def auto_is_triton(monkeypatch):
    monkeypatch.setattr(ops, "auto_backend", lambda device: "triton" if device.type == "cuda" else "cpu")


def entries(dtype):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(300, 7000, generator=generator).to(dtype)
    flat = torch.randn(40_000, generator=generator).to(dtype)
    return [
        ("plain", torch.randn(513, 1025, generator=generator).to(dtype)),
        ("odd start", flat[7:20_000]),
        ("slice", matrix[2:105, 30:6043], esfast.Slice((1000, 50_000), (3, 700))),
        ("far", flat[20_001:30_000], esfast.Slice((2**40,), (2**34 - 100,))),
        ("scalar", torch.tensor(3.0).to(dtype)),
        ("transposed", torch.randn(50, 30, generator=generator).to(dtype).t()),
    ]


def on_both(dtype):
    there = esfast.Plan(entries(dtype))
    return there, esfast.Plan([(e.name, e.tensor.cuda(), e.window) for e in there.entries])


def assert_equal(gpu, cpu, same_bits):
    for name, a, b in zip(cpu.names, gpu.tensors, cpu.tensors, strict=True):
        assert same_bits([a.cpu()], [b]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [1, 2, 30, 64])
def test_equals_the_cpu_backend(dtype, kind, members, same_bits):
    cpu, gpu = on_both(dtype)
    seeds, coeffs = [2**64 - 1 - j for j in range(members)], [0.01 * (-1) ** j for j in range(members)]
    bases = cpu.clone(), gpu.clone()
    for plan, base in zip((cpu, gpu), bases, strict=True):
        esfast.add_noise_(plan, seeds, coeffs, base=base, noise=kind)
        esfast.add_noise_(plan, seeds[:1], [0.5], noise=kind)  # in place
    assert_equal(gpu, cpu, same_bits)
    assert_equal(bases[1], bases[0], same_bits)
    esfast.add_noise_(gpu, [], [], base=bases[1])
    assert_equal(gpu, bases[0], same_bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_decay_adam_and_stochastic_rounding(dtype, kind, same_bits):
    cpu, gpu = on_both(dtype)
    for plan, backend in ((cpu, "cpu"), (gpu, "triton")):
        anchor, master = plan.clone(), plan.master()
        moments = torch.zeros(2, plan.flat_numel, device=plan.device)
        options = {"noise": kind, "backend": backend, "rounding": "stochastic"}
        for t in (1, 2):
            adam = Adam.at(t, moments, 1e-3, 0.9, 0.99, 1e-8)
            esfast.add_noise_(plan, [t, 5], [0.5, 0.25], adam=adam, decay=0.1, **options)
            esfast.add_noise_(plan, [t, 6], [0.5, 0.25], decay=0.1, anchor=anchor, **options)
            esfast.add_noise_(master, [t, 7], [1e-5, 2e-5], decay=0.01, **options)
        plan.result = [plan.clone(), moments]
        esfast.add_noise_(plan, [9], [1e-3], base=master.high(), **options)
        plan.result.append(plan.clone())
        esfast.add_noise_(plan, [], [], base=master, **options)
    assert_equal(gpu, cpu, same_bits)
    assert_equal(gpu.result[0], cpu.result[0], same_bits)
    assert_equal(gpu.result[2], cpu.result[2], same_bits)
    assert same_bits([gpu.result[1].cpu()], [cpu.result[1]])


@pytest.mark.parametrize("tile", [512, 1024, 8192])
def test_any_tile_gives_the_same_bits(tile, same_bits):
    cpu, gpu = on_both(torch.bfloat16)
    base = gpu.clone()
    triton_backend.run(Call(gpu, *check_members([5], [0.1]), base), tile)
    esfast.add_noise_(cpu, [5], [0.1])
    assert_equal(gpu, cpu, same_bits)


def test_replayed_cuda_graph_follows_its_tables(same_bits):
    cpu, gpu = on_both(torch.bfloat16)
    base, start = gpu.clone(), cpu.clone()
    seeds, coeffs = torch.tensor([1, -2], device="cuda"), torch.tensor([0.5, 0.25], device="cuda")
    esfast.add_noise_(gpu, seeds, coeffs, base=base)  # compiles, and makes the table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        esfast.add_noise_(gpu, seeds, coeffs, base=base)
    seeds.copy_(torch.tensor([7, -1]))
    coeffs.copy_(torch.tensor([-0.125, 1.0]))
    graph.replay()
    esfast.add_noise_(cpu, [7, 2**64 - 1], [-0.125, 1.0], base=start)
    assert_equal(gpu, cpu, same_bits)


def test_the_current_stream_is_used(same_bits):
    cpu, gpu = on_both(torch.float32)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for i in range(20):
        with torch.cuda.stream(streams[i % 2]):
            streams[i % 2].wait_stream(streams[1 - i % 2])
            esfast.add_noise_(gpu, [i], [0.1])
        esfast.add_noise_(cpu, [i], [0.1])
    torch.cuda.synchronize()
    assert_equal(gpu, cpu, same_bits)


def test_more_than_2_to_the_31_elements(same_bits):
    count = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 3 * count:
        pytest.skip(f"needs {3 * count / 2**30:.0f} GiB of free GPU memory")
    whole = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    esfast.add_noise_(esfast.Plan([("w", whole)]), [3], [1.0])
    end = torch.zeros(6000, dtype=torch.bfloat16)
    esfast.add_noise_(esfast.Plan([("w", end, esfast.Slice((count,), (count - 6000,)))]), [3], [1.0])
    assert same_bits([whole[-6000:].cpu()], [end])


def test_es_on_a_gpu_equals_es_on_a_cpu(same_bits):
    finals = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64).to(device, torch.bfloat16)
        es = esfast.ES(model, sigma=0.1, lr=0.1, population_size=4)
        for generation in range(5):
            for member in es.population():
                member.reward = float((member.seed + generation) % 7)
            es.step()
        finals.append([t.detach().cpu() for t in es.plan.tensors])
    assert same_bits(*finals)
