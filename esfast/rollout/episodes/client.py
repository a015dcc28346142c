"""The client that an episode gets: openai.AsyncOpenAI, whose requests stay in this process."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

from ...utils.errors import BadImport
from .app import CHAT_PATH, TEXT_PATH, Endpoint
from .protocol import ApiError
from .session import MEMBER

IN_MEMORY = "http://esfast.invalid/v1"


def clients(endpoint: Endpoint, base_url: str | None = None) -> Callable[[str], Any]:
    """Returns key -> the client with this key: an openai.AsyncOpenAI with the attribute `model`, the name to ask for.

    Its requests reach the endpoint through memory: chat and text completions at once, everything else through the HTTP
    client's ASGI transport. With `base_url` that is what the client states, for programs that connect from outside.

    Raises ImportError if openai is missing.
    """
    try:
        import openai
    except ImportError:
        raise BadImport(
            "an environment's episodes ask the model through the package openai, which is not installed: pip install "
            "'esfast[environments]'"
        ) from None
    from openai.resources.chat import AsyncChat, AsyncCompletions
    from openai.resources.completions import AsyncCompletions as AsyncTextCompletions
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    async def short_way(path: str, answer_type: Any, key: str, asked: dict[str, Any]) -> Any:
        """The answer to a plain request, without HTTP and without the library's work on each field, which together take
        ten times as long. None if the request is not plain, or is wrong: the caller then sends it through HTTP."""
        try:
            answer = await endpoint.respond(path, _body(asked, openai), key)
        except (NotPlain, ApiError):
            return None
        return answer_type.model_validate(answer)

    class Chats(AsyncCompletions):
        async def create(self, **asked: Any) -> Any:
            answer = await short_way(CHAT_PATH, ChatCompletion, self._client.api_key, asked)
            return await super().create(**asked) if answer is None else answer

    class Texts(AsyncTextCompletions):
        async def create(self, **asked: Any) -> Any:
            answer = await short_way(TEXT_PATH, Completion, self._client.api_key, asked)
            return await super().create(**asked) if answer is None else answer

    class Chat(AsyncChat):
        @functools.cached_property
        def completions(self) -> Any:
            return Chats(self._client)

    class MemberClient(openai.AsyncOpenAI):
        model = MEMBER

        @functools.cached_property
        def chat(self) -> Any:
            return Chat(self)

        @functools.cached_property
        def completions(self) -> Any:
            return Texts(self)

    first = MemberClient(
        api_key="none",
        base_url=base_url or IN_MEMORY,
        http_client=openai.DefaultAsyncHttpxClient(transport=_transport(openai, endpoint)),
        max_retries=0,
    )

    def with_key(key: str) -> MemberClient:
        # with_options, which checks all settings anew, takes longer than an episode's request
        client = copy.copy(first)
        client.api_key = key
        return client

    return with_key


class NotPlain(Exception):
    """The request has something that is not of JSON, or more than a body."""


def _body(asked: dict[str, Any], openai: Any) -> dict[str, Any]:
    """The JSON object of a request. Raises NotPlain."""
    left_out = openai.NotGiven, openai.Omit
    body = {name: value for name, value in asked.items() if not isinstance(value, left_out)}
    # How long to wait for an answer is the run's to say.
    body.pop("timeout", None)
    further = body.pop("extra_body", None) or {}
    headed = body.pop("extra_headers", None) or body.pop("extra_query", None)
    if headed or not isinstance(further, dict) or body.get("stream"):
        raise NotPlain
    return _plain({**body, **further})


def _plain(value: Any) -> Any:
    """A copy of a JSON value; of the library's answers, which may be sent back, the JSON."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if callable(getattr(value, "model_dump", None)):
        return value.model_dump(mode="json", exclude_none=True)
    raise NotPlain


def _transport(openai: Any, endpoint: Endpoint) -> Any:
    """The ASGI transport of the HTTP library that this version of openai is made with, httpx or httpx2."""
    kinds = [kind for kind in openai.DefaultAsyncHttpxClient.__mro__ if kind.__name__ == "AsyncClient"]
    library = importlib.import_module(kinds[0].__module__.partition(".")[0])
    return library.ASGITransport(app=endpoint)
