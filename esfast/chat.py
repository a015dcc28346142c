"""Prompts that are chats, lists of messages {"role", "content"}, as TRL has them beside plain texts."""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Rows


def is_chat(prompt) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(m, dict) for m in prompt)


def texts(rows: Rows, tokenizer) -> list[str]:
    """What the model is to go on with: a row's prompt, or its chat in the tokenizer's template, up to where the
    assistant's answer begins. ValueError if the tokenizer has no template."""
    return [_render(row["prompt"], tokenizer) if is_chat(row["prompt"]) else row["prompt"] for row in rows]


def completions(rows: Rows, responses: Sequence[str]) -> list:
    """Responses as reward functions get them: for a chat, a list of one message."""
    return [
        [{"role": "assistant", "content": response}] if is_chat(row["prompt"]) else response
        for row, response in zip(rows, responses, strict=True)
    ]


def _render(messages: Sequence[dict], tokenizer) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "prompt: a list of chat messages needs a tokenizer with a chat template; this one has none. Take an "
            "instruction-tuned model, or prompts that are texts"
        )
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    begin = (
        tokenizer.bos_token
    )  # a template that writes it, and a tokenizer that puts it before any text: once is enough
    if begin and text.startswith(begin) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(begin)
    return text
