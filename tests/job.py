"""A small training run in a process of its own, for tests that start several, kill them or make them fail.

    python job.py OUT [option=value ...]                 options of ESConfig, or of FAULTS, as JSON
    python job.py --kill RUNS FOLDER [option=value ...]  kills a run of 1, 2 or 3 processes at a random instant, and
                                                         resumes it with another number of them, until RUNS were killed

A member's reward is a function of its weights, so that a run takes no time but for `pause` seconds a member.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

import torch

import esfast
import esfast.trainer  # before any fork
from esfast import Team, embedded
from esfast.journal import read

ROWS = [{"prompt": str(i)} for i in range(4)]
SETTINGS = {"generations": 6, "population_size": 7, "sigma": 0.02, "lr": 0.02, "prompts_per_generation": 4,
            "checkpoint_every": 2, "eval_every": 0, "save_best": False, "progress": False}  # fmt: skip
# pause: seconds a member takes; slow: rank and factor of one that is slower; at: [rank, generation] of a fault;
# fault: what happens there, once (in the first life of the job)
FAULTS = {"pause": 0.0, "slow": [0, 1.0], "at": [0, -1], "fault": "", "dtype": "float32"}


def value(prompts, completions):
    return [float(text) for text in completions]


class Engine:
    def __init__(self, model, team, faults):
        self.weight, self.team, self.faults, self.es, self.members = next(model.parameters()), team, faults, None, 0

    def generate(self, prompts):
        self.members += 1
        rank, factor = self.faults["slow"]
        time.sleep(self.faults["pause"] * (factor if self.team.rank == rank else 1))
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.es and [self.team.rank, self.es.generation] == self.faults["at"] and first_life:
            fault(self.faults["fault"])
        return [str(float(self.weight.detach().double().sum()))] * len(prompts)


def fault(kind):
    if kind == "raise":
        raise ZeroDivisionError("made to fail")
    if kind in ("SIGKILL", "SIGINT", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, kind))


def main(out, *pairs):
    given = {name: json.loads(text) for name, text in (pair.split("=", 1) for pair in pairs)}
    faults = {name: given.pop(name, default) for name, default in FAULTS.items()}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in its background ignores it
    torch.set_num_threads(1)
    torch.manual_seed(0)
    team = Team.join()
    tokenizer = embedded.make_tokenizer()
    model = embedded.make_model(tokenizer).to(getattr(torch, faults["dtype"]))
    engine = Engine(model, team, faults)
    config = esfast.ESConfig(str(out), **(SETTINGS | given))
    trainer = esfast.ESTrainer(model, value, config, ROWS, None, tokenizer, engine=engine, team=team)
    engine.es = trainer.es
    for _ in range(2):  # a team serves several runs: this one is of no consequence
        es = esfast.ES([("w", torch.zeros(3))], population_size=3, team=team)
        for member in es.population():
            member.reward = float(member.index)
        es.step()
    trainer.train()
    print(f"rank {team.rank}: {engine.members} members", flush=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_children(processes, kill_after, *arguments):
    """Runs `main` in forks, which have no imports to wait for; returns the seconds it took, None if they were killed."""
    began, children, port = time.monotonic(), [], free_port()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            try:
                main(*arguments)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    if kill_after is not None:  # all at once: the power fails
        time.sleep(kill_after)
        for child in children:
            os.kill(child, signal.SIGKILL)
    ends = [os.waitpid(child, 0)[1] for child in children]
    if any(not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) for status in ends):
        sys.exit(f"{arguments} failed")
    return None if any(map(os.WIFSIGNALED, ends)) else time.monotonic() - began


def kill(runs, folder, *pairs):
    """A run that is never killed, and `runs` that are; what every one that was resumed holds must be the same."""
    folder, random = Path(folder), Random(0)
    whole = folder / "whole"
    seconds = {n: in_children(n, None, folder / f"of {n}", *pairs) for n in (2, 3)}
    seconds[1] = in_children(1, None, whole, *pairs)
    expected, found = outcome(whole), Counter()
    for i in itertools.count():
        if found["killed"] == runs:
            break
        out, before, after = folder / f"run{i}", 1 + i % 3, 1 + (i + 1 + i // 3 % 2) % 3
        if in_children(before, random.uniform(0, seconds[before]), out, *pairs) is None:
            found["killed"] += 1
            found[f"{before} processes, then {after}"] += 1
            found["half-written files"] += bool(half_written(out))
            if (out / "journal.jsonl").exists():
                found["generations done"] += len(read(out / "journal.jsonl").records)
        in_children(after, None, out, *pairs, "resume=true")
        assert outcome(out) == expected, f"{out} ended with other bits"
        assert not half_written(out), f"{out} holds half-written files"
        found["runs"] += 1
        shutil.rmtree(out)
    print(json.dumps(found))


def half_written(folder):
    return [p for p in folder.rglob("*") if p.name.startswith(".")] if folder.exists() else []


def outcome(folder):
    """The bits of the tuned weights, and the generations of the journal."""
    return (folder / "model" / "model.safetensors").read_bytes(), read(folder / "journal.jsonl").records


if __name__ == "__main__":
    try:
        if sys.argv[1] == "--kill":
            kill(int(sys.argv[2]), *sys.argv[3:])
        else:
            main(*sys.argv[1:])
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}", file=sys.stderr)
        sys.exit(130)
