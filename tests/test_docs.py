"""What docs/training.md, choosing.md and coming-from-grpo.md show is run, as far as a small model on a CPU goes."""

import re
import shlex
from pathlib import Path

import pytest

import esfast
from esfast import cli, embedded
from esfast.bench import BENCHMARKS

DOCS = Path(__file__).parent.parent / "docs"
TEXTS = {p: (DOCS / p).read_text(encoding="utf-8") for p in ("training.md", "choosing.md", "coming-from-grpo.md")}
BLOCKS = [(p, b) for p, text in TEXTS.items() for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
COMMANDS = [line.split("#")[0].strip() for text in TEXTS.values() for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
            for line in block.splitlines()]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return embedded.build(tmp_path_factory.mktemp("model") / "tiny", steps=1, progress=False)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_python_blocks_run(block, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[block][1].replace("Qwen/Qwen2.5-0.5B-Instruct", str(tiny))
    for count in ("generations=50", "max_steps=50"):
        code = code.replace(count, count.replace("50", "2"))
    scope = {"esfast": esfast}
    exec(code.replace("completion_length=64", "completion_length=4"), scope)
    assert scope["trainer"].es.generation == 2 and list(tmp_path.glob("runs/*/model/model.safetensors"))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    arguments = shlex.split(command)[1:]
    if arguments[0] == "bench":
        assert arguments[1] in BENCHMARKS
    else:
        assert callable(cli._parser(full=True).parse_args(arguments).run)


def test_every_link_between_pages_leads_somewhere():
    for text in TEXTS.values():
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (DOCS / target).exists(), target
    assert len(BLOCKS) >= 2 and len(COMMANDS) >= 8
