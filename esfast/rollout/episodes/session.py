"""The model's side of one running episode: its requests, their answers, and how much of its limits is left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ...utils.time_limit import now
from ..completion import Completion
from .episode import Episode, Limits, add_new
from .protocol import Answer, ApiError, Request, answer_of
from .watch import described

# Any client may use this name for the member that plays its episode.
MEMBER = "member"


class Question:
    """A request that waits for the engine."""

    __slots__ = "session", "request", "turn", "answer", "since"

    def __init__(self, session: Session, request: Request, turn: int, since: float):
        self.session, self.request, self.turn, self.since = session, request, turn, since
        # (the completion, tokens of the prompt)
        self.answer: asyncio.Future[tuple[Completion, int]] = asyncio.Future(loop=session.loop)

    @property
    def seed(self) -> int:
        """What the seed of the answer is made from, with the turn: the row, so the same for all members, and the
        request's own seed if it has one."""
        return (self.session.seed + self.request.options.seed) % 2**64


class Session:
    """A Speaker of the endpoint.

    member      which of the members that play at the same time answers
    index, row  the row's number, and the row
    seed        of the row's episode
    ask         hands a Question in, whose future gets the answer
    loop        the event loop that episodes run on, in this thread
    models      names of the member
    """

    def __init__(
        self,
        member: int,
        index: int,
        row: Mapping[str, Any],
        seed: int,
        limits: Limits,
        ask: Callable[[Question], None],
        loop: asyncio.AbstractEventLoop,
        models: tuple[str, ...],
    ):
        self.member, self.index, self.row, self.seed = member, index, row, seed
        self.limits, self.models = limits, models
        self._ask, self.loop, self._thread = ask, loop, threading.get_ident()
        self.since = now()
        self._messages: list[dict[str, Any]] = []

    # What it has used of its limits, and how many of its requests wait for an answer.
    turns = tokens = waiting = 0
    # Seconds outside the model until `since`.
    spent = 0.0
    # Its task, once that was started; whether it is over; and when it was found to have taken too long.
    task: asyncio.Task
    over = False
    ended_at: float | None = None

    async def answer(self, request: Request) -> Answer:
        """See Speaker. Raises ApiError if the episode is over or has used up its limits."""
        limits = self.limits
        if self.over or self.turns >= limits.turns or self.tokens >= limits.tokens:
            raise self.refusal()
        # asyncio.get_running_loop would ask the system for the number of the process.
        if threading.get_ident() != self._thread:
            # The episode asks from a thread that has an event loop of its own.
            asked = asyncio.run_coroutine_threadsafe(self.answer(request), self.loop)
            return await asyncio.wrap_future(asked)
        turn, self.turns = self.turns, self.turns + 1
        question = Question(self, request, turn, now())
        if not self.waiting:
            self.spent += question.since - self.since
        self.waiting += 1
        try:
            self._ask(question)
            completion, prompt_tokens = await question.answer
        finally:
            self.waiting -= 1
            if not self.waiting:
                self.since = now()
        self.tokens += completion.tokens
        answer = answer_of(request, completion, f"esfast-{self.index}-{turn}", self.models[0], prompt_tokens)
        add_new(self._messages, request.messages, answer.message)
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
        return Episode(reward, error, self.turns, self.tokens, self.spent, list(self._messages), cause)

    def refusal(self) -> ApiError:
        """Why it gets no answer, if it is over or has used up its limits."""
        if self.over:
            return ApiError(400, "episode_over", f"row {self.index}: the episode is over")
        name = "turns" if self.turns >= self.limits.turns else "tokens"
        used = f"the episode has used its {getattr(self.limits, name)} {name} (max_episode_{name})"
        return ApiError(400, f"{name}_limit", f"row {self.index}: {used}")


def _shown(row: Mapping[str, Any]) -> str:
    text = described(lambda: " ".join(repr(dict(row)).split()), "it can't be shown")
    return text if len(text) <= 100 else f"{text[:97]}..."
