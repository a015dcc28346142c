"""What earlier versions wrote is read for ever: journals, exports, checkpoints and run folders under tests/fixtures, a
folder a version or commit, give the weights that they gave then, to the bit. tests/fixtures/make.py says how they were made."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import transformers
from fixtures.make import GENERATIONS, MORE, digest, make_es, step, weights_of
from life import contents
from safetensors.torch import load_file

import esfast
from esfast import Plan
from esfast.cli import main as command
from esfast.core.random_stream import DRAWS_VERSION
from esfast.journal.journal import read, replay
from esfast.tasks.file import reward_function
from esfast.trainer.run_folder import RunFolder

FOLDERS = sorted(p for p in (Path(__file__).parent / "fixtures").iterdir() if (p / "expected.json").is_file())
EXPECTED = {folder: json.loads((folder / "expected.json").read_text()) for folder in FOLDERS}
JOURNALS = [pytest.param(f, name, id=f"{f.name}-{name}") for f in FOLDERS for name in EXPECTED[f]["journals"]]
RUNS = [pytest.param(f, name, id=f"{f.name}-{name}") for f in FOLDERS for name in EXPECTED[f]["runs"]]


@pytest.fixture
def folder():
    """Of the version; each test names it."""


@pytest.fixture
def there(folder, tmp_path, monkeypatch):
    """A copy of a version's folder, where the test is then: its runs name the base model as it lies beside them."""
    written = EXPECTED[folder]["transformers"]
    if int(transformers.__version__.split(".")[0]) < int(written.split(".")[0]):  # 4 reads none of 5's tokenizers
        pytest.skip(f"its models were saved by Transformers {written}, this is {transformers.__version__}")
    shutil.copytree(folder, tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.syspath_prepend(tmp_path / "there")
    monkeypatch.delitem(sys.modules, "run_rewards", raising=False)  # another test's
    return tmp_path / "there"


def tuned(folder, name):
    return digest(load_file(next(p for p in Path(folder).glob(name))))


def run_command(*words):
    assert command([str(word) for word in words]) in (0, None)


def test_there_are_fixtures_and_they_are_small():
    assert FOLDERS and all(EXPECTED[f]["journals"] and EXPECTED[f]["runs"] for f in FOLDERS)
    assert sum(p.stat().st_size for f in FOLDERS for p in f.rglob("*")) < 2**20


@pytest.mark.parametrize("packed", (False, True), ids=("journal", "export"))
@pytest.mark.parametrize("folder, name", JOURNALS)
def test_a_journal_gives_the_weights_it_gave(folder, name, packed):
    expected = EXPECTED[folder]["journals"][name]
    path = folder / "journals" / name / ("packed.safetensors" if packed else "journal.jsonl")
    for until in (0, 1, 2, GENERATIONS):  # the third generation has a member that was set aside
        weights = weights_of(folder, expected["dtype"])
        replay(Plan(weights), path, until=until)
        assert digest(weights) == expected["weights"][str(until)], until


@pytest.mark.parametrize("folder, name", JOURNALS)
def test_a_journal_is_packed_as_it_was(folder, name, tmp_path):
    here = folder / "journals" / name
    run_command("export", here / "journal.jsonl", "--out", tmp_path / "packed.safetensors")
    assert load_all(tmp_path / "packed.safetensors") == load_all(here / "packed.safetensors")


def load_all(path):
    return {name: repr(tensor.tolist()) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("folder, name", JOURNALS)
def test_a_run_of_es_goes_on_as_it_would_have(folder, name, tmp_path, caplog):
    expected = EXPECTED[folder]["journals"][name]
    shutil.copytree(folder / "journals" / name, tmp_path / "run")
    weights = weights_of(folder, expected["dtype"])
    es = make_es(weights, tmp_path / "run", expected["options"], resume=True)
    from_a_checkpoint = 4 if expected["options"].get("checkpoints") else 0
    assert f"after generation {GENERATIONS}: {from_a_checkpoint} of them from a checkpoint" in caplog.text
    assert es.generation == GENERATIONS and digest(weights) == expected["weights"][str(GENERATIONS)]
    for _ in range(MORE):
        step(es)
    assert digest(weights) == expected["weights"][str(GENERATIONS + MORE)]


@pytest.mark.parametrize("folder, name", RUNS)
def test_a_run_folder_is_replayed_to_the_weights_it_holds(folder, name, there):
    expected = EXPECTED[folder]["runs"][name]
    assert tuned(f"runs/{name}/model", expected["file"]) == expected["weights"]
    base = ["--base", "base", *(["--dtype", "bfloat16"] if name == "master" else [])]
    base += ["--adapter", f"runs/{name}/adapter"] if name == "lora" else []
    for source in (f"runs/{name}/journal.jsonl", f"runs/{name}.safetensors"):
        out = there / "again" / Path(source).name
        run_command("replay", source, *base, "--out", out)
        assert tuned(out, expected["file"]) == expected["weights"], source
    run_command("export", f"runs/{name}", "--out", "packed.safetensors")
    assert load_all("packed.safetensors") == load_all(f"runs/{name}.safetensors")


@pytest.mark.parametrize("folder, name", RUNS)
def test_a_run_folder_goes_on(folder, name, there, caplog):
    """What was done is as it was; then comes one generation more. Of rows that are drawn in another way than then, the
    first resume tells."""
    run = RunFolder(f"runs/{name}")
    journal, metrics = run.journal.read_bytes(), run.read_metrics()
    resume(name, there, generations=4)
    assert run.journal.read_bytes().startswith(journal) and len(read(run.journal).records) == 4
    assert run.read_metrics()[:4] == metrics and run.read_metrics()[4]["generation"] == 4
    assert run.read_summary()["generations"] == 4
    said = "was begun by an older esfast, which drew rows in another way. What it did in 3 generations stays"
    assert (said in caplog.text) == (folder.name == "d3e6f80") and run.read_identity()["draws"] == DRAWS_VERSION
    caplog.clear()
    resume(name, there, generations=5)
    assert said.partition(",")[0] not in caplog.text


def resume(name, there, generations):
    if "task" in RunFolder(f"runs/{name}").read_config():
        return run_command("train", "--resume", "--out", f"runs/{name}", "--generations", generations)
    config = esfast.ESConfig(**RunFolder(f"runs/{name}").read_config() | {"resume": True, "generations": generations})
    rows = [json.loads(line) for line in (there / "rows.jsonl").read_text().splitlines()]
    lora = pytest.importorskip("peft").LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return esfast.ESTrainer(
        "base", reward_function("run_rewards:vowels"), config, rows[:7], rows[7:], peft_config=lora
    ).train()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_finished_run_of_before_is_left_as_it_is(folder, there, caplog):
    before = contents(there / "runs" / "file")
    run_command("train", "--resume", "--out", "runs/file")
    assert contents(there / "runs" / "file").items() >= before.items() and "drew rows" not in caplog.text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_run_folders_of_before_are_reported_and_evaluated(folder, there, capsys):
    names = list(EXPECTED[folder]["runs"])
    run_command("report", *(f"runs/{name}" for name in names), "--out", "report.html")
    page = Path("report.html").read_text()
    assert all(name in page for name in names) and "Training reward" in page
    capsys.readouterr()
    run_command("eval", "--model", "runs/file", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["reward"] == pytest.approx(RunFolder("runs/file").read_summary()["after"]["eval_reward"])
