"""The record of a run: from the base weights and a few kilobytes of seeds and coefficients, the tuned weights again.

A journal is a text file of JSON lines, appended to and flushed to disk before the weights change. The first line says
what the numbers mean; every line ends with the CRC-32 of what stands before it in the line. Generations are numbered
from 0 here, as their noise is; metrics.jsonl counts those that are done, from 1: its line 1 is of the journal's 0.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import time
import zlib
from pathlib import Path
from typing import NamedTuple

from ..core.noise import NOISE_VERSION, check_int
from ..core.ops import add_noise_
from ..core.plan import Plan
from ..update.updater import Generation, Rule, Updater
from ..utils.lock import Lock

log = logging.getLogger(__name__)

FORMAT = 2  # 1 had no optimizer


class Contents(NamedTuple):
    """What a journal holds: its header, its generations in order, and checks: fingerprints by generations done."""

    header: dict
    records: list[Generation]
    checks: dict[int, str]


def header_of(rule: Rule, seed: int, weights: str, plan: Plan) -> dict:
    """The first line of a run's journal; the run begins with the weights that the plan has now."""
    return {
        "esfast_journal": FORMAT, "noise_version": NOISE_VERSION, **rule.to_json(), "seed": seed, "weights": weights,
        "numel": plan.whole_numel, "layout": plan.layout, "base": plan.fingerprint(),
    }  # fmt: skip


class Journal:
    """An append-only file of generations. `Journal.create` begins one, `take_up` goes on with one.

    It holds the run's Lock, and appends only where it left off: if the file was deleted, or somebody else wrote to it,
    that is an error.
    """

    def __init__(self, path: Path, whole: bytes = b""):
        self.path = path
        self.seconds = 0.0  # spent in `append`
        self._lock = Lock.take(path, shared=True)
        self._end, self._last = len(whole), _last_line(whole)

    @classmethod
    def create(cls, path: str | Path, header: dict) -> Journal:
        """Begins a journal, also in the place of a file whose header was never complete.

        FileExistsError if there is one already: a run's record is never overwritten. InUse if another process owns it.
        """
        path = Path(path)
        journal = cls(path)
        if path.exists() and is_blank(path.read_bytes()):
            log.warning("journal: %s has no complete first line, so nothing was done: beginning anew", path)
            path.unlink()
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            raise FileExistsError(
                f"journal: {path} exists already; give the run another folder, or move it away"
            ) from None
        try:
            journal._write(header)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return journal

    @classmethod
    def take_up(cls, path: str | Path, header: dict) -> tuple[Journal, Contents]:
        """Goes on with the journal of a run of this header. A torn last line is taken off the file.

        ValueError: it is damaged, or of another run; what differs is named, with both values. InUse as in `create`.
        """
        path = Path(path)
        lock = Lock.take(path, shared=True)
        whole = path.read_bytes()
        contents = parse(whole, path)
        for key in header | contents.header:
            mine, found = header.get(key), contents.header.get(key)
            if mine != found:
                what = "fingerprint of the base weights" if key == "base" else key
                raise ValueError(f"journal: {path} is of a run with {what} {found!r}, this one has {mine!r}")
        if torn := _torn(whole):
            whole = whole[: len(whole) - len(torn)]
            with open(path, "r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        journal = cls(path, whole)
        del lock
        return journal, contents

    def check(self, generation: int, fingerprint: str) -> None:
        """Notes down the fingerprint of the weights after so many generations: a replay will compare."""
        self._write({"check": generation, "fingerprint": fingerprint})

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
        if not self._lock.held:  # a trainer lets go of it when it has trained
            self._lock = Lock.take(self.path, shared=True)
        try:
            file = open(self.path, "r+b", buffering=0)  # noqa: SIM115, which is closed below
        except FileNotFoundError:
            raise FileNotFoundError(
                f"journal: {self.path} was deleted or moved away while the run went on, so no more can be recorded: "
                "put it back and resume, or begin a new run"
            ) from None
        with file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - len(self._last)))
            if end != self._end or file.read() != self._last:
                raise RuntimeError(
                    f"journal: {self.path} was changed while the run went on: it has {end} bytes, not the {self._end} "
                    "that were left there; does another process write to it? If what it holds is whole, resume"
                )
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (a part of a line)", str(self.path))
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(end)  # no half lines, and no line whose step was not taken: it may be taken again
                raise
        self._end, self._last = end + len(line), line


