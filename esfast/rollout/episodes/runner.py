"""Runs the episodes of some rows together, those of one member or of several, and answers their requests in batches."""

from __future__ import annotations

import asyncio
import functools
import itertools
import operator
import re
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any

from ...utils.errors import BadState
from ...utils.garbage import rare_collections
from ...utils.time_limit import TooSlow, now
from ..completion import Asked, Completion
from ..sampling import LogitsError
from .app import Endpoint
from .client import part_with
from .episode import Episode, Limits, check_reward
from .loop import Loops
from .protocol import ApiError
from .session import MEMBER, Question, Session
from .watch import described, stdout_is_stderr

# Seconds that a request waits for those of other episodes while these wait for something outside, and while code of
# episodes runs without an end.
PATIENCE, LONGEST_PATIENCE = 0.01, 1.0
# Seconds that an episode has to end once it was cancelled.
GRACE = 1.0
# Objects that an episode and its request keep until the answer is there are about 50; more have to be made before
# Python looks for garbage.
OBJECTS = 100
# Random bytes of a key.
KEY = 16
# The order in which the engine answers.
PLACE = operator.attrgetter("session.member", "session.index", "turn")

Play = Callable[[Any, Mapping[str, Any]], Awaitable[Any]]
Prepare = Callable[[Sequence[str], Sequence[Asked], Sequence[int]], "Sequence[tuple[int, Asked] | ApiError]"]
Answers = Callable[[Sequence[Question], Sequence[str], Sequence[Asked]], "Sequence[Completion | LogitsError]"]


