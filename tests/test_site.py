"""The docs site: every page is in its navigation, a build fails over what is missing, and its notebook runs. `make docs`
builds the site itself."""

import json
import os
import re
from pathlib import Path

import pytest

import esfast

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted(DOCS.glob("**/*.ipynb"))

mkdocs = pytest.importorskip("mkdocs", reason="needs the extra `docs`")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds one page of the given text as `make docs` builds the site, without the plugin that reads the code."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    (tmp_path / "docs").mkdir()

    def run(text, nav=("page.md",)):
        (tmp_path / "docs" / "page.md").write_text(text, encoding="utf-8")
        config = load_config(
            str(ROOT / "mkdocs.yml"),
            docs_dir=str(tmp_path / "docs"),
            site_dir=str(tmp_path / "site"),
            nav=list(nav),
            plugins=[],
            hooks=[str(DOCS / "hooks.py")],
        )
        build(config)
        return (tmp_path / "site" / "page" / "index.html").read_text(encoding="utf-8")

    return run


def test_a_sound_page_builds(build):
    assert "leads here" in build("# A\n\n[leads here](#a), [out](../README.md)\n")


@pytest.mark.parametrize(
    ("text", "nav"),
    [
        ("# A\n\n[nowhere](missing.md)\n", ["page.md"]),
        ("# A\n\n[nowhere](#b)\n", ["page.md"]),
        ("# A\n\n[out of docs](../missing.md)\n", ["page.md"]),
        ('# A\n\n<script src="https://example.org/a.js"></script>\n', ["page.md"]),
        ("# A\n", ["page.md", "missing.md"]),
    ],
    ids=["dead link", "dead anchor", "dead link out of docs", "something to fetch", "missing page"],
)
def test_a_build_fails_over(text, nav, build):
    with pytest.raises(mkdocs.exceptions.Abort):
        build(text, nav)


def test_every_page_is_in_the_navigation():
    from mkdocs.utils.yaml import get_yaml_loader, yaml_load

    with open(ROOT / "mkdocs.yml", encoding="utf-8") as file:
        text = re.sub(r"!!python/\S+ \{.*\}", "none", file.read())
    nav = re.findall(r"'([^']+\.md)'", str(yaml_load(text, get_yaml_loader())["nav"]))
    pages = {str(p.relative_to(DOCS)) for p in DOCS.glob("**/*.md")}
    pages |= {str(p.relative_to(DOCS).with_suffix(".md")) for p in NOTEBOOKS}
    assert sorted(nav) == sorted(pages)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setattr("os.environ", os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    content = nbformat.read(notebook, as_version=4)
    nbformat.validate(content)
    code = [cell for cell in content.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs"
    # A twentieth of the worked examples, since making those takes most of the time.
    content.cells.insert(0, nbformat.v4.new_code_cell("from esfast.tasks import embedded\nembedded.CORPUS = 1"))
    nbclient.NotebookClient(content, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "the same bits: True" in json.dumps(code[-1].outputs)


def test_the_api_page_has_every_public_name():
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^      heading: esfast\.(\w+)$", page, re.MULTILINE))
    assert headings == {*esfast.__all__} - {"NOISE_VERSION"}


def test_the_api_page_has_no_name_twice():
    names = re.findall(r"^::: (\S+)$", (DOCS / "reference" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(names) == len(set(names))
