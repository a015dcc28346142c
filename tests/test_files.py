"""Files that are written whole, their access rights, and what is noticed before there is something to write."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esfast
from esfast.tasks import embedded
from esfast.utils.files import check_writable, whole_folder, write_whole


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_everything_that_a_run_writes_has_the_rights_that_the_umask_gives(tmp_path, umask):
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    args = esfast.ESConfig(
        output_dir=str(tmp_path / "new" / "run"),
        generations=2,
        population_size=2,
        checkpoint_every=1,
        prompts_per_generation=1,
        max_completion_length=2,
        sigma=0.1,
        lr=0.1,
        progress=False,
    )
    rows = [{"prompt": f"{i}\n"} for i in range(3)]
    esfast.ESTrainer(
        embedded.make_model(tokenizer),
        lambda completions, **_: [float(len(set(c))) for c in completions],
        args,
        rows,
        rows,
        tokenizer,
    ).train()
    found = {path: mode(path) for path in tmp_path.rglob("*")}
    assert any(path.name == "model.safetensors" for path in found) and any(
        p.parent.name == "checkpoints" for p in found
    )
    assert {path: m for path, m in found.items() if m != (0o777 if path.is_dir() else 0o666) & ~umask} == {}


def test_an_exported_file_and_a_page_have_them_too(tmp_path, umask):
    write_whole(tmp_path / "page.html", "x")
    assert mode(tmp_path / "page.html") == 0o666 & ~umask


def test_whole_or_not_at_all(tmp_path):
    write_whole(tmp_path / "file", "before")
    with pytest.raises(TypeError):
        write_whole(tmp_path / "file", 5)
    with pytest.raises(KeyError), whole_folder(tmp_path / "folder") as unfinished:
        (unfinished / "half").touch()
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "before"
    # hidden names that are longer than a file system takes are not made of long ones
    write_whole(tmp_path / ("n" * 250), "long")


BAD = {
    "below a file": ("file/run", True, NotADirectoryError),
    "a file": ("file", True, NotADirectoryError),
    "a folder": ("folder", False, IsADirectoryError),
    "too long": ("x" * 300 + "/run", True, OSError),
    "undecodable": ("l\udce4ufe", True, ValueError),
    "where nothing can be made": ("/proc/esfast/run", True, OSError),
    "below a file, a file": ("file/page.html", False, NotADirectoryError),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_written_is_noticed(tmp_path, case):
    path, folder, error = BAD[case]
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match="^--out: ") as caught:
        check_writable("--out", tmp_path / path, folder)
    assert "\n" not in str(caught.value) and "Errno" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def test_what_can_be_written_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("before")
    for path, folder in (("new/run", True), ("new/page.html", False), ("file", False), ("läufe", True), (".", True)):
        assert check_writable("--out", tmp_path / path, folder) == tmp_path / path
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "before"


def test_a_name_that_the_locale_has_no_letters_for_is_refused_at_the_door(tmp_path):
    code = "from esfast.utils.files import check_writable; check_writable('output_dir', 'l\\xe4ufe', True)"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert r"output_dir: the name 'l\xe4ufe' can't be written" in done.stderr and not list(Path(tmp_path).iterdir())
