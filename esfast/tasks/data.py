"""Where a task's problems come from: its generator, afresh or a fixed set, or a file of the user's."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..rows import draw
from .base import split_of

Source = tuple[Callable[[int, int, int], Sequence[dict]], Callable[[int], Sequence[dict]]]
DATASETS = "dataset:"  # names for datasets.load_dataset begin so


def source(
    problems: Callable[..., list[dict]],
    row: Callable[[dict, str], dict],
    identity: Callable[[dict], Any],
    style: str,
    data: str | Path | None = None,
    train_prompts: int | None = None,
) -> Source:
    """A task's `train_rows` and `eval_rows` (see Task) from its functions:

    problems       (count, seed, split, style) -> generated rows
    row            (record of a data file, style) -> row; ValueError or TypeError says what is wrong with the record
    identity       (row) -> what decides about the split of a row from a file
    data           a file (see `read`) whose records are used instead of generated problems
    train_prompts  train on that many fixed problems instead of fresh ones in every generation
    """
    if data is not None:
        train, test = split(read(data), lambda record: row(record, style), identity, data)
        train = train[:train_prompts]
        return (lambda generation, count, seed: draw(train, generation, count, seed)), lambda count: test[:count]
    problems(1, 0, "train", style)  # an unknown style is refused here rather than at the first generation
    if train_prompts is None:
        train_rows = lambda generation, count, seed: problems(count, f"{seed}/{generation}", "train", style)  # noqa: E731
    else:
        fixed = functools.lru_cache(lambda seed: problems(train_prompts, f"{seed}/fixed", "train", style))
        train_rows = lambda generation, count, seed: draw(fixed(seed), generation, count, seed)  # noqa: E731
    return train_rows, lambda count: problems(count, "evaluation", "test", style)


def read(path: str | Path) -> list[dict]:
    """The records of a JSON file (a list of objects), a JSONL file (an object a line), or of whatever else the
    `datasets` package loads: any other file, or `dataset:NAME`, whose split "train" is taken.

    Raises FileNotFoundError, ValueError that names the line that can't be read, ImportError without `datasets`.
    """
    name = str(path)
    if name.startswith(DATASETS) or not name.endswith((".json", ".jsonl")):
        return _load_dataset(name)
    text, records, number = Path(path).read_text(encoding="utf-8"), [], 0
    try:
        if name.endswith(".json"):
            records = json.loads(text)
        else:
            for number, line in enumerate(text.splitlines()):  # noqa: B007  (named in the error)
                records += [json.loads(line)] if line.strip() else []
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {number + error.lineno} is no JSON ({error.msg})") from None
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise ValueError(f"{path}: expected {'a list of objects' if name.endswith('.json') else 'an object a line'}")
    if not records:
        raise ValueError(f"{path}: expected at least one record")
    return records


def split(
    records: Sequence[Mapping], row: Callable[[dict], dict], identity: Callable[[dict], Any], what: str | Path
) -> tuple[list[dict], list[dict]]:
    """Rows to train on and rows to be judged on. A column "split" of the file's own decides, "train" or "test" (also
    "validation"); otherwise a hash of the problem, by which a quarter is held out."""
    rows: dict[str, list[dict]] = {"train": [], "test": []}
    for number, record in enumerate(records, start=1):
        try:
            made = row(dict(record))
            name = {"validation": "test"}.get(record["split"], record["split"]) if "split" in record else None
            rows[split_of(identity(made)) if name is None else name].append(made)
        except (ValueError, TypeError, KeyError) as error:
            word = f"split {error}: expected train, test or validation" if isinstance(error, KeyError) else error
            raise ValueError(f"{what}: record {number}: {word}") from None
    if not rows["train"]:
        raise ValueError(f'{what}: all {len(records)} records are held out; add more, or a column "split"')
    return rows["train"], rows["test"]


def fields(record: Mapping, *names: str) -> list:
    """The values of a record under these names; ValueError says which one is missing."""
    for name in names:
        if name not in record:
            raise ValueError(f"expected {' and '.join(map(repr, names))}, got only {', '.join(map(repr, record))}")
    return [record[name] for name in names]


def _load_dataset(name: str) -> list[dict]:
    if not name.startswith(DATASETS) and not Path(name).exists():
        raise FileNotFoundError(f"no file {name}; for a dataset of the Hugging Face hub write {DATASETS}NAME")
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{name}: anything but .json and .jsonl files needs the datasets package: pip install 'esfast[datasets]'"
        ) from None
    if name.startswith(DATASETS):
        return list(datasets.load_dataset(name.removeprefix(DATASETS), split="train"))
    kind = {"txt": "text", "pq": "parquet", "tsv": "csv"}.get(Path(name).suffix[1:], Path(name).suffix[1:])
    return list(datasets.load_dataset(kind, data_files=name, split="train"))
