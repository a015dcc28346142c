"""The part of the OpenAI API that members speak: requests are checked here, and answers put into its form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..completion import Asked, Completion

MOST_STOPS = 16
TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


class ApiError(Exception):
    """An answer with an error: its HTTP status, and the code, message and parameter of the API's error object."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error"}.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Options(NamedTuple):
    """What a request says besides its prompt. `seed` is 0 if none was given."""

    asked: Asked
    stop: tuple[str, ...]
    seed: int
    tools: list[dict[str, Any]] | None
    template: dict[str, Any] | None


@dataclass(slots=True)
class Request:
    """A checked request. `prompt` is a list of messages, or a text."""

    kind: Kind
    prompt: Any
    options: Options

    @property
    def row(self) -> dict[str, Any]:
        """What `chat.render` takes."""
        options = self.options
        return {"prompt": self.prompt, "tools": options.tools, "chat_template_kwargs": options.template}

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.prompt if self.kind is CHAT else [{"role": "user", "content": self.prompt}]


# Reads a field of a request: (name, value that is not None) -> value, or an ApiError.
Read = Callable[[str, Any], Any]


class Answer(NamedTuple):
    """What a member answers. `message` is the assistant's, without fields that are None."""

    id: str
    model: str
    message: dict[str, Any]
    finish_reason: str
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of requests.

    prompt       the name of the field with the prompt
    read_prompt  reads that field
    fields       how each other field is read
    json         answer -> its JSON object
    """

    prompt: str
    read_prompt: Read
    fields: Mapping[str, Read]
    json: Callable[[Answer], dict[str, Any]]


def read_request(kind: Kind, body: Any, models: tuple[str, ...]) -> Request:
    """The request from its JSON, of which it may keep parts. Raises ApiError."""
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", f"expected a JSON object, got {body!r:.60}")
    options = read_options(kind, body, models)
    return Request(kind, kind.read_prompt(kind.prompt, body.get(kind.prompt)), options)


def read_options(kind: Kind, fields: Mapping[str, Any], models: tuple[str, ...]) -> Options:
    """What the fields of a request say besides the prompt. A field that is None is as one that is left out. Raises
    ApiError."""
    found = {
        name: kind.fields.get(name, _unknown)(name, value)
        for name, value in fields.items()
        if value is not None and name != kind.prompt
    }
    if (model := found.get("model")) not in models:
        known_models = ", ".join(map(repr, models))
        raise ApiError(404, "model_not_found", f"model: expected {known_models}, got {model!r:.80}", "model")
    most = found.get("max_completion_tokens") or found.get("max_tokens")
    return Options(
        Asked(most, found.get("temperature"), found.get("top_p", 1.0)),
        found.get("stop", ()),
        found.get("seed", 0),
        None if found.get("tool_choice") == "none" else found.get("tools"),
        found.get("chat_template_kwargs"),
    )


def answer_of(request: Request, completion: Completion, name: str, model: str, prompt_tokens: int) -> Answer:
    """The answer with this id."""
    text, reason = _stopped(request, completion)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    calls = tool_calls(text, name) if request.options.tools else []
    if calls:
        rest, reason = TOOL_CALL.sub("", text).strip(), "tool_calls"
        message = {"role": "assistant", **({"content": rest} if rest else {}), "tool_calls": calls}
    return Answer(name, model, message, reason, prompt_tokens, completion.tokens)


def chat_json(answer: Answer) -> dict[str, Any]:
    """A chat completion."""
    return _json("chat.completion", answer, {"message": {"content": None, "refusal": None, **answer.message}})


def text_json(answer: Answer) -> dict[str, Any]:
    """A text completion."""
    return _json("text_completion", answer, {"text": answer.message["content"]})


def said(message: dict[str, Any]) -> dict[str, Any]:
    """The message without fields that are None, such as those of an answer that is sent back; of a message without
    text, as one of tool calls, the content stays."""
    if None not in message.values():
        return message
    return {k: v for k, v in message.items() if v is not None or k == "content"}


def tool_calls(text: str, unique: str) -> list[dict[str, Any]]:
    """The calls in a text of Hermes' and Qwen's form, <tool_call>{"name": ..., "arguments": {...}}</tool_call>. Empty
    if one of them is not of this form: the text then stays as it is."""
    found = []
    for number, written in enumerate(TOOL_CALL.findall(text)):
        try:
            call = json.loads(written)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, KeyError, RecursionError):
            return []
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return []
        function = {"name": name, "arguments": json.dumps(arguments)}
        found.append({"id": f"call-{unique}-{number}", "type": "function", "function": function})
    return found


def _unknown(name: str, value: Any) -> Any:
    raise ApiError(400, "unsupported_parameter", f"{name}: esfast's endpoint doesn't know this field", name)


def _as_it_is(name: str, value: Any) -> Any:
    return value


def _only(*accepted: Any) -> Read:
    """Reads a field whose accepted values don't change the answer."""

    def read(name: str, value: Any) -> Any:
        if value in accepted:
            return value
        shown = " or ".join(map(json.dumps, accepted))
        advice = f"only {shown}" if accepted else "leave it out"
        raise ApiError(
            400, "unsupported_value", f"{name}: esfast's endpoint doesn't support {value!r:.60}: {advice}", name
        )

    return read


