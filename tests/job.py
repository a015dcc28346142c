"""A small training run in a process of its own, for tests that start several, kill them or make them fail.

    python job.py OUT [option=value ...]                 options of ESConfig, or of FAULTS, as JSON
    python job.py --drill KILLS STOPS FOLDER [option=value ...]
        stops runs of 1, 2 or 3 processes at a random instant, KILLS of them by SIGKILL and STOPS by SIGTERM, and
        resumes each with another number of processes, twice at the same time

A member's reward is a function of its weights, so that a run takes no time but for `pause` seconds a member.
"""

import itertools
import json
import logging
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

import matplotlib.figure  # noqa: F401
import torch

import esfast

# This and matplotlib take a second to import, so they are imported before any fork.
import esfast.trainer.trainer
from esfast import Team
from esfast.distributed import team as distributed
from esfast.distributed.team import Stopped
from esfast.journal.journal import peek, read
from esfast.tasks import embedded
from esfast.utils import lock
from esfast.utils.interrupts import signal_of

ROWS = [{"prompt": str(i)} for i in range(4)]
SETTINGS = {
    "generations": 6,
    "population_size": 7,
    "sigma": 0.02,
    "lr": 0.02,
    "prompts_per_generation": 4,
    "checkpoint_every": 2,
    "eval_every": 0,
    "save_best": False,
    "progress": False,
}
# pause: seconds that a member takes. slow: the rank of a slower process, and how many times slower it is.
# at: [rank, generation] where a fault happens. fault: what happens there, once (not again after a restart).
# patience: seconds to wait for a run folder that is in use. silence: seconds after which a process counts as lost.
FAULTS = {
    "pause": 0.0,
    "slow": [0, 1.0],
    "at": [0, -1],
    "fault": "",
    "dtype": "float32",
    "patience": lock.PATIENCE,
    "silence": distributed.SILENCE,
}
# Exit status of a job that found the run folder in use.
REFUSED = 3


def value(prompts, completions):
    return [float(text) for text in completions]


# so that forks, which import this module, go on with a run of this program, whose functions would be those of __main__
value.__module__ = "job"


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
    # A shell starts background processes with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lock.PATIENCE, distributed.SILENCE = faults["patience"], faults["silence"]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    team = Team.join()
    tokenizer = embedded.make_tokenizer()
    model = embedded.make_model(tokenizer).to(getattr(torch, faults["dtype"]))
    engine = Engine(model, team, faults)
    config = esfast.ESConfig(str(out), **(SETTINGS | given))
    trainer = esfast.ESTrainer(model, value, config, ROWS, None, tokenizer, engine=engine, team=team)
    engine.es = trainer.es
    # A team can serve several runs: these two must not affect the trainer's.
    for _ in range(2):
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


def start(processes, *arguments):
    """Runs `main` in forks, which have no imports to wait for; returns their ids."""
    children, port = [], free_port()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ |= {
                "WORLD_SIZE": str(processes),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            os._exit(status_of(*arguments))
        children.append(child)
    return children


def status_of(*arguments):
    try:
        main(*arguments)
    except KeyboardInterrupt as interrupt:
        return 128 + signal_of(interrupt)
    except lock.InUse:
        return REFUSED
    except Stopped as stopped:
        return REFUSED if "InUse" in str(stopped) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def finish(children):
    """Their statuses, as a shell gives them."""
    ends = [os.waitpid(child, 0)[1] for child in children]
    return [128 + os.WTERMSIG(end) if os.WIFSIGNALED(end) else os.WEXITSTATUS(end) for end in ends]


def undisturbed(processes, *arguments):
    """Seconds that a run takes that nothing disturbs."""
    began = time.monotonic()
    assert finish(start(processes, *arguments)) == [0] * processes
    return time.monotonic() - began


def drill(kills, stops, folder, *pairs):
    """Stops runs and resumes them. At the end each must hold the same as a run that was never stopped."""
    folder, random = Path(folder), Random(0)
    whole = folder / "whole"
    seconds = {n: undisturbed(n, folder / f"of {n}", *pairs) for n in (2, 3)}
    seconds[1] = undisturbed(1, whole, *pairs)
    expected, found = outcome(whole), Counter()
    for i in itertools.count():
        signum = signal.SIGKILL if found["SIGKILL"] < kills else signal.SIGTERM
        if signum == signal.SIGTERM and found["SIGTERM"] == stops:
            break
        out, before, after = folder / f"run{i}", 1 + i % 3, 1 + (i + 1 + i // 3 % 2) % 3
        children = start(before, out, *pairs)
        time.sleep(random.uniform(0, seconds[before]))
        # Stop all processes at once, as a power failure or a scheduler does.
        for child in children:
            os.kill(child, signum)
        began = time.monotonic()
        ends = finish(children)
        assert time.monotonic() - began < 30, f"{out} took {time.monotonic() - began} s to stop"
        assert set(ends) <= {0, 128 + signum}, f"{out} ended with {ends}"
        if any(ends):
            found[signum.name] += 1
            found[f"{before} processes, then {after}"] += 1
            found["half-written files"] += bool(half_written(out))
            found["saved"] += signum == signal.SIGTERM and (out / "model").exists()
            found["generations done"] += generations(out)
        resumes = [start(after, out, *pairs, "resume=true", "patience=0") for _ in range(2)]
        ends = sorted(max(finish(each)) for each in resumes)
        assert ends[0] == 0 and ends[1] in (0, REFUSED), f"{out}: two that resume at once ended with {ends}"
        found["refused"] += ends[1] == REFUSED
        found["came when it was finished"] += ends[1] == 0
        assert outcome(out) == expected, f"{out} ended with other bits"
        assert not half_written(out), f"{out} holds half-written files"
        found["runs"] += 1
        shutil.rmtree(out)
    print(json.dumps(found))


def generations(folder):
    found = peek(folder / "journal.jsonl")
    return len(found.records) if found else 0


def half_written(folder):
    return [p for p in folder.rglob("*") if p.name.startswith(".")] if folder.exists() else []


def outcome(folder):
    """The bits of the tuned weights, and the generations of the journal."""
    return (folder / "model" / "model.safetensors").read_bytes(), read(folder / "journal.jsonl").records


def program(*words):
    logging.basicConfig()
    logging.getLogger("esfast").setLevel(logging.INFO)
    try:
        if words[0] == "--drill":
            drill(*map(int, words[1:3]), *words[3:])
        else:
            main(*words)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}", file=sys.stderr)
        return 128 + signal_of(interrupt)
    return 0


if __name__ == "__main__":
    sys.exit(program(*sys.argv[1:]))
