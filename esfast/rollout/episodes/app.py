"""The endpoint of the members: an ASGI application with /v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextvars import ContextVar
from typing import Any, Protocol

from .protocol import CHAT, TEXT, Answer, ApiError, Request, read_request
from .stream import events

Scope = MutableMapping[str, Any]
Send = Callable[[Scope], Awaitable[None]]
Receive = Callable[[], Awaitable[Scope]]

ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
MODELS = "/v1/models"
LARGEST = 64 * 2**20  # bytes of a request
# An error that the requests of a context are answered with.
REFUSED: ContextVar[ApiError | None] = ContextVar("REFUSED", default=None)


class Speaker(Protocol):
    """The owner of a key: an episode. `models` are the model names that its requests may use."""

    models: tuple[str, ...]

    def answer(self, request: Request) -> Coroutine[Any, Any, Answer]:
        """Waits for the answer. Raises ApiError for a request that is refused."""


class Endpoint:
    """The application. `speakers` has a Speaker for each key; a request's key (Authorization: Bearer KEY) says which
    episode asks, and so which member answers."""

    def __init__(self):
        self.speakers: dict[str, Speaker] = {}

    def speaker(self, key: str) -> Speaker:
        """The owner of the key. ApiError if there is none."""
        if (speaker := self.speakers.get(key)) is None:
            raise ApiError(401, "invalid_api_key", "the key belongs to no episode that is running")
        return speaker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            # a WebSocket, which is refused before it is open
            await send({"type": "websocket.close"})
            return
        try:
            status, kind, body = 200, *await self._serve(scope, receive)
        except ApiError as error:
            status, kind, body = error.status, *_json(error.body)
        except Disconnected:
            return
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _serve(self, scope: Scope, receive: Receive) -> tuple[bytes, bytes]:
        """The type and the bytes of the answer. Raises ApiError."""
        if (refused := REFUSED.get()) is not None:
            raise refused
        path, key = scope["path"].rstrip("/"), _key(scope)
        if path not in ROUTES and path != MODELS and not path.startswith(f"{MODELS}/"):
            known = ", ".join([*ROUTES, MODELS])
            raise ApiError(404, "not_found", f"{path}: esfast's endpoint has {known}")
        method = "POST" if path in ROUTES else "GET"
        if scope["method"] != method:
            raise ApiError(405, "method_not_allowed", f"{path}: expected {method}, got {scope['method']}")
        if path not in ROUTES:
            return _json(self._models(path, key))
        try:
            body = json.loads(await _body(receive))
        except (ValueError, RecursionError):
            raise ApiError(400, "invalid_json", "the body of the request is no JSON") from None
        speaker, kind = self.speaker(key), ROUTES[path]
        answer = kind.json(await _unless_gone(speaker.answer(read_request(kind, body, speaker.models)), receive))
        return (b"text/event-stream", events(answer, body)) if body.get("stream") else _json(answer)

    def _models(self, path: str, key: str) -> dict[str, Any]:
        models = self.speaker(key).models
        found = [{"id": name, "object": "model", "created": 0, "owned_by": "esfast"} for name in models]
        if path == MODELS:
            return {"object": "list", "data": found}
        name = path.removeprefix(f"{MODELS}/")
        if name not in models:
            raise ApiError(404, "model_not_found", f"model: expected {', '.join(map(repr, models))}, got {name!r:.80}")
        return found[models.index(name)]


def _json(answer: dict[str, Any]) -> tuple[bytes, bytes]:
    return b"application/json", json.dumps(answer).encode()


class Disconnected(Exception):
    """The client went away."""


async def _unless_gone(answer: Awaitable[Answer], receive: Receive) -> Answer:
    """The answer; if the client disconnects before it is there, withdraws the request and raises Disconnected."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    asked, left = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({asked, left}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            raise Disconnected
        return asked.result()
    finally:
        asked.cancel()
        left.cancel()


async def _body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > LARGEST:
            raise ApiError(413, "too_large", f"body: a request may have {LARGEST} bytes")
        if not message.get("more_body"):
            return bytes(body)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def _key(scope: Scope) -> str:
    headers = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
