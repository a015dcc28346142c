"""esfast: full-parameter evolution-strategies fine-tuning of language models by inference alone."""

from importlib import import_module

from .noise import NOISE_VERSION, noise

__version__ = "0.1.0"

# Loaded on first use: `esfast --help` need not wait for torch, nor a user of add_noise_ for transformers.
_HOMES = {
    "Plan": "plan",
    "Slice": "plan",
    "add_noise_": "ops",
    "ES": "es",
    "Team": "distributed",
    "SGD": "optimizers",
    "Momentum": "optimizers",
    "Adam": "optimizers",
    "Group": "optimizers",
    "ESConfig": "config",
    "ESTrainer": "trainer",
    "perturbed": "perturbation",
    "zscore": "shaping",
}
_MODULES = ("es", "journal", "ops", "plan", "rollout", "tasks", "trainer", "update", "weights")
__all__ = ["NOISE_VERSION", "noise", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
