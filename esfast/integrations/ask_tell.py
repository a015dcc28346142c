"""ES with the loop of evosax, EvoTorch and cma: ask for candidates, evaluate them, tell their fitness.

Those libraries return flat vectors, which their users copy into a model. Here a candidate is a seed. In a `with` block
the model's weights are the candidate's; no vector is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from ..core.plan import Plan
from ..es.es import ES, Member
from ..utils.errors import BadState, BadValue


class Candidate:
    """A member of the population. Inside `with candidate:` the model is that member."""

    def __init__(self, es: ES, member: Member):
        self._es, self.member = es, member

    @property
    def index(self) -> int:
        return self.member.index

    def __enter__(self) -> Candidate:
        if not any(self.member is m for m in self._es.members):
            raise BadState(f"candidate {self.index} is of a population of the past; ask for a new one")
        if self._es._inside is not None:
            raise BadState(f"candidate {self._es._inside.index} is still in place; leave its block first")
        self._es._enter(self.member)
        return self

    def __exit__(self, *exc) -> None:
        self._es._leave()

    def __repr__(self) -> str:
        return f"Candidate({self.index}, seed={self.member.seed}, sign={self.member.sign:+d})"


class AskTell:
    """The ask-tell interface of a flat-vector optimizer, for the weights of an nn.Module.

        es = AskTell(model, maximize=False, sigma=0.1, lr=0.1, population_size=50)
        for generation in range(100):
            candidates, losses = es.ask(), []
            for candidate in candidates:
                with candidate:
                    losses.append(loss(model))
            es.tell(candidates, losses)

    Args:
        model: as for `esfast.ES`. All further arguments go to `esfast.ES`.
        maximize: whether higher fitness is better; cma and evosax minimise.

    Attributes: `es`, the ES underneath.
    """

    def __init__(self, model: torch.nn.Module | Plan | Iterable[tuple], maximize: bool = True, **options):
        self.es, self.maximize = ES(model, **options), bool(maximize)
        self._asked: list[Candidate] = []

    def ask(self) -> list[Candidate]:
        """The candidates of this generation, population_size of them. Before `tell`, it returns the same ones again."""
        self._asked = [Candidate(self.es, m) for m in self.es.population().members]
        return list(self._asked)

    def tell(self, candidates: Sequence[Candidate], fitness: Sequence[float]):
        """Takes one ES step and returns its record (`esfast.update.updater.UpdateRecord`).

        Raises:
            ValueError: the candidates are not those of `ask`, each once and in any order; or a fitness is missing or
                not finite. No weight has changed.
        """
        candidates, values = list(candidates), [_number(f) for f in fitness]
        if sorted(map(id, candidates)) != sorted(map(id, self._asked)) or not candidates:
            raise BadValue(f"tell(): expected the {len(self._asked)} candidates that ask() gave, each once")
        if len(values) != len(candidates):
            raise BadValue(f"tell(): expected {len(candidates)} numbers, one a candidate, got {len(values)}")
        for candidate, value in zip(candidates, values, strict=True):
            if not math.isfinite(value):
                raise BadValue(f"tell(): the fitness of candidate {candidate.index} is {value}, not a finite number")
        for candidate, value in zip(candidates, values, strict=True):
            candidate.member.reward = value if self.maximize else -value
        record = self.es.step()
        self._asked = []
        return record


def _number(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise BadValue(f"tell(): expected a number for each candidate, got {value!r:.80}") from None
