"""The help of every command (a description, options with their defaults, examples at the end), and the error for an
unknown option."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ..utils.suggest import did_you_mean

EXAMPLES = "examples:\n"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line. For an unknown option the error names the closest known one."""

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
            hint = did_you_mean(option, self._option_string_actions) if option else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint and '.' + hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help tells more)\n")


class Formatter(argparse.HelpFormatter):
    """Adds the default to the help of each option that has one and doesn't name it, and keeps the lines of examples."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        silent = default is None or default is False or default is argparse.SUPPRESS or not action.option_strings
        if silent or "default:" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLES) else super()._fill_text(text, width, indent)


def help_options(description: str, *examples: str) -> dict[str, Any]:
    """Keyword arguments for an ArgumentParser with such a help. A remark may follow an example, after two spaces."""
    return {
        "description": description,
        "epilog": EXAMPLES + "\n".join(f"  {line}" for line in examples),
        "formatter_class": Formatter,
    }
