"""What the docs site needs beyond Markdown; mkdocs calls these functions (see mkdocs.yml).

- `<!-- help: train -->` becomes what `esfast train --help` prints, `<!-- settings -->` a table of ESConfig. Both are
  made when the site is built, so they cannot fall behind the code.
- A link out of docs/, which GitHub follows, becomes the address of that file if `repo_url` is set, and else its text.
- A notebook becomes a page: its Markdown, its code as blocks, and the notebook itself to download.
"""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.plugins.esfast")  # a warning here fails a strict build
ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for notebook in [f for f in files if f.src_uri.endswith(".ipynb")]:
        page = notebook.src_uri.removesuffix(".ipynb") + ".md"
        files.append(File.generated(config, page, content=notebook_page(Path(notebook.abs_src_path))))
    return files


def on_page_markdown(markdown, page, config, files):
    markdown = re.sub(r"<!-- help: ?(.*?) -->", lambda m: f"```text\n{help_of(m[1])}```", markdown)
    markdown = markdown.replace("<!-- settings -->", settings_table())
    here = Path(page.file.src_uri).parent
    return _LINK.sub(lambda m: _link(m, here, config), markdown)


def _link(match, here, config):
    text, target, anchor = match.groups()
    inside = os.path.normpath(here / target)
    if not inside.startswith(".."):
        return match[0]
    path = os.path.normpath(Path("docs") / inside)
    if not (ROOT / path).exists():
        log.warning("%s: the link to %s leads nowhere", here, target)
    return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor or ''})" if config.repo_url else text


def on_post_page(output, page, config):
    for address in re.findall(r"<(?:script|img|link)\b[^>]*\b(?:src|href)=\"?(https?:[^\" >]+)", output):
        log.warning("%s fetches %s when it is read", page.file.src_uri, address)
    return output


def help_of(command):
    """What `esfast COMMAND --help` prints, 100 characters wide."""
    words = [sys.executable, "-m", "esfast", *command.split(), "--help"]
    environment = os.environ | {"COLUMNS": "100", "PYTHON_COLORS": "0"}
    return subprocess.run(words, check=True, capture_output=True, text=True, env=environment, cwd=ROOT).stdout


def settings_table():
    """The fields of ESConfig as a Markdown table."""
    from esfast import ESConfig

    rows = ["| setting | type | default | what it does |", "| :-- | :-- | :-- | :-- |"]
    for field in dataclasses.fields(ESConfig):
        choices = field.metadata.get("choices")
        text = field.metadata["help"] + (f" ({', '.join(map(str, choices))})" if choices else "")
        cells = f"`{field.name}`", f"`{field.type}`", f"`{field.default!r}`", text
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |")
    return "\n".join(rows)


def notebook_page(path):
    """A notebook's cells as Markdown, without outputs."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in cells
    ]
    return "\n\n".join([*parts, f"[Download this notebook]({path.name})."])
