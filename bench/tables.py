"""Puts measured figures into Markdown: `python -m esfast.bench.tables README.md docs/*/*.md [--check]`.

The text between `<!-- begin:NAME -->` and `<!-- end:NAME -->` is replaced by the table NAME, which is made from a file
of bench/results/, with a caption that says where its figures come from. With --check nothing is written; a file that is
out of date is shown as a diff, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ..utils.files import write_whole
from . import (
    countdown,
    cycles,
    drift,
    dropin,
    episodes,
    forgetting,
    gpu,
    iteration,
    memory,
    modes,
    noise,
    playing,
    profile,
    ranks,
    replay,
    resident,
    sass,
    sharing,
    simulate,
    statistics,
    tasks,
    together,
    training,
    tune,
    vllm,
    zoo,
)
from .provenance import caption

Table = tuple[list[str], list[list[str]]]
# the files of results that a table is made of, in the order of the function's arguments
TABLES: dict[str, tuple[str, Callable[..., Table]]] = {
    "noise-cpu": ("noise_cpu.json", noise.table),
    "noise-cpu-avx2": ("noise_cpu_avx2.json", noise.table),
    "noise-cpu-summary": ("noise_cpu.json noise_cpu_avx2.json", noise.summary),
    "noise-kinds": ("noise_cpu.json", noise.kinds_table),
    "noise-gpu": ("noise_gpu.json", gpu.readme_table),
    "noise-gpu-summary": ("noise_gpu.json", gpu.summary),
    "noise-gpu-short": ("noise_gpu.json", gpu.short),
    "profile-gpu": ("profile_gpu.json", profile.table),
    "statistics": ("statistics.json", lambda result: statistics.table(statistics.summary(result))),
    "sass": ("sass.json", sass.table),
    "cycles": ("cycles.json", cycles.table),
    "iteration-cpu": ("iteration_cpu.json", iteration.table),
    "iteration-gpu": ("iteration_gpu.json", iteration.table),
    "together": ("together.json", together.table),
    "together-gpu": ("together_gpu.json", together.table),
    "together-gpu-short": ("together_gpu.json", together.short),
    "resident": ("resident.json", resident.table),
    "vllm": ("vllm.json", vllm.table),
    "dropin": ("dropin.json", dropin.table),
    "dropin-gpu": ("dropin_gpu.json", dropin.table),
    "dropin-mezo": ("dropin.json", dropin.mezo_table),
    "replay": ("replay.json", replay.table),
    "countdown": ("countdown.json", countdown.table),
    "countdown-noise": ("countdown_noise.json", countdown.noise_table),
    "tune": ("tune.json", tune.table),
    "tune-searches": ("tune.json", tune.searches_table),
    "tune-members": ("tune.json", tune.members_table),
    "ranks": ("ranks.json", ranks.table),
    "tasks": ("tasks.json", tasks.table),
    "episodes": ("episodes.json", episodes.table),
    "episodes-overhead": ("episodes.json", episodes.overhead_table),
    "playing": ("playing.json", playing.table),
    "forgetting": ("forgetting.json", forgetting.table),
    "forgetting-learned": ("forgetting.json", forgetting.learned_table),
    "simulate": ("simulate.json", simulate.table),
    "simulate-check": ("simulate.json", simulate.check_table),
    "simulate-wire": ("simulate.json", simulate.wire_table),
    "weights-memory": ("modes.json", modes.memory_table),
    "generation-memory": ("modes.json", memory.generation_table),
    "weights-time": ("modes.json", modes.time_table),
    "drift-restore": ("drift.json", drift.restore_table),
    "drift-update": ("drift.json", drift.update_table),
    "drift-rates": ("drift.json", drift.rates_table),
    "training-modes": ("training.json", training.table),
    "zoo": ("zoo.json", zoo.table),
    "zoo-summary": ("zoo.json", zoo.summary),
    "sharing": ("sharing.json", sharing.table),
    "sharing-summary": ("sharing.json", sharing.summary),
    "training-sweep": ("training.json", training.sweep_table),
}
NOT_YET = "*Not yet measured.*"

_BLOCK = re.compile(r"(<!-- begin:([\w-]+) -->\n).*?(<!-- end:\2 -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:begin|end):([\w-]+) -->")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m esfast.bench.tables", description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="Markdown files with markers")
    parser.add_argument("--results", type=Path, help="folder of the JSON files (default: the nearest bench/results)")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 and a diff if not up to date"
    )
    args = parser.parse_args(argv)
    return max([_update(file, args.results or _results_of(file), args.check) for file in args.files])


def _results_of(file: Path) -> Path:
    """bench/results beside the file, or beside the nearest folder above it that has one."""
    folders = file.resolve().parents
    return next((f / "bench" / "results" for f in folders if (f / "bench" / "results").is_dir()), folders[0])


def _update(file: Path, results: Path, check: bool) -> int:
    try:
        old = file.read_text(encoding="utf-8")
        new = fill(old, results)
    except (ValueError, OSError) as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 1
    if check:
        diff = difflib.unified_diff(old.splitlines(True), new.splitlines(True), file.name, f"{file.name} as generated")
        sys.stdout.writelines(diff)
        return int(old != new)
    if old != new:
        write_whole(file, new)
    return 0


def fill(text: str, results: Path) -> str:
    """`text` with every marked block replaced; ValueError for markers that are unknown or have no partner."""
    blocks = [match[2] for match in _BLOCK.finditer(text)]
    if sorted(_MARKER.findall(text)) != sorted(blocks * 2):
        alone = sorted(set(_MARKER.findall(_BLOCK.sub("", text)))) or blocks
        raise ValueError(f"begin and end markers don't pair up: {', '.join(alone)}")
    for name in blocks:
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; known: {', '.join(TABLES)}")
    return _BLOCK.sub(lambda match: f"{match[1]}\n{generate(match[2], results)}\n\n{match[3]}", text)


def generate(name: str, results: Path) -> str:
    """The table NAME and its caption as Markdown."""
    filenames, make = TABLES[name]
    paths = [results / filename for filename in filenames.split()]
    if not all(path.exists() for path in paths):
        return NOT_YET
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    try:
        verbs = ["Predicted" if result.get("predicted") else "Measured" for result in found]
        captions = "\n\n".join(f"{verb} with {caption(r)}" for verb, r in zip(verbs, found, strict=True))
        return f"{markdown_table(*make(*found))}\n\n{captions}"
    except (KeyError, TypeError) as error:
        raise ValueError(f"{filenames} isn't what the table {name!r} needs: {error!r}; measure again") from None


def markdown_table(headers: list[str], lines: list[list[str]]) -> str:
    rule = [":--", *["--:"] * (len(headers) - 1)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (headers, rule, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


if __name__ == "__main__":
    sys.exit(main())
