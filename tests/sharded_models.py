"""Checks of sharded models; `run_all` runs them after those of sharded.py and sharded_meshes.py."""

import copy
import re
import sys
from pathlib import Path

import sharded_meshes  # noqa: F401  registers its checks
import torch
import torch.distributed as dist
from sharded import CHECKS, check, main, same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from esfast import ES, Plan, add_noise_
from esfast.core import dtensors as shards
from esfast.distributed import tensor_parallel
from esfast.tasks import embedded
from esfast.trainer.kl import KLToBase

__all__ = ["CHECKS"]


def run_all(rank, world, folder):
    """For one rank, in a process that has imported this module: all checks are registered."""
    main(rank, world, folder)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def compare_models(sharded, whole, what):
    for (name, found), (_, expected) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        found = found.full_tensor() if isinstance(found, DTensor) else found
        assert same(found, expected), f"{what}: {name}"


def train(sharded, whole, forward, exact, generations=2, **options):
    """Trains both models by ES and compares them. `exact`: outputs must agree to the bit, as they do if no sum is
    divided between ranks."""
    runs = [ES(m, sigma=0.05, lr=0.05, population_size=3, **options) for m in (sharded, whole)]
    assert runs[0].plan.layout == runs[1].plan.layout
    for _ in range(generations):
        for members in zip(*(es.population() for es in runs), strict=True):
            with torch.no_grad():
                a, b = forward(sharded), forward(whole)
            assert torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-4), f"member {members[0].index}"
            for m in members:
                m.reward = float(b.double().mean())
        for es in runs:
            es.step()
        compare_models(sharded, whole, "after the update")
    assert runs[0].plan.fingerprint() == runs[1].plan.fingerprint()


@check((2, 4))
def fsdp2(world):
    """FSDP2 keeps the root module's parameters gathered after a forward pass. The next member must not be evaluated
    with these stale copies, and a plan must not be made of them."""
    torch.manual_seed(0)
    whole = Tied()
    sharded = copy.deepcopy(whole)
    for layer in sharded.layers:
        fully_shard(layer, mesh=world)
    fully_shard(sharded, mesh=world)
    ids = torch.arange(13)
    train(sharded, whole, lambda m: m(ids), exact=True, weights="master")
    with torch.no_grad():
        sharded(ids)
    assert not isinstance(sharded.embed.weight, DTensor)
    train(sharded, whole, lambda m: m(ids), exact=True, weights="base")
    sharded.reshard()
    compare_models(sharded, whole, "from the shards")


@check((2, 4))
def kl_to_base_and_saving(world):
    """KL and saving, which the trainer does besides generating, for both ways to shard a model, also after a forward
    pass."""
    tokenizer = embedded.make_tokenizer()
    torch.manual_seed(0)
    whole = embedded.make_model(tokenizer).eval()
    plan = Plan(whole)

    def fsdp(model):
        for layer in model.model.layers:
            fully_shard(layer, mesh=world)
        fully_shard(model, mesh=world)

    texts, responses = ["3 4 5", "1"], ["3+4", "words"]
    before, after = whole.state_dict(), copy.deepcopy(whole)
    expected_kl = KLToBase(after, tokenizer, 8)
    add_noise_(Plan(after), [5], [0.05])
    expected = expected_kl(texts, responses)
    assert min(expected) > 1e-3
    for cut in (fsdp, lambda model: tensor_parallel.shard(model, world, "cpu")):
        model = copy.deepcopy(whole)
        cut(model)
        assert shards.in_shards(model) and not shards.in_shards(whole)
        kl = KLToBase(model, tokenizer, 8)
        tuned = Plan(model)
        add_noise_(tuned, [5], [0.05])
        assert torch.allclose(torch.tensor(kl(texts, responses)), torch.tensor(expected), rtol=1e-3)
        with torch.no_grad():
            model(torch.arange(3)[None])
        state = shards.whole_state_dict(model, keep=True)
        assert state.keys() == before.keys() and all(same(t, after.state_dict()[n]) for n, t in state.items())
        assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
        assert tuned.fingerprint() == Plan(after).fingerprint() != plan.fingerprint()


