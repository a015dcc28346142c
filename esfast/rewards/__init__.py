"""Reward functions, called here or in worker processes."""

from ..utils.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "RewardError": "scorer",
        "RewardFunc": "scorer",
        "Scorer": "scorer",
    },
)
