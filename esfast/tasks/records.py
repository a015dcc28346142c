"""Reads records from data files: JSON, lines of JSON, tables, texts, Parquet and Arrow, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..utils.errors import BadFile, BadImport, BadValue, FileMissing

# Prefix of names for datasets.load_dataset.
DATASETS = "dataset:"
SPLITS = ("train", "test", "validation")
DELIMITERS = ",;\t|"
# Longer ones first: UTF-32's begins with UTF-16's.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
UNPACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}


def read(path: str | Path) -> list[dict]:
    """The records of a file, as dicts. The ending of its name decides, in upper or lower case:

        .jsonl .ndjson   an object a line
        .json            a list of objects, an object of columns (lists of equal length) or of splits (lists of objects
                         named train, test, validation), or lines as in .jsonl
        .csv .tsv        a header and a record a row; every cell is a text, and stays one
        .txt             a prompt a line
        .parquet .arrow  (.pq, .feather) need the optional package datasets, which brings pyarrow
        ....gz           any of the text files, compressed; also .bz2 and .xz

    or of a folder that datasets.save_to_disk wrote (of several splits, each record gets its column "split"), or of
    `dataset:NAME`, whose split "train" is loaded from the Hugging Face hub. Texts are UTF-8, or have a byte order mark.
    Lines end with \\n or \\r\\n, or \\r where there is no \\n: U+2028, form feeds and their like stay inside a text.

    Raises FileNotFoundError; OSError for a dataset that can't be had; ValueError that names the file, and the line
    where there is one; ImportError without `datasets`.
    """
    name = str(path)
    if name.startswith(DATASETS):
        return _from_hub(name)
    path = Path(path)
    if not path.exists():
        raise FileMissing(f"no file {name}; for a dataset of the Hugging Face hub write {DATASETS}NAME")
    records = list(_of(path))
    if not records:
        raise BadValue(f"{path}: expected at least one record")
    return records


def _of(path: Path) -> Iterator[dict]:
    if path.is_dir():
        return _saved(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    unpack = UNPACK.get(suffixes[-1]) if suffixes else None
    kind = "".join(suffixes[-2:-1] if unpack else suffixes[-1:])
    if kind in TABLES and not unpack:
        return _rows_of(path, TABLES[kind])
    if kind not in TEXTS:
        raise BadValue(
            f"{path}: expected a file that ends in {', '.join([*TEXTS, *TABLES])}, a text file packed as "
            f"{', '.join(UNPACK)}, a folder of datasets.save_to_disk, or {DATASETS}NAME"
        )
    raw = path.read_bytes()
    if unpack:
        try:
            raw = unpack(raw)
        except Exception as error:
            # Each compression has its own errors.
            raise BadValue(f"{path}: can't be unpacked ({error})") from None
    return TEXTS[kind](path, _text(path, raw))


def _text(path: Path, raw: bytes) -> str:
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if raw.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise BadValue(f"{path}: line {line} holds a NUL character: UTF-16 without a byte order mark, or no text")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadValue(
            f"{path}: line {line} is no {encoding.removesuffix('-sig').upper()} ({error.reason} "
            f"0x{raw[error.start]:02x}); convert the file, as by iconv -f LATIN1 -t UTF-8"
        ) from None
    # Old Macs ended lines this way, and some spreadsheets still do.
    return text if "\n" in text else text.replace("\r", "\n")


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1."""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line


def _prompts(path: Path, text: str) -> Iterator[dict]:
    return ({"prompt": line} for _, line in _numbered(text))


# JSON


class _NoJSON(ValueError):
    """JSON that Python's json accepts and esfast refuses; `token` is the text that it is at, if known."""

    def __init__(self, message: str, token: str = ""):
        super().__init__(message)
        self.token = token


def _object(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _NoJSON(f"the key {twice!r} stands twice in one object")
    return record


def _constant(name: str) -> float:
    raise _NoJSON(f"{name} is no number of JSON's; write null, or leave the record out", name)


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _NoJSON(f"{text} is beyond the range of numbers", text)
    return value


# Not strict: control characters inside a text, tabs above all, do no harm.
_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, strict=False)


def _parse(path: Path, text: str, first_line: int = 1):
    """The value of a JSON text that begins in line `first_line` of the file."""
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise BadValue(f"{path}: line {first_line + error.lineno - 1} is no JSON ({error.msg})") from error
    except _NoJSON as error:
        outside = re.compile(r'"(?:[^"\\]|\\.)*"|(' + re.escape(error.token) + ")", re.DOTALL)
        at = next(
            (m.start() for m in outside.finditer(text) if m[1]), 0 if first_line > 1 or "\n" not in text else None
        )
        where = "" if at is None else f" line {first_line + text.count(chr(10), 0, at)}:"
        raise BadValue(f"{path}:{where} {error}") from None
    except (ValueError, RecursionError) as error:
        # For example a number of thousands of digits, or endless brackets.
        raise BadValue(f"{path}: line {first_line} can't be read ({error})") from None


