"""Plan: which weights, under which names, in which memory."""

import copy
import gc
import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import esfast
from esfast import Plan, Slice, add_noise_
from esfast.core.plan import Entry
from esfast.core.segments import FIELDS

COLUMN = {name: i for i, name in enumerate(FIELDS)}


class Model(nn.Module):
    """A language model's outline: embedding, two layers, a norm, and a head that may be tied to the embedding."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.register_buffer("positions", torch.zeros(4))
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


NAMES = ["embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
NAMES += ["norm.weight", "norm.bias", "lm_head.weight"]


def test_a_module_gives_its_parameters():
    model = Model(tied=False)
    model.norm.weight.requires_grad_(False)  # counts all the same
    plan = Plan(model)
    assert plan.names == NAMES and len(plan) == len(NAMES)
    assert all(a is b for a, b in zip(plan.tensors, model.parameters(), strict=True))
    assert plan.numel == sum(p.numel() for p in model.parameters()) and plan.nbytes == 4 * plan.numel
    assert plan.device == torch.device("cpu")
    assert repr(plan) == "Plan(8 tensors, 228 weights, float32, cpu)"


def test_tied_parameters_are_one_tensor(same_bits):
    model = Model(tied=True)
    plan = Plan(model)
    assert plan.names == NAMES[:-1]
    before = model.embed.weight.detach().clone()
    add_noise_(plan, [4], [0.5], backend="reference")
    assert same_bits(model.lm_head.weight, torch.addcmul(before, torch.tensor(0.5), esfast.noise(4, NAMES[0], (11, 6))))


def test_tied_tensors_of_pairs_are_one_tensor():
    """A state dict holds tied weights twice, as two tensor objects over the same memory."""
    model = Model(tied=True)
    pairs = [(n, t) for n, t in model.state_dict().items() if n != "positions"]
    assert len(pairs) == 8 and Plan(pairs).names == NAMES[:-1]
    head = model.embed.weight.detach().view(11, 6)
    assert Plan([("head", head), ("embed", model.embed.weight)]).names == ["head"]


def test_a_tied_tensor_excluded_under_its_first_name_is_found_under_its_second():
    pairs = list(Model(tied=True).named_parameters(remove_duplicate=False))
    assert Plan(pairs, include="lm_head.*").names == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("layers.*", None, NAMES[1:5]),
        (["layers.0.*", "norm.*"], None, [*NAMES[1:3], *NAMES[5:7]]),
        (None, "*.bias", [n for n in NAMES if not n.endswith("bias")]),
        (None, ["embed*", "lm_head*"], NAMES[1:7]),
        ("layers.*", "*.bias", [NAMES[1], NAMES[3]]),
        ("layers.[1].weight", (), [NAMES[3]]),
        ("norm.weigh?", None, ["norm.weight"]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    assert Plan(Model(tied=False), include, exclude).names == expected


def test_excluded_weights_are_not_checked_nor_changed():
    items = [("good", torch.zeros(3)), ("bad", torch.zeros(3, dtype=torch.int64)), ("empty", torch.zeros(0))]
    plan = Plan(items, exclude=["bad", "empty"])
    add_noise_(plan, [1], [1.0])
    assert plan.names == ["good"] and items[1][1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("mixed", (False, True))
def test_clone(mixed, same_bits):
    tensors = [torch.randn(3, 4).t(), torch.randn(20)[::2], torch.randn(()), torch.randn(2, 3, 4)]
    if mixed:
        tensors[1], tensors[3] = tensors[1].half(), tensors[3].bfloat16()
    plan = Plan([(str(i), t, Slice(tuple(n + 2 for n in t.shape), (1,) * t.dim())) for i, t in enumerate(tensors)])
    twin = plan.clone()
    assert twin.names == plan.names and [e.window for e in twin.entries] == [e.window for e in plan.entries]
    assert same_bits(twin.tensors, plan.tensors)
    assert not {t.data_ptr() for t in twin.tensors} & {t.data_ptr() for t in plan.tensors}
    before = copy.deepcopy(twin.tensors)
    add_noise_(plan, [1], [1.0])
    assert same_bits(twin.tensors, before) and not same_bits(plan.tensors, before)


def test_clone_of_parameters_requires_no_grad():
    assert not any(t.requires_grad for t in Plan(nn.Linear(2, 2)).clone().tensors)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_tables_are_made_once():
    plan = Plan(Model(tied=False))
    first, second = plan.clone(), plan.clone()
    assert plan.table() is plan.table() is plan.table(plan)
    paired = plan.table(first)
    assert paired is plan.table(first) and paired is not plan.table()
    other = plan.table(second)
    assert (other.rows[:, COLUMN["src"]] == [t.data_ptr() for t in second.tensors]).all()
    assert (plan.table(first).rows[:, COLUMN["src"]] == [t.data_ptr() for t in first.tensors]).all()


@pytest.mark.parametrize(
    ("tensor", "rows"),
    [
        (torch.zeros(5), [(1, 5)]),
        (torch.zeros(()), [(1, 1)]),
        (torch.zeros(4, 3, 2), [(1, 24)]),
        (torch.zeros(1, 7, 1), [(1, 7)]),
        (torch.zeros(4, 6)[:, 1:4], [(4, 3)]),
        (torch.zeros(4, 6)[1:3], [(1, 12)]),
        (torch.zeros(4, 6)[:, 2], [(4, 1)]),
        (torch.zeros(4, 6).t(), [(4, 1)] * 6),
        (torch.zeros(4, 6)[::2, :3], [(2, 3)]),
        (torch.zeros(3, 4, 6)[:, 1:3], [(3, 12)]),
        (torch.zeros(3, 4, 6)[:, 1:3, :5], [(2, 5)] * 3),
    ],
)
def test_a_tensor_is_as_few_matrices_as_its_strides_allow(tensor, rows):
    table = Plan([("w", tensor)]).table().rows
    assert [(r[COLUMN["rows"]], r[COLUMN["cols"]]) for r in table.tolist()] == rows


@given(st.data())
def test_the_table_names_every_element_once(data):
    """Memory and number of each element, from the table, against the tensor's own strides."""
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    steps = [data.draw(st.integers(1, 2)) for _ in shape]
    offset = [data.draw(st.integers(0, 3)) for _ in shape]
    whole = [o + n + data.draw(st.integers(0, 2)) for o, n in zip(offset, shape, strict=True)]
    full = torch.zeros([shape[d] * steps[d] for d in order]).permute([order.index(d) for d in range(len(shape))])
    tensor = full[tuple(slice(None, None, s) for s in steps)]
    assert list(tensor.shape) == shape
    found = {}
    for row in Plan([("w", tensor, Slice(tuple(whole), tuple(offset)))]).table().rows.tolist():
        s = dict(zip(FIELDS, row, strict=True))
        for r in range(s["rows"]):
            for c in range(s["cols"]):
                address = s["dst"] + 4 * (r * s["dst_stride"] + c)
                assert address not in found
                found[address] = s["first"] + r * s["index_stride"] + c
    wanted = {}
    for place in np.ndindex(*shape):
        address = tensor.data_ptr() + 4 * sum(p * s for p, s in zip(place, tensor.stride(), strict=True))
        at = [p + o for p, o in zip(place, offset, strict=True)]
        wanted[address] = int(np.ravel_multi_index(at, whole)) if shape else 0
    assert found == wanted


