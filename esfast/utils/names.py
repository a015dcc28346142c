"""The values of settings that are names. They stand here so that the command line can list them without torch."""

ROUNDINGS = ("nearest", "stochastic")  # of updates and of members, see esfast.core.ops
WEIGHT_MODES = ("base", "master", "host", "inplace")  # where weights come back from, see esfast.es.weights
DECAY_TO = ("zero", "initial")  # where weight decay leads, see esfast.update
DECODINGS = ("auto", "plain", "static", "continuous")  # how Transformers generates, see esfast.rollout.decoding
