"""`esfast report RUN...`: one self-contained HTML page about runs: no network, no script, charts as inline SVG."""

from .page import page
from .runs import Run, load

__all__ = ["Run", "load", "page"]