@check((2,))
def transformers_tensor_parallel(world):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder = Path(sys.argv[3]) / "model"
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
        Qwen2ForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sharded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, tp_plan="auto")
    assert any(isinstance(p, DTensor) for p in sharded.parameters())
    ids = torch.arange(12)[None]
    with sdpa_kernel(SDPBackend.MATH):
        train(sharded, whole, lambda m: m(ids).logits.float(), exact=False)


@check((2, 4))
def transformers_plans(world):
    """Models that are sharded by their own tensor-parallel plans generate the tokens of the whole model, and a Plan
    gives them the same weights."""
    import transformers as t

    size = dict(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    configs = [
        t.Qwen2Config(**size),
        t.Qwen2Config(**size, tie_word_embeddings=True),
        t.Phi3Config(**size),
        t.Qwen3Config(**size, head_dim=8),
        t.Gemma2Config(**size, head_dim=8),
        t.GPTNeoXConfig(**size),
        t.LlamaConfig(**size | {"vocab_size": 64, "num_hidden_layers": 1}, attention_bias=True),
    ]
    for config in configs:
        name = type(config).__name__
        torch.manual_seed(0)
        whole = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        cut = copy.deepcopy(whole)
        tensor_parallel.shard(cut, world, "cpu")
        head = cut.get_output_embeddings()
        cuts_head = not config.tie_word_embeddings and config.vocab_size % world.size() == 0
        assert isinstance(head.weight, DTensor) == cuts_head, f"{name}: the output matrix"
        for found, expected in zip(Plan(cut).entries, Plan(whole).entries, strict=True):
            assert found.window.shape == expected.window.shape, f"{name}: {found.name}"
        es = ES(cut, sigma=0.05, population_size=2), ES(whole, sigma=0.05, population_size=2)
        ids = torch.arange(3, 17).view(2, 7)
        for _ in zip(*(e.population() for e in es), strict=True):
            with torch.no_grad():
                assert torch.allclose(cut(ids).logits, whole(ids).logits, atol=1e-5), name
                tokens = [m.generate(ids, max_new_tokens=6, do_sample=False) for m in (cut, whole)]
            assert torch.equal(*tokens), name
        state = shards.whole_state_dict(cut, keep=dist.get_rank() == 0)
        assert set(state) == (set(whole.state_dict()) if dist.get_rank() == 0 else set())
        assert all(same(t, whole.state_dict()[n]) for n, t in state.items()), name
        if config.tie_word_embeddings and state:
            assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    refused = [
        (
            t.Qwen2Config(**size | {"num_key_value_heads": 1}),
            "1 num_key_value_heads of Qwen2ForCausalLM can't be shared",
        ),
        (t.Qwen2Config(**size | {"intermediate_size": 49}), "gate_proj of Qwen2.*, (49, 32), can't be cut in"),
        (t.GPT2Config(n_embd=8, n_layer=1, n_head=4), "GPT2LMHeadModel brings no plan"),
    ]
    for config, words in refused:
        model = t.AutoModelForCausalLM.from_config(config)
        try:
            tensor_parallel.shard(model, world, "cpu")
        except ValueError as e:
            assert re.search(words.replace("(", "\\(").replace(")", "\\)"), str(e)), e
        else:
            raise AssertionError(f"not refused: {words}")
        assert not any(isinstance(p, DTensor) for p in model.parameters())


@check((4,))
def fsdp2_over_tensor_parallel(world):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6))
    sharded = parallelize_module(copy.deepcopy(whole), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(sharded, mesh=mesh["dp"])
    assert any(isinstance(p, _StridedShard) for p in sharded[0].weight.placements)
    train(sharded, whole, lambda m: m(torch.eye(6)), exact=False)
