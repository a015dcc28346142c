"""The rooms of esfast stand in one order, and a module imports only from its own and from those before it."""

import ast
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (
    "utils kernels core update journal distributed es rollout rewards tasks trainer report integrations cli bench"
).split()
# `esfast bench` hands its words to the benchmarks, which stand last.
ALLOWED = {("esfast.cli", "esfast.bench")}
# Imports inside functions that would close a circle of modules, each for the reason given. No others may come.
LATE = {
    # a kernel is tuned by calling what chooses among kernels
    ("esfast.core.backends.triton", "esfast.core.ops"),
    # torch.compile meets add_noise_ as an operator, which runs add_noise_
    ("esfast.core.custom_op", "esfast.core.ops"),
    # `replay` reads journals and exports, and an export is made of a journal
    ("esfast.journal.journal", "esfast.journal.export"),
    ("esfast.rollout.adapters", "esfast.rollout.engine"),
    # the plugin extends the worker, which says so where no plugin was loaded
    ("esfast.integrations.vllm", "esfast.integrations.vllm_plugin"),
    ("esfast.bench", "esfast.bench.figures"),
    ("esfast.bench", "esfast.bench.provenance"),
    ("esfast.bench.sass", "esfast.bench.sass_cuda"),
}
FLOORS = 10  # of rooms: the longest way from one that imports nothing
LINES = 400  # of a file
SKIPS = 30  # places that keep their own layout

SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
FOLDERS = ("esfast", "csrc", "kernels", "bench")
# code around the package: of it, only the length is looked at
AROUND = ("tests", "docs", "examples")


def sources(folders: tuple[str, ...] = FOLDERS) -> dict[str, str]:
    """The texts of all sources in these folders by path."""
    paths = [p for folder in folders for p in sorted((ROOT / folder).rglob("*"))]
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths if p.suffix in SUFFIXES}


def name_of(path: str) -> str:
    """The module of a file; bench/ and kernels/ are installed inside the package."""
    parts = [*([] if path.startswith("esfast/") else ["esfast"]), *path.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@lru_cache(None)
def imported(path: str, text: str) -> list[tuple[str, str, bool]]:
    """(module, name or "", whether inside a function) for each name that a file imports; not what only a type checker
    reads."""
    module = name_of(path).split(".")
    package = module if path.endswith("/__init__.py") else module[:-1]
    found = []

    def walk(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, "", inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found.extend((source, alias.name, inside) for alias in node.names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            for child in ast.iter_child_nodes(node):
                walk(child, inside or isinstance(node, ast.FunctionDef))

    walk(ast.parse(text), False)
    return found


def edges(texts: dict[str, str]) -> dict[tuple[str, str], bool]:
    """(module, a module that it imports) -> whether it does so inside a function alone."""
    names = {path: name_of(path) for path in texts if path.endswith(".py")}
    known, found = set(names.values()), {}
    for path, name in names.items():
        for source, what, inside in imported(path, texts[path]):
            other = f"{source}.{what}" if f"{source}.{what}" in known else source
            if other in known:
                found[name, other] = inside and found.get((name, other), True)
    return found


def room(module: str) -> str:
    """The folder ("room") of a module in the package. "" for the package's own __init__, which imports from all rooms,
    but only when a name is used."""
    return (module.split(".") + [""])[1]


def findings(texts: dict[str, str]) -> list[str]:
    names = [name_of(path) for path in texts if path.endswith(".py")]
    found = [f"{n} stands in no room of {', '.join(ORDER)}" for n in names if room(n) not in ("", "__main__", *ORDER)]
    graph: dict[str, set[str]] = {name: set() for name in names}
    rooms: dict[str, set[str]] = {name: set() for name in ORDER}
    for (name, other), late in edges(texts).items():
        mine, theirs = room(name), room(other)
        if not (late and (name, other) in LATE):
            graph[name].add(other)
        if mine not in ORDER or theirs not in ORDER or mine == theirs or (name, other) in ALLOWED:
            continue
        if ORDER.index(mine) < ORDER.index(theirs):
            found.append(f"{name} imports {other}, which stands above it")
        else:
            rooms[mine].add(theirs)
    found += [f"{' -> '.join(circle)} is a circle" for circle in circles(graph)]
    floors: dict[str, int] = {}
    for name in ORDER:  # each imports only those before it
        floors[name] = 1 + max((floors[other] for other in rooms[name]), default=0)
    if max(floors.values()) > FLOORS:
        found.append(f"the rooms stand on {max(floors.values())} floors, expected at most {FLOORS}: {floors}")
    return found + too_long(texts)


def too_long(texts: dict[str, str]) -> list[str]:
    long = {path: n for path, text in texts.items() if (n := text.count("\n")) > LINES}
    return [f"{path} has {n} lines, expected at most {LINES}" for path, n in long.items()]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """For each circle of imports, the modules along it."""
    found: list[list[str]] = []
    done: set[str] = set()
    path: list[str] = []

    def walk(name: str) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                walk(other)
            done.add(path.pop())

    for name in graph:
        walk(name)
    return found


def test_no_module_reaches_up_and_none_goes_round_in_circles():
    assert findings(sources()) == []


def test_the_files_around_the_package_can_be_read_in_one_sitting():
    around = sources(AROUND)
    assert {"tests/conftest.py", "docs/hooks.py", "examples/replay.py"} <= set(around)
    assert too_long(around) == []
    assert too_long({"tests/test_long.py": "\n" * 401}) == ["tests/test_long.py has 401 lines, expected at most 400"]


def test_few_places_keep_their_own_layout():
    found = [p for folder in (*FOLDERS, "tests", "examples") for p in (ROOT / folder).rglob("*.py")]
    marks = sum(p.read_text(encoding="utf-8").count("# fmt: " + "skip") for p in [*found, ROOT / "setup.py"])
    assert marks < SKIPS


def test_every_exception_is_still_needed():
    late = {edge for edge, inside in edges(sources()).items() if inside}
    assert late >= LATE | ALLOWED


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        (
            "esfast/utils/stats.py",
            "from ..core.noise import philox",
            "esfast.utils.stats imports esfast.core.noise, which",
        ),
        (
            "esfast/core/plan.py",
            "def f():\n    from esfast.trainer import trainer",
            "core.plan imports esfast.trainer.trainer",
        ),
        ("esfast/tasks/tags.py", "import esfast.cli.parser", "esfast.tasks.tags imports esfast.cli.parser"),
        (
            "esfast/trainer/trainer.py",
            "from ..bench.workload import x",
            "esfast.trainer.trainer imports esfast.bench.workload",
        ),
        ("esfast/core/kinds.py", "from . import plan", "is a circle"),
        ("esfast/core/custom_op.py", "from .ops import add_noise_", "is a circle"),
        ("esfast/attic/thing.py", "", "esfast.attic.thing stands in no room"),
        ("csrc/long.cuh", "\n" * 401, "csrc/long.cuh has 403 lines"),
    ],
    ids=["lower room", "in a function", "absolute", "benchmarks", "circle", "no longer late", "no room", "long"],
)
def test_what_would_be_wrong_is_found(file, line, words):
    texts = sources()
    texts[file] = f"{texts.get(file, '')}\n{line}\n"
    found = findings(texts)
    assert any(words in text for text in found) and all(words in text or "is a circle" in text for text in found)
