"""The client that an episode gets: openai.AsyncOpenAI, whose requests stay in this process."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from ...utils.errors import BadImport
from .answers import maker
from .app import REFUSED, Endpoint
from .arguments import ArgumentReader, NotPlain, Seen
from .protocol import CHAT, TEXT, ApiError, Kind
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

    class Quick:
        """A resource of the library whose other methods are made when one of them is asked for."""

        def __init__(self, client: Any):
            self._client = client

        def __getattr__(self, name: str) -> Any:
            if "_client" not in vars(self) or "_post" in vars(self):
                raise AttributeError(name)
            super().__init__(self._client)  # type: ignore[call-arg]
            return getattr(self, name)

    def shortened(resource: Any, kind: Kind, answer_type: Any) -> Any:
        """The class of a resource, with a short way for the requests that its `create` would send."""
        by_http = resource.create
        request_of = ArgumentReader(openai, kind, by_http)
        made_of = maker(kind, answer_type)

        class Shortened(Quick, resource):
            @functools.wraps(by_http)
            async def create(self, **asked: Any) -> Any:
                client, refused = self._client, None
                if client.short:
                    try:
                        speaker = endpoint.speaker(client.api_key)
                        answer = await speaker.answer(request_of(asked, speaker.models, client.seen))
                    except NotPlain:
                        pass
                    except ApiError as error:
                        refused = error
                    else:
                        made = made_of(answer)
                        if kind is CHAT and "tool_calls" not in answer.message:
                            # The next request mostly sends it back, with the fields in this order.
                            sent_back = {"content": answer.message["content"], "role": "assistant"}
                            client.seen.append((vars(made.choices[0].message).copy(), sent_back))
                        return made
                # The library makes its exception of an error. The request is not asked again.
                REFUSED.set(refused)
                try:
                    return await by_http(self, **asked)
                finally:
                    REFUSED.set(None)

        return Shortened

    chat_completions = shortened(AsyncCompletions, CHAT, ChatCompletion)
    text_completions = shortened(AsyncTextCompletions, TEXT, Completion)

    class Chat(Quick, AsyncChat):
        def __init__(self, client: Any):
            super().__init__(client)
            self.completions = chat_completions(client)  # type: ignore[misc]

    class MemberClient(openai.AsyncOpenAI):
        model = MEMBER
        short = False
        seen: Seen = []

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
    settings = dict(vars(first))

    def with_key(key: str) -> MemberClient:
        # A copy; with_options, which checks all settings anew, takes longer than an episode's request.
        client = object.__new__(MemberClient)
        # 1.4 microseconds a client; with an update of the fields that it has, 2.1.
        client.__dict__ = {**settings, "api_key": key, "seen": [], "chat": Chat(client)}
        return client

    return with_key


def part_with(client: Any) -> None:
    """Takes the parts that refer to it from the client of an episode that has ended. They make cycles, in which client
    and messages would stay in memory until Python looks for such garbage. A part that is asked for later is made anew.
    """
    parts = vars(client)
    parts.pop("chat", None)
    parts.pop("completions", None)


def _transport(openai: Any, endpoint: Endpoint) -> Any:
    """The ASGI transport of the HTTP library that this version of openai is made with, httpx or httpx2."""
    kinds = [kind for kind in openai.DefaultAsyncHttpxClient.__mro__ if kind.__name__ == "AsyncClient"]
    library = importlib.import_module(kinds[0].__module__.partition(".")[0])
    return library.ASGITransport(app=endpoint)
