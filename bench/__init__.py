"""Benchmarks, all that yields a number: `esfast bench NAME [options] [--json FILE|-]`.

A benchmark is a module of this package with `add_arguments(parser)`, `run(args) -> dict` that holds "rows" (a list of
dicts), and `table(result) -> (headers, lines of cells)`, which the terminal and the docs show. If a row has a key
"pass" and it is false, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..cli.command_help import Parser, help_options
from ..utils.errors import EsfastError, is_mendable
from ..utils.files import check_writable, write_whole

BENCHMARKS = {
    "noise": "speed of add_noise_ against ES code of today, the best of an afternoon and a copy; checked to the bit",
    "gpu": "speed of add_noise_ on a GPU, over the parameters of real models, against today's way and a fused rival",
    "statistics": "is the noise N(0,1)? moments and correlations with their standard errors",
    "sass": "what the GPU kernels compile to: instructions per weight against their budgets; needs no GPU",
    "profile": "what the GPU's own counters say of each kernel: memory, issue slots, instructions and cycles a weight",
    "cycles": "how long the GPU kernels should take on an H100 and an H200, simulated from machine code; needs no GPU",
    "drift": "what rounding does to weights over thousands of members and updates, by the usual code and by each mode",
    "modes": "time, traffic and memory of the weight modes, side by side, against what they state",
    "training": "the embedded model learns by every weight mode and by the usual code's numerics, over several seeds",
    "tune": "sigma and lr found by the run, against hand-tuned and wrong ones, on the tasks of the embedded model",
    "ranks": "what low-rank noise costs in learning: ranks and full-rank noise on two tasks, sigma scanned for each",
    "iteration": "a whole generation of ES: against its text generation alone, and against the loop of today",
    "together": "members in one batch: against one after another, and against frozen weights in the same batch",
    "resident": "members in one batch: the memory that they are said to take, and by how much a process grew",
    "vllm": "a population in one vLLM engine: against member after member, and against frozen weights in one batch",
    "dropin": "loops of others, before and after esfast: what a generation costs beside its evaluations; MeZO learning",
    "tasks": "the embedded model learns each of the tasks: rewards before and after, and how long it took",
    "episodes": "the embedded model learns a game of three turns; what the endpoint costs beside the model's answers",
    "playing": "members that play a game of three turns at the same time, against one after another",
    "forgetting": "what the embedded model forgets while it learns another task, and what decay to the start keeps",
    "simulate": "a generation on up to 10,000 workers, simulated from costs measured here, and its bytes on the wire",
    "replay": "the main job exported, and made again from the base model: bytes a generation, seconds, the same bits",
    "zoo": "a tiny model of every architecture of Transformers, trained, saved, loaded and replayed to the same bits",
    "sharing": "which architectures let members answer in one batch: texts compared with those of one after another",
    "countdown": "the embedded model learns Countdown: accuracy before and after, and where the time goes",
}


# The first is how the figures of the docs are made, where there are any.
EXAMPLES = {
    "noise": ("--json bench/results/noise_cpu.json", "--numel 1e6 --repeats 2   a first look", "--device cuda"),
    "gpu": (
        "--json bench/results/noise_gpu.json",
        "--models Qwen2.5-7B --dtypes bfloat16",
        "--device cpu --dtypes bfloat16 --repeats 1   tries the benchmark where there is no GPU",
    ),
    "statistics": ("--json bench/results/statistics.json", "--numbers 2**24 --seed 7"),
    "sass": ("--json bench/results/sass.json", "--arch 80 90 100 --dtypes bfloat16"),
    "profile": ("--json bench/results/profile_gpu.json", "--numel 2**20 --dtypes bfloat16   a first look"),
    "cycles": (
        "--json bench/results/cycles.json",
        "--measured bench/results/noise_gpu.json --json bench/results/cycles.json   beside what a GPU measured",
        "--dtypes bfloat16 float32 float16",
    ),
    "drift": ("--json bench/results/drift.json", "--numel 2**16 --generations 10 --dtypes bfloat16"),
    "modes": ("--json bench/results/modes.json", "--numel 1e7 --dtypes bfloat16 --noise gaussian"),
    "training": ("--json bench/results/training.json --keep runs/training", "--repeats 2 --generations 20"),
    "tune": ("--json bench/results/tune.json --keep runs/tune", "--tasks sudoku --seeds 0   a first look"),
    "ranks": ("--json bench/results/ranks.json --keep runs/ranks", "--tasks countdown --ranks 1 --generations 10"),
    "iteration": (
        "--json bench/results/iteration_cpu.json",
        "--device cuda --json bench/results/iteration_gpu.json",
        "--models tiny --repeats 1   a first look",
    ),
    "together": (
        "--json bench/results/together.json",
        "--members 4 --prompts 8 --repeats 2   a first look",
        "--device cuda --models Qwen2.5-0.5B --dtype bfloat16 --noise gaussian low_rank --members 1 4 16 30 --rates",
    ),
    "resident": ("--json bench/results/resident.json", "--repeats 1   a first look"),
    "vllm": (
        "--json bench/results/vllm.json",
        "--members 4 --prompts 2 --repeats 1   a first look",
        "--model Qwen/Qwen2.5-1.5B-Instruct --dtype bfloat16 --members 64 --prompts 16   on a GPU",
    ),
    "dropin": (
        "--json bench/results/dropin.json",
        "--device cuda --numel 1e8 --seeds --json bench/results/dropin_gpu.json   without MeZO's runs",
    ),
    "tasks": ("--json bench/results/tasks.json", "--tasks sudoku --keep runs/tasks"),
    "episodes": ("--json bench/results/episodes.json", "--seeds 7 --repeats 2   a first look"),
    "playing": ("--json bench/results/playing.json", "--repeats 1   a first look"),
    "forgetting": (
        "--json bench/results/forgetting.json --keep runs/forgetting",
        "--seeds 0 --decays 0 -- --generations 10",
    ),
    "simulate": (
        "--json bench/results/simulate.json --plots docs/figures",
        "--workers 1 8 64 --member-seconds 10   of other machines",
    ),
    "replay": ("--json bench/results/replay.json", "-- --generations 10   options of `esfast train`"),
    "zoo": ("--json bench/results/zoo.json", "--architectures qwen3 mamba gemma3_text   some of them"),
    "sharing": ("--json bench/results/sharing.json", "--architectures qwen3 mamba gemma3_text   some of them"),
    "countdown": (
        "--seeds 0 1 2 --json bench/results/countdown.json",
        "--seeds 0 1 2 --noise gaussian low_rank --json bench/results/countdown_noise.json",
        "--seeds 7 -- --generations 10",
    ),
}


class BenchmarkError(EsfastError, RuntimeError):
    """The benchmark can't or won't give figures; the message says why."""


def main(argv: list[str] | None = None) -> int:
    """Runs one benchmark; returns the exit status: 0, 1 if it refused or a row failed, 2 for unusable arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser_of(argv).parse_args(argv)
    module = import_module(f".{args.name}", __name__)

    from .provenance import provenance

    try:
        where_from = provenance(args.name, argv[1:])  # now: what runs is what lies on disk as it starts
    except BenchmarkError as error:
        print(f"esfast bench {args.name}: error: {error}", file=sys.stderr)
        return 2
    files = [path for path in args.json if path != "-"]

    def save(found: dict, complete: bool = False) -> dict:
        """Writes what is found so far; a benchmark that takes minutes calls it after every row."""
        result = {
            "benchmark": args.name,
            "provenance": where_from,
            **({} if complete else {"unfinished": True}),
            **found,
        }
        for path in files:
            write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
        return result

    args.save = save
    try:
        for path in files:
            check_writable("--json", path)
        if args.plots:
            check_writable("--plots", args.plots, folder=True)
        result = save(module.run(args), complete=True)
        if args.plots:
            from .figures import draw

            draw(result, Path(args.plots))
    except Exception as error:
        if not is_mendable(error):
            raise
        print(f"esfast bench {args.name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"esfast bench {args.name}: interrupted", file=sys.stderr)
        return 130
    shown = sys.stdout
    if "-" in args.json:
        print(json.dumps(result, indent=1, allow_nan=False))
        shown = sys.stderr
    print(text_table(*module.table(result)), file=shown)
    failed = any(row.get("pass") is False for row in result["rows"])
    return int(failed or any(row.get("failed") for row in result.get("left_out", [])))


def parser_of(argv: list[str]) -> argparse.ArgumentParser:
    """The parser, with the options of the benchmark that `argv` names: others are not imported."""
    parser = Parser(
        prog="esfast bench",
        **help_options(
            "Benchmarks. What fails its check gets no figures, or a row that says so and the exit status 1. Figures "
            "come with hardware, versions, commit, date and command.",
            "esfast bench noise --numel 1e6 --repeats 2",
            "esfast bench gpu --help                      each benchmark has a help of its own",
        ),
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, text in BENCHMARKS.items():
        examples = [f"esfast bench {name} {options}" for options in EXAMPLES[name]]
        command = commands.add_parser(name, help=text, allow_abbrev=False, **help_options(text, *examples))
        if argv[:1] == [name]:
            import_module(f".{name}", __name__).add_arguments(command)
        result = command.add_argument_group("result")
        result.add_argument(
            "--json",
            metavar="FILE",
            nargs="+",
            default=[],
            help="write the result there, to each; - for stdout, and nothing else",
        )
        result.add_argument("--plots", metavar="FOLDER", help="draw its figures there, where it has any")
    return parser


def add_choices(
    parser: argparse.ArgumentParser, option: str, known: Sequence[str], help: str, default: Sequence[str] = ()
) -> None:
    """Adds an option that takes one or several of the known names; default: all of them."""
    parser.add_argument(option, nargs="+", choices=known, default=list(default or known), help=help)


DTYPES = ("bfloat16", "float32", "float16")


def add_dtypes(parser: argparse.ArgumentParser) -> None:
    """Adds --dtypes, of which two are the default: those that models come in."""
    add_choices(parser, "--dtypes", DTYPES, "of the weights (default: bfloat16 float32)", DTYPES[:2])


def count(text: str) -> int:
    """A positive whole number as one types it: 50000000, 5e7 or 2**30."""
    try:
        if match := re.fullmatch(r"(\d{1,3})\*\*(\d{1,2})", text):
            number = int(match[1]) ** int(match[2])
        else:
            number = int(text) if text.isdecimal() else int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number such as 1000, 5e7 or 2**30, got {text!r}")
    return number


def text_table(headers: list[str], lines: list[list[str]]) -> str:
    """Columns padded with spaces, for a terminal: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    pad = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    rule = ["-" * w for w in widths]
    return "\n".join(
        "  ".join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)).rstrip()
        for line in (headers, rule, *lines)
    )
