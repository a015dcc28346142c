"""Arguments of the client's `create` as a request, without the JSON text that the library would send."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..chat import TEXTS
from .protocol import CHAT, Kind, Options, Request, read_options


class NotPlain(Exception):
    """A request is not only JSON, or the answer is not to be."""


# Arguments of `create` that are no fields of the request. How long to wait for an answer is the run's to say.
NO_FIELDS = frozenset({"extra_headers", "extra_query", "extra_body", "timeout"})

# The messages of a client's last chat, those of the answer included: what each one had in it, and its JSON.
Told = list[tuple[dict[str, Any], dict[str, Any]]]


def reader(
    openai: Any, kind: Kind, create: Callable[..., Any]
) -> Callable[[dict[str, Any], tuple[str, ...], Told], Request]:
    """Returns (arguments of `create`, names of the model, what was told before) -> the request. It keeps nothing that
    the caller may change. Of a chat that goes on it reads only the new messages, and adds them to what was told.

    It raises ApiError for a request that is refused, and NotPlain if the library would do more than to send the
    arguments as JSON, or raise an error itself."""
    known = frozenset(inspect.signature(create).parameters)
    left_out = frozenset({openai.NotGiven, openai.Omit})
    answer = openai.types.chat.ChatCompletionMessage

    @functools.cache
    def is_answer(kind: Any) -> bool:
        return issubclass(kind, openai.BaseModel) and not getattr(kind, "__api_exclude__", None)

    def json_of(value: Any) -> Any:
        kind: Any = type(value)
        if kind is dict:
            # An error if a name is no text, or for half a character: the library can't make a request of them.
            "".join(value).encode()
            return {
                name: item if type(item) is str and item.isascii() else json_of(item) for name, item in value.items()
            }
        if kind is str:
            value.encode()
            return value
        if kind is list or kind is tuple:
            return [json_of(item) for item in value]
        if value is None or kind is int or kind is bool or (kind is float and math.isfinite(value)):
            return value
        if is_answer(kind):
            # an answer, or a part of one, that is sent back
            given = value.model_fields_set
            fields = {name: item for name, item in vars(value).items() if name in given}
            return json_of(fields | (value.model_extra or {}))
        raise NotPlain

    def chat(messages: list[Any], told: Told) -> list[Any]:
        found = []
        for message, (fields, json) in zip(messages, told, strict=False):
            if type(message) is dict:
                if message != fields and message != json:
                    break
            elif type(message) is not answer or vars(message) != fields or message.__pydantic_extra__:
                break
            found.append(json)
        del told[len(found) :]
        for message in messages[len(found) :]:
            json = json_of(message)
            # Only texts: a number may equal one of another type, and a list can be changed in place.
            if len(told) == len(found) and type(message) is dict and set(map(type, json.values())) == TEXTS:
                told.append((json, json))
            found.append(json)
        return found

    def fields(given: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object of the arguments besides the prompt."""
        if not given.keys() <= known or given.get("extra_headers") or given.get("extra_query"):
            raise NotPlain
        found = {
            name: json_of(value)
            for name, value in given.items()
            if name not in NO_FIELDS and type(value) not in left_out
        }
        if (further := given.get("extra_body")) is not None:
            if type(further) is not dict or kind.prompt in further:
                raise NotPlain
            found |= json_of(further)
        if found.get("stream"):
            raise NotPlain
        return found

    def options(models: tuple[str, ...], given: Iterable[tuple[str, Any]], types: Any) -> Options:
        return read_options(kind, fields(dict(given)), models)

    # Most requests of a run say the same. With types: a number may equal one of another type.
    options_once = functools.lru_cache(256)(options)

    def request(asked: dict[str, Any], models: tuple[str, ...], told: Told) -> Request:
        given = asked.copy()
        prompt = given.pop(kind.prompt, None)
        said = models, tuple(given.items()), tuple(map(type, given.values()))
        try:
            try:
                how = options_once(*said)
            except TypeError:
                # It has lists or objects.
                how = options(*said)
            prompt = chat(prompt, told) if kind is CHAT and type(prompt) is list else json_of(prompt)
        except (ValueError, TypeError, RecursionError):
            raise NotPlain from None
        return Request(kind, kind.read_prompt(kind.prompt, prompt), how)

    return request
