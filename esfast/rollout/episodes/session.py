"""The model's side of one running episode: its requests, their answers, and how much of its limits is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ...utils.time_limit import now
from ..completion import Completion
from ..sampling import response_seeds
from .episode import Episode, Limits, Transcript
from .protocol import ApiError, Request, Write

# Any client may use this name for the member that plays its episode.
MEMBER = "member"


class Question:
    """A request that waits for the engine."""

    __slots__ = "session", "request", "turn", "answer", "since"

    def __init__(self, session: Session, request: Request, turn: int):
        self.session, self.request, self.turn = session, request, turn
        self.answer: asyncio.Future[tuple[Completion, int]] = session.loop.create_future()
        self.since = now()

    @property
    def seed(self) -> int:
        """The seed of the answer: a function of the row and the turn, so the same for all members, and of the request's
        own seed if it has one."""
        return response_seeds((self.session.seed + self.request.seed) % 2**64, self.turn, 1, 1)[0]


class Session:
    """A Speaker of the endpoint.

    member      which of the members that play at the same time answers
    index, row  the row's number, and the row
    seed        of the row's episode
    ask         hands a Question in; its future gets the answer
    loop        the event loop that episodes run on, in this thread
    name        a further name of the member
    """

    def __init__(
        self,
        member: int,
        index: int,
        row: Mapping[str, Any],
        seed: int,
        limits: Limits,
        ask: Callable[[Question], Awaitable[tuple[Completion, int]]],
        loop: asyncio.AbstractEventLoop,
        name: str | None = None,
    ):
        self.member, self.index, self.row, self.seed, self.limits = member, index, row, seed, limits
        self.models: tuple[str, ...] = (MEMBER,) if name is None else (MEMBER, name)
        self._ask, self.loop, self._thread = ask, loop, threading.get_ident()
        self.turns = self.tokens = self.waiting = 0
        self.task: asyncio.Task | None = None
        self.over = False
        # Seconds outside the model until `since`, and the time when the last cancellation came.
        self.spent, self.since = 0.0, now()
        self.ended_at: float | None = None
        self._transcript = Transcript()

    async def answer(self, request: Request, write: Write) -> dict[str, Any]:
        """See Speaker. Raises ApiError if the episode is over or has used up its limits."""
        limits = self.limits
        if self.over or self.turns >= limits.turns or self.tokens >= limits.tokens:
            raise self._refusal()
        # asyncio.get_running_loop would ask the system for the number of the process.
        if threading.get_ident() != self._thread:
            # The episode asks from a thread that has an event loop of its own.
            asked = asyncio.run_coroutine_threadsafe(self.answer(request, write), self.loop)
            return await asyncio.wrap_future(asked)
        turn, self.turns = self.turns, self.turns + 1
        self._pause()
        try:
            completion, prompt_tokens = await self._ask(Question(self, request, turn))
        finally:
            self._resume()
        self.tokens += completion.tokens
        head = {"id": f"esfast-{self.index}-{turn}", "created": 0, "model": self.models[0]}
        answer, message = write(request, completion, head, prompt_tokens)
        self._transcript.add(request.messages, message)
        return answer

    @property
    def seconds(self) -> float:
        """Time outside the model so far."""
        return self.spent + (0.0 if self.waiting else now() - self.since)

    def not_charged(self, seconds: float) -> None:
        """Leaves out of the episode's time what the model took for other episodes."""
        if not self.waiting:
            self.since += seconds

    def episode(self, reward: float | None, error: str | None, cause: BaseException | None = None) -> Episode:
        """Ends the session and returns the Episode. Later requests are refused."""
        self.spent, self.over = self.seconds, True
        self.since = now()
        error = None if error is None else f"row {self.index} ({_shown(self.row)}): its episode {error}"
        return Episode(reward, error, self.turns, self.tokens, self.spent, self._transcript.messages, cause)

    def _refusal(self) -> ApiError:
        if self.over:
            return ApiError(400, "episode_over", f"row {self.index}: the episode is over")
        name = "turns" if self.turns >= self.limits.turns else "tokens"
        used = f"the episode has used its {getattr(self.limits, name)} {name} (max_episode_{name})"
        return ApiError(400, f"{name}_limit", f"row {self.index}: {used}")

    def _pause(self) -> None:
        if not self.waiting:
            self.spent += now() - self.since
        self.waiting += 1

    def _resume(self) -> None:
        self.waiting -= 1
        if not self.waiting:
            self.since = now()


def _shown(row: Mapping[str, Any]) -> str:
    text = " ".join(repr(dict(row)).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
