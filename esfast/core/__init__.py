"""The noise, and the one pass over the weights that adds it."""
