"""Answers as server-sent events, for clients that ask with `stream`. The engine makes whole answers, so each one comes
in one piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def events(answer: Mapping[str, Any], body: Mapping[str, Any]) -> bytes:
    """The answer of a request with this body, as the API's chunks."""
    chunk = {name: answer[name] for name in ("id", "created", "model")}
    chunk["object"] = {"chat.completion": "chat.completion.chunk"}.get(answer["object"], answer["object"])
    chunks = [{**chunk, "choices": [_piece(choice) for choice in answer["choices"]]}]
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**chunk, "choices": [], "usage": answer["usage"]})
    return b"".join(f"data: {text}\n\n".encode() for text in [*map(json.dumps, chunks), "[DONE]"])


def _piece(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The choice of a chunk: a message is a delta there, and its tool calls are numbered."""
    piece = dict(choice)
    message = piece.pop("message", None)
    if message is not None:
        piece["delta"] = dict(message)
        if "tool_calls" in message:
            piece["delta"]["tool_calls"] = [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]
    return piece
