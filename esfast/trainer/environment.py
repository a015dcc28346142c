"""What ESTrainer gets from an environment: a reward function, metrics, rows, and an engine that plays episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..rewards.scorer import RewardError, RewardFunc
from ..rollout.episodes.engine import Episodes, Settings, check_environment
from ..rollout.episodes.episode import FIGURES, Episode, Limits
from ..rollout.episodes.evaluator import EpisodesEvaluator, check_places
from ..rollout.evaluator import MemberEvaluator
from ..utils.errors import BadType, BadValue
from ..utils.rows import Rows, by_row
from .config import ESConfig


def episode_reward(prompts, completions: Sequence[Episode], **columns) -> list[float | None]:
    """The reward function of environments: each episode's own reward. RewardError for the first one that failed."""
    for episode in completions:
        if episode.error is not None:
            raise RewardError(episode.error) from episode.cause
    return [episode.reward for episode in completions]


class Given(NamedTuple):
    """The arguments of ESTrainer that say what is learned."""

    reward_funcs: Any
    metrics: Mapping[str, RewardFunc] | None
    train_dataset: Any
    eval_dataset: Any


def of_environment(environment: Any, given: Given, config: ESConfig, shards: int = 1, evaluator: Any = None) -> Given:
    """What the trainer goes on with: the arguments themselves without an environment. With one its episodes' rewards
    are the reward function, and rows that are not given come from its methods `rows(generation, count, seed)` and
    `held_out(count)`; rows need no prompt.

    Raises TypeError or ValueError for an environment that is none, for reward functions beside it, and for settings
    that don't go with it.
    """
    if environment is None:
        if given.reward_funcs is None:
            raise BadType("reward_funcs: expected a function or several; or give an environment")
        return given
    check_environment(environment)
    if given.reward_funcs:
        raise BadType("reward_funcs: an environment's episodes return their rewards; give one or the other")
    if given.metrics:
        raise BadType("metrics: an environment's episodes are measured by turns, tokens and seconds; leave metrics out")
    if config.kl_to_base:
        raise BadValue("kl_to_base: it is measured over single responses, not over episodes; leave it out")
    if evaluator is not None:
        check_places(evaluator)
    if shards > 1:
        # Limits on time could end an episode in one of the processes alone, which would then wait for ever.
        raise BadValue("tensor_parallel_size: an environment needs the whole model in each process; leave it at 1")
    train, held_out = given.train_dataset, given.eval_dataset
    if train is None:
        if not callable(getattr(environment, "rows", None)):
            raise BadType("train_dataset: the environment has no method rows(generation, count, seed); give the rows")
        train = _generated(environment, config.seed)
        if held_out is None and callable(getattr(environment, "held_out", None)):
            held_out = list(environment.held_out(config.eval_prompts)) or None
    if callable(train):
        drawn = train
        train = lambda generation, count: with_prompts("train_dataset", drawn(generation, count))  # noqa: E731
        train.__module__, train.__qualname__ = _name_of(drawn)
    else:
        train = with_prompts("train_dataset", train)
    return Given(episode_reward, FIGURES, train, with_prompts("eval_dataset", held_out))


def with_prompts(what: str, rows: Any) -> Any:
    """The rows, each with a prompt: an empty one where there is none. What is not rows stays as it is."""
    rows = by_row(what, rows, prompt=False)
    if rows is None or isinstance(rows, str) or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        return rows
    found = [rows[i] for i in range(len(rows))]
    return [{"prompt": "", **row} if isinstance(row, Mapping) else row for row in found]


def playing(environment: Any, evaluator: MemberEvaluator, tokenizer: Any, config: ESConfig) -> MemberEvaluator:
    """The evaluator whose members play episodes, where the given one puts them in place."""
    if environment is None:
        return evaluator
    # Its prompts are rows, and its completions episodes.
    given: Any = evaluator
    found: Any = EpisodesEvaluator(Episodes(environment, evaluator.engine, tokenizer, settings_of(config)), given)
    return found


def settings_of(config: ESConfig) -> Settings:
    """How episodes run."""
    limits = Limits(
        turns=config.max_episode_turns,
        tokens=config.max_episode_tokens or 2**31,
        seconds=config.episode_timeout,
        at_once=config.episodes_at_once,
    )
    return Settings(limits, config.temperature, config.endpoint_port, config.chat_template_kwargs)


def _generated(environment: Any, seed: int) -> Callable[[int, int], Rows]:
    return lambda generation, count: environment.rows(generation, count, seed)


def _name_of(function: Any) -> tuple[str, str]:
    return getattr(function, "__module__", __name__), getattr(function, "__qualname__", type(function).__qualname__)
