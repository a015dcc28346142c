"""Members' factors in LoRA slots, on stand-ins for vLLM's LoRA layers. tests/with_vllm has the real ones."""

from types import SimpleNamespace

import pytest
import torch
from test_vllm_layout import VOCAB, WHOLES, WIDTH, sharded, tensors
from torch import nn

import esfast
from esfast.integrations import vllm_layout
from esfast.integrations.vllm_members import Members, least_slot_rank
from esfast.integrations.vllm_slots import Slots, groups_that_freeze
from esfast.integrations.vllm_weights import WorkerWeights
from esfast.update.updater import Group, Rule

SLOTS, ROOM = 3, 8
TIED = {name: shape for name, shape in WHOLES.items() if name != "lm_head.weight"}


class BaseLinearLayerWithLoRA(nn.Module): ...


class ColumnParallelLinearWithLoRA(BaseLinearLayerWithLoRA): ...


class RowParallelLinearWithLoRA(BaseLinearLayerWithLoRA): ...


class VocabParallelEmbeddingWithLoRA(nn.Module): ...


class LogitsProcessorWithLoRA(nn.Module): ...


def wrapped(model, ranks, fully_sharded=False, embeddings=True):
    """Puts LoRA layers around a model's layers, as vLLM does; returns what its LoRAModelManager calls modules."""
    modules = {}
    for path, base in list(model.named_modules()):
        rows = getattr(base, "output_partition_sizes", None)
        row_parallel = type(base).__name__ == "RowParallelLinear"
        if rows is None and not row_parallel:
            continue
        lora = (RowParallelLinearWithLoRA if row_parallel else ColumnParallelLinearWithLoRA)()
        out, width = base.weight.shape
        a_rank = ROOM // ranks if fully_sharded and not row_parallel else ROOM
        outs = [out // ranks if fully_sharded else out] if row_parallel else rows
        lora.base_layer, lora.tp_rank = base, base.tp_rank
        # What an earlier member left behind.
        lora.lora_a_stacked = tuple(torch.full((SLOTS, 1, a_rank, width), 7.0) for _ in outs)
        lora.lora_b_stacked = tuple(torch.full((SLOTS, 1, o, ROOM), 7.0) for o in outs)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, lora)
        modules[path] = lora
    if embeddings:
        lora = VocabParallelEmbeddingWithLoRA()
        lora.base_layer = model.model.embed_tokens
        lora.lora_a_stacked = torch.full((SLOTS, VOCAB, ROOM), 7.0)
        lora.lora_b_stacked = torch.full((SLOTS, 1, WIDTH, ROOM), 7.0)
        model.model.embed_tokens = modules["model.embed_tokens"] = lora
        head = modules["lm_head"] = LogitsProcessorWithLoRA()
        head.lora_a_stacked = torch.full((SLOTS, 1, ROOM, WIDTH), 7.0)
        head.lora_b_stacked = torch.full((SLOTS, 1, VOCAB, ROOM), 7.0)
    return modules


def buffers(lora):
    """The tensors that hold all slots."""
    kinds = (lora.lora_a_stacked, lora.lora_b_stacked)
    return [t for kind in kinds for t in (kind if isinstance(kind, tuple) else [kind])]


def change(lora, slot, rank):
    """What a slot adds to the weights of a tensor-parallel rank; of a fully sharded layer, the rank's share of it."""
    if isinstance(lora, VocabParallelEmbeddingWithLoRA):
        return lora.lora_a_stacked[slot] @ lora.lora_b_stacked[slot, 0].T
    if isinstance(lora, LogitsProcessorWithLoRA):
        return lora.lora_b_stacked[slot, 0] @ lora.lora_a_stacked[slot, 0]
    done = []
    for a, b in zip(lora.lora_a_stacked, lora.lora_b_stacked, strict=True):
        a, b = a[slot, 0], b[slot, 0]
        first = rank * a.shape[0] if a.shape[0] < b.shape[1] else 0
        done.append(b[:, first : first + a.shape[0]] @ a)
    return torch.cat(done)


def noise_of(names, seed, coeff, rank, rule=None):
    zeros = {name: torch.zeros(WHOLES[name]) for name in names}
    plan = esfast.Plan(zeros.items())
    for group, part in (rule or Rule(noise="low_rank", rank=rank)).by_group(plan):
        esfast.add_noise_(part, *group.noise_of([(seed, coeff)]), noise="low_rank", rank=rank)
    return zeros


