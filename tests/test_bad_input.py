"""Whatever a user may get wrong: what is raised, and the words that are read. No weight changes by any of it."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import esfast
from esfast import ES, EsfastError, Plan, Slice, add_noise_
from esfast.journal.journal import replay


def ones(*shape, **options):
    return torch.ones(shape or (4,), **options)


def add(weights, seeds=(1,), coeffs=(1.0,), **options):
    add_noise_(weights, seeds, coeffs, **options)


def meeting(weights):
    add(weights, base=Plan([("w", weights.tensors[0])]))


def es_of(weights, reward=0.0, **options):
    es = ES(weights, population_size=2, **options)
    for member in es.population():
        member.reward = reward
    return es


def step_inside(weights):
    es = ES(weights, population_size=2)
    for _ in es.population():
        es.step()


def population_inside(weights):
    es = ES(weights, population_size=2)
    for _ in es.population():
        es.population()


def sigma_gone_bad(weights):
    es = ES(weights, population_size=2)
    es.sigma = -1
    list(es.population())


def lr_gone_bad(weights):
    es = es_of(weights)
    es.lr = "fast"
    es.step()


def infinite_coefficients(weights):
    es = ES(weights, population_size=2, lr=3e38, shaping=lambda r: [x * 1e10 for x in r])
    for member in es.population():
        member.reward = member.index
    es.step()


# ruff: noqa: E501  (a table: one case a line)
# (what is wrong, the call, given a plan with the one tensor "w", the exception, a regex of its message)
CASES = [
    # noise
    ("seed negative", lambda w: esfast.noise(-1, "w", 3), ValueError, r"seed: expected 0 <= seed < 18446744073709551616"),
    ("seed too large", lambda w: esfast.noise(2**64, "w", 3), ValueError, r"expected 0 <= seed < .*, got 18446744073709551616$"),
    ("seed a float", lambda w: esfast.noise(1.0, "w", 3), TypeError, r"seed: expected an int, got float 1\.0"),
    ("seed a bool", lambda w: esfast.noise(True, "w", 3), TypeError, r"seed: expected an int, got bool True"),
    ("seed a str", lambda w: esfast.noise("7", "w", 3), TypeError, r"seed: expected an int, got str '7'"),
    ("name of bytes", lambda w: esfast.noise(0, b"w", 3), TypeError, r"name: expected a non-empty str, got b'w'"),
    ("name empty", lambda w: esfast.noise(0, "", 3), TypeError, r"name: expected a non-empty str, got ''"),
    ("shape negative", lambda w: esfast.noise(0, "w", (2, -1)), ValueError, r"shape: expected 0 <= shape < .*, got -1"),
    ("shape a float", lambda w: esfast.noise(0, "w", 1.5), TypeError, r"shape: expected an int, got float 1\.5"),
    ("shape None", lambda w: esfast.noise(0, "w", None), TypeError, r"shape: expected an int, got NoneType"),
    ("kind unknown", lambda w: esfast.noise(0, "w", 3, "normal"), ValueError, r"noise: expected one of 'gaussian', 'rademacher', 'low_rank', got 'normal'"),
    ("rank zero", lambda w: esfast.noise(0, "w", (3, 3), "low_rank", 0), ValueError, r"rank: expected 1 <= rank < 257, got 0"),
    ("rank too large", lambda w: esfast.noise(0, "w", (3, 3), "low_rank", 257), ValueError, r"rank: expected 1 <= rank < 257, got 257"),
    ("rank a float", lambda w: esfast.noise(0, "w", (3, 3), "low_rank", 1.0), TypeError, r"rank: expected an int, got float 1\.0"),
    ("rank a bool", lambda w: add(w, noise="low_rank", rank=True), TypeError, r"rank: expected an int, got bool True"),
    ("rank of another kind", lambda w: add(w, noise="gaussian", rank=2), ValueError, r"rank: 'gaussian' noise has no rank, got 2; take 'low_rank' noise"),
    # Plan
    ("source a tensor", lambda w: Plan(ones()), TypeError, r"Plan: expected an nn\.Module or an iterable of \(name, tensor\) pairs, got Tensor"),
    ("source a state dict", lambda w: Plan({"w": ones()}), TypeError, r"got dict \(pass \.items\(\)\)"),
    ("source None", lambda w: Plan(None), TypeError, r"Plan: expected an nn\.Module .*, got NoneType"),
    ("source a name", lambda w: Plan("model"), TypeError, r"Plan: expected an nn\.Module .*, got str"),
    ("no pairs", lambda w: Plan([ones()]), TypeError, r"expected \(name, tensor\) or \(name, tensor, Slice\), got tensor"),
    ("pairs turned", lambda w: Plan([(ones(), "w")]), TypeError, r"a tensor's name must be a non-empty str, got tensor"),
    ("an array", lambda w: Plan([("w", np.ones(3))]), TypeError, r"'w' must be a torch\.Tensor, got ndarray"),
    ("nothing in it", lambda w: Plan([]), ValueError, r"no tensors selected: the source has none"),
    ("no parameters", lambda w: Plan(nn.ReLU()), ValueError, r"no tensors selected: the source has none"),
    ("integers", lambda w: Plan([("ids", ones(dtype=torch.int64))]), TypeError, r"'ids' is torch\.int64, expected float32, bfloat16 or float16 \(only float weights"),
    ("float64", lambda w: Plan([("w", ones(dtype=torch.float64))]), TypeError, r"'w' is torch\.float64, expected .* \(arithmetic is in float32\); convert it"),
    ("float8", lambda w: Plan([("w", ones().to(torch.float8_e4m3fn))]), TypeError, r"'w' is torch\.float8_e4m3fn, expected float32"),
    ("complex", lambda w: Plan([("w", ones(dtype=torch.complex64))]), TypeError, r"'w' is torch\.complex64, expected float32"),
    ("meta", lambda w: Plan([("w", ones(device="meta"))]), ValueError, r"'w' is on the meta device and has no memory; load the weights first"),
    ("sparse", lambda w: Plan([("w", ones(2, 2).to_sparse())]), TypeError, r"'w' has layout torch\.sparse_coo; only dense"),
    ("a lazy sign", lambda w: Plan([("w", ones(dtype=torch.complex64).conj().imag)]), TypeError, r"'w' is a view .* pass \.resolve_neg\(\)"),
    ("no elements", lambda w: Plan([("w", ones(0, 3))]), ValueError, r"'w' has no elements \(shape \(0, 3\)\).*exclude="),
    ("two devices", lambda w: Plan([("a", ones()), ("m", ones(device="meta"))]), ValueError, r"'m' is on the meta device"),
    ("a name twice", lambda w: Plan([("w", ones()), ("w", ones())]), ValueError, r"'w' is given twice, .*only disjoint slices of one whole may share a name"),
    ("slices that meet", lambda w: Plan([("w", ones(), Slice((9,), (0,))), ("w", ones(), Slice((9,), (3,)))]), ValueError, r"'w' is given twice, for .* at \(0,\) of \(9,\) and .* at \(3,\) of \(9,\)"),
    ("slices of two wholes", lambda w: Plan([("w", ones(), Slice((9,), (0,))), ("w", ones(), Slice((8,), (4,)))]), ValueError, r"'w' is given twice"),
    ("names that collide", lambda w: Plan([("plumless", ones()), ("buckeroo", ones())]), ValueError, r"'plumless' and 'buckeroo' have the same 32-bit id 4ddb0c25"),
    ("expanded", lambda w: Plan([("w", ones(1).expand(4))]), ValueError, r"'w' \(4,\) float32 overlaps itself in memory"),
    ("views that overlap", lambda w: (lambda t: Plan([("a", t[:3]), ("b", t[2:])]))(ones()), ValueError, r"'a' \(3,\) float32 and 'b' \(2,\) float32 overlap in memory"),
    ("views of two dtypes", lambda w: (lambda t: Plan([("a", t), ("b", t.view(torch.float16))]))(ones()), ValueError, r"'a' \(4,\) float32 and 'b' \(8,\) float16 overlap"),
    ("scattered", lambda w: Plan([("w", torch.ones(2, 300, 300, 2).permute(1, 3, 2, 0)[:, :, ::2])]), ValueError, r"scattered over more than 65536 matrices; make it \.contiguous\(\)"),
    ("pattern of nothing", lambda w: Plan([("w.weight", ones())], include="w.wieght"), ValueError, r"the include pattern 'w\.wieght' matches no tensor; a name here is 'w\.weight'"),
    ("exclude of nothing", lambda w: Plan([("w", ones())], exclude=["lm_head*"]), ValueError, r"the exclude pattern 'lm_head\*' matches no tensor; a name here is 'w'"),
    ("all excluded", lambda w: Plan([("w", ones())], exclude="*"), ValueError, r"no tensors selected \(include and exclude leave nothing\)"),
    ("pattern a number", lambda w: Plan([("w", ones())], include=5), TypeError, r"include: expected a glob pattern or a list of them, got 5"),
    # Slice
    ("slice a tuple", lambda w: Plan([("w", ones(), ((8,), (0,)))]), TypeError, r"third item of 'w' must be an esfast\.Slice, got tuple"),
    ("slice of another rank", lambda w: Plan([("w", ones(2, 2), Slice((8,), (0,)))]), ValueError, r"'w' has 2 dimensions, but its Slice has shape \(8,\) and offset \(0,\)"),
    ("slice that reaches out", lambda w: Plan([("w", ones(2, 4), Slice((2, 6), (0, 3)))]), ValueError, r"outside its whole in dimension 1: offset 3 \+ size 4 > 6"),
    ("slice before the whole", lambda w: Plan([("w", ones(), Slice((8,), (-1,)))]), ValueError, r"Slice\.offset of 'w': expected 0 <= .*, got -1"),
    ("slice of floats", lambda w: Plan([("w", ones(), Slice((8.0,), (0,)))]), TypeError, r"Slice\.shape of 'w': expected an int, got float 8\.0"),
    ("slice of plain numbers", lambda w: Plan([("w", ones(), Slice(8, 0))]), TypeError, r"the Slice of 'w' needs one number a dimension, got shape 8 and offset 0"),
    ("slice of a giant", lambda w: Plan([("w", ones(1, 1), Slice((2**32, 2**31), (0, 0)))]), ValueError, r"the whole of 'w', .* has more than 2\*\*62 elements"),
    # add_noise_
    ("plan a module", lambda w: add(nn.Linear(2, 2)), TypeError, r"plan: expected an esfast\.Plan, got Linear; write esfast\.Plan\(model\)"),
    ("noise unknown", lambda w: add(w, noise="uniform"), ValueError, r"noise: expected one of 'gaussian', 'rademacher', 'low_rank', got 'uniform'"),
    ("rounding unknown", lambda w: add(w, rounding="up"), ValueError, r"rounding: expected one of 'nearest'.*, got 'up'"),
    ("backend unknown", lambda w: add(w, backend="gpu"), ValueError, r"backend: expected one of 'auto'.*'reference', got 'gpu'"),
    ("backend a list", lambda w: add(w, backend=["cpu"]), ValueError, r"backend: expected one of 'auto'.*, got \['cpu'\]"),
    ("one seed bare", lambda w: add(w, 1, 1.0), TypeError, r"seeds and coeffs: expected sequences of equal length, for example \[seed\], \[sigma\]"),
    ("seeds None", lambda w: add(w, None), TypeError, r"seeds and coeffs: expected sequences"),
    ("coeffs missing", lambda w: add(w, [1, 2], [0.5]), ValueError, r"expected equally many, got 2 and 1"),
    ("a seed of many too large", lambda w: add(w, [1, 2**64], [1.0, 1.0]), ValueError, r"seed: expected 0 <= seed < "),
    ("a seed a float", lambda w: add(w, [1.5]), TypeError, r"seed: expected an int, got float 1\.5"),
    ("coeff NaN", lambda w: add(w, [1, 2], [0.5, math.nan]), ValueError, r"coeffs\[1\]: expected a finite float32, got nan"),
    ("coeff too large", lambda w: add(w, coeffs=[1e39]), ValueError, r"coeffs\[0\]: expected a finite float32, got 1e\+39"),
    ("coeff a word", lambda w: add(w, coeffs=["big"]), TypeError, r"coeffs: expected numbers, got \['big'\]"),
    ("coeff a giant int", lambda w: add(w, coeffs=[10**400]), TypeError, r"coeffs: expected numbers, got \[1000"),
    ("base a tensor", lambda w: add(w, base=ones()), TypeError, r"base: expected a Plan \(for example plan\.clone\(\)\), got Tensor"),
    ("base of another name", lambda w: add(w, base=Plan([("v", ones())])), ValueError, r"base: its 'v' \(4,\) float32 stands where the plan has 'w' \(4,\) float32"),
    ("base of another shape", lambda w: add(w, base=Plan([("w", ones(2, 2))])), ValueError, r"base: its 'w' \(2, 2\) float32 stands where the plan has 'w' \(4,\)"),
    ("base of another dtype", lambda w: add(w, base=Plan([("w", ones().half())])), ValueError, r"base: its 'w' \(4,\) float16 stands where the plan has 'w' \(4,\) float32"),
    ("base of another slice", lambda w: add(w, base=Plan([("w", ones(), Slice((9,), (0,)))])), ValueError, r"base: its 'w' \(4,\) float32 at \(0,\) of \(9,\) stands where"),
    ("base with more", lambda w: add(w, base=Plan([("w", ones()), ("v", ones())])), ValueError, r"base: expected 1 tensors as in the plan, got 2"),
    ("base the same memory", meeting, ValueError, r"'w' \(4,\) float32 and 'w' \(4,\) float32 overlap in memory"),
    # ES
    ("sigma zero", lambda w: ES(w, sigma=0), ValueError, r"sigma: expected a positive finite number, got 0"),
    ("sigma negative", lambda w: ES(w, sigma=-1e-3), ValueError, r"sigma: expected a positive finite number, got -0\.001"),
    ("sigma NaN", lambda w: ES(w, sigma=math.nan), ValueError, r"sigma: expected a positive finite number, got nan"),
    ("sigma nothing in float32", lambda w: ES(w, sigma=1e-50), ValueError, r"sigma: expected a positive finite number, got 1e-50"),
    ("lr infinite", lambda w: ES(w, lr=math.inf), ValueError, r"lr: expected a positive finite number, got inf"),
    ("lr too large for float32", lambda w: ES(w, lr=1e39), ValueError, r"lr: expected a positive finite number, got 1e\+39"),
    ("lr a word", lambda w: ES(w, lr="1e-3"), ValueError, r"lr: expected a positive finite number, got '1e-3'"),
    ("population of one", lambda w: ES(w, population_size=1), ValueError, r"population_size: expected 2 <= population_size < 4294967296, got 1"),
    ("population a float", lambda w: ES(w, population_size=30.0), TypeError, r"population_size: expected an int, got float 30\.0"),
    ("an odd pair", lambda w: ES(w, population_size=5, mirrored=True), ValueError, r"population_size: mirrored sampling needs an even number, got 5"),
    ("run's seed negative", lambda w: ES(w, seed=-1), ValueError, r"seed: expected 0 <= seed"),
    ("ES noise unknown", lambda w: ES(w, noise="cauchy"), ValueError, r"noise: expected one of 'gaussian', 'rademacher', 'low_rank', got 'cauchy'"),
    ("shaping unknown", lambda w: ES(w, shaping="rank"), ValueError, r"shaping: expected one of 'zscore', 'centered_rank', or a function of the rewards, got 'rank'"),
    ("weights unknown", lambda w: ES(w, weights="copy"), ValueError, r"weights: expected one of 'base', .*'inplace'.*, got 'copy'"),
    ("weights a list", lambda w: ES(w, weights=["base"]), ValueError, r"weights: expected one of 'base'.*, got \['base'\]"),
    ("ES backend unknown", lambda w: ES(w, backend="gpu"), ValueError, r"backend: expected one of 'auto'"),
    ("step with no population", lambda w: ES(w).step(), RuntimeError, r"step\(\): no population to learn from; iterate over population\(\) first"),
    ("step inside", step_inside, RuntimeError, r"step\(\): member 0 is still in place; leave its loop first"),
    ("population inside", population_inside, RuntimeError, r"population\(\): member 0 is still in place; leave its loop first"),
    ("reward missing", lambda w: es_of(w, None).step(), ValueError, r"step\(\): member 0 has no reward; set member\.reward in the loop's body"),
    ("reward NaN", lambda w: es_of(w, math.nan).step(), ValueError, r"step\(\): the reward of member 0 is nan, not a finite number"),
    ("reward a word", lambda w: es_of(w, "good").step(), ValueError, r"step\(\): the reward of member 0 is 'good', no number"),
    ("reward a tensor of two", lambda w: es_of(w, ones(2)).step(), ValueError, r"step\(\): the reward of member 0 is tensor\(\[1\., 1\.\]\), no number"),
    ("sigma changed to nonsense", sigma_gone_bad, ValueError, r"sigma: expected a positive finite number, got -1"),
    ("lr changed to nonsense", lr_gone_bad, ValueError, r"lr: expected a positive finite number, got 'fast'"),
    ("shaping gives too few", lambda w: es_of(w, shaping=lambda r: r[1:]).step(), ValueError, r"shaping: expected 2 finite numbers from the function, got \[0\.0\]"),
    ("shaping gives NaN", lambda w: es_of(w, shaping=lambda r: [math.nan] * len(r)).step(), ValueError, r"shaping: expected 2 finite numbers from the function, got \[nan, nan\]"),
    ("coefficients overflow", infinite_coefficients, ValueError, r"step\(\): lr 3e\+38 and the shaped rewards give coefficients that are not finite"),
    # journal
    ("journal of another thing", lambda w: replay(w, __file__), ValueError, r"journal: line 1 of .*test_bad_input\.py is damaged \(its checksum does not fit\)"),
    ("journal that exists", lambda w: ES(w, journal=__file__), FileExistsError, r"journal: .*test_bad_input\.py exists already; give the run another folder"),
]  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("call", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input(call, error, message, same_bits):
    plan = Plan([("w", ones() / 3)])
    with pytest.raises(error, match=message) as caught:
        call(plan)
    assert isinstance(caught.value, EsfastError)
    assert same_bits(plan.tensors[0], ones() / 3)


def test_there_are_enough_cases_and_none_twice():
    assert len({c[0] for c in CASES}) == len(CASES) >= 40


def test_messages_name_the_argument_first():
    """A message begins with the argument or the call; after a colon it says what was expected or what is wrong."""
    for name, call, error, _ in CASES:
        with pytest.raises(error) as caught:
            call(Plan([("w", ones())]))
        text = str(caught.value)
        assert ":" in text and not text.startswith(":") and "\n" not in text and len(text) < 500, name
        assert text.split(":")[0].isprintable() and "object at 0x" not in text, name
