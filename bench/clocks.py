"""Records clocks, power and throttling of the GPU during a measurement: its figures depend on them.

nvidia-smi reports them five times a second, in a process of its own, so that the GPU does not become idle meanwhile.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections import deque
from statistics import median

QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")
COMMAND = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
PERIOD_MS = 200
# Bits of nvidia-smi's mask. An idle GPU (1), or clocks that an application asked for (2), are no throttling.
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class Clocks:
    """Takes samples while it is open: `with Clocks() as clocks: ...; clocks.between(began, ended)`."""

    def __init__(self, device: str = "cuda"):
        self.absent: str | None = None if device == "cuda" else "measured on a CPU"
        self._samples: deque[tuple[float, list[float], int]] = deque(maxlen=100_000)
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Clocks:
        if self.absent is None:
            try:
                self._process = subprocess.Popen(
                    [*COMMAND, f"--loop-ms={PERIOD_MS}"],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    bufsize=1,
                )
            except OSError as error:
                self.absent = f"nvidia-smi can't be run: {error.strerror}"
            else:
                threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self._note(line)

    def _ask(self) -> None:
        try:
            done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError) as error:
            self.absent = f"nvidia-smi can't be asked: {error}"
        else:
            for line in (done.stdout + done.stderr).splitlines()[:1]:
                self._note(line)

    def _note(self, line: str) -> None:
        try:
            *numbers, mask = line.strip().split(", ")
            self._samples.append((time.time(), [float(n) for n in numbers], int(mask, 16)))
        except ValueError:
            self.absent = f"nvidia-smi says: {line.strip()}"

    def between(self, began: float, ended: float) -> dict:
        """Samples from began to ended (time.time()): medians, the lowest SM clock, and why the clocks were lowered. If
        the time is too short for a sample, the nearest sample. Without samples, None and the reason."""
        if not self._samples and self._process is not None and self._process.poll() is None:
            # Some versions of nvidia-smi buffer their output.
            self._ask()
        samples = list(self._samples)
        inside = [s for s in samples if began <= s[0] <= ended]
        inside = inside or sorted(samples, key=lambda s: abs(s[0] - ended))[:1]
        if not inside:
            return {"clocks": None, "clocks_absent": self.absent or "nvidia-smi gave no sample yet"}
        sm, memory, power, temperature = zip(*(numbers for _, numbers, _ in inside), strict=True)
        reasons = {text for *_, mask in inside for bit, text in REASONS.items() if mask & bit}
        return {
            "clocks": {
                "sm_mhz": median(sm),
                "sm_mhz_min": min(sm),
                "memory_mhz": median(memory),
                "power_w": median(power),
                "power_w_max": max(power),
                "temperature_c": max(temperature),
                "throttled": sorted(reasons),
                "samples": len(inside),
            }
        }


def text(row: dict) -> str:
    """A cell of a table: the median SM clock in MHz, and why it was lowered."""
    clocks = row.get("clocks")
    if not clocks:
        return "?"
    lowered = ", ".join(clocks["throttled"])
    return f"{clocks['sm_mhz']:.0f}" + (f" ({lowered})" if lowered else "")
