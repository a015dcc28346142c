"""Environments with `reset` and `step`, as Gymnasium, OpenEnv and TRL have them, and games of TextArena."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..core.random_stream import RandomStream
from ..utils.errors import BadImport, BadType, BadValue


class StepEnvironment:
    """An environment for ESTrainer from one with `reset` and `step`.

        environment = StepEnvironment(lambda row: gymnasium.make("Taxi-v3"), action=int)

    An observation is a message of the user, an answer of the model an action. `step` returns what Gymnasium's or Gym's
    does, (observation, reward, terminated, truncated, info) or (observation, reward, done, info), or as OpenEnv's an
    object with `observation`, `reward` and `done`. The reward of an episode is the sum of its steps' rewards. `reset`
    and `step` may be coroutine functions. `close` is called at the end if there is one.

    Args:
        make: row -> an environment of its own for the episode.
        action: the model's text -> the action. If it raises ValueError, the episode ends with what it has earned.
        show: observation -> the text for the model.
        reset: row -> the arguments of `reset`. Default: the row's `seed`, if it has one.
    """

    def __init__(
        self,
        make: Callable[[Mapping[str, Any]], Any],
        action: Callable[[str], Any] = str,
        show: Callable[[Any], str] = str,
        reset: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ):
        self.make, self.action, self.show = make, action, show
        self.reset = reset or (lambda row: {"seed": row["seed"]} if "seed" in row else {})

    async def episode(self, client: Any, row: Mapping[str, Any]) -> float:
        environment, messages, total = self.make(row), [], 0.0
        try:
            begun = await _result(environment.reset(**self.reset(row)))
            observation = begun[0] if isinstance(begun, tuple) else getattr(begun, "observation", begun)
            done = False
            while not done:
                messages.append({"role": "user", "content": self.show(observation)})
                answer = await client.chat.completions.create(model=client.model, messages=messages)
                messages.append(answer.choices[0].message)
                try:
                    action = self.action(answer.choices[0].message.content or "")
                except ValueError:
                    break
                observation, reward, done = _stepped(await _result(environment.step(action)))
                total += reward
        finally:
            await _result(getattr(environment, "close", _nothing)())
        return total


class TextArena:
    """A game of TextArena, `--environment textarena:GuessTheNumber-v0`. The model plays all players, each of whom has a
    conversation of its own; the reward is that of player 0, a row's `seed` decides about the game.

    Raises ImportError if textarena is missing, ValueError for an unknown game.
    """

    max_new_tokens = 256

    def __init__(self, name: str, players: int = 1):
        try:
            self._library = importlib.import_module("textarena")
        except ImportError as error:
            raise BadImport(f"environment: textarena:{name} needs the package textarena: {error}") from None
        self.name, self.players = name, players
        try:
            self._library.make(name)
        except Exception as error:
            # It raises exceptions of many types.
            raise BadValue(f"environment: textarena has no game {name!r}, or can't make it: {error}") from None

    def rows(self, generation: int, count: int, seed: int) -> list[dict]:
        stream = RandomStream(f"textarena/{seed}/{generation}", "problems")
        return [{"seed": 2 * stream.below(2**30)} for _ in range(count)]

    def held_out(self, count: int) -> list[dict]:
        """Of odd seeds, which `rows` never gives."""
        return [{"seed": 2 * i + 1} for i in range(count)]

    async def episode(self, client: Any, row: Mapping[str, Any]) -> float:
        draws, game = Draws(row["seed"]), self._library.make(self.name)
        talks: dict[int, list] = {}
        with draws.own():
            game.reset(num_players=self.players, seed=row["seed"])
        done = False
        while not done:
            with draws.own():
                player, observation = game.get_observation()
            talk = talks.setdefault(player, [])
            talk.append({"role": "user", "content": _told(observation)})
            answer = await client.chat.completions.create(model=client.model, messages=talk)
            talk.append(answer.choices[0].message)
            with draws.own():
                done, _ = game.step(answer.choices[0].message.content or "")
        rewards, _ = game.close()
        return float(rewards[0])


class Draws:
    """Python's random numbers for one episode: others, which run between its turns, draw from theirs."""

    def __init__(self, seed: int):
        self._state = random.Random(seed).getstate()

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        outer = random.getstate()
        random.setstate(self._state)
        try:
            yield
        finally:
            self._state = random.getstate()
            random.setstate(outer)


def _stepped(result: Any) -> tuple[Any, float, bool]:
    """(observation, reward, done) from what a `step` returned. TypeError for anything else."""
    if isinstance(result, tuple) and len(result) in (4, 5):
        return result[0], float(result[1]), any(map(bool, result[2:-1]))
    try:
        return result.observation, float(result.reward or 0.0), bool(result.done)
    except AttributeError:
        raise BadType(
            "environment: step() returned neither (observation, reward, terminated, truncated, info) nor an object "
            f"with observation, reward and done, but {result!r:.80}"
        ) from None


def _told(observation: Any) -> str:
    """TextArena's observation as a text: it is one already, or (from, message, type) for each thing that happened."""
    return observation if isinstance(observation, str) else "\n".join(str(event[1]) for event in observation)


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _nothing() -> None: ...
