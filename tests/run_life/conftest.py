"""What the tests of a run's life share."""

import shutil
from pathlib import Path

import pytest
from life import bits, trainer

from esfast.utils import lock


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed: folder and fingerprint of its weights."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    made = trainer(folder)
    made.train()
    return folder, bits(made)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole[0], tmp_path / "run"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
