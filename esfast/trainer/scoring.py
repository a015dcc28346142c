"""The rewards of a generation: asks its members for completions and scores these."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence

from ..distributed.team import Team
from ..es.es import ES
from ..es.population import Member, Population
from ..rewards.scorer import RewardError, RewardFunc, Scorer, Scores, combine, each, judge
from ..rollout import chat
from ..rollout.evaluator import MemberEvaluator
from ..utils.interrupts import Stops
from ..utils.stats import mean
from .batches import Batch
from .clock import PhaseTimer
from .config import ESConfig
from .held_out import Judge, nonsense

log = logging.getLogger(__name__)


class Scoring:
    """Asks the members of a population, and sets their rewards. Reward functions of one member may run while the next
    one generates.

    scorer   calls `reward_funcs`, `metrics` and `further` functions, in this process or in workers
    weights  factors of the reward functions
    responses  of this process's members so far
    """

    def __init__(
        self,
        evaluator: MemberEvaluator,
        reward_funcs: Sequence[RewardFunc],
        weights: Sequence[float],
        metrics: Mapping[str, RewardFunc],
        config: ESConfig,
        team: Team,
        further: Sequence[RewardFunc] = (),
    ):
        # Of the processes that hold a model together only the first scores.
        self._scores = team.is_group_leader
        workers = config.reward_workers if self._scores else 0
        self.scorer = Scorer([*reward_funcs, *metrics.values(), *further], workers, config.reward_timeout)
        self._evaluator, self._reward_funcs, self._weights, self._metrics = evaluator, reward_funcs, weights, metrics
        self.skips = config.on_reward_error == "skip"
        self.responses = 0

    def __call__(self, es: ES, batch: Batch, clock: PhaseTimer, stops: Stops) -> None:
        """Sets the rewards of this process's members of a new population. With on_reward_error="skip" a member that
        gives no text, or whose reward functions fail, has none; otherwise that is the error. Afterwards the weights
        are as before."""
        with es.population() as members:
            scored = self._ask(es, members, batch, clock, stops, self._set_aside)
        clock.record("perturb")
        for member, scores in scored:
            member.reward = self._reward(es, member, scores)
        clock.record("wait")

    def by_prompt(self, es: ES, members: Population, batch: Batch, stops: Stops) -> dict[int, list[float]]:
        """The reward of each prompt, by the index of the member, of this process's members: NaN for a prompt that no
        function judges, and everywhere for a member that gives no text. Nothing else is set aside without "skip"."""
        missing = [math.nan] * len(batch.texts)
        found: dict[int, list[float]] = {}

        def no_text(es: ES, member: Member, error: Exception) -> None:
            found[member.index] = missing

        for member, scores in self._ask(es, members, batch, PhaseTimer(es.store.device), stops, no_text):
            try:
                found[member.index] = each(scores.result(), self._weights)
            except RewardError as error:
                self._set_aside(es, member, error)
                found[member.index] = missing
        return found

    def of(self, batch: Batch, completions: Sequence[str] | None) -> list[float]:
        """The reward of each completion as in `by_prompt`; of None, which is no text, NaN. So it is with "skip" if a
        reward function fails."""
        missing = [math.nan] * len(batch.texts)
        if completions is None:
            return missing
        scores = self.scorer.submit(self._reward_funcs, *chat.answered(batch.rows, completions))
        try:
            return each(scores.result(), self._weights)
        except RewardError as error:
            if not self.skips:
                raise
            log.warning("a step that was tried out has no rewards: %s", error)
            return missing

    def _ask(
        self,
        es: ES,
        members: Population,
        batch: Batch,
        clock: PhaseTimer,
        stops: Stops,
        no_text: Callable[[ES, Member, Exception], None],
    ) -> list[tuple[Member, Scores]]:
        """The scores of the members that gave text; `no_text` is told of the others."""
        scored = []
        members.on_placed, members.prompts_of = functools.partial(clock.record, "perturb"), batch.of
        with contextlib.closing(self._evaluator.evaluate(members, batch.texts, batch.seeds)) as answers:
            for member, completions in answers:
                clock.record("generate")
                self.responses += 0 if isinstance(completions, Exception) else len(completions)
                if isinstance(completions, Exception):
                    whose = f"member {member.index} of generation {es.generation} (sigma {es.sigma:g})"
                    no_text(es, member, nonsense(whose))
                elif self._scores:
                    answered = chat.answered(batch.rows[batch.of(member)], completions)
                    scored.append((member, self.scorer.submit(self._reward_funcs, *answered)))
                stops.check()
                clock.record("score")
        return scored

    def _reward(self, es: ES, member: Member, scores: Scores) -> float | None:
        try:
            return mean(combine(scores.result(), self._weights))
        except RewardError as error:
            self._set_aside(es, member, error)
            return None

    def _set_aside(self, es: ES, member: Member, error: Exception) -> None:
        """Leaves the member without a reward, or raises the error."""
        if not self.skips:
            raise error
        log.warning("member %d of generation %d is set aside: %s", member.index, es.generation, error)

    @property
    def judge(self) -> Judge:
        """Scores an evaluation: (rows, completions) -> each reward function's scores, and the figures to log."""
        return functools.partial(judge, self.scorer, self._reward_funcs, self._weights, self._metrics, skip=self.skips)
