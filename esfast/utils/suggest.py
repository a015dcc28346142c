"""The error message for an unknown name, with a suggestion."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """One line with the closest of the known names, if one is close, and with all of them, unless they are many."""
    known = list(known)
    hint = did_you_mean(name, known)
    if hint and len(known) > 20:
        return f"unknown {what} {name!r}.{hint}"
    return f"unknown {what} {name!r}.{hint} Known {what}s: {', '.join(sorted(known))}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A sentence with the closest of the known names, after a space; nothing if none is close."""
    folded = {one.lower(): one for one in known}
    close = difflib.get_close_matches(str(name).lower(), list(folded), n=1)
    return f" Did you mean {folded[close[0]]!r}?" if close else ""
