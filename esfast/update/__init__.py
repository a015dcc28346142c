"""Optimizers, groups of weights, and the Updater that applies a generation to the weights."""

from ..utils.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Updater": "updater",
        "Rule": "updater",
        "UpdateRecord": "updater",
        "Generation": "updater",
        "Optimizer": "optimizer",
        "SGD": "optimizers",
        "Momentum": "optimizers",
        "Adam": "optimizers",
        "Group": "optimizers",
    },
)
