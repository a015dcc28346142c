"""Several processes: who scores which member, shared updates, models in shards."""

from ..utils.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Team": "team",
        "SharedUpdates": "team",
        "shard": "tensor_parallel",
    },
)
