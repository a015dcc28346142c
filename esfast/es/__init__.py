"""ES: members, shaping, and the weight modes."""

from ..utils.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "ES": "es",
        "Member": "population",
        "Packets": "population",
        "Population": "population",
        "coefficients": "es",
        "perturbed": "perturbation",
        "zscore": "shaping",
        "centered_rank": "shaping",
        "MODES": "weights",
        "WeightStore": "store",
        "LocalStore": "store",
    },
)