def _number(least: float, most: float) -> Read:
    def read(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise _wrong(name, f"a number from {least:g} to {most:g}", value)
        return float(value)

    return read


def _top_p(name: str, value: Any) -> float:
    if value == 0:
        raise _wrong(name, "more than 0", value)
    return _number(0, 1)(name, value)


def _length(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(name, "a whole number of at least 1", value)
    return value


def _seed(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, "a whole number", value)
    return value % 2**64


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _wrong(name, f"a text, or a list of at most {MOST_STOPS} texts, none of them empty", value)
    return tuple(stops)


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    return value


def _tools(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _wrong(name, "a list of JSON schemas", value)
    return value


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or set(map(type, value)) != {dict}:
        raise _wrong(name, "a list of messages", value)
    return value


def _prompt(name: str, value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if not isinstance(value, str):
        raise _wrong(name, ONE_TEXT, value)
    return value


ONE_TEXT = "one text; ask once for each prompt, and not with token ids"
# The fields of both kinds of requests.
COMMON: dict[str, Read] = {
    "model": _as_it_is,
    "temperature": _number(0, 100),
    "top_p": _top_p,
    "max_tokens": _length,
    "stop": _stops,
    "seed": _seed,
    "stream": _only(False, True),
    "stream_options": _object,
    "n": _only(1),
    "best_of": _only(1),
    "logprobs": _only(False),
    "top_logprobs": _only(),
    "echo": _only(False),
    "suffix": _only(""),
    "presence_penalty": _only(0),
    "frequency_penalty": _only(0),
    "logit_bias": _only({}),
    "response_format": _only({"type": "text"}),
    "tool_choice": _only("auto", "none"),
    "modalities": _only(["text"]),
    "store": _only(False),
}
# About billing, caches and statistics of the service, which mean nothing here.
WITHOUT_EFFECT = (
    "user metadata service_tier safety_identifier prompt_cache_key parallel_tool_calls prompt_cache_retention"
)
COMMON |= dict.fromkeys(WITHOUT_EFFECT.split(), _as_it_is)
OF_CHATS: dict[str, Read] = {
    "tools": _tools,
    "max_completion_tokens": _length,
    "chat_template_kwargs": _object,
}
CHAT = Kind("messages", _messages, COMMON | OF_CHATS, chat_json)
TEXT = Kind("prompt", _prompt, COMMON, text_json)


def _stopped(request: Request, completion: Completion) -> tuple[str, str]:
    """The text up to the first stop string, and why it ends there."""
    if stops := request.options.stop:
        places = [place for stop in stops if (place := completion.text.find(stop)) >= 0]
        if places:
            return completion.text[: min(places)], "stop"
    return completion.text, "stop" if completion.ended else "length"


def _json(object_name: str, answer: Answer, said: dict[str, Any]) -> dict[str, Any]:
    name, model, _, reason, asked, answered = answer
    return {
        "id": name,
        "created": 0,
        "model": model,
        "object": object_name,
        "choices": [{"index": 0, **said, "finish_reason": reason, "logprobs": None}],
        "usage": {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered},
    }


def _wrong(name: str, expected: str, got: Any) -> ApiError:
    return ApiError(400, "invalid_value", f"{name}: expected {expected}, got {got!r:.80}", name)
