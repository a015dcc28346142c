"""Episodes as an engine: rows go in and episodes come out, from the weights as they are."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...utils.errors import BadState, BadType
from .. import chat
from ..completion import Asked, Complete, Completion, complete
from ..engine import Engine
from ..sampling import LogitsError, response_seeds, turn_seeds
from .app import Endpoint
from .client import clients
from .episode import FIGURES, Episode, Limits
from .loop import Loops
from .port import Port
from .protocol import ApiError
from .runner import Play, Runner
from .session import Question


@dataclass(frozen=True)
class Settings:
    """How episodes run.

    limits       of each episode
    temperature  of requests that name none, in training; 0: greedy. Evaluations are greedy where a request names none
    port         None: requests stay in memory. A number: also a server on 127.0.0.1 with this port, 0 for any
    template     variables of the tokenizer's chat template
    """

    limits: Limits = Limits()
    temperature: float = 0.0
    port: int | None = None
    template: Mapping[str, Any] | None = None


class Episodes:
    """An esfast.rollout.Engine whose prompts are rows, and whose completions are episodes (Episode).

        engine = Episodes(environment, TransformersEngine(model, tokenizer, max_new_tokens=256), tokenizer)
        for episode in engine.generate(rows):
            print(episode.reward, episode.turns, episode.messages)

    An episode that fails has an `error` and no reward; nothing is raised for it.

    Args:
        environment: an object with `async episode(client, row) -> float`, or such a function. `client` is an
            openai.AsyncOpenAI, `client.model` the name to ask for. If its attribute `needs_port` is true there is a
            port, any one unless the settings name one.
        engine: generates the answers. One that has fixed settings (a function) refuses others.
        tokenizer: whose chat template turns messages into texts.
        settings: limits, temperature, port.

    Raises:
        TypeError: the environment is neither.
        ImportError: openai is not installed.
    """

    def __init__(self, environment: Any, engine: Engine, tokenizer: Any, settings: Settings | None = None):
        self.environment, self.engine, self.tokenizer = environment, engine, tokenizer
        self.settings = settings or Settings()
        self._play = check_environment(environment)
        self._endpoint = Endpoint()
        port = self.settings.port
        if port is None and getattr(environment, "needs_port", False):
            port = 0
        self._port = None if port is None else Port(self._endpoint, port)
        self._client_of = clients(self._endpoint, None if self._port is None else self._port.url)
        self._render = chat.Renderer(tokenizer, self.settings.template)
        self._loops, self._plays = Loops(), threading.Lock()
        self._done: list[Episode] = []
        weakref.finalize(self, self._loops.close)

    @property
    def tokens(self) -> int:
        return getattr(self.engine, "tokens", 0)

    def generate(self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int] | None = None) -> list[Episode]:
        """The episode of each row, in order. `seeds` has one for each row; None, in evaluations: answers are greedy
        where a request names no temperature.

        Raises what the engine raises, for example LogitsError, and RuntimeError while other episodes are played."""
        (found,) = self.of_members([rows], None if seeds is None else [seeds], self._alone)
        if isinstance(found, LogitsError):
            raise found
        return found

    def of_members(
        self,
        rows: Sequence[Sequence[Mapping[str, Any]]],
        seeds: Sequence[Sequence[int]] | None,
        complete: Complete,
        names: Sequence[str] | None = None,
    ) -> list[list[Episode] | LogitsError]:
        """The episodes of members that play at the same time; of a member whose weights give no text its error.

        Args:
            rows, seeds: of each member, as for `generate`.
            complete: how members complete texts.
            names: of the members, which requests may use beside "member".

        Raises RuntimeError while other episodes are played: their requests come to the same endpoint.
        """
        if not self._plays.acquire(blocking=False):
            raise BadState(
                "episodes are being played already, by another thread or by the episode that asks for more: play one "
                "call after another, or with another Episodes, which has an engine of its own"
            )
        try:
            return self._of_members(rows, seeds, complete, names)
        finally:
            self._plays.release()

    def _of_members(
        self,
        rows: Sequence[Sequence[Mapping[str, Any]]],
        seeds: Sequence[Sequence[int]] | None,
        complete: Complete,
        names: Sequence[str] | None,
    ) -> list[list[Episode] | LogitsError]:
        default = 0.0 if seeds is None else self.settings.temperature
        runner = Runner(
            self._loops,
            self._endpoint,
            self.settings.limits,
            self._play,
            self._client_of,
            self._render,
            self._prepare,
            functools.partial(self._answer, complete, default),
            None if self._port is None else self._port.serve,
        )
        found = runner(rows, [_seeds(len(own)) for own in rows] if seeds is None else seeds, names)
        if seeds is not None:
            self._done += [episode for own in found if not isinstance(own, LogitsError) for episode in own]
        return found

    def _alone(
        self, owners: Sequence[int], texts: Sequence[str], seeds: Sequence[int] | None, asked: Asked
    ) -> Sequence[Completion]:
        return complete(self.engine, texts, seeds, asked)

    def take_figures(self) -> dict[str, float]:
        """Means over the episodes with seeds since the last call, those of training; {} if there were none."""
        done, self._done = self._done, []
        means = {name: figure([], done) for name, figure in FIGURES.items()}
        return {name: sum(values) / len(values) for name, values in means.items() if values}

    def close(self) -> None:
        self.close_endpoint()
        self.engine.close()

    def close_endpoint(self) -> None:
        """Closes all but the engine."""
        self._loops.close()
        if self._port is not None:
            self._port.close()

    def _prepare(
        self, texts: Sequence[str], asked: Sequence[Asked], left: Sequence[int]
    ) -> list[tuple[int, Asked] | ApiError]:
        """Of each text the tokens of the prompt, and how it is asked, with the most tokens of the completion (None: the
        engine doesn't say). An ApiError if there is no room for the prompt, or the engine can't answer as it was asked
        to."""
        reader = getattr(self.engine, "prompts", None)
        longest = getattr(self.engine, "max_new_tokens", None) or getattr(reader, "max_new_tokens", None)
        if longest is not None:
            left = [min(tokens, longest) for tokens in left]
        pairs = list(zip(asked, left, strict=True))
        # Most requests ask alike.
        ways = {pair: self._way(*pair, longest) for pair in set(pairs)}
        rows = [[]] * len(texts) if reader is None else self._encoded(reader, texts)
        limit = None if reader is None else reader.limit
        found: list[Any] = []
        for ids, pair in zip(rows, pairs, strict=True):
            how, way = pair[0], ways[pair]
            if isinstance(way, ApiError):
                # each request its own exception
                found.append(self._way(*pair, longest))
            elif type(ids) is ApiError:
                found.append(ids)
            elif reader is None:
                found.append((0, way[0] if longest or how.max_tokens else how))
            else:
                found.append(_fitted(len(ids), limit, *way))
        return found

    def _way(self, how: Asked, left: int, longest: int | None) -> tuple[Asked, int | None] | ApiError:
        """How a text is asked, with the most tokens of its completion; and how many there must be room for in any case,
        None for any number. An ApiError if the engine can't answer in this way."""
        try:
            if callable(getattr(self.engine, "complete_texts", None)):
                return how._replace(max_tokens=_most(how.max_tokens, longest, left)), how.max_tokens
            # An engine with fixed settings, whose answers can't be cut short.
            self._check_alike(how, longest)
            return how._replace(max_tokens=longest or left), longest
        except ApiError as error:
            return error

    def _encoded(self, reader: Any, texts: Sequence[str]) -> list[Any]:
        """Token ids of the texts, encoded together, which takes a fraction of one by one. A text that the tokenizer
        refuses has an ApiError instead."""
        # A tokenizer may refuse a text with any exception.
        with contextlib.suppress(Exception):
            return reader.tokens(texts)
        found: list[Any] = []
        for text in texts:
            try:
                found += reader.tokens([text])
            except Exception as error:
                found.append(ApiError(400, "invalid_value", f"prompt: {error}", "messages"))
        return found

    def _check_alike(self, how: Asked, longest: int | None) -> None:
        """An ApiError if the request asks for what an engine with fixed settings can't do."""
        fixed = {"max_tokens": (None, longest), "temperature": (None, 0.0, self.settings.temperature), "top_p": (1.0,)}
        for name, known in fixed.items():
            if getattr(how, name) not in known:
                raise ApiError(
                    400,
                    "unsupported_value",
                    f"{name}: {type(self.engine).__name__} answers all requests alike; leave it out, got "
                    f"{getattr(how, name)!r}",
                    name,
                )

    def _answer(
        self,
        complete: Complete,
        default: float,
        questions: Sequence[Question],
        texts: Sequence[str],
        asked: Sequence[Asked],
    ) -> list[Completion | LogitsError]:
        """Completions of all; those that are asked alike are completed together."""

        def own(how: Asked) -> Asked:
            temperature = default if how.temperature is None else how.temperature
            # None: the engine's own, which is the run's.
            named = None if temperature and temperature == self.settings.temperature else temperature
            return Asked(how.max_tokens, named, how.top_p)

        own_of = {how: own(how) for how in set(asked)}
        found: list[Completion | LogitsError | None] = [None] * len(texts)
        groups: dict[Asked, list[int]] = {}
        for i, how in enumerate(asked):
            groups.setdefault(own_of[how], []).append(i)
        for how, places in groups.items():
            seeds = None
            if how.temperature != 0:
                seeds = turn_seeds([questions[i].seed for i in places], [questions[i].turn for i in places])
            owners = [questions[i].session.member for i in places]
            for i, completion in zip(places, complete(owners, [texts[i] for i in places], seeds, how), strict=True):
                found[i] = completion
        return [completion for completion in found if completion is not None]


def _most(asked: int | None, longest: int | None, left: int) -> int:
    """The most tokens of a completion. ApiError if more are asked than the engine's longest has."""
    if asked is None:
        return left if longest is None else min(left, longest)
    if longest is not None and asked > longest:
        raise ApiError(
            400,
            "invalid_value",
            f"max_tokens: expected at most {longest} (max_completion_length), got {asked}; without it, the most",
            "max_tokens",
        )
    return min(left, asked)


def _fitted(length: int, limit: int | None, how: Asked, wanted: int | None) -> tuple[int, Asked] | ApiError:
    """The tokens of a prompt, and how it is asked: with as many tokens of a completion as there is room for. An
    ApiError if there is no room."""
    most: Any = how.max_tokens
    room = most if limit is None else limit - length
    if length and room >= most:
        return length, how
    if not length or room < (1 if wanted is None else most):
        return ApiError(
            400,
            "context_length_exceeded",
            f"the prompt has {length} tokens and the model's context {limit}, which leaves no room for "
            f"{'a completion' if wanted is None else f'{most} tokens'}",
            "messages",
        )
    return length, how._replace(max_tokens=room)


@functools.lru_cache(8)
def _seeds(rows: int) -> tuple[int, ...]:
    """Of the rows of an evaluation."""
    return tuple(response_seeds(0, 0, rows, 1))


def check_environment(environment: Any) -> Play:
    """Its coroutine function (client, row) -> reward. TypeError if it has none."""
    play = getattr(environment, "episode", environment)
    is_coroutine = any(map(inspect.iscoroutinefunction, (play, getattr(type(play), "__call__", None))))  # noqa: B004
    if not callable(play) or isinstance(environment, type) or not is_coroutine:
        raise BadType(
            "environment: expected an object with `async def episode(self, client, row)`, or such a function, which "
            f"returns the reward, got {environment!r:.80}"
        )
    try:
        inspect.signature(play).bind(None, None)
    except TypeError as error:
        raise BadType(f"environment: episode(client, row) can't be called like this: {error}") from None
    return play
