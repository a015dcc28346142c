"""Arguments of the client's `create` as the JSON object of a request."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any


class NotPlain(Exception):
    """A request is not only JSON, or the answer is not to be."""


# Arguments of `create` that are no fields of the request. How long to wait for an answer is the run's to say.
NO_FIELDS = frozenset({"extra_headers", "extra_query", "extra_body", "timeout"})
TEXTS = {str}

# The messages of a client's last chat, those of the answer included: what each one had in it, and its JSON.
Told = list[tuple[dict[str, Any], dict[str, Any]]]


def reader(openai: Any) -> Callable[[Mapping[str, Any], Told], dict[str, Any]]:
    """Returns (arguments of `create`, what was told before) -> the JSON object of the request, a copy. Of a chat that
    goes on it reads only the new messages, and adds them to what was told. It raises NotPlain if the library would do
    more than to send this object, or raise an error itself."""
    left_out = frozenset({openai.NotGiven, openai.Omit})
    answer = openai.types.chat.ChatCompletionMessage

    @functools.cache
    def is_answer(kind: Any) -> bool:
        return issubclass(kind, openai.BaseModel) and not getattr(kind, "__api_exclude__", None)

    def json_of(value: Any) -> Any:
        kind: Any = type(value)
        if kind is dict:
            # TypeError if a name is no text
            "".join(value)
            return {
                name: item if type(item) is str and item.isascii() else json_of(item) for name, item in value.items()
            }
        if kind is str:
            # of half a character the library can't make a request
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
            elif type(message) is not answer or vars(message) != fields or message.model_extra:
                break
            found.append(json)
        del told[len(found) :]
        for message in messages[len(found) :]:
            if type(message) is dict and set(map(type, message.values())) == TEXTS:
                json = message.copy()
                # An error if a name is no text, or for half a character: the library can't make a request of them.
                "".join((*json, *json.values())).encode()
                # Only such messages: a number may equal one of another type, and a list can be changed in place.
                if len(told) == len(found):
                    told.append((json, json))
            else:
                json = json_of(message)
            found.append(json)
        return found

    def plain(asked: Mapping[str, Any], told: Told) -> dict[str, Any]:
        fields = {}
        try:
            for name, value in asked.items():
                kind = type(value)
                if name == "messages" and kind is list:
                    fields[name] = chat(value, told)
                elif name not in NO_FIELDS and kind not in left_out:
                    fields[name] = json_of(value)
            if (further := asked.get("extra_body")) is not None:
                if type(further) is not dict:
                    raise NotPlain
                fields |= json_of(further)
        except (ValueError, TypeError, RecursionError):
            raise NotPlain from None
        if asked.get("extra_headers") or asked.get("extra_query") or fields.get("stream"):
            raise NotPlain
        return fields

    return plain