def slots_of(ranks, rank, wholes=WHOLES, tied=False, **options):
    model = sharded(tensors(torch.float32), rank, ranks)
    bare = {name: (tuple(t.shape), w) for name, t, w in vllm_layout.pieces(model, WHOLES)}
    modules = wrapped(model, ranks, **options)
    if not tied:
        found = {name: (tuple(t.shape), w) for name, t, w in vllm_layout.pieces(model, WHOLES)}
        assert found == bare  # the names of the Hugging Face model, whatever vLLM calls them with LoRA
    slots = Slots(model, wholes, modules, tied)
    slots.begin(lambda name: 1.0)
    return model, modules, slots


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("fully", [False, True])
def test_each_rank_s_slots_add_the_noise_of_its_weights(ranks, rank, fully):
    coeff, seed, matrices = -0.7, 5, [n for n in WHOLES if n.endswith("weight") and "norm" not in n]
    wanted = noise_of(matrices, seed, coeff, rank)
    for r in range(ranks):
        model, modules, slots = slots_of(ranks, r, fully_sharded=fully)
        assert sorted(slots.carried) == sorted(matrices)
        slots.write(1, seed, coeff, rank)
        for path, lora in modules.items():
            assert all((t[[0, 2]] == 7).all() for t in buffers(lora))  # the other slots are as they were
            found = change(lora, 1, r)
            if path in ("model.embed_tokens", "lm_head"):
                assert torch.allclose(found, wanted[f"{path}.weight"], atol=1e-6)
                continue
            base = lora.base_layer
            held = vllm_layout.pieces_of(path, "weight", base, base.weight, model.packed_modules_mapping, WHOLES)
            parts = [esfast.Plan([(n, torch.empty(v.shape), w)]).entries[0] for n, v, w in held]
            whole = torch.cat([cut(wanted[e.name], e) for e in parts])
            if fully and type(base).__name__ == "RowParallelLinear":
                whole = whole.chunk(ranks)[r]  # a rank has a share of the outputs
            elif fully and ranks > 1:
                continue  # a rank has a share of the factors' rows: see below
            assert torch.allclose(found, whole, atol=1e-6), path


def cut(whole, entry):
    places = zip(entry.window.offset, entry.tensor.shape, strict=True)
    return whole[tuple(slice(offset, offset + count) for offset, count in places)]


def test_fully_sharded_ranks_hold_all_rows_of_the_factors():
    """The ranks gather x lora_a^T, each with its rows: together they must be B, in order."""
    rows = []
    for r in range(4):
        _, modules, slots = slots_of(4, r, fully_sharded=True)
        slots.write(0, 5, 1.0, 3)
        rows.append(modules["model.layers.0.mlp.gate_up_proj"].lora_a_stacked[0][0, 0])
    wanted = torch.zeros(3, WIDTH)
    plan = esfast.Plan([("model.layers.0.mlp.gate_proj.weight", torch.zeros(12, WIDTH))])
    esfast.low_rank_factors(plan, 5, 3, out={plan.names[0]: (torch.empty(3, 12), wanted)})
    assert torch.equal(torch.cat(rows), torch.cat([wanted, torch.zeros(ROOM - 3, WIDTH)]))


def test_nothing_of_a_member_before_is_left():
    """Of a higher rank, of other groups; and with sigma 0 the slot adds nothing."""
    _, modules, slots = slots_of(1, 0)
    slots.write(0, 5, 0.5, 8)
    slots.write(0, 6, 0.5, 1)
    found = change(modules["lm_head"], 0, 0)
    assert torch.equal(found, noise_of(["lm_head.weight"], 6, 0.5, 1)["lm_head.weight"])
    slots.begin(lambda name: 0.0 if "mlp" in name else 2.0)
    slots.write(0, 6, 0.5, 1)
    assert not modules["model.layers.0.mlp.down_proj"].lora_b_stacked[0][0].any()
    assert torch.equal(change(modules["lm_head"], 0, 0), noise_of(["lm_head.weight"], 6, 1.0, 1)["lm_head.weight"])
    slots.write(0, 6, 0.0, 1)
    assert not any(t[0].any() for m in modules.values() for t in buffers(m))


def test_tied_weights_have_their_noise_in_both_places():
    model, modules, slots = slots_of(1, 0, TIED, tied=True)
    assert "model.embed_tokens.weight" in slots.carried and "lm_head.weight" not in slots.carried
    slots.write(2, 9, 0.3, 2)
    wanted = noise_of(["model.embed_tokens.weight"], 9, 0.3, 2)["model.embed_tokens.weight"]
    for path in ("model.embed_tokens", "lm_head"):
        assert torch.allclose(change(modules[path], 2, 0), wanted, atol=1e-6)
    del modules["lm_head"]
    assert "model.embed_tokens.weight" not in Slots(model, TIED, modules, True).carried
    assert "model.embed_tokens.weight" in Slots(model, WHOLES, modules, False).carried


def test_a_lora_layer_that_is_not_understood_is_named():
    model, modules, _ = slots_of(1, 0)
    lora = modules["model.layers.0.self_attn.qkv_proj"]
    lora.lora_a_stacked = lora.lora_a_stacked[:2]
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.qkv_proj' has 2 slots for 3 parts .*q_proj"):
        Slots(model, WHOLES, modules, False)


