"""The record of a run: from the base weights and a few kilobytes of seeds and coefficients, the tuned weights again.

A journal is a text file of JSON lines, appended to and flushed to disk before the weights change. The first line says
what the numbers mean; every line ends with the CRC-32 of what stands before it in the line.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
import zlib
from pathlib import Path

from .noise import NOISE_VERSION, check_int
from .ops import add_noise_
from .plan import Plan
from .update import Generation, Rule, Updater

FORMAT = 2  # 1 had no optimizer


class Journal:
    """An append-only file of generations. `Journal.create` begins one; `read` gives header and records back."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds = 0.0  # spent in `append`

    @classmethod
    def create(cls, path: str | Path, rule: Rule, seed: int, weights: str, plan: Plan) -> Journal:
        """Begins a journal. FileExistsError if there is one already: a run's record is never overwritten."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise FileExistsError(f"journal: {path} exists already; give the run another folder, or move it away")
        header = {"esfast_journal": FORMAT, "noise_version": NOISE_VERSION, **rule.to_json(), "seed": seed,
                  "weights": weights, "numel": plan.whole_numel, "layout": plan.layout}  # fmt: skip
        journal = cls(path)
        journal._write(header)
        return journal

    def append(self, record: Generation) -> None:
        """Adds one generation and waits until it is on disk. OSError if it can't be written."""
        fields = dataclasses.asdict(record)
        fields["seeds"] = [f"{s:016x}" for s in record.seeds]  # 64 bits don't fit the numbers of other JSON readers
        began = time.perf_counter()
        self._write(fields)
        self.seconds += time.perf_counter() - began

    def _write(self, fields: dict) -> None:
        text = json.dumps(fields, separators=(",", ":"))
        line = f"{text} {zlib.crc32(text.encode()):08x}\n".encode()
        with open(self.path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, "only a part of a line could be written", str(self.path))
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)  # no half lines, and no line whose step was not taken: it may be taken again
                raise


def read(path: str | Path) -> tuple[dict, list[Generation]]:
    """Header and generations of a journal; ValueError names the line that is damaged or of another format."""
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        text, _, crc = line.rpartition(b" ")
        if crc != b"%08x" % zlib.crc32(text):
            raise ValueError(f"journal: line {number} of {path} is damaged (its checksum does not fit)")
        records.append(json.loads(text))
    header = records[0] if records else None
    if not isinstance(header, dict) or header.get("esfast_journal") != FORMAT:
        raise ValueError(f"journal: {path} does not begin with the header of an esfast journal of format {FORMAT}")
    for generation, record in enumerate(records[1:]):
        if record["generation"] != generation:
            raise ValueError(
                f"journal: line {generation + 2} of {path} is of generation {record['generation']}, "
                f"expected {generation}: a line is missing, or there twice"
            )
        record["seeds"] = [int(s, 16) for s in record["seeds"]]
    return header, [Generation(**record) for record in records[1:]]


def replay(plan: Plan, path: str | Path, until: int | None = None, backend: str = "auto") -> None:
    """Applies a journal's generations (the first `until`, default all) to the base weights that its run began with.

    Raises:
        ValueError: the journal is damaged, of another noise version, of a run with weights="inplace" (whose rounding
            errors no journal holds), or of another model (names, shapes or
            dtypes), or has fewer generations. Weights are untouched.
    """
    header, records = read(path)
    until = check_int("until", len(records) if until is None else until, 0, len(records) + 1)
    if header["noise_version"] != NOISE_VERSION:
        raise ValueError(f"journal: {path} is of noise version {header['noise_version']}, this is {NOISE_VERSION}")
    if header["weights"] == "inplace":
        raise ValueError(f'journal: {path} is of a run with weights="inplace", which can\'t be replayed to the bit')
    if header["layout"] != plan.layout:
        raise ValueError(
            f"journal: {path} is of a model with {header['numel']} weights and layout {header['layout']} (of names, "
            f"shapes and dtypes), the plan has {plan.whole_numel} and {plan.layout}"
        )
    truth = plan.master() if header["weights"] == "master" else plan
    update = Updater(truth, Rule.from_json(header), backend)
    for record in records[:until]:
        update(record)
    if truth is not plan:
        add_noise_(plan, [], [], base=truth, backend=backend)
