"""Reward functions that a worker can import by name, for test_rewards."""

import os
import signal
import subprocess
import time
from pathlib import Path


def length(prompts, completions, **columns):
    return [len(text) for text in completions]


def where(prompts, completions, **columns):
    return [os.getpid()] * len(completions)


def target(prompts, completions, target, **columns):
    return list(target)


def hangs(prompts, completions, **columns):
    if "hang" in completions:
        child = subprocess.Popen(["sleep", "600"])
        Path(columns["note"][0]).write_text(str(child.pid))
        time.sleep(600)
    return [0.0] * len(completions)


def raises(prompts, completions, **columns):
    return [1 / len(text) for text in completions]


def wrong(prompts, completions, **columns):
    return {"few": [1.0], "nan": [float("nan")] * 2, "none": [None] * 2, "text": ["a"] * 2, "list": [[1.0]] * 2}[
        columns["note"][0]
    ]


def dies(prompts, completions, **columns):
    os.kill(os.getpid(), signal.SIGSEGV)


def slow(prompts, completions, **columns):
    time.sleep(0.3)
    return [1.0] * len(completions)


def changes(prompts, completions, **columns):
    completions.clear()
    return [0.0] * len(prompts)


def prints(prompts, completions, **columns):
    print("a function may print")
    return [0.0] * len(completions)
