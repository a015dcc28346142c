"""A command as a page or a help shows it, parsed by the parser that would parse it."""

import argparse
import re
import shlex
from pathlib import Path

from esfast import cli
from esfast.bench import parser_of

ROOT = Path(__file__).parent.parent


def in_page(text: str) -> list[str]:
    """The commands of a page's sh blocks, without their remarks."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [command for line in lines if (command := re.split(r"(?:^|\s)#", line)[0].strip())]


def in_help(text: str) -> list[str]:
    """The examples at the end of a help, without their remarks."""
    return [re.split(r"\s{2,}", line.strip())[0] for line in text.partition("\nexamples:\n")[2].splitlines()]


def parse(command: str) -> argparse.Namespace:
    """What an esfast command parses to; SystemExit or AssertionError if it doesn't."""
    words = shlex.split(command.partition(" > ")[0])
    assert words[0] == "esfast", command
    if words[1:2] == ["bench"]:
        return parser_of(words[2:]).parse_args(words[2:])
    args = cli._parser(full=True).parse_args(words[1:])
    assert callable(args.run)
    return args
