"""The simulated generation: what can be known by hand, the measured processes, and its tables."""

import functools
import json
import math
import os
import shutil
import sys

import numpy as np
import pytest

from esfast.bench import fleet, main, simulate, tables
from esfast.bench.fleet import Costs

COLD = sys.executable
FREE = Costs(operation=0.0, round_trip=0.0, member=0.0, weights=0.0, bandwidth=math.inf)


def test_dynamic_gives_the_next_member_to_whoever_is_free():
    durations, slowness = np.array([3.0, 1.0, 1.0, 1.0, 1.0]), np.ones(2)
    assert fleet.dynamic(durations, slowness, FREE)[0] == 4.0  # 3 + 1 and 1 + 1 + 1
    assert fleet.static(durations, slowness) == 5.0  # 3 + 1 + 1 and 1 + 1
    assert fleet.ideal(durations, slowness) == 3.5
    assert fleet.ideal(np.array([9.0, 1.0]), slowness) == 9.0  # a member can't be cut


def test_a_slow_worker_holds_up_the_static_schedule_alone():
    durations, slowness = np.ones(40), np.array([1.0, 1.0, 1.0, 5.0])
    assert fleet.static(durations, slowness) == 50.0
    assert fleet.dynamic(durations, slowness, FREE)[0] == 15.0
    assert fleet.ideal(durations, slowness) == pytest.approx(12.5)


def test_the_store_is_a_queue():
    """All workers ask at once: the last is served when all requests before it are done."""
    costs = Costs(operation=0.01, round_trip=0.0, member=0.0, weights=0.0, bandwidth=math.inf)
    service = fleet._service(10, costs) * fleet.REQUESTS
    assert service > 0.02  # heartbeats take some of the store's time
    end, wait = fleet.dynamic(np.full(10, 100.0), np.ones(10), costs)
    assert end == pytest.approx(100 + service * 11, rel=1e-9)  # 10 members, and the first to be told that none is left
    assert wait > service


def test_costs_grow_as_they_should():
    costs = Costs(operation=1e-5, round_trip=1e-4, member=1e-3, weights=1e9, bandwidth=1e9)
    assert fleet.exchange(30, 1, costs) == 0.0
    assert fleet.exchange(1000, 100, costs) < fleet.exchange(1000, 1000, costs)
    assert fleet.update(30, 1, costs) == {"all": 0.03, "share": 0.03}
    every = fleet.update(10_000, 100, costs)
    assert every["all"] == pytest.approx(10.0) and every["share"] == pytest.approx(0.1 + 0.99 + 7e-4)


@pytest.mark.slow
def test_the_benchmark(warm_python, tmp_path, monkeypatch, capsys):
    """Runs the benchmark, without the measurement of the embedded model, which takes half a minute."""
    monkeypatch.setattr(simulate, "embedded_model", lambda members: (np.linspace(0.05, 0.15, members), 1e-4, 5e5))
    monkeypatch.setattr(simulate, "check", functools.partial(simulate.check, generations=1, members=24))
    measure = fleet.measure

    def measured(jobs, isolated=False):
        with pytest.MonkeyPatch.context() as patch:
            if isolated:
                # A fork would not be in the network namespace that the executable is started in.
                patch.setattr(sys, "executable", COLD)
            return measure(jobs, isolated)

    monkeypatch.setattr(fleet, "measure", measured)
    path = tmp_path / "simulate.json"
    command = ["simulate", "--workers", "1", "8", "64", "--generations", "1", "--members", "8", "--json", str(path)]
    status = main([*command, "--plots", str(tmp_path)])
    result = json.loads(path.read_text())
    rows = [r for r in result["rows"] if r["kind"] == "generation"]
    assert len(rows) == 2 * 3 * (1 + 2 * 2) and "5x slower" in (tmp_path / "simulate-handout.svg").read_text()
    for r in rows:
        assert 0 < r["efficiency"] <= 1.0001 and r["seconds_ideal"] <= r["seconds_dynamic"] * 1.0001
    checks = [r for r in result["rows"] if r["kind"] == "check"]
    assert len(checks) == 4 and status == int(not all(r["pass"] for r in checks))  # a busy machine may fail it
    text = "".join(f"<!-- begin:{n} -->\n<!-- end:{n} -->\n" for n in ("simulate", "simulate-check", "simulate-wire"))
    assert tables.fill(text, tmp_path).count("esfast bench simulate") == 3
    if os.geteuid() or not shutil.which("unshare") or not any(r["kind"] == "wire" for r in result["rows"]):
        pytest.skip(f"bytes on the wire need root and network namespaces: {capsys.readouterr().err}")
    loopback = [r for r in result["rows"] if r["kind"] == "loopback"]
    assert all(0.7 < r["fitted"] / r["bytes"] < 1.4 for r in loopback)
    for r in (r for r in result["rows"] if r["kind"] == "wire"):
        assert r["bytes"]["esfast"] < 1e-4 * r["bytes"]["broadcast"] < r["bytes"]["all-reduce"]


def test_nonsense_is_refused(capsys):
    assert main(["simulate", "--workers", "0"]) == 1
    assert "at least 1" in capsys.readouterr().err
