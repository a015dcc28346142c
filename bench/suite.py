"""The stages of a day with a GPU: `bash bench/gpu_suite.sh [STAGE ...]`. Without a name all, the most useful first.

A stage runs in a process of its own, with a time limit. If one fails, it is recorded and the next one runs; the exit
status is then 1. Results go to bench/results/ after every row, and also to the folder OUT if it is set. OUT also gets
suite.log, all that was printed, and status.json, the stages so far. The build is done once, in place.

ESFAST_SUITE_DEVICE=cpu tries the stages on a machine without a GPU, on tiny shapes. Its figures mean nothing, are
called *_dry_run.json, and go to OUT only. ESFAST_SUITE_SECONDS limits the seconds of a stage; ESFAST_SUITE_TESTS names
other tests for the stage `tests`. This file runs before esfast is built, and needs only Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/test_gpu.py",
    "tests/test_gpu_rollout.py",
    "tests/test_gpu_graphs.py",
    "tests/test_thin_product.py",
    "tests/test_bench_gpu.py",
    "tests/test_bench_gpu_failures.py",
)
# Seconds that one test may take.
TEST_SECONDS = 120
# Seconds that a stage has to end by itself when its time is up.
KILL_AFTER = 5
ESFAST = "import sys; from esfast.cli import main; sys.exit(main(sys.argv[1:]))"
READY = """
import sys
from esfast.core.ops import backend_report
state = backend_report(sys.argv[1])
for name in sys.argv[2:]:
    print(f"backend {name!r}: {state[name]}")
