"""A small training run in a process of its own, for tests that start several, kill them or make them fail.

    python job.py OUT [option=value ...]        options of ESConfig, or of FAULTS, as JSON

A member's reward is a function of its weights, so that a run takes no time but for `pause` seconds a member.
"""

import json
import os
import signal
import sys
import time

import torch

import esfast
from esfast import Team, embedded

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
    torch.set_num_threads(1)
    torch.manual_seed(0)
    team = Team.join()
    tokenizer = embedded.make_tokenizer()
    model = embedded.make_model(tokenizer).to(getattr(torch, faults["dtype"]))
    engine = Engine(model, team, faults)
    config = esfast.ESConfig(out, **(SETTINGS | given))
    trainer = esfast.ESTrainer(model, value, config, ROWS, None, tokenizer, engine=engine, team=team)
    engine.es = trainer.es
    trainer.train()
    print(f"rank {team.rank}: {engine.members} members", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}", file=sys.stderr)
        sys.exit(130)