# ---- memory that moves, memory that meets ---------------------------------------------------------------------------


@pytest.mark.parametrize("move", (lambda m: m.half(), lambda m: setattr(m.weight, "data", torch.ones(2, 2))))
def test_moved_memory_is_refused(move):
    layer = nn.Linear(2, 2, bias=False)
    plan = Plan(layer)
    base = plan.clone()
    move(layer)
    before = layer.weight.detach().clone()
    for call in (lambda: add_noise_(plan, [1], [1.0]), lambda: add_noise_(base, [1], [1.0], base=plan)):
        with pytest.raises(RuntimeError, match="the memory of 'weight' moved since the plan was made"):
            call()
    assert torch.equal(layer.weight, before)


def test_interleaved_memory_is_no_overlap(same_bits):
    """Columns of one matrix meet in extent and not in any byte; nor do a base and a plan that lie so."""
    whole = torch.zeros(50, 12)
    plan = Plan([("a", whole[:, :4]), ("b", whole[:, 4:7]), ("c", whole[1::2, 7:]), ("d", whole[::2, 7:])])
    add_noise_(plan, [6], [1.0])
    wanted = whole.clone()
    whole.zero_()
    for name, part in zip(plan.names, (wanted[:, :4], wanted[:, 4:7], wanted[1::2, 7:], wanted[::2, 7:]), strict=True):
        assert same_bits(part.contiguous(), esfast.noise(6, name, part.shape))
    both = torch.randn(8, 10)
    right = both[:, 5:].clone()
    add_noise_(Plan([("w", both[:, :5])]), [], [], base=Plan([("w", both[:, 5:])]))
    assert same_bits(both, torch.cat([right, right], dim=1))


