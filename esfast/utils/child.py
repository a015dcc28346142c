"""Command line for a subprocess with the same sys.path."""

import sys


def child(code: str, *arguments: str) -> list[str]:
    """Command that runs `code` in a new Python with this one's sys.path; `arguments` are its sys.argv[1:]."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}", *arguments]
