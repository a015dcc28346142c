"""The error message for an unknown name, with a suggestion."""

import difflib
from collections.abc import Iterable


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """One line with the closest of the known names, if one is close, and with all of them, unless they are many."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    if hint and len(known) > 20:
        return f"unknown {what} {name!r}.{hint}"
    return f"unknown {what} {name!r}.{hint} Known {what}s: {', '.join(sorted(known))}"
