"""The record of a run: journal, replay, checkpoints, export."""

from ..utils.lazy import lazily

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Journal": "journal",
        "read": "journal",
        "replay": "journal",
        "parse": "journal",
        "header_of": "journal",
        "verify": "journal",
        "pack": "export",
        "unpack": "export",
    },
)
