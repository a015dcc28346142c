"""How often Python looks for garbage in cycles of objects."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def rare_collections(objects: int) -> Iterator[None]:
    """In the block Python looks for garbage in cycles once this process has made `objects` more objects than it has
    freed, or more if the process is set to so (gc.set_threshold).

    By default that happens at 700 new objects. Work that keeps thousands of them for a moment pays for many searches
    that find nothing. Now and then one of them looks through every object of the process, which takes 0.3 s with torch
    and transformers loaded."""
    before = gc.get_threshold()
    # A first threshold of 0 switches the search off.
    if before[0]:
        gc.set_threshold(max(objects, before[0]), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