sys.exit(any(state[name] != "ready" for name in sys.argv[2:]))
"""


@dataclasses.dataclass(frozen=True)
class Site:
    """Where the suite runs. `results` are folders; `tree` holds the package as it is when installed."""

    device: str
    tree: Path
    results: tuple[Path, ...]

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def esfast(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", ESFAST, *arguments]

    def bench(self, name: str, file: str, on_gpu: list[str], on_cpu: list[str]) -> list[str]:
        file = f"{file}_{'gpu' if self.on_gpu else 'dry_run'}.json"
        options = ["--device", self.device, *(on_gpu if self.on_gpu else on_cpu)]
        return self.esfast("bench", name, *options, "--json", *[str(folder / file) for folder in self.results])

    def pytest(self, *arguments: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            str(ROOT / "pyproject.toml"),
            *arguments,
        ]


@dataclasses.dataclass(frozen=True)
class Stage:
    seconds: int
    # (site, seconds that the stage has) -> its commands
    commands: Callable[[Site, int], list[list[str]]]
    # name of the file with its result
    file: str | None = None


def _build(site: Site, seconds: int) -> list[list[str]]:
    wanted = ("cuda", "triton") if site.on_gpu else ("cpu",)
    return [
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--parallel", "4"],
        site.esfast("info"),
        [sys.executable, "-c", READY, site.device, *wanted],
    ]


def _tests(site: Site, seconds: int) -> list[list[str]]:
    tests = os.environ.get("ESFAST_SUITE_TESTS", " ".join(TESTS)).split()
    options = []
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout", str(TEST_SECONDS)]
    return [site.pytest(*options, *[str(ROOT / test) for test in tests])]


def _noise(site: Site, seconds: int) -> list[list[str]]:
    # The benchmark stops early enough to finish the row that it is at.
    on_gpu = ["--seconds", str(max(10, seconds - 60))]
    # the reference stands in for a second backend
    on_cpu = ["--backends", "cpu", "reference", "--dtypes", "bfloat16", "--members", "3", "--repeats", "1"]
    return [site.bench("gpu", "noise", on_gpu, on_cpu)]


def _iteration(site: Site, seconds: int) -> list[list[str]]:
    on_gpu = ["--repeats", "3", "--seconds", str(max(10, seconds - 60))]
    return [site.bench("iteration", "iteration", on_gpu, ["--models", "tiny", "--repeats", "1"])]


def _together(site: Site, seconds: int) -> list[list[str]]:
    """One member at a time generates as `esfast train` does by itself; several from CUDA graphs, and plainly."""
    sizes = "--members 1 4 16 30 --prompts 16 --new-tokens 64 --repeats 3 --dtype bfloat16".split()
    on_gpu = ["--models", "Qwen2.5-0.5B", "Qwen2.5-1.5B", *sizes, "--seconds", str(max(10, seconds - 60))]
    on_cpu = "--models tiny --members 1 3 --prompts 2 --new-tokens 2 --repeats 1".split()
    rates = "--rates --noise gaussian low_rank --decoding static plain".split()
    return [site.bench("together", "together", [*rates, *on_gpu], [*rates, *on_cpu])]


def _dropin(site: Site, seconds: int) -> list[list[str]]:
    return [
        site.bench("dropin", "dropin", ["--numel", "1e8", "--seeds"], ["--numel", "1e5", "--repeats", "1", "--seeds"])
    ]


def _profile(site: Site, seconds: int) -> list[list[str]]:
    return [site.bench("profile", "profile", ["--seconds", str(max(10, seconds - 60))], ["--numel", "1e4"])]


def _sanitize(site: Site, seconds: int) -> list[list[str]]:
    """memcheck reads every access; racecheck looks at shared memory, which Triton's kernels use and ours don't."""
    tool = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    if tool is None and site.on_gpu:
        return [[sys.executable, "-c", "print('there is no compute-sanitizer'); raise SystemExit(1)"]]
    test = str(ROOT / "tests" / "test_gpu.py")
    cases = {
        "memcheck": "test_equals_the_cpu_backend and 2-dtype1",
        "racecheck": "test_equals_the_cpu_backend and 2-dtype1 and triton",
    }
    if not site.on_gpu:
        return [site.pytest("--collect-only", "-k", cases["racecheck"], test)]
    options = ["--report-api-errors", "no", "--error-exitcode", "9", "--target-processes", "application-only"]
    return [[tool, "--tool", name, *options, *site.pytest("-k", case, test)] for name, case in cases.items()]


# In the order that gives the most first. A GPU may be at hand for commands of 10 minutes: no stage gets 9, nor do build
# and tests together.
STAGES = {
    "build": Stage(230, _build),
    "tests": Stage(330, _tests),
    "noise": Stage(520, _noise, "noise"),
    "iteration": Stage(520, _iteration, "iteration"),
    "together": Stage(520, _together, "together"),
    "dropin": Stage(240, _dropin, "dropin"),
    "profile": Stage(280, _profile, "profile"),
    "sanitize": Stage(520, _sanitize),
}


class Log:
    """What is printed goes to the terminal and to a file."""

    def __init__(self, path: Path | None):
        self._file = open(path, "ab", buffering=0) if path else None

    def write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        if self._file:
            self._file.write(data)

    def say(self, text: str) -> None:
        self.write(text.encode() + b"\n")


class Suite:
    def __init__(self, site: Site, out: Path | None, log: Log):
        self.site, self.out, self.log = site, out, log
        self.stages: list[dict] = []

    def run(self, name: str) -> None:
        stage = STAGES[name]
        seconds = min(stage.seconds, int(os.environ.get("ESFAST_SUITE_SECONDS", stage.seconds)))
        record = {"stage": name, "state": "running", "seconds": 0.0, "limit": seconds, "reason": ""}
        self.stages.append(record)
        self._write()
        self.log.say(f"\n== {name} (at most {seconds} s)")
        began = time.monotonic()
        states = []
        for command in stage.commands(self.site, seconds):
            left = seconds - (time.monotonic() - began)
            state, reason = self._run(command, left) if left > 1 else ("timed out", "no time was left")
            states.append(state)
            if state != "passed":
                record |= {"state": state, "reason": reason}
                if name == "build" or state == "timed out":
                    break
        if all(state == "passed" for state in states):
            record["state"] = "passed"
        record["seconds"] = round(time.monotonic() - began, 1)
        if stage.file:
            record |= self._found(stage.file)
        self.log.say(f"== {name}: {record['state']} after {record['seconds']:.0f} s {record['reason']}".rstrip())
        self._write()

    def _run(self, command: list[str], seconds: float) -> tuple[str, str]:
        """How a stage ended and, unless it passed, why."""
        began, last = time.monotonic(), [b""]
        command = ["timeout", "-k", str(KILL_AFTER), f"{seconds:.0f}", *command]
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.site.tree), os.environ.get("PYTHONPATH")])),
        }
        folder = ROOT if "setup.py" in command else self.site.tree
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        def read() -> None:
            for line in process.stdout:
                self.log.write(line)
                if line.strip():
                    last[0] = line.strip()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            status = process.wait()
        finally:
            # Processes that a stage leaves behind would share the GPU with the next stage.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        reader.join(KILL_AFTER)
        if status == 0:
            return "passed", ""
        if status == 124 or (status in (137, -9) and time.monotonic() - began >= seconds):
            return "timed out", f"its {seconds:.0f} s were up"
        if status < 0:
            return "killed", f"by {signal.Signals(-status).name}"
        return "failed", last[0].decode(errors="replace")[-200:]

    def _found(self, file: str) -> dict:
        """The contents of the stage's result, also if the stage failed."""
        path = self.site.results[0] / f"{file}_{'gpu' if self.site.on_gpu else 'dry_run'}.json"
        with contextlib.suppress(OSError, ValueError):
            result = json.loads(path.read_text(encoding="utf-8"))
            keys = ("model", "dtype", "op", "backend", "contender", "loop", "kernel", "noise", "members")
            reasons = [
                f"{', '.join(str(x[k]) for k in keys if k in x)}: {x['reason']}" for x in result.get("left_out", [])
            ]
            return {"rows": len(result["rows"]), "left_out": reasons}
        return {"rows": 0, "left_out": []}

    def _write(self) -> None:
        if self.out:
            path = self.out / "status.json"
            temporary = path.with_name(".status.tmp")
            temporary.write_text(json.dumps({"device": self.site.device, "stages": self.stages}, indent=1) + "\n")
            os.replace(temporary, path)

    def close(self) -> int:
        """Prints the closing table; returns the exit status."""
        self.log.say(f"\n{'stage':<10} {'state':<10} {'seconds':>7}  {'rows':>4}  reason")
        for r in self.stages:
            cells = f"{r['stage']:<10} {r['state']:<10} {r['seconds']:>7.0f}  {r.get('rows', ''):>4}  {r['reason']}"
            self.log.say(cells.rstrip())
            for reason in r.get("left_out", []):
                self.log.say(f"{'':<10} left out: {reason[:160]}")
        return int(any(r["state"] != "passed" for r in self.stages))


