"""Noise that is added to weights and taken away again by separate calls, as MeZO and es-at-scale do it."""

from __future__ import annotations

from collections.abc import Callable

from ..utils.errors import BadValue
from ..utils.interrupts import held


class Offsets:
    """Weights plus sum_j coeffs[j] * noise(seeds[j]), whose terms come and go one call at a time.

    Where code adds +1, -2 and +1 times the noise and rounds thrice, here the coefficients are added up and the weights
    are written anew from the base, in one pass: they are the rounded sum at any time, and when all terms have cancelled
    they are the base, to the bit.

    mode: one of esfast.es.weights, which says where the base is. Several seeds at once need a mode with a base on the
        device (base, master).
    on_change: called before noise is added to clean weights that somebody else has written; default: they become the
        base.
    """

    def __init__(self, mode, on_change: Callable[[], None] | None = None):
        self.mode, self._on_change = mode, on_change if on_change is not None else mode.adopt
        self.terms: dict[int, float] = {}  # coefficient by seed, in the order of their first call

    def add(self, seed: int, coeff: float) -> None:
        """Adds coeff * noise(seed). ValueError or TypeError for what `add_noise_` refuses; weights are untouched."""
        self.follow()
        terms = {**self.terms, seed: self.terms.get(seed, 0.0) + coeff}
        terms = {s: c for s, c in terms.items() if c != 0}
        with held():  # what is applied and what is noted down must not part
            if len(terms) > 1:
                self._place(terms)
            elif terms:
                self.mode.perturb(*next(iter(terms.items())))
            else:
                self.mode.restore()
            self.terms = terms

    def follow(self) -> None:
        """If nothing is in place, sees to it that the base is what the weights are."""
        if not self.terms and self.mode.changed_elsewhere():
            self._on_change()

    def clear(self) -> None:
        """Takes all of it away."""
        with held():
            self.mode.restore()
            self.terms = {}

    def _place(self, terms: dict[int, float]) -> None:
        if not hasattr(self.mode, "place"):
            raise BadValue(
                f"{type(self.mode).__name__} holds one seed's noise at a time; take that of {next(iter(self.terms))} "
                'away first, or use weights="base"'
            )
        self.mode.place(terms)
