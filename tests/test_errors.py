"""Errors that a user can mend, bugs, and what the command line makes of either; output that nobody reads; the log."""

import ast
import builtins
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import esfast
from esfast import cli
from esfast.cli import parser
from esfast.utils import errors
from esfast.utils.files import check_writable

HOME = Path(esfast.__file__).parent
# Errors of these types are the user's to mend, unless they are listed below with the reason why not.
MENDABLE = ("ValueError", "TypeError", "RuntimeError", "ImportError", "OSError", "FileExistsError", "FileNotFoundError")
NOT_MENDABLE = {
    ("rollout/decoding.py", "RuntimeError"): "makes the engine take another way of decoding",
    ("integrations/actors.py", "RuntimeError"): "engines that differ are a bug",
    ("journal/journal.py", "OSError"): "stands for the operating system's, with its number",
    ("utils/lock.py", "OSError"): "stands for the operating system's, with its number",
    ("tasks/countdown.py", "TypeError"): "is caught two lines below",
    ("tasks/records.py", "ValueError"): "_NoJSON, which the reader of the file makes one of",
    ("tasks/verifiers.py", "RuntimeError"): "stands for the environment's own, and the episode's failure names it",
    ("rewards/worker.py", "TypeError"): "NotRewards, which the scorer makes a RewardError",
}


def test_what_esfast_raises_can_be_mended_or_is_listed():
    found = set()
    for path in HOME.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where, made = path.relative_to(HOME).as_posix(), None
            if isinstance(node, ast.Raise):
                made = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(node, ast.ClassDef) and not any(ast.unparse(b) == "EsfastError" for b in node.bases):
                made = next(iter(node.bases), None)
            if isinstance(made, ast.Name) and made.id in MENDABLE:
                found.add((where, made.id))
    assert found == NOT_MENDABLE.keys()


@pytest.mark.parametrize("kind", [k for k in vars(errors).values() if isinstance(k, type)], ids=lambda k: k.__name__)
def test_an_error_is_of_pythons_own_type_too(kind):
    assert issubclass(kind, esfast.EsfastError) and str(kind("why")) == "why"
    own = [base for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base]
    assert own[0] is not Exception or kind is esfast.EsfastError


def test_doors_raise_them(tmp_path):
    with pytest.raises(esfast.EsfastError, match="sigma: expected a positive finite number") as caught:
        esfast.ESConfig(sigma=0)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(esfast.EsfastError, match="unknown setting 'sigmma'. Did you mean 'sigma'") as caught:
        esfast.ESConfig(sigmma=1)
    assert isinstance(caught.value, TypeError)
    (tmp_path / "file").write_text("")
    with pytest.raises(esfast.EsfastError, match="can't write to") as caught:
        check_writable("--out", tmp_path / "file", folder=True)
    assert isinstance(caught.value, NotADirectoryError)


def unreadable():
    Path("no such file").read_text()


def bug():
    {}["key"]


def value_error_of_a_library():
    int("x")


def os_error_without_a_number():
    raise OSError("somebody's")


def no_memory():
    raise MemoryError


def mend():
    raise errors.BadValue("sigma: expected more")


@pytest.mark.parametrize("act", [bug, value_error_of_a_library, os_error_without_a_number, mend, unreadable, no_memory])
@pytest.mark.parametrize("debug", [False, True])
def test_one_line_for_what_can_be_mended_and_a_traceback_for_a_bug(act, debug, monkeypatch, capsys):
    monkeypatch.setattr(parser, "_command", lambda name: lambda args: act())
    assert cli.main([*["--debug"] * debug, "info"]) == 1
    said = capsys.readouterr().err
    is_a_bug = act not in (mend, unreadable, no_memory)
    assert ("Traceback" in said and act.__name__ in said) == (is_a_bug or debug)
    assert ("esfast: this is a bug" in said and "report it" in said) == is_a_bug
    assert said.count("\n") == 1 or is_a_bug or debug
    if act is mend:
        assert said.endswith("esfast: error: --sigma: expected more\n")
    if act is unreadable:
        assert said.endswith("esfast: error: [Errno 2] No such file or directory: 'no such file'\n")


def run(arguments, unbuffered=False, **streams):
    environment = {"PYTHONUNBUFFERED": "1" if unbuffered else "", "PATH": "/usr/bin:/bin"}
    return subprocess.Popen([sys.executable, "-m", "esfast", *arguments], env=environment, **streams)


@pytest.mark.parametrize(("arguments", "unbuffered"), [(["info"], True), (["--help"], False)])
def test_a_reader_that_has_enough_is_no_error(arguments, unbuffered):
    process = run(arguments, unbuffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 141 and said == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_output_that_finds_no_room_is_one_line():
    with open("/dev/full", "wb") as full:
        process = run(["--help"], stdout=full, stderr=subprocess.PIPE)
        said = process.stderr.read().decode()
    assert process.wait() == 1 and said == "esfast: error: stdout: [Errno 28] No space left on device\n"


def test_information_is_shown_as_such_and_warnings_as_warnings():
    code = """import logging
from esfast.cli import main
try: main(["--help"])
except SystemExit: pass
logging.getLogger("esfast.es.weights").info("takes %d", 3)
logging.getLogger("esfast.es.weights").warning("lost")
logging.getLogger("library").info("not shown")
logging.getLogger("library").warning("shown")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "esfast: takes 3\nesfast: warning: lost\nesfast: warning: shown\n"


def test_a_device_that_is_not_there_is_refused_before_the_model_is_loaded(capsys):
    assert cli.main(["train", "--model", "no such model", "--device", "cuda:99", "--out", "nowhere/at/all"]) == 1
    assert "--device: expected one that PyTorch has here, such as cpu, got 'cuda:99'" in capsys.readouterr().err


def test_a_benchmark_shows_a_bug_as_such_and_one_line_of_the_rest(monkeypatch, capsys):
    import esfast.bench.simulate as benchmark

    monkeypatch.setattr(benchmark, "run", lambda args: bug())
    assert cli.main(["bench", "simulate"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "KeyError: 'key'" in said and "esfast: this is a bug" in said
    monkeypatch.setattr(benchmark, "run", lambda args: mend())
    assert cli.main(["bench", "simulate"]) == 1
    assert capsys.readouterr().err == "esfast bench simulate: error: sigma: expected more\n"


def test_a_dataset_that_cannot_be_had_is_one_line(monkeypatch, capsys):
    import datasets

    def load_dataset(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert cli.main(["train", "--task", "dataset:a/b", "--reward", "math:gcd", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said == "esfast: error: dataset:a/b can't be loaded: ConnectionError: no network\n"


def test_what_is_chosen_is_information_and_what_is_lost_a_warning(caplog, tmp_path):
    esfast.ES([("a", torch.zeros(3))], weights="auto")
    (record,) = caplog.records
    assert record.levelno == logging.INFO and record.name.split(".")[0] == "esfast" and "takes" in record.message
    caplog.clear()
    esfast.ESConfig(logging_steps=1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "left out" in record.message
