"""The part of the OpenAI API that members speak: requests are checked here, and answers put into its form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..completion import Asked, Completion

# Fields whose only accepted values don't change the answer; None is accepted for each.
NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False, True),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "modalities": (["text"],),
    "store": (False,),
}
# Fields about billing, caches and statistics of the service, which mean nothing here.
WITHOUT_EFFECT = frozenset(
    "user metadata service_tier safety_identifier prompt_cache_key parallel_tool_calls prompt_cache_retention".split()
)
COMMON = frozenset({"model", "temperature", "top_p", "max_tokens", "stop", "seed", "stream_options"})
CHAT = COMMON | {"messages", "tools", "max_completion_tokens", "chat_template_kwargs"}
TEXT = COMMON | {"prompt"}
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


@dataclass(frozen=True)
class Request:
    """A checked request. `row` has the prompt, a text or a chat, and what `chat.render` takes besides; `seed` is 0 if
    none was given."""

    row: dict[str, Any]
    asked: Asked
    stop: tuple[str, ...]
    seed: int
    chat: bool

    @property
    def messages(self) -> list[dict[str, Any]]:
        prompt = self.row["prompt"]
        return list(prompt) if self.chat else [{"role": "user", "content": prompt}]


def chat_request(body: Any, models: Sequence[str]) -> Request:
    """The request of /v1/chat/completions. Raises ApiError."""
    _check(body, CHAT, models)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise _wrong("messages", "a list of messages", messages)
    tools = body.get("tools") if body.get("tool_choice") != "none" else None
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(t, Mapping) for t in tools)):
        raise _wrong("tools", "a list of JSON schemas", tools)
    options = body.get("chat_template_kwargs")
    if options is not None and not isinstance(options, Mapping):
        raise _wrong("chat_template_kwargs", "an object", options)
    row = {"prompt": [_plain(m) for m in messages], "tools": tools, "chat_template_kwargs": options}
    longest = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    return Request(row, _asked(body, longest), _stops(body), _seed(body), True)


def text_request(body: Any, models: Sequence[str]) -> Request:
    """The request of /v1/completions. Raises ApiError."""
    _check(body, TEXT, models)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str):
        raise _wrong("prompt", "one text; ask once for each prompt, and not with token ids", prompt)
    return Request({"prompt": prompt}, _asked(body, "max_tokens"), _stops(body), _seed(body), False)


# (request, completion, id, time and model of the answer, tokens of the prompt) -> the JSON object of the answer
Write = Callable[[Request, Completion, Mapping[str, Any], int], dict[str, Any]]


def chat_answer(request: Request, completion: Completion, head: Mapping[str, Any], prompt_tokens: int) -> dict:
    """The object of a chat completion. `head` has its id, time and model."""
    text, reason = _stopped(request, completion)
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    calls = tool_calls(text, head["id"]) if request.row.get("tools") else []
    if calls:
        message |= {"content": TOOL_CALL.sub("", text).strip() or None, "tool_calls": calls}
        reason = "tool_calls"
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(prompt_tokens, completion)}


def text_answer(request: Request, completion: Completion, head: Mapping[str, Any], prompt_tokens: int) -> dict:
    """The object of a text completion."""
    text, reason = _stopped(request, completion)
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
    return {**head, "object": "text_completion", "choices": [choice], "usage": _usage(prompt_tokens, completion)}


def said(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The assistant's message in an answer, without fields that are None."""
    (choice,) = answer["choices"]
    message = choice.get("message") or {"role": "assistant", "content": choice["text"]}
    return {name: value for name, value in message.items() if value is not None}


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


def _check(body: Any, known: frozenset[str], models: Sequence[str]) -> None:
    if not isinstance(body, Mapping):
        raise ApiError(400, "invalid_json", f"expected a JSON object, got {body!r:.60}")
    for name, value in body.items():
        if value is None or name in known or name in WITHOUT_EFFECT:
            continue
        if name not in NEUTRAL:
            raise ApiError(400, "unsupported_parameter", f"{name}: esfast's endpoint doesn't know this field", name)
        if not any(value == neutral for neutral in NEUTRAL[name]):
            accepted = " or ".join(json.dumps(v) for v in NEUTRAL[name])
            advice = f"only {accepted}" if accepted else "leave it out"
            raise ApiError(
                400, "unsupported_value", f"{name}: esfast's endpoint doesn't support {value!r:.60}: {advice}", name
            )
    options = body.get("stream_options")
    if options is not None and not isinstance(options, Mapping):
        raise _wrong("stream_options", "an object", options)
    if body.get("model") not in models:
        known_models = ", ".join(map(repr, models))
        raise ApiError(
            404, "model_not_found", f"model: expected {known_models}, got {body.get('model')!r:.80}", "model"
        )


def _asked(body: Mapping[str, Any], longest: str) -> Asked:
    temperature, top_p = _number(body, "temperature", 0, 100), _number(body, "top_p", 0, 1)
    if top_p == 0:
        raise _wrong("top_p", "more than 0", top_p)
    return Asked(_integer(body, longest, 1), temperature, 1.0 if top_p is None else top_p)


def _number(body: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise _wrong(name, f"a number from {least} to {most}", value)
    return float(value)


def _integer(body: Mapping[str, Any], name: str, least: int) -> int | None:
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise _wrong(name, f"a whole number of at least {least}", value)
    return value


def _seed(body: Mapping[str, Any]) -> int:
    value = body.get("seed")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise _wrong("seed", "a whole number", value)
    return (value or 0) % 2**64


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _wrong("stop", f"a text, or a list of at most {MOST_STOPS} texts, none of them empty", value)
    return tuple(stops)


def _stopped(request: Request, completion: Completion) -> tuple[str, str]:
    """The text up to the first stop string, and why it ends there."""
    places = [place for stop in request.stop if (place := completion.text.find(stop)) >= 0]
    if places:
        return completion.text[: min(places)], "stop"
    return completion.text, "stop" if completion.ended else "length"


def _usage(prompt_tokens: int, completion: Completion) -> dict[str, int]:
    total = prompt_tokens + completion.tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion.tokens, "total_tokens": total}


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without fields that are None, such as those of an answer that is sent back; of a message without
    text, as one of tool calls, the content stays."""
    return {k: v for k, v in message.items() if v is not None or k == "content"}


def _wrong(name: str, expected: str, got: Any) -> ApiError:
    return ApiError(400, "invalid_value", f"{name}: expected {expected}, got {got!r:.80}", name)