def _lines(path: Path, text: str) -> Iterator[dict]:
    # A list in a file with another ending.
    if text.lstrip("\ufeff \t\r\n").startswith("["):
        yield from _document(path, text)
        return
    for number, line in _numbered(text):
        # Files that were joined may contain byte order marks.
        record = _parse(path, line.lstrip("\ufeff"), number)
        if not isinstance(record, dict):
            raise BadValue(f"{path}: line {number}: expected an object, got {line.strip():.60}")
        yield record


def _document(path: Path, text: str) -> Iterator[dict]:
    try:
        found = _parse(path, text)
    except ValueError as error:
        if getattr(error.__cause__, "msg", None) != "Extra data" or text.lstrip().startswith("["):
            raise
        # An object a line, in a file with another ending.
        yield from _lines(path, text)
        return
    if isinstance(found, dict) and found and found.keys() <= set(SPLITS):
        found = [{"split": name, **record} for name in found for record in _objects(path, f"{name}: ", found[name])]
    if isinstance(found, dict) and found and all(isinstance(column, list) for column in found.values()):
        sizes = {name: len(column) for name, column in found.items()}
        if len(set(sizes.values())) > 1:
            raise BadValue(f"{path}: expected columns of equal length, got {sizes}")
        found = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    yield from _objects(path, "", [found] if isinstance(found, dict) else found)


def _objects(path: Path, where: str, records) -> list[dict]:
    if not isinstance(records, list):
        raise BadValue(f"{path}: {where}expected a list of objects, got {records!r:.60}")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise BadValue(f"{path}: {where}record {number}: expected an object, got {record!r:.60}")
    return records


# Tables


def _tabbed(path: Path, text: str) -> Iterator[dict]:
    return _table(path, text, "\t")


def _table(path: Path, text: str, delimiter: str | None = None) -> Iterator[dict]:
    header = re.sub(r'"[^"]*"', "", text.partition("\n")[0])
    delimiter = delimiter or max(DELIMITERS, key=header.count)
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        # pandas writes the row's number in a first column without a name.
        start = 1 if names[:1] == [""] and len(names) > 1 else 0
        names = [name.strip() for name in names[start:]]
        if "" in names or len(set(names)) < len(names):
            raise BadValue(f"{path}: line 1: expected a header of different names, got {names}")
        for cells in reader:
            if cells and len(cells) != start + len(names):
                raise BadValue(
                    f"{path}: line {reader.line_num}: expected {start + len(names)} cells as in the header, "
                    f"got {len(cells)}; a cell with {delimiter!r} or a new line in it needs quotes"
                )
            if cells:
                yield dict(zip(names, cells[start:], strict=True))
    except csv.Error as error:
        raise BadValue(f"{path}: line {reader.line_num} is no CSV ({error})") from None
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path):
    from pyarrow import parquet

    return parquet.read_table(path)


def _arrow(path: Path):
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        try:
            return pyarrow.ipc.open_file(file).read_all()
        except pyarrow.ArrowInvalid:
            # A stream, as the datasets package writes it.
            file.seek(0)
            return pyarrow.ipc.open_stream(file).read_all()


def _rows_of(path: Path, load: Callable) -> Iterator[dict]:
    try:
        rows = load(path).to_pylist()
    except ImportError:
        raise BadImport(f"{path}: needs pyarrow, of the datasets package: pip install 'esfast[datasets]'") from None
    except Exception as error:
        # pyarrow may raise anything for a damaged file.
        raise BadValue(f"{path}: can't be read ({error})") from None
    return iter(rows)


def _saved(folder: Path) -> Iterator[dict]:
    if not any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        raise BadValue(f"{folder}: is a folder, and none that datasets.save_to_disk wrote; name a file")
    package = _datasets(folder)
    try:
        found = package.load_from_disk(str(folder))
    except Exception as error:
        # The package may raise anything for a damaged folder, or a table without columns.
        raise BadValue(f"{folder}: can't be read ({type(error).__name__}: {error})") from None
    if not isinstance(found, dict):
        return iter(found)
    if len(found) == 1:
        return iter(next(iter(found.values())))
    return ({"split": name} | row for name, rows in found.items() for row in rows)


def _from_hub(name: str) -> list[dict]:
    package = _datasets(name)
    try:
        return list(package.load_dataset(name.removeprefix(DATASETS), split="train"))
    except Exception as error:  # whatever the package and what it calls make of a name, a network or a file
        raise BadFile(f"{name} can't be loaded: {type(error).__name__}: {error}") from error


def _datasets(name: str | Path):
    try:
        import datasets
    except ImportError:
        raise BadImport(f"{name}: needs the datasets package: pip install 'esfast[datasets]'") from None
    return datasets


TEXTS = {".jsonl": _lines, ".ndjson": _lines, ".json": _document, ".csv": _table, ".tsv": _tabbed, ".txt": _prompts}
TABLES = {".parquet": _parquet, ".pq": _parquet, ".arrow": _arrow, ".feather": _arrow}
