"""`esfast train` with several processes, each of which asks packets of members: the run of one process and one member at
a time, to the bit."""

import os
import subprocess
import sys

import pytest
import torch
import warm
from job import free_port

from esfast.bench.architectures import tiny_model
from esfast.tasks import embedded

LONG = pytest.mark.skipif("ESFAST_LONG_TESTS" not in os.environ, reason="takes half a minute: ESFAST_LONG_TESTS=1")
# With KILL set, one process dies amidst the packets of the second generation, once.
REWARD = """
import os, signal
from pathlib import Path

def letters(completions, **columns):
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if first and os.environ.get("KILL") == os.environ["RANK"]:
        if '{"generation"' in Path("run/journal.jsonl").read_text():
            os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(text)) + (sum(map(ord, text)) % 97) / 1000 for text in completions]
"""
TRAIN = (
    "train --model model --task file:prompts.jsonl --reward tell:letters --reward-workers 0 --generations 3 "
    "--population-size 9 --prompts-per-generation 4 --max-completion-length 6 --sigma 0.2 --lr 0.05 --eval-every 0 "
    "--out run"
).split()


def train(folder, at_once, *launcher, **environment):
    folder.mkdir()
    tokenizer = embedded.make_tokenizer()
    torch.manual_seed(0)
    tiny_model("qwen2", tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "tell.py").write_text(REWARD)
    prompts = ["a", "12+3=", "Name a colour, please: ", "xyz xyz", "12+4=", "b"]
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
    with warm.python():
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "esfast", *TRAIN, "--members-at-once", str(at_once)],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / "run"
    return done.stderr, (run / "journal.jsonl").read_bytes(), (run / "model" / "model.safetensors").read_bytes()


def torchrun(processes, *more):
    port = str(free_port())
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", port, *more]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return train(tmp_path_factory.mktemp("single") / "one", 1)[1:]


def test_two_processes_with_four_members_at_once(single, tmp_path):
    told, *found = train(tmp_path / "two", 4, *torchrun(2))
    assert "members_at_once: 4 of 9 members answer together" in told and tuple(found) == single


@LONG
@pytest.mark.parametrize("dies", [False, True])
def test_three_processes_one_of_which_dies(dies, single, tmp_path):
    """A death ends the generation that it falls into; the processes start again and take it up from its beginning."""
    restarts = ["--max-restarts", "1"] if dies else []
    told, *found = train(tmp_path / "three", 4, *torchrun(3, *restarts), KILL="1" if dies else "none")
    assert tuple(found) == single and ("resuming after generation 1" in told) == dies
