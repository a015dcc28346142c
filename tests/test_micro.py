"""bench/micro under pytest-benchmark, on few weights: every group has its rows, and a slow-down is caught."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="the microbenchmarks need it: pip install pytest-benchmark")
MICRO = Path(__file__).parent.parent / "bench" / "micro"


def micro(folder, *options, **environment):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        str(MICRO),
        "--numel",
        "1e5",
        "-p",
        "no:cacheprovider",
        "--benchmark-storage",
        str(folder / "saved"),
        *options,
    ]
    # in a worker of xdist, whose variables are inherited, pytest-benchmark times nothing
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env = inherited | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=env)


@pytest.mark.usefixtures("warm_python")
def test_each_operation_stands_beside_today_s_way_and_a_copy(tmp_path):
    done = micro(tmp_path, "-k", "float32", "--benchmark-json", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["benchmarks"]
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row["extra_info"])
    assert len({group.partition(", cpu")[0] for group in groups}) == 12
    for group, infos in groups.items():
        assert {"cpu", "today", "copy"} <= {info["backend"] for info in infos}, group
        assert all(info["GB/s"] > 0 for info in infos)


@pytest.mark.usefixtures("warm_python")
def test_a_slow_down_fails_the_comparison(tmp_path):
    """The comparison passes against the same code, and fails after a wait is planted into add_noise_."""
    chosen = "-k", "cpu-cpu-float32-gaussian-perturb"
    (tmp_path / "slow.py").write_text(
        "import time, esfast.core.ops\n"
        "real = esfast.core.ops.add_noise_\n"
        "def add_noise_(*args, **options):\n"
        "    time.sleep(0.1)\n"
        "    return real(*args, **options)\n"
        "esfast.core.ops.add_noise_ = add_noise_\n"
    )
    compare = "--benchmark-compare", "--benchmark-compare-fail=min:400%"
    saved = micro(tmp_path, *chosen, "--benchmark-save", "before")
    assert saved.returncode == 0, saved.stdout + saved.stderr
    same = micro(tmp_path, *chosen, *compare)
    assert same.returncode == 0, same.stdout + same.stderr
    slow = micro(tmp_path, *chosen, *compare, "-p", "slow", PYTHONPATH=str(tmp_path))
    assert slow.returncode != 0 and "Performance has regressed" in slow.stdout + slow.stderr, slow.stdout + slow.stderr
