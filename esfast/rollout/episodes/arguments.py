"""Arguments of the client's `create` as a request, without the JSON text that the library would send."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ...utils.rows import check_text
from ..chat import TEXTS
from .protocol import CHAT, Kind, Options, Request, read_options


class NotPlain(Exception):
    """A request is not only JSON, or the answer is not to be."""


# Arguments of `create` that are no fields of the request. How long to wait for an answer is the run's to say.
NO_FIELDS = frozenset({"extra_headers", "extra_query", "extra_body", "timeout"})

# The messages of a client's last chat, those of the answer included: what each one had in it, and its JSON.
Seen = list[tuple[dict[str, Any], dict[str, Any]]]


class ArgumentReader:
    """Reads the arguments of a `create` of the library.

        request = ArgumentReader(openai, CHAT, AsyncCompletions.create)(arguments, names of the model, seen)

    It keeps nothing that the caller may change. Of a chat that goes on it reads only the new messages, and adds them to
    those that were seen.

    Raises ApiError for a request that is refused, and NotPlain if the library would do more than to send the arguments
    as JSON, or raise an error itself.
    """

    def __init__(self, openai: Any, kind: Kind, create: Callable[..., Any]):
        self._kind, self._base = kind, openai.BaseModel
        self._known = frozenset(inspect.signature(create).parameters)
        self._left_out = frozenset({openai.NotGiven, openai.Omit})
        self._answer = openai.types.chat.ChatCompletionMessage
        self._is_answer = functools.cache(self._find_whether_answer)
        # Most requests of a run say the same besides the prompt.
        self._options_once = functools.lru_cache(256)(self._options)

    def __call__(self, asked: dict[str, Any], models: tuple[str, ...], seen: Seen) -> Request:
        kind, given = self._kind, asked.copy()
        prompt = given.pop(kind.prompt, None)
        # With types: a number may equal one of another type.
        others = models, tuple(given.items()), tuple(map(type, given.values()))
        try:
            try:
                options = self._options_once(*others)
            except TypeError:
                # It has lists or objects.
                options = self._options(*others)
            if kind is CHAT and type(prompt) is list:
                return Request(kind, self._chat(prompt, seen), options)
            prompt = self._json_of(prompt)
        except (ValueError, TypeError, RecursionError):
            raise NotPlain from None
        return Request(kind, kind.read_prompt(kind.prompt, prompt), options)

    def _options(self, models: tuple[str, ...], given: Iterable[tuple[str, Any]], types: Any) -> Options:
        return read_options(self._kind, self._fields(dict(given)), models)

    def _fields(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object of the arguments besides the prompt."""
        if not given.keys() <= self._known or given.get("extra_headers") or given.get("extra_query"):
            raise NotPlain
        found = {
            name: self._json_of(value)
            for name, value in given.items()
            if name not in NO_FIELDS and type(value) not in self._left_out
        }
        if (further := given.get("extra_body")) is not None:
            if type(further) is not dict or self._kind.prompt in further:
                raise NotPlain
            found |= self._json_of(further)
        if found.get("stream"):
            raise NotPlain
        return found

    def _chat(self, messages: list[Any], seen: Seen) -> list[Any]:
        """The JSON of the messages, each of them an object."""
        found, answer = [], self._answer
        for message, (fields, json) in zip(messages, seen, strict=False):
            if type(message) is dict:
                if message != fields and message != json:
                    break
            elif type(message) is not answer or vars(message) != fields or message.__pydantic_extra__:
                break
            found.append(json)
        del seen[len(found) :]
        for message in messages[len(found) :]:
            if type(message) is dict and TEXTS.issuperset(map(type, message.values())):
                check_text("request", "".join((*message, *message.values())))
                json = message.copy()
                # Only texts are seen: a number may equal one of another type, and a list can be changed in place.
                if len(seen) == len(found):
                    seen.append((json, json))
            else:
                json = self._json_of(message)
                if type(json) is not dict:
                    raise NotPlain
            found.append(json)
        if not found:
            raise NotPlain
        return found

    def _json_of(self, value: Any) -> Any:
        kind: Any = type(value)
        if kind is dict:
            # a TypeError if a name is no text
            check_text("request", "".join(value))
            return {name: self._json_of(item) for name, item in value.items()}
        if kind is str:
            check_text("request", value)
            return value
        if kind is list or kind is tuple:
            return [self._json_of(item) for item in value]
        if value is None or kind is int or kind is bool or (kind is float and math.isfinite(value)):
            return value
        if self._is_answer(kind):
            # an answer, or a part of one, that is sent back
            given = value.model_fields_set
            fields = {name: item for name, item in vars(value).items() if name in given}
            return self._json_of(fields | (value.model_extra or {}))
        raise NotPlain

    def _find_whether_answer(self, kind: type) -> bool:
        return issubclass(kind, self._base) and not getattr(kind, "__api_exclude__", None)
