"""Checks the prompts of a data set before anything is generated; an error names the row."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

from ..utils.errors import BadValue
from ..utils.rows import Rows, check_text

BATCH = 1000  # prompts that are tokenized together
# A check that takes longer shows its progress.
QUIET_SECONDS = 5
NAMED = 5  # rows with faults that a message names


def check_prompts(what: str, rows: Rows, render: Callable[[Rows], list[str]], engine, progress: bool = True) -> None:
    """ValueError if a prompt can't be rendered, isn't valid UTF-8, or is refused by the engine (its method `check`, if
    it has one). All rows are checked; the message describes the first fault and counts the others.

    render  turns rows into the texts that the engine gets
    """

    def check(batch: Rows) -> None:
        texts = render(batch)
        for text in texts:
            check_text("prompt", text)
        getattr(engine, "check", _anything)(texts)

    faults: list[tuple[int, Exception]] = []
    starts = range(0, len(rows), BATCH)
    for start in tqdm(starts, what, disable=not progress, delay=QUIET_SECONDS, leave=False, dynamic_ncols=True):
        batch = [rows[i] for i in range(start, min(start + BATCH, len(rows)))]
        # Check one by one, to name the row.
        if _fault(check, batch) is not None:
            found = [(start + i, _fault(check, [row])) for i, row in enumerate(batch)]
            faults += [(i, error) for i, error in found if error is not None]
    if faults:
        row, error = faults[0]
        others = ", ".join(str(i) for i, _ in faults[1 : 1 + NAMED])
        more = f" (and {len(faults) - 1} more rows: {others}{', ...' * (len(faults) > 1 + NAMED)})" if others else ""
        raise BadValue(f"{what}: row {row}: {error}{more}") from error


def _anything(prompts: list[str]) -> None:
    """The check of an engine without one: accepts everything."""


def _fault(check: Callable[[Rows], None], batch: Rows) -> Exception | None:
    try:
        check(batch)
    except Exception as error:  # a chat template may raise anything
        return error
    return None
