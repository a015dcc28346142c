"""`esfast bench cycles`: the model of a scheduler on instructions whose cost is known, and its predictions for the kernels."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from esfast.bench import BenchmarkError, cycles, scheduler, tables
from esfast.core.kinds import KINDS

PLENTY = 1e9  # bytes per cycle: memory is no limit


def code(stall=1, yields=False, sets=7, reads=7, waits=0):
    """A control code as the compiler packs it."""
    return stall | (not yields) << 4 | sets << 5 | reads << 8 | waits << 11


def trace(text, count=256, **control):
    return [scheduler.instruction(text, code(**control))] * count


def cycles_of(instructions, warps=8, bandwidth=PLENTY, rounds=12):
    found = scheduler.simulate(instructions, warps, 1, bandwidth, rounds)
    return found["cycles_per_block"] / (warps * len(instructions)), found


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        (trace("FFMA R1, R2, R3, R4"), 1),  # two halves of the float pipe, two cycles each
        (trace("@!P0 FADD R1, R2, R3"), 1),
        (trace("LOP3.LUT R1, R2, R3, R4, 0x96, !PT"), 2),
        (trace("IMAD R1, R2, R3, R4"), 2),
        (trace("IMAD.WIDE.U32 R2, R4, R5, RZ"), 4),
        (trace("F2I.TRUNC.NTZ R1, R2"), 8),
        ((trace("LOP3.LUT R1, R2, R3, R4, 0x96, !PT", 1) + trace("FFMA R1, R2, R3, R4", 1)) * 128, 1),  # side by side
    ],
)
def test_pipes(instructions, expected):
    found, shares = cycles_of(instructions)
    assert found == pytest.approx(expected, rel=0.12)  # a new block is late by LAUNCH
    assert shares["issue"] == pytest.approx(1 / found, rel=0.01)


def test_stalls_are_hidden_by_other_warps_only():
    slow = trace("FFMA R1, R2, R3, R4", stall=6)
    for warps, least in ((1, 6), (3, 2), (6, 1)):
        assert least <= cycles_of(slow, warps=warps)[0] < 1.5 * least  # a new block is late by LAUNCH


def test_barriers_wait_for_what_they_guard():
    load = scheduler.instruction("LDG.E R1, desc[UR4][R2.64]", code(sets=2))
    use = scheduler.instruction("FFMA R1, R1, R3, R4", code(waits=1 << 2))
    other = scheduler.instruction("FFMA R5, R6, R3, R4", code(waits=1 << 3))
    assert cycles_of([load, use] * 64, warps=1)[0] * 2 == pytest.approx(scheduler.CACHED + 1, rel=0.1)
    assert cycles_of([load, other] * 64, warps=1)[0] < scheduler.CACHED / 4


def test_memory_is_shared_by_bytes():
    ops = [
        scheduler.instruction(text, code())
        for text in ("LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4")
    ]
    ops = scheduler.with_transfers(ops * 32, loads=32)
    found, _ = cycles_of(ops, bandwidth=4.0, rounds=40)
    assert found == pytest.approx(512 / 4, rel=0.1)


def test_an_unknown_instruction_is_named():
    with pytest.raises(BenchmarkError, match="does not know the instruction HGMMA.64x8x16"):
        scheduler.instruction("HGMMA.64x8x16 R1, R2", code())


def test_blocks_that_fit():
    assert [scheduler.resident_blocks(r, t) for r, t in ((80, 256), (144, 128), (168, 64), (32, 1024), (40, 256))] == [
        3,
        3,
        6,
        2,
        6,
    ]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton, which brings a disassembler, is not installed"
)
def test_predictions():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(sys.path)
    }
    run = "import sys; from esfast.bench import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", run, "cycles", "--json", "-"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    backends = ["triton"] + ["cuda"] * (result["cuda"] == "built")
    assert len(result["rows"]) == len(backends) * 2 * len(KINDS) * 4
    for r in result["rows"]:
        assert 0 < r["issue_share"] <= 1 and 0 < r["alu_share"] <= 1 and r["measured_ms"] is None
        assert r["ms"] > 0.97 * r["roof_ms"], "faster than the memory"
        if (r["backend"], r["kernel"], r["noise"]) == ("cuda", "update", "rademacher"):
            assert r["cycles"] <= 3.2, r
        if (r["kernel"], r["noise"]) == ("update", "low_rank"):
            # an fma takes one, and four members' factors are drawn for 128 rows and columns
            assert 1.3 < r["cycles"] <= 2.3, r
    headers, lines = cycles.table(result)
    assert len(lines) == len(result["rows"]) // 2 and all(len(line) == len(headers) for line in lines)
    assert all(line[-1] == "not yet measured" for line in lines)


def test_measurements_stand_beside_predictions():
    row = {"backend": "cuda", "kernel": "update", "noise": "gaussian", "dtype": "bfloat16", "gpu": "H200"}
    ran = {
        "model": cycles.MODEL,
        "op": "update",
        "backend": "cuda",
        "noise": "gaussian",
        "dtype": "bfloat16",
        "members": 30,
        "ms_median": 210.5,
    }
    result = {
        "provenance": {"hardware": {"gpu": "NVIDIA H200"}},
        "rows": [{**ran, "backend": "triton", "ms_median": 1.0}, ran],
    }
    assert cycles.find_measured(row, [result]) == 210.5
    assert cycles.find_measured({**row, "gpu": "H100"}, [result]) is None
    assert cycles.find_measured(row, [{**result, "rows": [{**ran, "members": 8}]}]) is None


def test_the_table_says_that_it_predicts(tmp_path):
    row = {
        "backend": "cuda",
        "kernel": "update",
        "noise": "gaussian",
        "dtype": "bfloat16",
        "gpu": "H200",
        "warps_per_scheduler": 4,
        "cycles": 27.1,
        "issue_share": 0.9,
        "alu_share": 0.6,
        "fma_share": 0.7,
        "conversion_share": 0.0,
        "memory_pipe_share": 0.02,
        "ms": 210.0,
        "roof_ms": 7.1,
        "of_copy": 0.03,
        "measured_ms": None,
    }
    hardware = {"cpu": "a CPU", "cores": 2, "memory_gib": 8, "gpu": None, "gpu_memory_gib": None}
    versions = {"esfast": "1", "torch": "2", "python": "3", "instruction_set": "avx2", "compiler": "GCC"}
    provenance = {
        "hardware": hardware,
        "versions": versions,
        "commit": None,
        "dirty": None,
        "date": "2026-01-01",
        "command": "c",
    }
    (tmp_path / "cycles.json").write_text(json.dumps({"predicted": True, "rows": [row, row], "provenance": provenance}))
    text = tables.generate("cycles", tmp_path)
    assert "Predicted with a CPU" in text and "not yet measured" in text and "27.1" in text
