"""Episodes of environments, in which code of a user talks with the model and returns the reward."""

from ...utils.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Episode": "episode",
        "Limits": "episode",
        "Episodes": "engine",
        "Settings": "engine",
        "EpisodesEvaluator": "evaluator",
        "Places": "evaluator",
    },
)
