"""The journal of a run: seeds and coefficients, from which a replay makes the tuned weights out of the base weights.

A journal is a text file of JSON lines. A line is appended and flushed to disk before the weights change. The first line
says what the numbers mean; every line ends with the CRC-32 of its text. The journal numbers generations from 0, as the
noise does. metrics.jsonl counts the generations that are done: its line 1 belongs to the journal's generation 0.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple, Protocol

from ..core.kinds import NOISE_VERSION
from ..core.ops import add_noise_
from ..core.plan import Plan
from ..update.updater import Rule, Updater, UpdateRecord
from ..utils.errors import BadState, BadValue, FileMissing, FileTaken
from ..utils.lock import Lock
from ..utils.settings import check_int

log = logging.getLogger(__name__)

# Format of the file. Format 1 had no optimizer.
FORMAT = 2


class Contents(NamedTuple):
    """Contents of a journal: the header, the records in order, and `checks`, fingerprints by number of generations
    done."""

    header: dict
    records: list[UpdateRecord]
    checks: dict[int, str]


class Fingerprinted(Protocol):
    """The weights of a journal's run, as far as its header needs them: a Plan or an esfast.es.store.WeightStore."""

    @property
    def whole_numel(self) -> int: ...

    @property
    def layout(self) -> str: ...

    def fingerprint(self) -> str: ...


def header_of(rule: Rule, seed: int, weights: str, plan: Fingerprinted) -> dict:
    """The first line of a journal, for a run that begins with the present weights of a plan (or of a WeightStore, which
    has a plan's `whole_numel`, `layout` and `fingerprint`)."""
    return {
        "esfast_journal": FORMAT,
        "noise_version": NOISE_VERSION,
        **rule.to_json(),
        "seed": seed,
        "weights": weights,
        "numel": plan.whole_numel,
        "layout": plan.layout,
        "base": plan.fingerprint(),
    }


_CREATING = threading.Lock()


class Journal:
    """An append-only file of generations. `Journal.create` begins one, `resume` continues one.

    It holds the run's Lock. It appends only where the last line ended: if the file was deleted, or something else wrote
    to it, that is an error.
    """

    def __init__(self, path: Path, whole: bytes = b""):
        self.path = path
        self.seconds = 0.0  # spent in `append`
        self._lock = Lock.take(path, shared=True)
        self._end, self._last = len(whole), _last_line(whole)

    @classmethod
    def create(cls, path: str | Path, header: dict) -> Journal:
        """Begins a journal. A file whose header was never complete is replaced.

        FileExistsError if there is a journal already, since a run's record is never overwritten. InUse if another
        process owns it.
        """
        path = Path(path)
        journal = cls(path)
        # Threads of one process share its Lock. Without this one, a second thread would take a journal that the first
        # has just made, and not yet written to, for one whose header was never complete.
        with _CREATING:
            if path.exists() and is_blank(path.read_bytes()):
                log.warning("journal: %s has no complete first line, so nothing was done: beginning anew", path)
                path.unlink()
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except FileExistsError:
                raise FileTaken(
                    f"journal: {path} exists already; give the run another folder, or move it away"
                ) from None
            try:
                journal._write(header)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return journal

    @classmethod
    def resume(cls, path: str | Path, header: dict) -> tuple[Journal, Contents]:
        """Continues the journal of a run with this header. An incomplete last line is removed from the file.

        ValueError if the journal is damaged, or belongs to another run; the message names what differs, with both
        values. InUse as in `create`.
        """
        path = Path(path)
        lock = Lock.take(path, shared=True)
        whole = path.read_bytes()
        contents = parse(whole, path)
        for key in header | contents.header:
            mine, found = header.get(key), contents.header.get(key)
            if mine != found:
                what = "fingerprint of the base weights" if key == "base" else key
                raise BadValue(f"journal: {path} is of a run with {what} {found!r}, this one has {mine!r}")
        if torn := _torn(whole):
            whole = whole[: len(whole) - len(torn)]
            with open(path, "r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())
        journal = cls(path, whole)
        del lock
        return journal, contents

    def check(self, generation: int, fingerprint: str) -> None:
        """Writes the fingerprint of the weights after this many generations, for a replay to compare."""
        self._write({"check": generation, "fingerprint": fingerprint})

    def append(self, record: UpdateRecord) -> None:
        """Appends one generation and waits until it is on disk. OSError if it can't be written."""
        fields = dataclasses.asdict(record)
        # As text: other JSON readers have no 64-bit integers.
        fields["seeds"] = [f"{s:016x}" for s in record.seeds]
        began = time.perf_counter()
        self._write(fields)
        self.seconds += time.perf_counter() - began

    def _write(self, fields: dict) -> None:
        text = json.dumps(fields, separators=(",", ":"))
        line = f"{text} {zlib.crc32(text.encode()):08x}\n".encode()
        # A trainer releases the lock after training.
        if not self._lock.held:
            self._lock = Lock.take(self.path, shared=True)
        try:
            file = open(self.path, "r+b", buffering=0)  # noqa: SIM115, which is closed below
        except FileNotFoundError:
            raise FileMissing(
                f"journal: {self.path} was deleted or moved away while the run went on, so no more can be recorded: "
                "put it back and resume, or begin a new run"
            ) from None
        with file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - len(self._last)))
            if end != self._end or file.read() != self._last:
                raise BadState(
                    f"journal: {self.path} was changed while the run went on: it has {end} bytes, not the {self._end} "
                    "that were left there; does another process write to it? If what it holds is whole, resume"
                )
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (a part of a line)", str(self.path))
                os.fsync(file.fileno())
            except BaseException:
                # Remove the line, also if it is whole: its step was not taken, and may be taken again.
                file.truncate(end)
                raise
        self._end, self._last = end + len(line), line


