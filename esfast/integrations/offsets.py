"""Noise that separate calls add to weights and take away again, as in MeZO and es-at-scale."""

from __future__ import annotations

from collections.abc import Callable

from ..utils.errors import BadValue
from ..utils.interrupts import defer_sigint


class Offsets:
    """Weights plus sum_j coeffs[j] * noise(seeds[j]), where each call changes one term.

    Other code adds +1, -2 and +1 times the noise, and rounds three times. Here the coefficients of a seed are added up,
    and the weights are written from the base in one pass. So the weights are the sum, rounded once, at any time; and
    when all terms have cancelled, they are the base, to the bit.

    mode: a weight mode of esfast.es.weights. Several seeds at once need a mode with a base on the device: base, master.
    on_change: called before noise is added to weights that something else has written. Default: they become the base.
    """

    def __init__(self, mode, on_change: Callable[[], None] | None = None):
        self.mode, self._on_change = mode, on_change if on_change is not None else mode.adopt
        self.terms: dict[int, float] = {}  # coefficient by seed, in the order of their first call

    def add(self, seed: int, coeff: float) -> None:
        """Adds coeff * noise(seed). ValueError or TypeError if `add_noise_` refuses it; no weight has then changed."""
        self.follow()
        terms = {**self.terms, seed: self.terms.get(seed, 0.0) + coeff}
        terms = {s: c for s, c in terms.items() if c != 0}
        # The weights and the note of what was added to them must stay consistent.
        with defer_sigint():
            if len(terms) > 1:
                self._place(terms)
            elif terms:
                self.mode.perturb(*next(iter(terms.items())))
            else:
                self.mode.restore()
            self.terms = terms

    def follow(self) -> None:
        """If no noise is in place, makes the base equal to the weights."""
        if not self.terms and self.mode.changed_elsewhere():
            self._on_change()

    def clear(self) -> None:
        """Takes all noise away."""
        with defer_sigint():
            self.mode.restore()
            self.terms = {}

    def _place(self, terms: dict[int, float]) -> None:
        if not hasattr(self.mode, "place"):
            raise BadValue(
                f"{type(self.mode).__name__} holds one seed's noise at a time; take that of {next(iter(self.terms))} "
                'away first, or use weights="base"'
            )
        self.mode.place(terms)
