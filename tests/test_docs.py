"""What the pages of docs/ show is run, as far as a small model on a CPU goes, and their links lead somewhere."""

import ast
import re
from pathlib import Path

import commands
import pytest
import torch
import torch.distributed as dist

import esfast

ROOT = Path(__file__).parent.parent
TEXTS = {
    p.relative_to(ROOT): p.read_text(encoding="utf-8")
    for p in (*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
}
PAGES = {page.name: text for page, text in TEXTS.items() if page.parts[0] == "docs"}
# pages whose Python blocks another test runs
ELSEWHERE = {
    "coming-from.md": "test_recipes.py",
    "vllm.md": "test_fleet_trainer.py",
    "recipes.md": "test_recipes.py",
    "rollouts.md": "test_decoding.py",
    "environments.md": "test_episodes_training.py",
    "extend.md": "test_extending.py",
    "es.md": "test_readme.py",
    "primitive.md": "test_readme.py",
    "your_task.md": "test_readme.py",
}


def blocks(page):
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


@pytest.mark.parametrize(
    ("page", "number"), [(p, n) for p in ("training.md", "coming-from-grpo.md") for n in range(len(blocks(p)))]
)
def test_trainings_run(page, number, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(page)[number].replace("Qwen/Qwen2.5-0.5B-Instruct", str(tiny))
    for count in ("generations=50", "max_steps=50"):
        code = code.replace(count, count.replace("50", "2"))
    scope = {"esfast": esfast}
    exec(code.replace("completion_length=64", "completion_length=4"), scope)
    assert scope["trainer"].es.generation == 2 and list(tmp_path.glob("runs/*/model/model.safetensors"))


def test_the_replay_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("replay.md")
    exec(code, scope := {})
    assert len(scope["records"]) == 20 and (tmp_path / "linear.safetensors").exists()


def test_a_first_sigma_is_a_tenth_of_the_weights(tiny):
    from transformers import AutoModelForCausalLM

    auto, code = blocks("choosing.md")
    exec(auto, scope := {"esfast": esfast})
    assert scope["config"].open_questions() == ["sigma", "lr", "groups"]
    model = AutoModelForCausalLM.from_pretrained(tiny)
    exec(code, scope := {"model": model})
    matrices = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    assert scope["sigma"] == pytest.approx(0.1 * matrices.square().mean().sqrt().item(), rel=1e-4)
    assert esfast.ES(model, **scope["settings"]).sigma == scope["sigma"] and 1e-3 < scope["sigma"] < 3e-2


def test_groups_of_ranks_run(tiny, tmp_path, monkeypatch):
    """As one group of one rank: tests/sharded.py and test_tensor_parallel.py have several."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        scope = {
            "esfast": esfast,
            "model": model,
            "evaluate": lambda model: float(torch.rand(())),
        }
        loop, training = (
            code.replace('"cuda"', '"cpu"').replace("shards=4", "shards=1").replace("(100)", "(2)")
            for code in blocks("distributed.md")
        )
        exec(loop, scope)
        assert scope["es"].generation == 2
        assert not any(torch.equal(p.full_tensor(), old) for p, old in zip(model.parameters(), before, strict=True))
        settings = "generations=1, population_size=2, prompts_per_generation=1, max_completion_length=2, progress=False"
        training = training.replace("Qwen/Qwen2.5-7B-Instruct", str(tiny)).replace('"runs/a"', f'"runs/a", {settings}')
        scope |= {"rows": [{"prompt": "a"}], "reward": lambda completions, **_: [float(len(c)) for c in completions]}
        exec(training, scope)
        assert (tmp_path / "runs" / "a" / "model" / "model.safetensors").exists()
    finally:
        dist.destroy_process_group()


def test_low_rank_noise_runs():
    (code,) = blocks("low_rank.md")
    model = torch.nn.Linear(4, 4)
    before = model.weight.detach().clone()
    exec(code, scope := {"esfast": esfast, "model": model, "seed": 1, "sigma": 0.1})
    assert torch.linalg.matrix_rank((model.weight - before).detach(), atol=1e-5) == 1
    assert scope["es"].rule.noise_options == {"noise": "low_rank", "rank": 1}


def test_every_page_with_python_is_run():
    here = {"choosing.md", "training.md", "coming-from-grpo.md", "replay.md", "distributed.md", "low_rank.md"}
    assert here | set(ELSEWHERE) == {page for page in PAGES if blocks(page)}
    for page, test in ELSEWHERE.items():
        assert re.search(rf'[/"]{page}"', (ROOT / "tests" / test).read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", sorted({c for text in PAGES.values() for c in commands.in_page(text)}))
def test_commands_parse(command):
    try:
        commands.parse(command)
    except SystemExit as stop:
        assert stop.code == 0 and command.endswith("--help")


def test_what_replay_is_said_to_answer_is_what_the_code_says():
    said = {
        node.value
        for path in (ROOT / "esfast").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    rows = re.findall(r"^\|[^|]+\| (`.*) \|$", PAGES["replay.md"].partition("## What is refused")[2], re.MULTILINE)
    for fragment in (f for row in rows for f in re.findall(r"`([^`]+)`", row)):
        assert any(fragment in text for text in said), fragment
    assert len(rows) >= 10


def test_every_link_leads_to_a_file_and_a_heading():
    for page, text in TEXTS.items():
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
            found = (ROOT / page.parent / target).resolve() if target else ROOT / page
            assert found.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {slug(h) for h in headings}, f"{page}: {target}#{anchor}"


@pytest.mark.parametrize("front", ["README.md", "docs/index.md"])
def test_the_front_pages_list_every_page(front):
    text = (ROOT / front).read_text(encoding="utf-8")
    linked = {(ROOT / front).parent / target for target in re.findall(r"\]\(([\w/.-]+\.(?:md|ipynb))\)", text)}
    assert linked >= {*ROOT.glob("docs/*/*.md"), *ROOT.glob("docs/*/*.ipynb")}


def slug(heading):
    """As GitHub makes anchors."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
