"""The kernel that adds low-rank noise to the results of linear layers, and where it is taken. Without a GPU it is
interpreted."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be interpreted")
import esfast  # noqa: E402
from esfast.bench.architectures import tiny_model  # noqa: E402
from esfast.core.backends.triton import missing  # noqa: E402
from esfast.kernels.thin_product import add_thin_product  # noqa: E402
from esfast.rollout import member_factors  # noqa: E402
from esfast.rollout.member_factors import Factors, thin_product_for  # noqa: E402
from esfast.tasks import embedded  # noqa: E402

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
runs = pytest.mark.skipif(missing(torch.device(DEVICE)) is not None, reason=str(missing(torch.device(DEVICE))))
TOKENIZER = embedded.make_tokenizer()
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def expected(y, x, a, b, bias):
    members = len(a)
    thin = torch.bmm(x.double().view(members, -1, a.shape[2]), a.double().mT)
    noise = torch.bmm(thin, b.double())
    return y.double() + (noise if bias is None else noise + bias.double()[:, None]).view(y.shape)


@runs
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3, 16])
@pytest.mark.parametrize(
    ("members", "rows", "size", "out"), [(3, 1, 7, 5), (2, 16, 64, 128), (2, 37, 530, 300), (1, 2, 33, 1030)]
)
def test_adds_each_members_product(members, rows, size, out, rank, dtype):
    if rank > 1 and dtype is torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 in tl.dot: this case needs a GPU")
    torch.manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    a, b, y = some(members, rank, size), some(members, rank, out), some(members * rows, out)
    # x may be a part of longer rows
    for x in (some(members * rows, size), some(members * rows, size + 9)[:, :size]):
        for bias in (None, some(members, out)):
            found = y.clone()
            add_thin_product(found, x, a, b, bias)
            want = expected(y, x.contiguous(), a, b, bias)
            scale = x.double().norm(dim=1).max() * a.double().norm(dim=2).max() * b.double().abs().max() * rank
            assert (found.double() - want).abs().max() <= ROUNDING[dtype] * scale
            assert (found.double() - y.double()).abs().max() > 10 * ROUNDING[dtype] * scale / size, "nothing was added"


@runs
def test_no_rows():
    y, *others = (torch.ones(shape, device=DEVICE) for shape in ((0, 5), (0, 7), (3, 1, 7), (3, 1, 5)))
    add_thin_product(y, *others)


@runs
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_factors_multiply_with_it(rank, bias, monkeypatch):
    """All ways to multiply give the same: also of each text's last token, and of a matrix that lies (in, out)."""
    torch.manual_seed(1)
    held = Factors(*(torch.randn(shape, device=DEVICE) for shape in ((9, 8), (3, rank, 9), (3, rank, 8))))
    own = torch.randn(3, 9, device=DEVICE) if bias else None
    x, calls = torch.randn(6, 4, 8, device=DEVICE), []

    def counted(*given):
        calls.append(1)
        add_thin_product(*given)

    # rows of one text, rows with gaps between their numbers, and one row that stands for all
    for some in (x, x[:, -1:], x[:, -1], torch.randn(6, 4, 16, device=DEVICE)[..., ::2], x[0, :1].expand(6, 8)):
        with monkeypatch.context() as patch:
            patch.setattr(member_factors, "thin_product_for", lambda a, b: None)
            without = held.mT.product(some, own)
            patch.setattr(member_factors, "thin_product_for", lambda a, b: counted)
            torch.testing.assert_close(held.mT.product(some, own), without)
            torch.testing.assert_close(held.product(without), without @ held.weight + _noise(without, held))
    assert len(calls) == 10


def _noise(x, held):
    of_members = x.unflatten(0, (3, 2))
    return torch.einsum("kr...i,kqi,kqo->kr...o", of_members, held.a, held.b).flatten(0, 1)


@runs
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_models_answer_with_it(name, monkeypatch):
    """Linear layers with and without a bias, Transformers' Conv1D, and tied heads."""
    model = tiny_model(name, TOKENIZER).to(DEVICE).eval()
    ids, calls = torch.arange(3, 45, device=DEVICE).view(6, 7), []
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 0, "do_sample": False}
    told = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}

    def counted(y, *others):
        calls.append(y.shape)
        add_thin_product(y, *others)

    def logits(add):
        monkeypatch.setattr(member_factors, "thin_product_for", lambda a, b: add)
        with torch.no_grad(), esfast.low_rank(model, [(seed, 0.1) for seed in range(3)], rank=2):
            return torch.stack(model.generate(**given, **told).logits)

    # The first run learns how operations are shared; interpreted kernels would take long for it.
    expected = logits(None)
    torch.testing.assert_close(logits(counted), expected, atol=1e-5, rtol=1e-5)
    assert (6, model.config.vocab_size) in calls, "the head"
    assert {(42, out) for out in (32, 64)} & set(calls), "layers"