def test_what_slots_do_not_carry_is_frozen_by_patterns():
    names = ["a.0.q.weight", "a.0.q.bias", "a.1.q.weight", "a.1.q.bias", "norm.weight", "a.0.x", "a.1.x"]
    found = groups_that_freeze(names, ["a.0.q.weight", "a.1.q.weight", "a.0.x"])
    assert found == [Group(p, 0.0, 0.0) for p in ("a.*.q.bias", "norm.weight", "a.1.x")]
    assert [least_slot_rank(r) for r in (1, 2, 8, 9, 200, 256)] == [1, 8, 8, 16, 256, 256]


# ---- Members: which adapters there are -------------------------------------------------------------------------------


class LoRAManager:
    """vLLM's, as far as members use it."""

    def __init__(self, modules):
        self._adapter_manager = SimpleNamespace(modules=modules)
        self.removed = []

    def remove_adapter(self, number):
        self.removed.append(number)


def config_of(lora):
    return SimpleNamespace(
        lora_config=lora,
        model_config=SimpleNamespace(hf_config=SimpleNamespace()),
        device_config=SimpleNamespace(device_type="cpu"),
    )


@pytest.fixture
def members(monkeypatch):
    from esfast.integrations import vllm_patches

    monkeypatch.setattr(vllm_patches, "draw_adapters", lambda manager, drawn, write: None)
    monkeypatch.setattr(vllm_layout, "hf_shapes", lambda config: WHOLES)
    monkeypatch.setattr(vllm_layout, "check_live", lambda model: None)
    model = sharded(tensors(torch.float32), 0, 1)
    modules = wrapped(model, 1)
    group = SimpleNamespace(rank_in_group=0, world_size=1, ranks=[0])
    weights = WorkerWeights(model, None, "", group)
    lora = SimpleNamespace(max_loras=SLOTS, max_lora_rank=ROOM, lora_dtype=torch.float32)
    config = config_of(lora)
    return Members(LoRAManager(modules), model, weights, config), weights


def test_names_and_numbers_are_never_used_twice(members):
    made, weights = members
    given = [adapter for _ in range(3) for adapter in made.add([1, 1], [0.1, -0.1], 2)]
    for key in ("lora_name", "lora_path", "lora_int_id"):
        assert len({adapter[key] for adapter in given}) == 6
    assert weights.rule.noise == "low_rank" and weights.rule.rank == 2
    assert {n for n in WHOLES if weights.rule.group_of(n).frozen} == {
        n for n in WHOLES if "norm" in n or n.endswith("bias")
    }
    made.forget()
    assert made._manager.removed == [adapter["lora_int_id"] for adapter in given] and not made._drawn
    assert made.add([1], [0.1], 2)[0]["lora_int_id"] not in made._manager.removed


def test_members_must_be_what_updates_use(members):
    made, weights = members
    frozen = tuple(Group.parse(text) for text in made.describe()["frozen"])
    for rule, words in (
        (Rule(), "updates use 'gaussian' noise, LoRA slots hold 'low_rank'"),
        (Rule(noise="low_rank", rank=4, groups=frozen), "'low_rank' noise of rank 4, .*asked for with rank 2"),
        (Rule(noise="low_rank", rank=2), "do not hold the noise of .* and 3 other tensors, .*freeze them"),
    ):
        weights.begin(rule)
        with pytest.raises(ValueError, match=words):
            made.add([1], [0.1], 2)
        assert made.add([1], [0.0], 2)  # the base has no noise
    with pytest.raises(ValueError, match="rank 9 does not fit .* max_lora_rank is 8: start it with max_lora_rank=16"):
        made.add([1], [0.1], 9)
    weights.begin(Rule(noise="low_rank", rank=2, groups=frozen))
    assert made.add([1], [0.1], None)
    weights.offsets.add(3, 0.1)
    with pytest.raises(RuntimeError, match="noise of seed 3 is still in place; restore first"):
        made.add([1], [0.1], 2)
    for seeds, sigmas, error in (
        ([-1], [0.1], ValueError),
        ([1], [float("nan")], ValueError),
        ([1, 2], [0.1], ValueError),
    ):
        with pytest.raises(error):
            made.add(seeds, sigmas, 2)


def test_an_engine_without_slots_says_how_to_start_it():
    config = config_of(None)
    for ask in (
        Members(None, None, None, config).describe,
        lambda: Members(None, None, None, config).add([1], [1.0], 1),
    ):
        with pytest.raises(RuntimeError, match="enable_lora=True, max_loras= .* and max_lora_rank="):
            ask()


def test_slots_that_kernels_for_gpus_do_not_take(members):
    made, _ = members
    made._on_gpu = True
    for ask in (made.describe, lambda: made.add([1], [0.1], 1)):
        with pytest.raises(ValueError, match="LoRA slots are float32, .*start it with dtype='bfloat16'"):
            ask()
