"""What is handed out: requirements, the source archive, a build without a compiler."""

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

import esfast

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_extras_that_are_asked_of_others_exist():
    """pip only warns about an extra that does not exist, and installs without it."""
    asked = re.findall(r'"([\w-]+)\[([\w,-]+)\]', PYPROJECT.partition("[project.optional-dependencies]")[2])
    for name, extras in asked:
        if name == "esfast":  # its extras are those of this very file
            continue
        try:
            known = metadata(name).get_all("Provides-Extra") or []
        except PackageNotFoundError:
            continue
        assert set(extras.split(",")) <= set(known), f"{name} has the extras {known}"


def setup_py(*arguments, **environment):
    pytest.importorskip("pybind11", reason="builds need pybind11")
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ | environment
    )


def test_the_source_archive_holds_what_it_takes_to_build_and_to_run_the_tests(tmp_path):
    done = setup_py("-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        found = {name.partition("/")[2] for name in file.getnames()}
    folders = ("bench", "csrc", "docs", "esfast", "examples", "kernels", "tests")
    wanted = {
        p.relative_to(ROOT).as_posix()
        for folder in folders
        for p in (ROOT / folder).rglob("*")
        if p.is_file()
        and p.suffix not in (".so", ".pyc")
        and not any(part.startswith((".", "__pycache__")) for part in p.relative_to(ROOT).parts)
    }
    wanted |= {"setup.py", "pyproject.toml", "Makefile", "constraints.txt", "README.md", "LICENSE", "MANIFEST.in"}
    assert wanted - found == set()
    assert not [name for name in found if name.endswith((".so", ".pyc")) or "__pycache__" in name]


def test_the_version_stands_in_one_place_and_the_papers_agree():
    done = setup_py("-q", "--version")
    assert done.returncode == 0 and done.stdout.split()[-1] == esfast.__version__, done.stderr[-2000:]
    assert "version" not in re.findall(
        r"^(\w+) = ", PYPROJECT.partition("[project]\n")[2].partition("\n[")[0], re.MULTILINE
    )
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == esfast.__version__
    newest = re.search(r"^## (\S+?)(,| |$)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert newest == esfast.__version__


def test_every_package_is_named():
    named = set(re.findall(r'"([\w.]+)"', re.search(r"^packages = (\[.*?\])", PYPROJECT, re.MULTILINE | re.DOTALL)[1]))
    here = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "esfast").rglob("__init__.py")}
    assert here <= named and {"esfast.bench", "esfast.kernels"} <= named


@pytest.mark.parametrize("missing", ["no compiler", "one that fails"])
def test_without_a_compiler_the_build_says_what_to_install(tmp_path, missing):
    (tmp_path / "bin").mkdir()
    if missing == "one that fails":
        for name in ("false-cxx", "false-cc"):
            (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
            (tmp_path / "bin" / name).chmod(0o755)
    names = (
        {"CXX": "false-cxx", "CC": "false-cc"}
        if missing != "no compiler"
        else {"CXX": "no-such-cxx", "CC": "no-such-cc"}
    )
    done = setup_py(
        "build_ext",
        "--build-lib",
        str(tmp_path / "lib"),
        "--build-temp",
        str(tmp_path / "temp"),
        "--force",
        PATH=f"{tmp_path / 'bin'}:/bin:/usr/bin" if missing != "no compiler" else str(tmp_path / "bin"),
        **names,
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "It needs a C++17 compiler, and Python's headers" in done.stderr and "apt-get install g++" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


ELSEWHERE = {"vllm", "ray", "verifiers", "textarena"}


def test_what_tests_are_skipped_without_is_in_the_development_extra():
    """Tests skip if an optional package is missing. If the development extra lacks it, they would be skipped
    everywhere. vLLM and Ray have an environment of their own; verifiers holds openai below 3 and can't be installed
    beside the others; TextArena is in no extra."""
    extras = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    (dev,) = re.findall(r"^dev = \[\n(.*?)^\]", extras, re.DOTALL | re.MULTILINE)
    asked = re.findall(r'^ +"([\w-]+)', dev, re.MULTILINE)
    for name in re.search(r"esfast\[(.*?)\]", dev)[1].split(","):
        asked += re.findall(r'"([\w-]+)', re.search(rf"^{name} = \[(.*?)\]$", extras, re.MULTILINE | re.DOTALL)[1])
    brought = {*asked, *(re.match(r"[\w-]+", text)[0] for text in metadata("datasets").get_all("Requires-Dist"))}
    skips = [re.findall(r'importorskip\(\s*"(\w+)', path.read_text("utf-8")) for path in (ROOT / "tests").rglob("*.py")]
    needed = {name.replace("_", "-") for names in skips for name in names} - {"esfast", *ELSEWHERE}
    assert {"peft", "trl", "datasets"} <= needed <= brought