@runs
def test_a_bias_that_is_a_part_of_a_longer_vector(monkeypatch):
    torch.manual_seed(2)
    held = Factors(*(torch.randn(shape, device=DEVICE) for shape in ((9, 8), (3, 1, 9), (3, 1, 8))))
    x, longer = torch.randn(6, 8, device=DEVICE), torch.randn(3, 20, device=DEVICE)
    for bias in (longer[:, 5:14], longer[:, :1].expand(3, 9), longer[:, 2:20:2]):
        monkeypatch.setattr(member_factors, "thin_product_for", lambda a, b: None)
        without = held.mT.product(x, bias)
        monkeypatch.setattr(member_factors, "thin_product_for", lambda a, b: add_thin_product)
        torch.testing.assert_close(held.mT.product(x, bias), without)


def test_where_it_is_taken(monkeypatch):
    def found(device="meta", rank=1, shape=(3, 1, 8)):
        a = torch.empty(3, rank, 9, device=device)
        return a, torch.empty(*shape, device=device)

    assert thin_product_for(*found("cpu")) is None, "on a CPU two products are as fast"

    class OnGpu:
        """Stands for a tensor on a GPU."""

        device = torch.device("cuda")

        def __init__(self, *shape, contiguous=True):
            self.shape, self.is_contiguous = shape, lambda: contiguous

    report = {"triton": "ready"}
    monkeypatch.setattr(member_factors, "backend_report", lambda device: report)
    member_factors._thin_product.cache_clear()
    assert thin_product_for(OnGpu(3, 1, 9), OnGpu(3, 1, 8)) is add_thin_product
    assert thin_product_for(OnGpu(3, 16, 9), OnGpu(3, 16, 8)) is add_thin_product
    assert thin_product_for(OnGpu(3, 17, 9), OnGpu(3, 17, 8)) is None
    assert thin_product_for(OnGpu(3, 1, 9, contiguous=False), OnGpu(3, 1, 8)) is None
    report["triton"] = "Triton finds no usable GPU driver (Failed to find C compiler)"
    member_factors._thin_product.cache_clear()
    assert thin_product_for(OnGpu(3, 1, 9), OnGpu(3, 1, 8)) is None
    member_factors._thin_product.cache_clear()


def test_gradients_go_through_pytorch(monkeypatch):
    """The kernel has no backward pass."""
    held = Factors(torch.randn(9, 8), torch.randn(3, 1, 9), torch.randn(3, 1, 8))
    monkeypatch.setattr(member_factors, "thin_product_for", lambda a, b: pytest.fail)
    x = torch.randn(6, 8, requires_grad=True)
    held.mT.product(x).sum().backward()
    assert x.grad.abs().min() > 0


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from esfast.kernels.thin_product import add_thin_product_kernel as kernel, configuration
backend, arch, warp = sys.argv[1].split(":")
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
for dtype in ("bf16", "fp16", "fp32"):
    for rank in (1, 4):
        tile, options = configuration(rank, 896, 4 if dtype == "fp32" else 2)
        names = kernel.arg_names
        signature = dict(zip(names, [f"*{dtype}"] * 5 + ["i32"] * 5 + ["constexpr"] * 5))
        constants = dict(zip(names[10:], (rank, True, *tile)))
        # Pointers are aligned, as in a launch: loads then go through shared memory.
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(9)}
        source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
        made = triton.compile(source, target=target, options=options)
        assert made.metadata.shared <= {"cuda": 65, "hip": 64}[backend] * 2**10, made.metadata.shared
        print(len(made.asm["cubin" if backend == "cuda" else "hsaco"]))
"""


@pytest.mark.parametrize("target", ["cuda:90:32", "hip:gfx942:64"])
def test_compiles_for(target):
    """In a process of its own: an interpreted kernel does not compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", COMPILE, target], capture_output=True, text=True, env=environment)
    if "ROCm linker" in done.stderr:
        pytest.skip("this Triton links for ROCm with a linker that is not installed")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 6 and all(int(n) > 1000 for n in done.stdout.split())
