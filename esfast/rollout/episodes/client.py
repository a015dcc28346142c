"""The client that an episode gets: openai.AsyncOpenAI, whose requests stay in this process."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

from ...utils.errors import BadImport
from .app import CHAT_PATH, REFUSED, TEXT_PATH, Endpoint
from .protocol import ApiError
from .session import MEMBER

IN_MEMORY = "http://esfast.invalid/v1"


def clients(endpoint: Endpoint, base_url: str | None = None) -> Callable[[str], Any]:
    """Returns key -> the client with this key: an openai.AsyncOpenAI with the attribute `model`, the name to ask for.

    Its requests reach the endpoint through memory. Chat and text completions that are nothing but JSON go there at
    once, which takes a tenth of the time. All others go through the library's HTTP client and its ASGI transport: those
    that stream or have headers, and those of clients that `with_options` returns. With `base_url` that is what the
    client states, for programs that connect from outside.

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

    plain = _reader(openai)

    def shortened(resource: Any, path: str, answer_type: Any) -> Any:
        """The class of a resource, with a short way for what its `create` would send to this path."""
        by_http = resource.create
        known = frozenset(inspect.signature(by_http).parameters)
        answer_type.model_rebuild()
        # What model_validate calls.
        made_of = answer_type.__pydantic_validator__.validate_python

        class Shortened(resource):
            @functools.wraps(by_http)
            async def create(self, **asked: Any) -> Any:
                client, error = self._client, None
                if client.short and asked.keys() <= known:
                    try:
                        answer = await endpoint.respond(path, plain(asked), client.api_key)
                    except NotPlain:
                        pass
                    except ApiError as refusal:
                        error = refusal
                    else:
                        made = made_of(answer)
                        # as the library does
                        vars(made)["_request_id"] = None
                        return made
                # The library makes its exception of an error. The request is not asked again.
                REFUSED.set(error)
                try:
                    return await by_http(self, **asked)
                finally:
                    REFUSED.set(None)

        return Shortened

    chat_completions = shortened(AsyncCompletions, CHAT_PATH, ChatCompletion)
    text_completions = shortened(AsyncTextCompletions, TEXT_PATH, Completion)

    class Chat(AsyncChat):
        @functools.cached_property
        def completions(self) -> Any:
            return chat_completions(self._client)

    class MemberClient(openai.AsyncOpenAI):
        model = MEMBER
        short = False

        @functools.cached_property
        def chat(self) -> Any:
            return Chat(self)

        @functools.cached_property
        def completions(self) -> Any:
            return text_completions(self)

        async def close(self) -> None:
            # The HTTP client is the other episodes', too. This client gets a closed one.
            self.short, self._client = False, http_client()
            await super().close()

    def http_client() -> Any:
        return openai.DefaultAsyncHttpxClient(transport=_transport(openai, endpoint))

    first = MemberClient(api_key="none", base_url=base_url or IN_MEMORY, http_client=http_client(), max_retries=0)
    first.short = True
    settings = vars(first)

    def with_key(key: str) -> MemberClient:
        # A copy; with_options, which checks all settings anew, takes longer than an episode's request.
        client = object.__new__(MemberClient)
        vars(client).update(settings, api_key=key)
        return client

    return with_key


class NotPlain(Exception):
    """A request is not only JSON, or the answer is not to be."""


# Arguments of `create` that are no fields of the request. How long to wait for an answer is the run's to say.
NO_FIELDS = frozenset({"extra_headers", "extra_query", "extra_body", "timeout"})


def _reader(openai: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns arguments of `create` -> the JSON object of the request, a copy. It raises NotPlain if the library
    would do more than to send this object, or raise an error itself."""
    left_out = frozenset({openai.NotGiven, openai.Omit})

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

    def plain(asked: dict[str, Any]) -> dict[str, Any]:
        fields = {name: v for name, v in asked.items() if name not in NO_FIELDS and type(v) not in left_out}
        if (further := asked.get("extra_body")) is not None:
            if type(further) is not dict:
                raise NotPlain
            fields |= further
        if asked.get("extra_headers") or asked.get("extra_query") or fields.get("stream"):
            raise NotPlain
        try:
            return json_of(fields)
        except (UnicodeError, TypeError, RecursionError):
            raise NotPlain from None

    return plain


def _transport(openai: Any, endpoint: Endpoint) -> Any:
    """The ASGI transport of the HTTP library that this version of openai is made with, httpx or httpx2."""
    kinds = [kind for kind in openai.DefaultAsyncHttpxClient.__mro__ if kind.__name__ == "AsyncClient"]
    library = importlib.import_module(kinds[0].__module__.partition(".")[0])
    return library.ASGITransport(app=endpoint)