class Runner:
    """Plays one episode a row and member.

        (episodes,) = Runner(Loops(), endpoint, limits, play, client_of, render, prepare, answer)([rows], [seeds])

    The loop runs in this thread. Requests wait until every episode that runs waits for an answer. Then the engine
    answers all of them, in the order of members and rows, and the loop goes on. So the batches are the same in every
    run. Only if an episode waits for something outside (a tool, a sandbox) are the others' requests answered without
    it.

    play       (client, row) -> reward, a coroutine function
    client_of  key -> the client of the episode with this key
    render     rows as in `chat.render` -> texts
    prepare    (texts, how each is to be continued, tokens that its episode has left) -> of each text (tokens of the
               prompt, how it is continued with the most tokens of the completion), or an ApiError if that can't be done
    answer     (questions, their texts, how each is asked) -> Completions; a LogitsError for a member that gives no
               text, whose episodes then end. May raise, which ends the run
    serve      a coroutine that serves the endpoint on a port until it is cancelled, or None
    """

    def __init__(
        self,
        loops: Loops,
        endpoint: Endpoint,
        limits: Limits,
        play: Play,
        client_of: Callable[[str], Any],
        render: Callable[[Sequence[Mapping[str, Any]]], list[str]],
        prepare: Prepare,
        answer: Answers,
        serve: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ):
        self._loops, self._endpoint, self._limits = loops, endpoint, limits
        self._play, self._client_of = play, client_of
        self._render, self._prepare = render, prepare
        self._answer, self._serve = answer, serve
        self._running: dict[tuple[int, int], Session] = {}
        self._questions: list[Question] = []
        self._just_ended: list[Session] = []
        self._looked = 0.0

    def __call__(
        self,
        rows: Sequence[Sequence[Mapping[str, Any]]],
        seeds: Sequence[Sequence[int]],
        names: Sequence[str] | None = None,
    ) -> list[list[Episode] | LogitsError]:
        """The episodes of each member's rows, in order; of a member that gives no text its error. `names` are names of
        the members at the endpoint. Raises what the engine raises."""
        self._episodes: list[list[Episode | None]] = [[None] * len(own) for own in rows]
        self._broken: dict[int, LogitsError] = {}
        # (member, (index, (row, seed))), the first row of all members first: where only some episodes run at once,
        # members have equally many.
        queues = [
            zip(itertools.repeat(member), enumerate(zip(own, of_own, strict=True)), strict=False)
            for member, (own, of_own) in enumerate(zip(rows, seeds, strict=True))
        ]
        self._left = deque(filter(None, itertools.chain.from_iterable(itertools.zip_longest(*queues))))
        self._models = [(MEMBER,)] * len(rows) if names is None else [(MEMBER, name) for name in names]
        # One draw of all keys takes a fraction of the time; one says nothing of another.
        drawn = secrets.token_hex(KEY * len(self._left))
        self._keys = iter(re.findall("." * 2 * KEY, drawn))
        if self._left:
            self._run()
        return [
            self._broken.get(member) or [episode for episode in own if episode is not None]
            for member, own in enumerate(self._episodes)
        ]

    def _run(self) -> None:
        # A port that was served on a loop is open on it until the loop is closed.
        lent = self._loops.lend(self._before_select, self._limits.seconds, self._charge, keep=self._serve is None)
        at_once = min(self._limits.at_once, len(self._left))
        with stdout_is_stderr(), rare_collections(OBJECTS * at_once), lent as loop:
            self._loop, self._done = loop, loop.create_future()
            try:
                server = None if self._serve is None else loop.create_task(self._serve())
                with loop.together():
                    self._start()
                loop.run_until_complete(self._done)
                if server is not None:
                    server.cancel()
            except TooSlow:
                # Raised beside the steps of an episode, whose callback blocked the loop.
                raise BadState(
                    f"environment: a callback of an episode blocked the event loop for {self._limits.seconds:g} s"
                ) from None
            finally:
                self._running, self._left = {}, deque()
                self._questions.clear()
                self._endpoint.speakers.clear()

    # ---- episodes ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        left, running, limits, loop = self._left, self._running, self._limits, self._loop
        while left and len(running) < limits.at_once:
            member, (index, (row, seed)) = left.popleft()
            session = Session(member, index, row, seed, limits, self._questions.append, loop, self._models[member])
            key = next(self._keys)
            self._endpoint.speakers[key] = running[member, index] = session
            session.task = loop.start(self._episode(session, key), functools.partial(self._on_last_step, session))

    async def _episode(self, session: Session, key: str) -> float:
        client = self._client_of(key)
        try:
            return check_reward(await self._play(client, session.row))
        finally:
            self._endpoint.speakers.pop(key, None)
            part_with(client)

    def _on_last_step(self, session: Session) -> None:
        """Says that the episode has ended, and whether it took too long. Its task is done after this step."""
        if session.ended_at is None and session.seconds > self._limits.seconds:
            session.ended_at = now()
        self._just_ended.append(session)

    def _note_ended(self) -> bool:
        """Notes the outcomes of episodes that have ended. Whether there were any."""
        ended = [session for session in self._just_ended if session.task.done()]
        # An episode that makes steps of its own may seem to have ended.
        self._just_ended = [session for session in self._just_ended if not session.task.done()]
        with self._loop.together():
            for session in ended:
                if not session.over:
                    self._note_outcome(session, session.task)
        return bool(ended)

    def _note_outcome(self, session: Session, task: asyncio.Task) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None and session.ended_at is None:
            self._note(session, session.episode(task.result(), None))
        elif session.ended_at is not None or isinstance(error, TooSlow):
            self._note(session, session.episode(None, self._too_long, error))
        else:
            self._note(session, session.episode(None, _words(error), error))

    def _note(self, session: Session, episode: Episode) -> None:
        self._episodes[session.member][session.index] = episode
        del self._running[session.member, session.index]
        if self._left:
            self._start()
        elif not self._running and not self._done.done():
            self._done.set_result(None)

    def _give_up(self, member: int, error: LogitsError) -> None:
        """Ends the episodes of a member that gives no text."""
        if member in self._broken:
            return
        self._broken[member] = error
        self._left = deque(left for left in self._left if left[0] != member)
        for session in [s for s in self._running.values() if s.member == member]:
            session.task.cancel()
            self._note(session, session.episode(None, str(error), error))

    def _charge(self, task: asyncio.Task | None, seconds: float) -> None:
        """Takes a long step of one episode off the time of the others."""
        for session in self._running.values():
            if session.task is not task:
                session.not_charged(seconds)

    @property
    def _too_long(self) -> str:
        return f"took more than {self._limits.seconds:g} s (episode_timeout)"

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def _before_select(self, timeout: float | None) -> float | None:
        """Called when the loop looks for events: answers the requests if it is time to. Returns the new timeout."""
        if not self._running:
            return timeout
        if self._just_ended and self._note_ended():
            # What was started, or the end of the run, is ready to be called.
            timeout = 0
        moment, idle = now(), timeout is None or timeout > 0
        self._end_late(moment)
        while self._questions and self._questions[0].answer.done():
            # It was cancelled.
            del self._questions[0]
        if self._questions:
            waited = moment - self._questions[0].since
            all_wait = idle and all(session.waiting for session in self._running.values())
            if all_wait or waited > (PATIENCE if idle else LONGEST_PATIENCE):
                self._answer_questions()
                return 0
        wake = PATIENCE if self._questions else min(0.25, self._limits.seconds / 4)
        return wake if timeout is None else min(timeout, wake)

    def _end_late(self, moment: float) -> None:
        if moment - self._looked < min(0.1, self._limits.seconds / 4):
            return
        self._looked = moment
        for session in list(self._running.values()):
            if session.ended_at is None and session.seconds > self._limits.seconds:
                session.ended_at = moment
                session.task.cancel()
            elif session.ended_at is not None and moment - session.ended_at > GRACE:
                # It goes on in spite of it: it is left behind, and no request of it is answered.
                self._note(session, session.episode(None, self._too_long))

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _answer_questions(self) -> None:
        began = now()
        # Others were cancelled, too.
        asked = [question for question in self._questions if not question.answer.done()]
        asked.sort(key=PLACE)
        self._questions.clear()
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            questions = _allowed(asked)
            questions, texts = _accepted(questions, self._texts(questions))
            text_of = dict(zip(questions, texts, strict=True))
            questions, prepared = _accepted(
                questions,
                self._prepare(
                    texts,
                    [question.request.options.asked for question in questions],
                    [self._limits.tokens - question.session.tokens for question in questions],
                ),
            )
            self._questions += _beyond_tokens(questions, prepared)
            if questions:
                self._answered(questions, [text_of[question] for question in questions], prepared)
        finally:
            asyncio._set_running_loop(outer)
        took = now() - began
        for session in self._running.values():
            session.not_charged(took)

    def _answered(
        self, questions: Sequence[Question], texts: Sequence[str], prepared: Sequence[tuple[int, Asked]]
    ) -> None:
        found = self._answer(questions, texts, [how for _, how in prepared])
        with self._loop.together():
            for question, (length, _), completion in zip(questions, prepared, found, strict=True):
                if isinstance(completion, LogitsError):
                    self._give_up(question.session.member, completion)
                    # That cancels the requests of the member's episodes, but not those from outside.
                    if not question.answer.done():
                        question.answer.set_exception(ApiError(400, "episode_over", str(completion)))
                elif not question.answer.done():
                    question.answer.set_result((completion, length))

    def _texts(self, questions: Sequence[Question]) -> list[str | ApiError]:
        """The texts that the model continues; for a request that has none, why."""
        rows = [question.request.row for question in questions]
        if len(self._models) == 1:
            return self._rendered(rows)
        # Of several members many say the same. What is in a row came as JSON.
        try:
            keys = list(map(repr, rows))
        except RecursionError:
            return self._rendered(rows)
        distinct = dict(zip(keys, rows, strict=True))
        text_of = dict(zip(distinct, self._rendered(list(distinct.values())), strict=True))
        return [text_of[key] for key in keys]

    def _rendered(self, rows: list[dict[str, Any]]) -> list[str | ApiError]:
        try:
            return list(self._render(rows))
        # A template may raise anything, and lists in lists can be too deep for it.
        except Exception:
            return list(itertools.chain.from_iterable(map(self._text, rows)))

    def _text(self, row: Mapping[str, Any]) -> list[str | ApiError]:
        try:
            return list(self._render([row]))
        except Exception as error:
            return [ApiError(400, "invalid_value", str(error), "messages")]


