"""Engines: prompts in, completions out."""

from ..utils.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Engine": "engine",
        "TransformersEngine": "engine",
        "CallableEngine": "engine",
        "as_engine": "engine",
        "MemberEvaluator": "evaluator",
        "SequentialEvaluator": "evaluator",
        "PopulationEvaluator": "population",
    },
)
