"""`esfast bench drift`: modes that claim to be exact are held to it, and what the usual code loses is seen."""

import argparse
import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from esfast import Plan
from esfast.bench import drift, main
from esfast.core import ops
from esfast.core.noise import noise
from esfast.es.weights import MODES
from esfast.update.updater import Generation, Rule

TINY = ["drift", "--numel", "4000", "--generations", "3", "--members", "10"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("drift") / "drift.json"
    assert main([*TINY, "--json", str(path)]) == 0
    return {(r["way"], r["dtype"]): r for r in json.loads(path.read_text())["rows"]}


def test_every_way_and_dtype_has_a_row(rows):
    assert set(rows) == {(w.name, d) for w in drift.WAYS for d in ("bfloat16", "float16", "float32")}
    for r in rows.values():
        assert r["restore"]["generation"] == r["update"]["generation"] == [1, 2, 3]
        assert len(r["restore"]["drift"]) == len(r["update"]["slope"]) == 3


@pytest.mark.parametrize("way", ["host", "base", "base, stochastic", "master"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_exact_modes_change_no_bit(rows, way, dtype):
    r = rows[way, dtype]
    assert r["pass"] is True and r["restore"]["changed"] == [0.0] * 3 and r["restore"]["drift"] == [0.0] * 3


def test_what_rounding_does(rows):
    """The figures follow theory: rounding moves a weight by at most half a unit in the last place, so the errors of all
    dtypes scale with that unit."""
    usual, base, master = (rows[way, "bfloat16"] for way in ("usual code", "base", "master"))
    assert usual["pass"] is None and usual["restore"]["changed"][-1] > 0.2
    two, one = (rows[way, "bfloat16"]["restore"]["drift"][-1] for way in ("inplace", "inplace, one pass"))
    assert one > 2 * two > 2e-5
    for r, eighth in ((r, rows[r["way"], "float16"]) for r in (base, master)):  # three bits more
        ratio = r["restore"]["last_member_error"] / eighth["restore"]["last_member_error"]
        assert 7 < ratio < 8.5
    assert master["update"]["slope"] == pytest.approx([1, 1, 1], abs=1e-4)
    assert master["update"]["distance"][-1] == pytest.approx(master["update"]["rounded_once"][-1], rel=1e-3)
    assert usual["update"]["slope"][0] < 0.95 * base["update"]["slope"][0]
    assert usual["update"]["distance"][-1] > 2 * master["update"]["distance"][-1]
    for way in ("usual code", "inplace", "base"):  # in float32 the usual code does as well
        assert rows[way, "float32"]["update"]["slope"] == pytest.approx([1, 1, 1], abs=1e-4)


def test_members_of_host_carry_the_moves_before_them(rows):
    host, base = rows["host", "bfloat16"]["restore"], rows["base", "bfloat16"]["restore"]
    assert host["first_member_error"] == base["first_member_error"]
    assert host["last_member_error"] > 2 * base["last_member_error"] > 0


def test_the_truth_is_that_of_the_definition():
    args = argparse.Namespace(numel=50, generations=1, members=3, sigma=1e-3, lr=1.0)
    exact = drift._Run(drift.WAYS[4], torch.bfloat16, args)._exact([1, 2], [0.5, -0.25])
    assert torch.equal(exact, 0.5 * noise(1, "w", 50).double() - 0.25 * noise(2, "w", 50).double())


def test_regression():
    x = torch.arange(100.0, dtype=torch.float64)
    wave = torch.where(x % 2 == 0, 1.0, -1.0).double()
    slope, correlation, error = drift.regression(3 * x + 7, x)
    assert (slope, correlation, error) == pytest.approx((3, 1, 0), abs=1e-6)
    slope, correlation, error = drift.regression(0.5 * x + 20 * wave, x)
    found = np.polyfit(x, 0.5 * x + 20 * wave, 1, cov="unscaled")
    assert slope == pytest.approx(found[0][0]) and 0 < error < 0.1
    assert correlation == pytest.approx(np.corrcoef(x, 0.5 * x + 20 * wave)[0, 1])


def broken_restore(plan):
    mode = MODES["base"](plan, Rule())
    restore = mode.restore
    mode.restore = lambda: (restore(), plan.tensors[0][-1:].view(torch.int16).bitwise_xor_(1))
    return mode


def biased(plan):
    mode = MODES["base"](plan, Rule())
    update = mode.update
    mode.update = lambda record: update(replace(record, coeffs=[0.8 * c for c in record.coeffs]))
    return mode


@pytest.mark.parametrize(
    ("way", "make"),
    [("base", broken_restore), ("base, stochastic", biased), ("master", lambda plan: MODES["base"](plan, Rule()))],
    ids=["a bit stays", "a biased update", "a master that rounds"],
)
def test_a_wrong_mode_fails(way, make, monkeypatch, tmp_path, capsys):
    ways = [dataclasses.replace(w, make=make) for w in drift.WAYS if w.name == way]
    monkeypatch.setattr(drift, "WAYS", ways)
    assert main([*TINY, "--dtypes", "bfloat16", "--json", str(tmp_path / "drift.json")]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_wrong_noise_gives_no_figures(monkeypatch, capsys):
    right = ops._BACKENDS["cpu"]

    def wrong(call):
        right(call)
        call.plan.tensors[0][3] += 1e-3

    monkeypatch.setitem(ops._BACKENDS, "cpu", wrong)
    assert main(TINY) == 1
    assert "No figures are given" in capsys.readouterr().err


def test_the_state_of_a_master_is_its_float32_value():
    weights = (0.02 * torch.randn(1000)).bfloat16()
    mode = MODES["master"](Plan([("w", weights)]), Rule())
    wide = weights.float()
    for seed in range(5):
        mode.update(Generation(0, [seed], [1e-5], [], 1e-3, 1e-5))
        ops.add_noise_(Plan([("w", wide)]), [seed], [1e-5])
    run = drift._Run(drift.WAYS[-1], torch.bfloat16, None)
    assert torch.equal(run._state(mode, weights), wide.double()) and not torch.equal(weights.float(), wide)