def _allowed(questions: Sequence[Question]) -> list[Question]:
    """The questions of episodes that may go on. The others are refused: an episode may have asked several at once, and
    used its tokens for the first of them."""
    allowed = []
    for question in questions:
        session = question.session
        if session.over or session.tokens >= session.limits.tokens:
            question.answer.set_exception(session.refusal())
        else:
            allowed.append(question)
    return allowed


def _beyond_tokens(questions: list[Question], prepared: list[tuple[int, Asked]]) -> list[Question]:
    """Takes those questions out of both lists for which their episodes may have no tokens left once their earlier ones
    are answered, and returns them."""
    if len({question.session for question in questions}) == len(questions):
        return []
    left: dict[Session, int] = {}
    later = []
    for question, (_, how) in list(zip(questions, prepared, strict=True)):
        session, most = question.session, how.max_tokens or 0
        if session not in left:
            left[session] = session.limits.tokens - session.tokens - most
        elif most <= left[session]:
            left[session] -= most
        else:
            later.append(question)
    prepared[:] = [one for question, one in zip(questions, prepared, strict=True) if question not in later]
    questions[:] = [question for question in questions if question not in later]
    return later


def _accepted(questions: Sequence[Question], found: Sequence[Any]) -> tuple[list[Question], list[Any]]:
    """The questions for which something was found, and that. Those with an ApiError are answered with it."""
    if ApiError not in set(map(type, found)):
        return list(questions), list(found)
    accepted: list[Question] = []
    for question, one in zip(questions, found, strict=True):
        if isinstance(one, ApiError):
            question.answer.set_exception(one)
        else:
            accepted.append(question)
    return accepted, [one for one in found if not isinstance(one, ApiError)]


def _words(error: BaseException | None) -> str:
    name = described(lambda: str(type(error).__name__), "an exception without a name")
    return f"raised {name}: " + described(lambda: f"{str(error):.1000}", "(its message can't be made)")