@given(st.data())
def test_overlap_is_found_where_there_is_any(data):
    """Views of one buffer with any strides: the check must agree with a count of how often each place is used."""
    buffer = torch.zeros(60)
    views = []
    for _ in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        strides = [data.draw(st.integers(0, 6)) for _ in shape]
        span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        start = data.draw(st.integers(0, 59 - span)) if span < 60 else 0
        if span < 60:
            views.append(torch.as_strided(buffer, shape, strides, start))
    places = [
        v.storage_offset() + sum(p * s for p, s in zip(at, v.stride(), strict=True))
        for v in views
        for at in np.ndindex(*v.shape)
    ]
    if not views or len({(v.shape, v.stride(), v.data_ptr()) for v in views}) < len(views):
        return  # none fits, or some are tied
    items = [(f"t{i}", v) for i, v in enumerate(views)]
    if len(set(places)) == len(places):
        assert len(Plan(items)) == len(views)
    else:
        with pytest.raises(ValueError, match="overlap"):
            Plan(items)


def test_an_entry_knows_its_twin():
    a, b = torch.zeros(2), torch.zeros(2)
    window = Slice((2,), (0,))
    assert Entry("w", a, window).same_place(Entry("w", b, window))
    for other in (Entry("v", b, window), Entry("w", b, Slice((3,), (0,))), Entry("w", b.view(2, 1), window)):
        assert not Entry("w", a, window).same_place(other)


def test_a_base_is_not_kept_alive():
    plan = Plan([("w", torch.randn(64))])
    base = plan.clone()
    plan.table(base)
    gone = weakref.ref(base)
    del base
    gc.collect()
    assert gone() is None
    plan.table(plan.clone())


@pytest.mark.parametrize("weights", ["base", "inplace"])
@pytest.mark.parametrize("replace", ["assign", "parameter", "layer"])
def test_parameters_that_the_module_no_longer_has(weights, replace):
    """Must be refused: noise would go into tensors that no forward pass reads, and all members would get the same
    reward."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    es, plan = esfast.ES(model, sigma=0.1, lr=0.1, population_size=2, weights=weights), esfast.Plan(model)
    for member in es.population():
        member.reward = member.index
    if replace == "assign":
        model.load_state_dict({name: p.detach().clone() for name, p in model.named_parameters()}, assign=True)
    elif replace == "parameter":
        model[1].weight = torch.nn.Parameter(torch.ones(2, 2))
    else:
        model[1] = torch.nn.Linear(2, 2)
    before = [p.detach().clone() for p in model.parameters()]
    name = "0.weight" if replace == "assign" else "1.weight"
    for use in (es.step, es.population, esfast.perturbed(plan, 1, 0.1).__enter__):
        with pytest.raises(RuntimeError, match=f"Plan: '{name}' is no longer a parameter of the module"):
            use()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    esfast.ES(model, sigma=0.1, lr=0.1, population_size=2, weights=weights).population()
