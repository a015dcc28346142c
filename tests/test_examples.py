"""Every script of examples/ runs to its end, shortened, in a process of its own; examples/README.md lists them all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs(warm_python, script, tiny, tmp_path):
    more = ["--model", str(tiny)] if "--model" in (EXAMPLES / script).read_text(encoding="utf-8") else []
    command = [sys.executable, str(EXAMPLES / script), "--quick", *more]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr


def test_the_page_lists_every_script_and_each_can_be_read_in_one_sitting():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\]\((\w+\.py)\)", page))) == SCRIPTS and len(SCRIPTS) >= 5
    for script in SCRIPTS:
        assert len((EXAMPLES / script).read_text(encoding="utf-8").splitlines()) <= 60, script