def read(path: str | Path) -> Contents:
    """Reads a journal. An incomplete last line, which a crash leaves, is ignored with a warning.

    Returns:
        A named tuple: `header` (dict), `records` (a list of UpdateRecord, one a generation, in order) and `checks`
            (fingerprints by the number of generations done).

    Raises:
        ValueError: a line is damaged, missing or of another format; the message names it.
        OSError: the file can't be read.
    """
    return parse(Path(path).read_bytes(), path)


def parse(data: bytes, path: str | Path) -> Contents:
    if torn := _torn(data):
        log.warning(
            "journal: the last line of %s is torn (%d bytes): left out, its generation is done anew", path, len(torn)
        )
        data = data[: len(data) - len(torn)]
    lines = []
    for number, line in enumerate(data.splitlines(), start=1):
        text, _, crc = line.rpartition(b" ")
        if crc != b"%08x" % zlib.crc32(text):
            raise BadValue(f"journal: line {number} of {path} is damaged (its checksum does not fit)")
        lines.append(json.loads(text))
    header = lines[0] if lines else None
    if not isinstance(header, dict) or header.get("esfast_journal") != FORMAT:
        raise BadValue(f"journal: {path} does not begin with the header of an esfast journal of format {FORMAT}")
    found = Contents(header, [], {})
    for number, line in enumerate(lines[1:], start=2):
        done = len(found.records)
        if "check" in line and line["check"] == done:
            found.checks[done] = line["fingerprint"]
            continue
        if line.get("generation", line.get("check")) != done or "check" in line:
            raise BadValue(
                f"journal: line {number} of {path} is of generation {line.get('generation', line.get('check'))}, "
                f"expected {done}: a line is missing, or there twice"
            )
        line["seeds"] = [int(s, 16) for s in line["seeds"]]
        found.records.append(UpdateRecord(**line))
    return found


def peek(path: str | Path) -> Contents | None:
    """The contents of a journal; None if there is no file or its header was never complete. ValueError as in `read`."""
    path = Path(path)
    data = path.read_bytes() if path.exists() else b""
    return None if is_blank(data) else parse(data, path)


def is_blank(data: bytes) -> bool:
    """Whether a journal was cut off before its header was complete, so that no generation was done."""
    begins = b'{"esfast_journal"'
    return _torn(data) == data and begins.startswith(data.strip(b"\0")[: len(begins)])


def _last_line(data: bytes) -> bytes:
    return data[data.rfind(b"\n", 0, max(0, len(data) - 1)) + 1 :]


def _torn(data: bytes) -> bytes:
    """The incomplete end of a file after a crash: a line without its end, or zeros that the file system filled in."""
    end = data.rfind(b"\n", 0, len(data.rstrip(b"\0"))) + 1
    return data[end:]


class _Header(dict):
    """The header of a journal, for a reader of fields that must be there: ValueError names one that is not."""

    def __init__(self, fields: dict, path: str | Path):
        super().__init__(fields)
        self._path = path

    def __missing__(self, field: str):
        raise BadValue(
            f"journal: the header of {self._path} has no {field!r}, which a replay needs; it was not written by "
            "esfast, or changed since"
        )


def replay(plan: Plan, path: str | Path, until: int | None = None, backend: str = "auto") -> None:
    """Applies a journal's generations to the base weights of its run. Fingerprints are compared before the first
    generation and wherever the journal holds one.

    Args:
        plan: the base weights; they become the tuned weights.
        path: a journal, or a file that `pack` made of one.
        until: how many generations to apply. Default: all.
        backend: as in `add_noise_`.

    Raises:
        ValueError: the journal is damaged; of another noise version; of a run with weights="inplace", whose rounding
            errors no journal holds; of another model (names, shapes, dtypes or weights); or shorter than `until`. No
            weight has changed.
        RuntimeError: after some generation the weights are not those of the run.
    """
    from .export import unpack

    header, records, checks = unpack(path) if Path(path).suffix == ".safetensors" else read(path)
    until = check_int("until", len(records) if until is None else until, 0, len(records) + 1)
    header = _Header(header, path)
    if header["noise_version"] != NOISE_VERSION:
        raise BadValue(f"journal: {path} is of noise version {header['noise_version']}, this is {NOISE_VERSION}")
    if header["weights"] == "inplace":
        raise BadValue(f'journal: {path} is of a run with weights="inplace", which can\'t be replayed to the bit')
    if header["layout"] != plan.layout:
        raise BadValue(
            f"journal: {path} is of a model with {header['numel']} weights and layout {header['layout']} (of names, "
            f"shapes and dtypes), the plan has {plan.whole_numel} and {plan.layout}"
        )
    if header["base"] != (found := plan.fingerprint()):
        raise BadValue(
            f"journal: {path} is of a run that began with weights of fingerprint {header['base']}, these have {found}"
        )
    base = plan.master() if header["weights"] == "master" else plan
    update = Updater(base, Rule.from_json(header), backend)
    for done, record in enumerate(records[:until], start=1):
        update(record)
        if done in checks or done == until:
            if base is not plan:
                add_noise_(plan, [], [], base=base, backend=backend)
            verify(plan, done, checks)


def verify(plan: Fingerprinted, generation: int, checks: dict[int, str]) -> None:
    """RuntimeError if the journal holds another fingerprint for the weights after this many generations."""
    if generation in checks and (found := plan.fingerprint()) != checks[generation]:
        raise BadState(
            f"journal: after {generation} generations the weights have the fingerprint {found}, those of the run had "
            f"{checks[generation]}"
        )
