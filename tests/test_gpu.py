"""On a GPU: the CUDA and Triton kernels against the C++ backend on the CPU, to the bit, and what only a device can show."""

import pytest
import torch

import esfast
from esfast.core.ops import AdamStep, Call, backend_report, check_members
from esfast.rollout import adapters
from esfast.tasks import embedded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="no CUDA device: test_cuda.py and test_triton.py run the kernels on the CPU",
    ),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gaussian", "rademacher")


def require(backend):
    """Fails if the backend can't run: on a machine with a GPU that is no reason to skip its tests."""
    state = backend_report("cuda")[backend]
    if state != "ready":
        pytest.fail(f"backend {backend!r} can't run on the GPU that is here: {state}")


@pytest.fixture(params=["cuda", "triton"])
def run(request):
    """add_noise_ by one of the GPU backends, or by the CPU's for a plan there."""
    require(request.param)

    def add_noise(plan, *arguments, **options):
        esfast.add_noise_(plan, *arguments, **options, backend=request.param if plan.device.type == "cuda" else "cpu")

    add_noise.backend = request.param
    return add_noise


def entries(dtype):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(300, 7000, generator=generator).to(dtype)
    flat = torch.randn(40_000, generator=generator).to(dtype)
    return [
        ("plain", torch.randn(513, 1025, generator=generator).to(dtype)),
        ("odd start", flat[7:20_000]),
        ("slice", matrix[2:105, 30:6043], esfast.Slice((1000, 50_000), (3, 700))),
        ("shard", matrix[200:240, 1024:5120], esfast.Slice((40, 16384), (0, 4096))),
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


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [1, 2, 30, 64])
def test_equals_the_cpu_backend(dtype, kind, members, rounding, same_bits, run):
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
def test_masters_and_adam_equal_the_cpu_backend(dtype, kind, same_bits, run):
    plans = on_both(dtype)
    masters = [p.master() for p in plans]
    moments = [torch.zeros(2, m.flat_numel, device=m.device) for m in masters]
    for t in (1, 2):
        for plan, master, moment in zip(plans, masters, moments, strict=True):
            run(master, [t, 5], [0.3, -0.2], noise=kind, adam=AdamStep.at(t, moment, 0.1, 0.9, 0.99, 1e-8), decay=0.01)
            run(master, [9], [0.1], noise=kind)
            run(plan, [t], [0.2], base=master, noise=kind)
    assert_equal(plans[1], plans[0], same_bits)
    assert_equal(masters[1], masters[0], same_bits)
    assert same_bits(moments[1].cpu(), moments[0])
    if masters[0].low is not None:
        assert torch.equal(masters[1].low.cpu(), masters[0].low)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_decay_adam_and_stochastic_rounding(dtype, kind, same_bits, run):
    cpu, gpu = on_both(dtype)
    for plan in (cpu, gpu):
        anchor, master = plan.clone(), plan.master()
        moments = torch.zeros(2, plan.flat_numel, device=plan.device)
        options = {"noise": kind, "rounding": "stochastic"}
        for t in (1, 2):
            adam = AdamStep.at(t, moments, 1e-3, 0.9, 0.99, 1e-8)
            run(plan, [t, 5], [0.5, 0.25], adam=adam, decay=0.1, **options)
            run(plan, [t, 6], [0.5, 0.25], decay=0.1, anchor=anchor, **options)
            run(master, [t, 7], [1e-5, 2e-5], decay=0.01, **options)
        plan.result = [plan.clone(), moments]
        run(plan, [9], [1e-3], base=master.high(), **options)
        plan.result.append(plan.clone())
        run(plan, [], [], base=master, **options)
    assert_equal(gpu, cpu, same_bits)
    assert_equal(gpu.result[0], cpu.result[0], same_bits)
    assert_equal(gpu.result[2], cpu.result[2], same_bits)
    assert same_bits([gpu.result[1].cpu()], [cpu.result[1]])


def test_equals_triton(same_bits):
    require("cuda"), require("triton")
    _, cuda = on_both(torch.bfloat16)
    triton = cuda.clone()
    for kind in KINDS:
        esfast.add_noise_(cuda, [1, 2, 3], [0.5, -0.25, 0.1], noise=kind, backend="cuda")
        esfast.add_noise_(triton, [1, 2, 3], [0.5, -0.25, 0.1], noise=kind, backend="triton")
    assert same_bits([t.cpu() for t in cuda.tensors], [t.cpu() for t in triton.tensors])


