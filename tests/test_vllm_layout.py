"""Which parts of Hugging Face tensors the tensors of vLLM hold, on stand-ins for vLLM's layers that fuse, pad and shard
as those do. tests/with_vllm tests the real layers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import esfast
from esfast.integrations import vllm_layout
from esfast.integrations.vllm_layout import check_covered, check_live, pieces

HEAD, WIDTH, VOCAB = 4, 8, 10
WHOLES = {
    "model.embed_tokens.weight": (VOCAB, WIDTH),
    "model.layers.0.self_attn.q_proj.weight": (4 * HEAD, WIDTH),
    "model.layers.0.self_attn.q_proj.bias": (4 * HEAD,),
    "model.layers.0.self_attn.k_proj.weight": (2 * HEAD, WIDTH),
    "model.layers.0.self_attn.k_proj.bias": (2 * HEAD,),
    "model.layers.0.self_attn.v_proj.weight": (2 * HEAD, WIDTH),
    "model.layers.0.self_attn.v_proj.bias": (2 * HEAD,),
    "model.layers.0.self_attn.o_proj.weight": (WIDTH, 4 * HEAD),
    "model.layers.0.mlp.gate_proj.weight": (12, WIDTH),
    "model.layers.0.mlp.up_proj.weight": (12, WIDTH),
    "model.layers.0.mlp.down_proj.weight": (WIDTH, 12),
    "model.layers.0.input_layernorm.weight": (WIDTH,),
    "lm_head.weight": (VOCAB, WIDTH),
}


class VocabParallelEmbedding(nn.Module): ...


class ParallelLMHead(VocabParallelEmbedding): ...


class ColumnParallelLinear(nn.Module): ...


class MergedColumnParallelLinear(ColumnParallelLinear): ...


class QKVParallelLinear(ColumnParallelLinear): ...


class RowParallelLinear(nn.Module): ...


class RMSNorm(nn.Module): ...


def layer(kind, weight, bias=None, **attributes):
    module = kind()
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.clone(), requires_grad=False)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def tree(layers):
    root = nn.Module()
    for path, module in layers.items():
        *parents, leaf = path.split(".")
        at = root
        for name in parents:
            if not hasattr(at, name):
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        at.add_module(leaf, module)
    root.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    return root


def part(t, rank, ranks, dim=0):
    return t.chunk(ranks, dim)[rank]


def vocabulary(kind, t, rank, ranks):
    """Padded to a multiple of 4 rows for each rank, with zeros."""
    padded = -(-VOCAB // (4 * ranks)) * 4 * ranks
    rows = padded // ranks
    start, end = min(rank * rows, VOCAB), min((rank + 1) * rows, VOCAB)
    weight = torch.zeros(rows, WIDTH, dtype=t.dtype)
    weight[: end - start] = t[start:end]
    return layer(
        kind,
        weight,
        num_added_embeddings=0,
        shard_indices=SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=end),
    )


def sharded(hf, rank, ranks):
    """What vLLM would hold of the tensors `hf` on one rank, in two layers' worth of its classes."""
    kv_ranks = min(ranks, 2)  # 2 kv heads: with more ranks, several hold the same
    kv_rank, replicas = rank * kv_ranks // ranks, ranks // kv_ranks
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."

    def qkv(leaf):
        q, k, v = (hf[f"{attention}{n}_proj.{leaf}"] for n in "qkv")
        return torch.cat([part(q, rank, ranks), part(k, kv_rank, kv_ranks), part(v, kv_rank, kv_ranks)])

    tp = {"tp_rank": rank, "tp_size": ranks}
    return tree(
        {
            "model.embed_tokens": vocabulary(VocabParallelEmbedding, hf["model.embed_tokens.weight"], rank, ranks),
            attention + "qkv_proj": layer(
                QKVParallelLinear,
                qkv("weight"),
                qkv("bias"),
                num_kv_head_replicas=replicas,
                **tp,
                output_partition_sizes=[4 * HEAD // ranks, 2 * HEAD // kv_ranks, 2 * HEAD // kv_ranks],
            ),
            attention + "o_proj": layer(RowParallelLinear, part(hf[attention + "o_proj.weight"], rank, ranks, 1), **tp),
            mlp + "gate_up_proj": layer(
                MergedColumnParallelLinear,
                torch.cat([part(hf[f"{mlp}{n}_proj.weight"], rank, ranks) for n in ("gate", "up")]),
                output_partition_sizes=[12 // ranks] * 2,
                **tp,
            ),
            mlp + "down_proj": layer(RowParallelLinear, part(hf[mlp + "down_proj.weight"], rank, ranks, 1), **tp),
            "model.layers.0.input_layernorm": layer(RMSNorm, hf["model.layers.0.input_layernorm.weight"]),
            "lm_head": vocabulary(ParallelLMHead, hf["lm_head.weight"], rank, ranks),
        }
    )


def tensors(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in WHOLES.items()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("noise", [{}, {"noise": "low_rank", "rank": 3}])
def test_ranks_hold_the_slices_of_the_perturbed_whole(ranks, noise, same_bits):
    hf = tensors()
    models = [sharded(hf, rank, ranks) for rank in range(ranks)]
    plan = esfast.Plan(hf.items())
    esfast.add_noise_(plan, [3, 4], [0.1, -0.2], **noise)
    first = check_covered(WHOLES, [[(n, t.shape, w.offset) for n, t, w in pieces(m, WHOLES)] for m in models])
    fingerprint = 0
    for rank, model in enumerate(models):
        mine = esfast.Plan(pieces(model, WHOLES))
        assert rank == 3 or mine.layout == plan.layout  # of 4 ranks the last holds no row of the vocabulary
        esfast.add_noise_(mine, [3, 4], [0.1, -0.2], **noise)
        wanted = sharded(hf, rank, ranks)  # from the perturbed tensors
        for (name, found), (_, expected) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
            assert same_bits(found, expected), name
        owned = [e for e, taken in zip(mine.entries, first[rank], strict=True) if taken]
        fingerprint += int(esfast.Plan([(e.name, e.tensor, e.window) for e in owned]).fingerprint(), 16)
    assert f"{fingerprint % 2**64:016x}" == plan.fingerprint()
    copies = {1: 0, 2: 1, 4: 3 + 2 * 4}[ranks]  # the norm on all but one; k's and v's weights and biases on two more
    assert sum(not taken for held in first for taken in held) == copies


def test_a_matrix_fused_in_both_is_several_slices_of_one(same_bits):
    wholes = {"qkv_proj.weight": (8 * HEAD, WIDTH)}
    hf = torch.randn(8 * HEAD, WIDTH)
    plan = esfast.Plan([("qkv_proj.weight", hf)])
    q, k, v = hf.split([4 * HEAD, 2 * HEAD, 2 * HEAD])
    models = []
    for rank in range(4):
        weight = torch.cat([part(q, rank, 4), part(k, rank // 2, 2), part(v, rank // 2, 2)])
        models.append(
            tree(
                {
                    "qkv_proj": layer(
                        QKVParallelLinear,
                        weight,
                        tp_rank=rank,
                        tp_size=4,
                        num_kv_head_replicas=2,
                        output_partition_sizes=[HEAD, HEAD, HEAD],
                    )
                }
            )
        )
        models[-1].packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    esfast.add_noise_(plan, [9], [0.5])
    for rank, model in enumerate(models):
        esfast.add_noise_(esfast.Plan(pieces(model, wholes)), [9], [0.5])
        wanted = torch.cat([part(q, rank, 4), part(k, rank // 2, 2), part(v, rank // 2, 2)])
        assert same_bits(model.qkv_proj.weight, wanted)


def test_rows_that_pad_a_vocabulary_are_left_alone():
    hf = tensors()
    model = sharded(hf, 0, 1)
    model.model.embed_tokens.weight.data[VOCAB:] = 7.0
    esfast.add_noise_(esfast.Plan(pieces(model, WHOLES)), [1], [1.0])
    assert (model.model.embed_tokens.weight[VOCAB:] == 7).all() and len(model.model.embed_tokens.weight) == 12


def test_what_is_refused_is_named():
    hf = tensors()

    def changed(change):
        model = sharded(hf, 0, 1)
        change(model)
        return model

    def packed(model):
        model.model.layers.get_submodule("0").mlp.down_proj.weight = nn.Parameter(torch.empty(0))

    def tied(model):
        model.lm_head.weight = model.model.embed_tokens.weight

    def unknown(model):
        model.model.add_module("router", layer(RMSNorm, torch.ones(3)))

    def larger(model):
        model.model.layers.get_submodule("0").input_layernorm.weight = nn.Parameter(torch.ones(WIDTH + 1))

    def lora(model):
        model.model.embed_tokens.num_added_embeddings = 2

    for words, change in (
        (r"down_proj.weight' has no elements \(shape \(0,\)\)", packed),
        ("'lm_head.weight' and 'model.embed_tokens.weight' share memory", tied),
        ("would be 'model.router.weight', which the Hugging Face model doesn't have", unknown),
        ("input_layernorm.weight .* can't hold rows 0 to 9", larger),
        ("embed_tokens has 2 rows for LoRA", lora),
    ):
        with pytest.raises(ValueError, match=words):
            pieces(changed(change), WHOLES)


def test_every_part_must_be_somewhere():
    whole, half = {"w": (4, 2)}, ("w", (2, 2), (0, 0))
    assert check_covered(whole, [[half], [("w", (2, 2), (2, 0))]]) == [[True], [True]]
    assert check_covered(whole, [[("w", (4, 2), (0, 0))]] * 2) == [[True], [False]]
    with pytest.raises(ValueError, match="hold nothing of 'w'"):
        check_covered(whole, [[], []])
    for ranks in ([[half]], [[half], [half]], [[half], [("w", (3, 2), (1, 0))]], [[half], [("w", (2, 2), (1, 0))]]):
        with pytest.raises(ValueError, match="'w' .* not each weight once"):
            check_covered(whole, ranks)


def test_a_packed_copy_behind_the_weights_is_found(same_bits):
    class Method:
        def __init__(self, use):
            self.use = use

        def apply(self, layer, x, bias):
            return nn.functional.linear(x, self.use(layer))

    weight = torch.randn(6, 5)
    live = layer(RowParallelLinear, weight, quant_method=Method(lambda m: m.weight))
    model = tree({"model.good": live})
    check_live(model)
    assert same_bits(live.weight, weight)
    copy = weight.clone()
    model.model.add_module("stale", layer(RowParallelLinear, weight, quant_method=Method(lambda m: copy)))
    with pytest.raises(ValueError, match="'model.stale' computes with a copy of its weights"):
        check_live(model)
    assert same_bits(model.model.stale.weight, weight)


def test_hf_shapes_are_those_of_the_model():
    from transformers import AutoModelForCausalLM, LlamaConfig

    for tied in (False, True):
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
        model = AutoModelForCausalLM.from_config(config)
        shapes = vllm_layout.hf_shapes(config)
        assert list(shapes.items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
        assert ("lm_head.weight" in shapes) != tied
