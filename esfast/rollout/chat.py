"""Chats as prompts: lists of messages {"role", "content"}, as in TRL."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.errors import BadValue
from ..utils.rows import Rows

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
ANSWERED = ("user", "tool", "function", "ipython")  # roles whose message the assistant answers
OWN = ("tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "conversation", "tools")
PROBE = "esfast"
TEXTS = {str}


def is_chat(prompt) -> bool:
    return isinstance(prompt, (list, tuple))


def render(rows: Rows, tokenizer, options: Mapping[str, Any] | None = None) -> list[str]:
    """The texts that the model continues: a row's prompt, or its chat in the tokenizer's template.

    After a message of the user or a tool, the text ends with the beginning of the assistant's answer. If the chat ends
    with a message of the assistant, the text ends with that message, for the model to continue. `options` are variables
    of the template; a row's columns "chat_template_kwargs" and "tools" (a list of JSON schemas, or its JSON text) add
    to them and take precedence.

    Raises ValueError for a chat without messages, an unknown role, content other than text, a chat that ends with a
    system message, a tokenizer without a template, and whatever the template refuses.
    """
    return Renderer(tokenizer, options)(rows)


class Renderer:
    """`render` for one batch of rows after another. What form of messages the template reads is found out once."""

    def __init__(self, tokenizer, options: Mapping[str, Any] | None = None):
        self._tokenizer, self._options = tokenizer, options or {}
        self._form: tuple[Any, tuple[bool, bool]] | None = None

    def __call__(self, rows: Rows) -> list[str]:
        form, rendered = None, []
        for row in rows:
            prompt = row["prompt"]
            if is_chat(prompt):
                form = form or self._form_of_messages()
                prompt = _render(prompt, self._tokenizer, form, {**self._options, **_options(row)}, _tools(row))
            rendered.append(prompt)
        return rendered

    def _form_of_messages(self) -> tuple[bool, bool]:
        template = getattr(self._tokenizer, "chat_template", None)
        if self._form is None or self._form[0] != template:
            self._form = template, _forms(self._tokenizer)
        return self._form[1]


def answered(rows: Rows, responses: Sequence[str]) -> tuple[Rows, list]:
    """Rows and completions as reward functions get them: for a chat the completion is a list of one message.

    As in TRL, a message that the model continued is whole in the completion and removed from the prompt, so that prompt
    + completion is the conversation. What is no text, such as an environment's episode, stays as it is.
    """
    asked, completions = [], []
    response: Any
    for row, response in zip(rows, responses, strict=True):
        prompt = row["prompt"]
        if is_chat(prompt) and isinstance(response, str):
            if prompt[-1]["role"] == "assistant":
                row = {**row, "prompt": list(prompt[:-1])}
                response = _joined(prompt[-1]["content"]) + response
            response = [{"role": "assistant", "content": response}]
        asked.append(row)
        completions.append(response)
    return asked, completions


def _render(
    messages: Sequence[Mapping], tokenizer, form: tuple[bool, bool], options: dict[str, Any], tools: list | None
) -> str:
    continued = _check(messages) == "assistant"
    chat = [_in_form(message, *form) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            chat,
            tools=tools,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            **options,
        )
    except Exception as error:
        # Jinja's errors, those that templates raise, and errors inside them.
        raise BadValue(f"prompt: the tokenizer's chat template refuses the chat: {error}") from None
    # If the template has written the bos token that the tokenizer will add, drop one of them.
    begin = tokenizer.bos_token
    if begin and text.startswith(begin) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(begin)
    return text


def _check(messages: Sequence[Mapping]) -> str:
    """The role of the last message. ValueError if this is not a chat of texts that the model can continue."""
    if not messages:
        raise BadValue("prompt: a chat needs at least one message")
    for place, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadValue(f"prompt: message {place} has the role {role!r}, expected one of {', '.join(ROLES)}")
        if isinstance(content, (list, tuple)):
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                if kind != "text" or not isinstance(part.get("text"), str):
                    raise BadValue(
                        f"prompt: message {place} has content of type {kind!r}; only text can be had, as a str or as "
                        'parts {"type": "text", "text": ...}: esfast asks models of text'
                    )
        elif not isinstance(content, str) and (content is not None or not message.get("tool_calls")):
            raise BadValue(f"prompt: message {place} has the content {content!r:.60}, expected a text")
    if role == "assistant" and content is None:
        raise BadValue("prompt: the last message is the assistant's and has no text that could be continued")
    if role != "assistant" and role not in ANSWERED:
        raise BadValue(
            f"prompt: the last message has the role {role!r}, expected user or tool (to be answered), or assistant (to "
            "be continued)"
        )
    return role


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the template in a row. Those that are None are left out: in a datasets.Dataset every row has the
    keys of all rows."""
    given = _column(row, "chat_template_kwargs")
    if not given:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise BadValue(f"chat_template_kwargs: expected a dict with texts as its keys, or its JSON, got {given!r:.60}")
    return check_options("chat_template_kwargs", {k: v for k, v in given.items() if v is not None})


def check_options(what: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options; ValueError if a template can't take them."""
    for name in options:
        if name in OWN:
            raise BadValue(
                f"{what}: {name!r} is not to be chosen: a chat's last message decides how it goes on, and tools have a "
                "column of their own"
            )
    return dict(options)


def _tools(row: Mapping[str, Any]) -> list | None:
    tools = _column(row, "tools")
    if tools and not isinstance(tools, (list, tuple)):
        raise BadValue(f"tools: expected a list of JSON schemas, got {tools!r:.60}")
    # For an empty list templates would write the heading of a list of tools.
    return [_without_none(_from_json("tools", tool)) for tool in tools] if tools else None


def _column(row: Mapping[str, Any], name: str):
    """The row's value in this column; JSON text is read. None if the value is missing, a blank or NaN."""
    value = row.get(name)
    missing = value != value if isinstance(value, float) else isinstance(value, str) and not value.strip()
    return None if missing else _from_json(name, value)


def _from_json(what: str, value):
    """Reads a JSON text; returns other values unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise BadValue(f"{what}: expected JSON, got {value!r:.60}: {error}") from None


def _without_none(value):
    """Removes the None fields that a datasets.Dataset adds to a record for keys of other records."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value


def _forms(tokenizer) -> tuple[bool, bool]:
    """Whether the template can read a message's content as a text, and whether as a list of parts."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise BadValue(
            "prompt: a list of chat messages needs a tokenizer with a chat template; this one has none. Take an "
            "instruction-tuned model, or prompts that are texts"
        )

    def rendered(content) -> str:
        try:
            return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:
            # A template that can't read this content may raise anything.
            return ""

    text, parts = rendered(PROBE), rendered([{"type": "text", "text": PROBE}])
    return PROBE in text, parts == text if PROBE in text else PROBE in parts


def _in_form(message: Mapping, reads_text: bool, reads_parts: bool) -> dict[str, Any]:
    """The message with its content in the form that the template reads, in its own form if the template reads both. The
    content comes last."""
    content = message.get("content")
    if reads_text and set(map(type, message.values())) == TEXTS and content is not None:
        # Most messages. Without looking for None in them it takes a third of the time.
        form = dict(message)
        form["content"] = form.pop("content")
        return form
    if isinstance(content, (list, tuple)) and not reads_parts:
        content = _joined(content)
    elif isinstance(content, str) and reads_parts and not reads_text:
        content = [{"type": "text", "text": content}]
    others = {name: value for name, value in message.items() if name != "content"}
    return {**_without_none(others), "content": _without_none(content)}


def _joined(content) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
