"""The Python of tests/warm.py does what Python does."""

import os
import signal
import subprocess
import sys

import pytest
import warm

pytestmark = pytest.mark.skipif(not warm.possible(), reason="needs Linux, and no GPU")
COLD = sys.executable
TELL = """
import os, sys
print(sys.argv, sys.path[0], os.getcwd(), os.environ.get("HUE"), __name__, sys.stdin.read())
print("further", file=sys.stderr)
os.write(int(sys.argv[1]), b"by a pipe")
"""


@pytest.fixture(params=["cold", "warm"])
def python(request, warm_python):
    """Both are held to the same."""
    return COLD if request.param == "cold" else sys.executable


@pytest.mark.parametrize("kind", ["-c", "-m", "script"])
def test_arguments_streams_environment_and_folder(python, kind, tmp_path):
    (tmp_path / "tell.py").write_text(TELL)
    what, name = {"-c": (["-c", TELL], "-c"), "-m": (["-m", "tell"], str(tmp_path / "tell.py"))}.get(
        kind, ([str(tmp_path / "tell.py")], str(tmp_path / "tell.py"))
    )
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe:
        process = subprocess.Popen(
            [python, *what, str(writing), "ä"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            pass_fds=[writing],
            env=os.environ | {"HUE": "red"},
        )
        os.close(writing)
        out, err = process.communicate("asked")
        assert (pipe.read(), err, process.returncode) == (b"by a pipe", "further\n", 0)
    first = {"-c": "", "-m": str(tmp_path)}.get(kind, str(tmp_path))
    assert out == f"{[name, str(writing), 'ä']} {first} {tmp_path} red __main__ asked\n"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit; atexit.register(print, 'at the end', flush=True); print('first')", 0, ""),
    ],
)
def test_ends(python, code, status, said):
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert done.returncode == status and said in done.stderr
    assert done.stdout == ("first\nat the end\n" if "atexit" in code else "")


# one that warm.py has imported, and one that it has not
@pytest.mark.parametrize("name", ["forks", "playing"])
def test_it_has_not_the_tests_own_modules(python, name):
    done = subprocess.run([python, "-c", f"import {name}"], capture_output=True, text=True)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr


# Short sleeps: Python does not see a signal that comes just before a sleep begins until the sleep is over.
WAIT = "import os, time; print(os.getpid(), flush=True); [time.sleep(0.02) for _ in range(3000)]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_it(python, number):
    process = subprocess.Popen([python, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert int(process.stdout.readline()) > 0
    process.send_signal(number)
    assert process.wait(20) == -number
    # The fork has ended, too: nobody holds its output open.
    assert process.stdout.read() == ""


def test_it_is_warm(warm_python):
    code = "import sys; print('transformers.models.qwen2.modeling_qwen2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"
