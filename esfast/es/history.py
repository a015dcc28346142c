"""The journal and the checkpoints of a run of ES, and how a run resumes from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

from ..distributed.team import Team
from ..journal import checkpoint
from ..journal.journal import Journal, parse, peek, verify
from ..update.updater import Updater, UpdateRecord
from ..utils.errors import BadValue, FileMissing
from ..utils.lock import Lock
from .store import WeightStore

log = logging.getLogger(__name__)


class History:
    """The generations that a run has done. Process 0 of a team holds the journal and sends its contents to the others.

    identities  after 0, 1, ... generations, a hash of the journal's header and records up to there. A checkpoint holds
                one, so that a checkpoint of another run is recognised. Empty without a journal
    seconds     spent so far waiting for lines of the journal to be on disk
    """

    def __init__(self, team: Team, run: str, checkpoints: str | Path | None):
        self.identities: list[str] = []
        self._team, self._prefix = team, run
        self._checkpoints = Path(checkpoints) if checkpoints is not None else None
        self._journal: Journal | None = None
        self._checked = -1

    def begin(self, path: Path, header: dict, resume: bool, store: WeightStore) -> int:
        """Begins the journal. With `resume`, brings `store` to the end of the journal
        that is there. Returns the number of generations done.

        Raises FileExistsError, FileNotFoundError, InUse or ValueError, as ES documents.
        """
        team, leads = self._team, self._team.rank == 0
        lock = Lock.take(path, shared=True) if leads else None
        team.assert_equal_on_all_ranks(f"{self._prefix}: fingerprint of the base weights", header["base"])
        there = team.gather(f"{self._prefix}: journal", "yes" if _has_generations(path) else "no")
        if resume and there[:1] == ["no"] and "yes" in there:
            raise FileMissing(
                f"resume: {path} is on the machine of process {there.index('yes')}, not on that of process 0, which "
                "goes on with it: start the machines in the order of before, or keep the run folder where all see it"
            )
        found = peek(path) if resume and leads else None
        # If the journal has no generation yet, settings may differ from its header.
        goes_on = found is not None and bool(found.records or found.header == header)
        goes_on = team.broadcast_from_rank0(f"{self._prefix}: resume", lambda: b"yes" if goes_on else b"no") == b"yes"
        self._note(header)
        if not goes_on:
            if leads and team.restarted:
                log.warning("started again, but there is no journal %s: beginning anew", path)
            if found is not None:
                path.unlink()
            self._journal = Journal.create(path, header) if leads else None
            return 0
        if header["weights"] == "inplace":
            raise BadValue(
                'resume: a run with weights="inplace" can\'t be resumed: no journal holds its rounding errors'
            )
        if leads:
            self._journal, _ = Journal.resume(path, header)
        # The journal holds the lock now.
        del lock
        _, records, checks = parse(team.broadcast_from_rank0(f"{self._prefix}: journal", path.read_bytes), path)
        for record in records:
            self._note(dataclasses.asdict(record))
        start, folder = 0, self._checkpoints
        if folder is not None and store.updater is not None:
            start = checkpoint.load_newest(
                folder, len(records), store.updater, team.shard_suffix, self.identities, checks
            )
        log.info(
            "resuming after generation %d: %d of them from a checkpoint, %d from the journal",
            len(records),
            start,
            len(records) - start,
        )
        for record in records[:start]:
            store.note_applied(record)
        store.replay(records[start:])
        verify(store, len(records), checks)
        self._checked = max(checks, default=-1)
        return len(records)

    def append(self, record: UpdateRecord) -> None:
        """Appends a generation to the journal, if there is one, and waits until it is on disk."""
        if self._journal is not None:
            self._journal.append(record)
        if self.identities:
            self._note(dataclasses.asdict(record))

    def check(self, generation: int, fingerprint: str) -> None:
        """Writes the weights' fingerprint into the journal, if there is a journal and it doesn't hold one yet."""
        if self._journal is not None and self._checked < generation:
            self._journal.check(generation, fingerprint)
            self._checked = generation

    def save(self, generation: int, updater: Updater) -> None:
        """Saves the full state in `checkpoints`. OSError if it can't be written."""
        identity = self.identities[generation] if self.identities else ""
        checkpoint.save(self._checkpoints, generation, updater, self._team.shard_suffix, identity)

    @property
    def seconds(self) -> float:
        return self._journal.seconds if self._journal is not None else 0.0

    def _note(self, fields: dict) -> None:
        text = "".join(self.identities[-1:]) + json.dumps(fields, sort_keys=True)
        self.identities.append(hashlib.sha256(text.encode()).hexdigest()[:32])


def _has_generations(path: Path) -> bool:
    try:
        found = peek(path)
    except ValueError:
        # It is damaged; process 0 reports that.
        return True
    return found is not None and bool(found.records)
