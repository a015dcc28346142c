"""esfast: full-parameter evolution-strategies fine-tuning of language models by inference alone."""

from .core.kinds import NOISE_VERSION
from .utils.lazy import lazily

__version__ = "0.1.0"

# Loaded on first use: `esfast --help` need not wait for torch, nor a user of add_noise_ for transformers.
_HOMES = {
    "noise": "core.noise",
    "Plan": "core.plan",
    "Slice": "core.plan",
    "add_noise_": "core.ops",
    "low_rank_factors": "core.factors",
    "ES": "es.es",
    "EsfastError": "utils.errors",
    "Team": "distributed.team",
    "SGD": "update.optimizers",
    "Momentum": "update.optimizers",
    "Adam": "update.optimizers",
    "Group": "update.optimizers",
    "ESConfig": "trainer.config",
    "ESTrainer": "trainer.trainer",
    "low_rank": "rollout.low_rank_model",
    "perturbed": "es.perturbation",
    "stacked": "rollout.stacked_model",
    "zscore": "es.shaping",
}
_ROOMS = ("core", "distributed", "es", "journal", "rewards", "rollout", "tasks", "trainer", "update")
# Modules that have short names, beside the rooms
_MODULES = {
    **{room: room for room in _ROOMS},
    "adapters": "rollout.adapters",
    "ops": "core.ops",
    "plan": "core.plan",
    "weights": "es.weights",
}
__all__ = ["NOISE_VERSION", *_HOMES]

__getattr__, __dir__ = lazily(__name__, _HOMES, _MODULES)
