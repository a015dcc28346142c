"""Finds the commands that pages and helps show, and parses each with the parser that it would meet."""

import argparse
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

from esfast.bench import parser_of
from esfast.cli.parser import parser_of_all

ROOT = Path(__file__).parent.parent


def in_page(text: str) -> list[str]:
    """The commands of a page's sh blocks, without their remarks."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [command for line in lines if (command := re.split(r"(?:^|\s)#", line)[0].strip())]


def in_help(text: str) -> list[str]:
    """The examples at the end of a help, without their remarks."""
    return [re.split(r"\s{2,}", line.strip())[0] for line in text.partition("\nexamples:\n")[2].splitlines()]


def parse(command: str) -> argparse.Namespace | None:
    """Parses a command and returns what an esfast command parses to. Raises SystemExit or AssertionError for a command
    that can't be parsed, or that names a script, a make target or an extra that does not exist."""
    words = shlex.split(command.partition(" > ")[0])
    while "=" in words[0]:  # an environment variable
        words = words[1:]
    program, *words = words
    if program == "torchrun":
        program, words = "esfast", words[words.index("esfast") + 1 :]
    if program == "esfast" and words[:1] == ["bench"]:
        return parser_of(words[1:]).parse_args(words[1:])
    if program == "esfast":
        args = parser_of_all().parse_args(words)
        assert callable(args.run)
        return args
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif program == "pip":
        extras = re.findall(r"\[(.+)\]", words[-1])
        assert set(",".join(extras).split(",")) - {""} <= _extras() and words[0] == "install", command
    else:
        script = {"python": words[0] == "-m" and find_spec(words[1]), "bash": (ROOT / words[0]).is_file()}
        files = [word for word in words[2:] if not word.startswith("-")]
        assert script[program] and all(list(ROOT.glob(file)) for file in files), command
    return None


def _extras() -> set[str]:
    table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", table, re.MULTILINE))
