"""Escapes texts of users and models for the page: no part of them becomes markup, and blanks are visible."""

from __future__ import annotations

import html
import re
from typing import Any

# Symbols for the blanks that keyboards have; all others are shown by their number.
_SYMBOLS = {" ": "\N{OPEN BOX}", "\n": "\N{RETURN SYMBOL}\n", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
# Control characters, halves of a surrogate pair, and what reorders or hides the text around it.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]")
# Blanks at the beginning, at the end and at the ends of lines, and others than spaces and line ends anywhere.
_BLANKS = re.compile(r"\A\s+|\s+\Z|[^\S\n]+(?=\n)|[^\S\n ]+")


def escaped(value: Any) -> str:
    """Any value as text for the page, also inside an attribute's quotes."""
    return html.escape(_UNSEEN.sub(_number, str(value)))


def response(text: Any) -> str:
    """A prompt or a response for a <pre>, with marks for blanks that would not be visible."""
    text = str(text)
    if not text:
        return '<span class="blank">empty</span>'
    parts, end = [], 0
    for match in _BLANKS.finditer(text):
        marks = "".join(_SYMBOLS.get(c) or _number(c) for c in match[0])
        parts += [escaped(text[end : match.start()]), f'<span class="blank">{marks}</span>']
        end = match.end()
    return "".join([*parts, escaped(text[end:])])


def _number(found: re.Match | str) -> str:
    character = found if isinstance(found, str) else found[0]
    return f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{ord(character):04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
