"""What the Triton kernels compile to, without a GPU: budgets on sm_90, and that every target compiles.

In processes of their own: here kernels may be interpreted, and an interpreted one does not compile.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels can't be compiled")
from esfast.bench import sass  # noqa: E402
from esfast.core.noise import DOMAINS, KINDS  # noqa: E402

COMPILED = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=COMPILED)


@pytest.fixture(scope="module")
def rows():
    done = python("import sys; from esfast.bench import main; sys.exit(main(sys.argv[1:]))", "sass", "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


def test_every_kernel_is_within_its_budget(rows):
    assert {(r["kernel"], r["noise"], r["dtype"]) for r in rows} == {
        (k, n, d) for k in ("perturb", "update") for n in KINDS for d in ("float32", "bfloat16", "float16")
    }
    for r in rows:
        assert r["pass"] is True and r["sass_per_weight"] <= sass.BUDGETS[r["kernel"], r["noise"]], r
        assert r["spill_bytes"] == 0 and r["load_bits"] == r["store_bits"] == 128, r
        shared = set() if r["noise"] == "low_rank" else {"LDS", "STS"}
        assert not ({"LDL", "STL"} | shared) & {m.split(".")[0] for m in r["memory_instructions"]}, r
        # an fma, and what draws a number for each row and column of a tile
        least = 1.3 if (r["kernel"], r["noise"]) == ("update", "low_rank") else 2.5
        assert r["sass_per_weight"] > least, "too little to be true: the reader of machine code has lost its way"


@pytest.mark.parametrize("target", ["cuda:80:32", "cuda:90:32", "cuda:100:32", "hip:gfx942:64"])
def test_compiles_for(target):
    code = (
        "import sys\nfrom triton.backends.compiler import GPUTarget\nfrom esfast.bench.sass import compile_kernel, compile_low_rank\n"
        "backend, arch, warp = sys.argv[1].split(':')\n"
        "target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))\n"
        "code = 'cubin' if backend == 'cuda' else 'hsaco'\n"
        "for dtype in (0, 1, 2):\n"
        "    for kind in (0, 1):\n        print(len(compile_kernel(kind, (dtype, dtype), target).asm[code]))\n"
        "    print(len(compile_low_rank((dtype, dtype), target)[0].asm[code]))"
    )
    done = python(code, target)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 9 and all(int(n) > 1000 for n in done.stdout.split())


VARIANTS = [
    # formats of source and destination, factors, what compile_low_rank is told beside
    (1, 1, 1, {}),
    (3, 1, 1, {}),
    (0, 0, None, {"decay": 2}),
    (3, 3, None, {"decay": 2}),
    (1, 1, None, {"stochastic": True, "decay": 2}),
    (3, 3, None, {"adam": True, "decay": 2}),
]


def test_no_low_rank_kernel_spills():
    """Compiles the variants that need the most registers: a split master, an anchor, stochastic rounding, Adam."""
    code = (
        f"from esfast.bench import sass\nfrom esfast.bench.disassembly import disassemble\n"
        f"for src, dst, slots, more in {VARIANTS!r}:\n"
        "    compiled = sass.compile_low_rank((src, dst), None, slots, **more)[0]\n"
        "    print(sass.resources(disassemble(compiled.asm['cubin']))['STACK'])"
    )
    done = python(code)
    assert done.stdout.split() == ["0"] * len(VARIANTS), done.stderr


def test_kinds_have_their_numbers():
    assert {k: DOMAINS[k] for k in KINDS} == sass.KINDS


SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   FFMA R0, R1, R2, R3 ;
        /*0030*/                   NOP ;
{body}
        /*0200*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0210*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0220*/                   EXIT ;
.L_x_2:
        /*0230*/                   BRA `(.L_x_2) ;
"""


def test_the_reader_counts_what_is_there():
    body = "\n".join(f"        /*{i:04x}*/                   IADD3 R{i}, R1, R2, RZ ;" for i in range(64, 76))
    figures = sass.measure(sass.Disassembly(SASS.format(body=body), "REG:40 STACK:8"))
    assert figures.loop == 1 + 12 + 1  # fma, adds, branch; no NOP
    assert figures.path == 2 + figures.loop + 2
    assert (figures.spill_bytes, figures.registers, figures.load_bits, figures.store_bits) == (8, 40, 128, 128)


def test_a_kernel_without_a_loop_is_refused():
    with pytest.raises(sass.BenchmarkError, match="no loop over members"):
        sass.measure(sass.Disassembly(SASS.format(body=""), "REG:40 STACK:0"))
