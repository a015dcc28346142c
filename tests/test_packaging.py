"""What is handed out: requirements, the source archive, a build without a compiler."""

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_extras_that_are_asked_of_others_exist():
    """pip installs without an extra that it does not find, and warns at every install."""
    asked = re.findall(r'"([\w-]+)\[([\w,-]+)\]', PYPROJECT.partition("[project.optional-dependencies]")[2])
    for name, extras in asked:
        if name == "esfast":  # its extras are those of this very file
            continue
        try:
            known = metadata(name).get_all("Provides-Extra") or []
        except PackageNotFoundError:
            continue
        assert set(extras.split(",")) <= set(known), f"{name} has the extras {known}"