@pytest.mark.parametrize("tile", [512, 1024, 8192])
def test_any_tile_gives_the_same_bits(tile, same_bits):
    require("triton")
    from esfast.core.backends import triton as triton_backend

    cpu, gpu = on_both(torch.bfloat16)
    base = gpu.clone()
    triton_backend.run(Call(gpu, *check_members([5], [0.1]), base), tile)
    esfast.add_noise_(cpu, [5], [0.1])
    assert_equal(gpu, cpu, same_bits)


def test_replayed_cuda_graph_follows_its_tables(same_bits, run):
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


def test_the_current_stream_is_used(same_bits, run):
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
def test_the_device_of_the_tensors_is_used(same_bits, run):
    cpu, _ = on_both(torch.bfloat16)
    gpu = esfast.Plan([(e.name, e.tensor.to("cuda:1"), e.window) for e in cpu.entries])
    run(gpu, [4], [0.5])
    run(cpu, [4], [0.5])
    assert torch.cuda.current_device() == 0
    assert_equal(gpu, cpu, same_bits)


def test_more_than_2_to_the_31_elements(same_bits, run):
    count = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 3 * count:
        pytest.skip(f"needs {3 * count / 2**30:.0f} GiB of free GPU memory")
    whole = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    run(esfast.Plan([("w", whole)]), [3], [1.0])
    end = torch.zeros(6000, dtype=torch.bfloat16)
    run(esfast.Plan([("w", end, esfast.Slice((count,), (count - 6000,)))]), [3], [1.0])
    assert same_bits([whole[-6000:].cpu()], [end])


def test_a_failed_launch_names_the_kernel():
    require("cuda")
    from esfast import _cuda

    numbers = dict.fromkeys(("tiles", "extras", "segments", "seeds", "coeffs", "members", "low", "device", "stream"), 0)
    with pytest.raises(RuntimeError, match=r"add_noise_kernel \(gaussian, bfloat16\) on 0 tiles: cudaError"):
        _cuda.add_noise(
            **numbers,
            tile_count=0,
            src_format=1,
            dst_format=1,
            kind=0,
            rank=0,
            scale=1.0,
            stochastic=False,
            decay=0.0,
            moments=(0, 0),
            adam=(0.0,) * 4,
        )


def test_es_on_a_gpu_equals_es_on_a_cpu(same_bits, run):
    finals = []
    for device, backend in (("cpu", "cpu"), ("cuda", run.backend)):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64).to(device, torch.bfloat16)
        es = esfast.ES(model, sigma=0.1, lr=0.1, population_size=4, backend=backend)
        for generation in range(5):
            for member in es.population():
                member.reward = float((member.seed + generation) % 7)
            es.step()
        finals.append([t.detach().cpu() for t in es.plan.tensors])
    assert same_bits(*finals)


def test_buffers_on_a_gpu_are_put_back():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).cuda()
    before = [b.clone() for b in model.buffers()]
    es = esfast.ES(model, population_size=3)
    for member in es.population():
        with torch.no_grad():
            member.reward = float(model(torch.ones(4, 3, device="cuda")).sum())
    assert all(map(torch.equal, before, model.buffers()))
    model.load_state_dict({name: p + 1 for name, p in model.state_dict().items()})
    with pytest.raises(RuntimeError, match="changed since ES last wrote them"):
        es.population()


def test_adapters_leave_the_generators_of_both_devices():
    peft = pytest.importorskip("peft", reason="needs peft, an optional package")
    made = []
    for state in (1, 2):
        model = embedded.make_model(embedded.make_tokenizer()).cuda()
        torch.manual_seed(state)
        before = torch.get_rng_state(), torch.cuda.get_rng_state()
        wrapped = adapters.wrap(model, peft.LoraConfig(r=2, target_modules=["q_proj"]), 5)
        assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])
        made.append([p.detach().cpu() for p in wrapped.parameters() if p.requires_grad])
    assert all(map(torch.equal, *made))