@contextlib.contextmanager
def site_of(device: str, out: Path | None) -> Iterator[Site]:
    """Makes a temporary folder of links that has the layout of the installed package: bench/ and kernels/ inside
    esfast/."""
    with tempfile.TemporaryDirectory(prefix="esfast-suite-") as folder:
        tree = Path(folder) / "tree"
        (tree / "esfast").mkdir(parents=True)
        for path in [*(ROOT / "esfast").iterdir(), ROOT / "bench", ROOT / "kernels"]:
            # The extensions are built later, and perhaps for another Python.
            if path.suffix != ".so":
                (tree / "esfast" / path.name).symlink_to(path)
        for name in ("_cpu", "_cuda"):
            suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
            (tree / "esfast" / f"{name}{suffix}").symlink_to(ROOT / "esfast" / f"{name}{suffix}")
        results = [ROOT / "bench" / "results"] if device == "cuda" else []
        results += [out] if out else []
        yield Site(device, tree, tuple(results) or (Path(folder) / "results",))


def architectures(device: str) -> str | None:
    """The architectures of this machine's GPUs, in the form of ESFAST_CUDA_ARCHS; None if they are unknown."""
    if device != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return " ".join(sorted({capability.replace(".", "") for capability in found})) or None


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        print(f"gpu_suite.sh: unknown stage {unknown[0]!r}; the stages are {' '.join(STAGES)}", file=sys.stderr)
        return 2
    device = os.environ.get("ESFAST_SUITE_DEVICE", "cuda")
    out = Path(os.environ["OUT"]).resolve() if os.environ.get("OUT") else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
    if "ESFAST_CUDA_ARCHS" not in os.environ and (found := architectures(device)):
        os.environ["ESFAST_CUDA_ARCHS"] = found
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with site_of(device, out) as site:
        suite = Suite(site, out, Log(out / "suite.log" if out else None))
        try:
            for name in names or STAGES:
                suite.run(name)
        finally:
            status = suite.close()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