def read(path: str | Path) -> Contents:
    """What a journal holds. A last line that was being written when the power went is left out, with a word.

    ValueError names the line that is damaged, missing or of another format.
    """
    return parse(Path(path).read_bytes(), path)


def parse(data: bytes, path: str | Path) -> Contents:
    if torn := _torn(data):
        log.warning("journal: the last line of %s is torn (%d bytes): left out, its generation is done anew", path,
                    len(torn))  # fmt: skip
        data = data[: len(data) - len(torn)]
    lines = []
    for number, line in enumerate(data.splitlines(), start=1):
        text, _, crc = line.rpartition(b" ")
        if crc != b"%08x" % zlib.crc32(text):
            raise ValueError(f"journal: line {number} of {path} is damaged (its checksum does not fit)")
        lines.append(json.loads(text))
    header = lines[0] if lines else None
    if not isinstance(header, dict) or header.get("esfast_journal") != FORMAT:
        raise ValueError(f"journal: {path} does not begin with the header of an esfast journal of format {FORMAT}")
    found = Contents(header, [], {})
    for number, line in enumerate(lines[1:], start=2):
        done = len(found.records)
        if "check" in line and line["check"] == done:
            found.checks[done] = line["fingerprint"]
            continue
        if line.get("generation", line.get("check")) != done or "check" in line:
            raise ValueError(
                f"journal: line {number} of {path} is of generation {line.get('generation', line.get('check'))}, "
                f"expected {done}: a line is missing, or there twice"
            )
        line["seeds"] = [int(s, 16) for s in line["seeds"]]
        found.records.append(Generation(**line))
    return found


def peek(path: str | Path) -> Contents | None:
    """What a journal holds, None if there is none or its header was never complete. ValueError as in `read`."""
    path = Path(path)
    data = path.read_bytes() if path.exists() else b""
    return None if is_blank(data) else parse(data, path)


def is_blank(data: bytes) -> bool:
    """Whether it is a journal that was cut off before its header was complete: nothing was done."""
    begins = b'{"esfast_journal"'
    return _torn(data) == data and begins.startswith(data.strip(b"\0")[: len(begins)])


def _last_line(data: bytes) -> bytes:
    return data[data.rfind(b"\n", 0, max(0, len(data) - 1)) + 1 :]


def _torn(data: bytes) -> bytes:
    """The end of a file that a crash left: a line without its end, or what a file system filled up with zeros."""
    end = data.rfind(b"\n", 0, len(data.rstrip(b"\0"))) + 1
    return data[end:]


def replay(plan: Plan, path: str | Path, until: int | None = None, backend: str = "auto") -> None:
    """Applies a journal's generations (the first `until`, default all) to the base weights that its run began with.

    `path` is a journal, or one packed by esfast.journal.export. Fingerprints are compared before the first generation
    and wherever the journal holds one.

    Raises:
        ValueError: the journal is damaged, of another noise version, of a run with weights="inplace" (whose rounding
            errors no journal holds), or of another model (names, shapes, dtypes or weights), or has fewer generations.
            Weights are untouched.
        RuntimeError: the weights are not those of the run after some generation.
    """
    from .export import unpack

    header, records, checks = unpack(path) if Path(path).suffix == ".safetensors" else read(path)
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
    if header["base"] != (found := plan.fingerprint()):
        raise ValueError(
            f"journal: {path} is of a run that began with weights of fingerprint {header['base']}, these have {found}"
        )
    truth = plan.master() if header["weights"] == "master" else plan
    update = Updater(truth, Rule.from_json(header), backend)
    for done, record in enumerate(records[:until], start=1):
        update(record)
        if done in checks or done == until:
            if truth is not plan:
                add_noise_(plan, [], [], base=truth, backend=backend)
            verify(plan, done, checks)


def verify(plan: Plan, generation: int, checks: dict[int, str]) -> None:
    """RuntimeError if the weights after so many generations are not those that a journal's check vouches for."""
    if generation in checks and (found := plan.fingerprint()) != checks[generation]:
        raise RuntimeError(
            f"journal: after {generation} generations the weights have the fingerprint {found}, those of the run had "
            f"{checks[generation]}"
        )
