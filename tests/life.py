"""A run in miniature: a member's reward is a function of its weights, so that nothing needs to be generated."""

import json
from pathlib import Path

import pytest
import torch

import esfast
from esfast.tasks import embedded

ROWS = [{"prompt": str(i)} for i in range(1, 5)]
TOKENIZER = embedded.make_tokenizer()
# Options of `esfast train` for a run of little text.
FEW = (
    "--population-size 2 --prompts-per-generation 2 --eval-prompts 2 --max-completion-length 2 --no-progress"
).split()


def value(completions, **columns):
    return [float(text) for text in completions]


def other_value(completions, **columns):
    return [1 - float(text) for text in completions]


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = embedded.make_model(TOKENIZER)
    for name, setting in changes.items():
        setattr(model.config, name, setting)
    return model


def trainer(folder, reward=value, rows=ROWS, model=None, metrics=None, at=None, eval_rows=ROWS, **settings):
    """The reward of a member is a function of its weights. `at` is called with every batch of prompts."""
    model = model if model is not None else make_model()
    weight = next(model.parameters())

    def answer(prompts):
        if at is not None:
            at(made)
        return [str(float(weight.detach().double().sum()))] * len(prompts)

    settings = {
        "generations": 4,
        "population_size": 4,
        "sigma": 0.02,
        "lr": 0.02,
        "prompts_per_generation": 2,
        "eval_every": 0,
        "checkpoint_every": 1,
        "progress": False,
    } | settings
    config = esfast.ESConfig(output_dir=str(folder), **settings)
    made = esfast.ESTrainer(model, reward, config, rows, eval_rows, TOKENIZER, metrics, answer)
    return made


def fails_at(generation, error=None):
    """Stops a run inside this generation (numbered from 0) of the training."""

    def at(made):
        if made.es.generation == generation and made.es._inside is not None:
            raise error or ZeroDivisionError("made to fail")

    return at


def stopped(folder, generation, **options):
    made = trainer(folder, at=fails_at(generation), **options)
    with pytest.raises(ZeroDivisionError):
        made.train()
    return made


def contents(folder):
    """Every file's bytes and time of change."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def bits(made):
    return made.es.plan.fingerprint()


def facts(folder):
    """Summary and metrics of a finished run, without its times."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "evaluations": {k: summary[k] for k in ("generations", "before", "after", "after_generation")},
        "rows": [{k: v for k, v in r.items() if "second" not in k and k != "overhead_ratio"} for r in rows],
        "card": (folder / "model" / "README.md").read_text(),
        "weights": (folder / "model" / "model.safetensors").read_bytes(),
    }
