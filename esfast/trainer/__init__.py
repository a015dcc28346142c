"""ESTrainer: from a model, prompts and rewards to a tuned model in a run folder."""

from ..utils.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "ESTrainer": "trainer",
        "ESConfig": "config",
    },
)
