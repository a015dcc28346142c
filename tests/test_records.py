"""Data files as people have them: encodings, line ends, packers, JSON and CSV of every kind, tables, folders."""

import bz2
import gzip
import json
import lzma
import sys

import pytest

from esfast import tasks
from esfast.tasks import data
from esfast.tasks.records import read

ROWS = [{"prompt": "one", "n": 1}, {"prompt": "zwei ü", "n": 2}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\t"])
def test_only_new_lines_end_lines(tmp_path, separator):
    text = f"a{separator}b"
    line = json.dumps({"prompt": text, "n": 1}, ensure_ascii=False).replace(json.dumps(text)[2:-2], separator)
    assert read(file(tmp_path, "a.jsonl", f"{line}\r\n{line}\n"))[1] == {"prompt": text, "n": 1}
    assert read(file(tmp_path, "a.json", f"[{line}]")) == [{"prompt": text, "n": 1}]
    assert read(file(tmp_path, "a.txt", f"{text}\r\n\nx\n")) == [{"prompt": text}, {"prompt": "x"}]
    if separator != "\t":
        assert read(file(tmp_path, "a.tsv", f"prompt\tn\n{text}\t1\n")) == [{"prompt": text, "n": "1"}]
    assert read(file(tmp_path, "a.csv", f"prompt,n\n{text},1\n")) == [{"prompt": text, "n": "1"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path, encoding):
    assert read(file(tmp_path, "a.jsonl", LINES.encode(encoding))) == ROWS
    assert read(file(tmp_path, "a.json", json.dumps(ROWS, ensure_ascii=False).encode(encoding))) == ROWS
    assert read(file(tmp_path, "a.csv", "prompt\nü\n".encode(encoding))) == [{"prompt": "ü"}]
    assert read(file(tmp_path, "a.txt", "ü\n".encode(encoding))) == [{"prompt": "ü"}]


def test_files_with_byte_order_marks_that_were_joined(tmp_path):
    assert read(file(tmp_path, "a.jsonl", LINES.encode("utf-8-sig") * 2)) == ROWS * 2


@pytest.mark.parametrize(
    "name", ["a.JSONL", "a.v2.ndjson", "a.Json", "a.jsonl.gz", "a.JSON.GZ", "a.ndjson.bz2", "a.jsonl.xz"]
)
def test_names_and_packers(tmp_path, name):
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(name.lower().rpartition(".")[2], bytes)
    assert read(file(tmp_path, name, pack(LINES.encode()))) == ROWS
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"prompt\nx\n"))
    assert read(tmp_path / "t.csv.gz") == [{"prompt": "x"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps(ROWS, indent=1)),
        ("list.jsonl", json.dumps(ROWS)),
        ("columns.json", json.dumps({"prompt": ["one", "zwei ü"], "n": [1, 2]}, indent=2)),
        ("lines.json", LINES),
        ("blank.jsonl", "\n\n" + LINES.replace("\n", "\n  \n\r\n")),
        ("no_end.jsonl", LINES.rstrip("\n")),
        ("mac.jsonl", LINES.replace("\n", "\r")),
    ],
)
def test_ways_to_write_the_same(tmp_path, name, content):
    assert read(file(tmp_path, name, content)) == ROWS


def test_an_object_of_splits(tmp_path):
    splits = {"train": [{"prompt": "a"}, {"prompt": "b"}], "validation": [{"prompt": "c"}]}
    found = read(file(tmp_path, "a.json", json.dumps(splits)))
    assert found == [{"split": name, **record} for name, records in splits.items() for record in records]
    with pytest.raises(ValueError, match="a.json: test: record 1: expected an object, got 3"):
        read(file(tmp_path, "a.json", '{"train": [{"prompt": "a"}], "test": [3]}'))


def test_values_of_json_stay_what_they_are(tmp_path):
    record = {"prompt": [{"role": "user", "content": "x"}], "deep": {"a": [None, True, 1.5, "1e5"]}, "huge": 10**400}
    assert read(file(tmp_path, "a.jsonl", json.dumps(record))) == [record]
    assert read(file(tmp_path, "one.json", json.dumps(record, indent=2))) == [record]


BAD_JSON = [
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": NaN}', "line 2: NaN is no number of JSON's"),
    ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": -Infinity}', "line 3: -Infinity is no number"),
    ("a.jsonl", '{"prompt": "NaN"}\n{"n": [1, Infinity]}', "line 2: Infinity is no number"),
    ("a.json", '[{"prompt": "NaN"},\n {"prompt":\n NaN}]', "line 3: NaN is no number"),
    ("a.json", '[{"n": 1},\n {"n": 1e999}]', "line 2: 1e999 is beyond the range of numbers"),
    ("a.jsonl", '{"n": -1e999}', "line 1: -1e999 is beyond"),
    ("a.jsonl", '{"n": 1}\n{"n": 1, "m": 2, "n": 3}', "line 2: the key 'n' stands twice in one object"),
    ("a.json", '[{"n": 1},\n{"n": 1, "n": 3}]', "the key 'n' stands twice in one object"),
    ("a.jsonl", '{"n": 1}\n{"n": 1,}', "line 2 is no JSON"),
    ("a.json", '[{"n": 1},\n{"n": 1},\n]', "line [23] is no JSON"),
    ("a.json", "[1]\n[2]", "line 2 is no JSON .Extra data"),
    ("a.jsonl", "[1]\n[2]", "line 2 is no JSON .Extra data"),
    ("a.jsonl", '{"n": 1}\nword', "line 2 is no JSON"),
    ("a.jsonl", '{"n": 1}\n{"n": 1} {"n": 2}', "line 2 is no JSON .Extra data"),
    ("a.jsonl", '{"n": 1}\n"text"', 'line 2: expected an object, got "text"'),
    ("a.jsonl", '{"n": 1}\n[{"n": 1}]', "line 2: expected an object, got"),
    ("a.json", '"text"', "expected a list of objects, got 'text'"),
    ("a.json", '[{"n": 1}, [2]]', r"record 2: expected an object, got \[2\]"),
    ("a.json", '{"prompt": ["a", "b"], "n": [1]}', "expected columns of equal length, got"),
    ("a.jsonl", '{"n": ' + "9" * 5000 + "}", "line 1 can't be read .Exceeds the limit"),
    ("a.jsonl", "{\n}\n" + "[" * 10**5, "line 1 is no JSON"),
    ("a.jsonl", '{"a": 1}\n{"a": ' + "[" * 10**5, "line 2 can't be read|line 2 is no JSON"),
    ("a.json", "", "line 1 is no JSON"),
    ("a.json", "[]", "expected at least one record"),
    ("a.jsonl", "\n \n", "expected at least one record"),
    ("a.txt", "\n\n", "expected at least one record"),
    ("a.csv", "", "expected at least one record"),
    ("a.csv", "prompt,n\n", "expected at least one record"),
    ("a.jsonl", LINES.encode("latin-1"), "line 2 is no UTF-8 .*0xfc.*iconv"),
    ("a.txt", "a\nb\nschön".encode("cp1252"), "line 3 is no UTF-8"),
    ("a.jsonl", LINES.encode("utf-16-le"), "line 1 holds a NUL character: UTF-16 without a byte order mark"),
    ("a.jsonl", b"\xff\xfe\x00", "line 1 is no UTF-16"),
    ("a.jsonl.gz", LINES, "can't be unpacked"),
    ("a.jsonl.gz", gzip.compress(LINES.encode() * 99, mtime=0)[:-20], "can't be unpacked"),
    ("a.json.xz", b"", "can't be unpacked"),
    ("a.jsonl.zst", LINES, "expected a file that ends in .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet"),
    ("a.yaml", LINES, "expected a file that ends in"),
    ("a", LINES, "expected a file that ends in"),
    ("a.parquet.gz", b"", "expected a file that ends in"),
    ("a.parquet", b"PAR1 no", "can't be read"),
    ("a.arrow", b"ARROW1 no", "can't be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_JSON)
def test_what_can_not_be_read_is_named_with_the_line(tmp_path, name, content, message):
    if name.endswith((".parquet", ".arrow")):
        pytest.importorskip("pyarrow", reason="Parquet and Arrow need pyarrow, of the datasets package")
    path = file(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 600


def test_cells_stay_texts(tmp_path):
    odd = ["007", "NaN", "None", "1e5", "", "true", "1,5", "2024-01-01", " x ", 'say "hi"', "two\nlines", "a;b", "null"]
    cells = "".join('"' + cell.replace('"', '""') + '",1\n' for cell in odd)
    assert [row["prompt"] for row in read(file(tmp_path, "a.csv", "prompt,n\n" + cells))] == odd
    assert read(file(tmp_path, "a.csv", "prompt,n\r\n007,\r\n\r\nNaN,x\r\n")) == [
        {"prompt": "007", "n": ""},
        {"prompt": "NaN", "n": "x"},
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt;n\na, b;1\n"),
        ("a.csv", "prompt|n\na, b|1\n"),
        ("a.csv", "prompt\tn\na, b\t1\n"),
        ("a.tsv", "prompt\tn\na, b\t1\n"),
        ("a.csv", '"prompt","n"\n"a, b","1"\n'),
        ("a.csv", ' prompt , n\n"a, b",1\n'),
        ("a.csv", ',prompt,n\n0,"a, b",1\n'),  # as pandas writes its index
        ("a.tsv.csv", 'prompt,n\n"a, b",1\n'),
        ("of.tsv_files.csv", "prompt;n\na, b;1\n"),
        ("a.csv.tsv", "prompt\tn\na, b\t1\n"),
        ("a.csv", 'prompt,n\r"a, b",1\r'),  # lines as old Macs end them
    ],
)
def test_tables_of_several_kinds(tmp_path, name, text):
    assert read(file(tmp_path, name, text)) == [{"prompt": "a, b", "n": "1"}]


def test_cells_of_any_length(tmp_path):
    assert len(read(file(tmp_path, "a.csv", "prompt\n" + "x" * 200_000))[0]["prompt"]) == 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,n\na,1\nb\n", "line 3: expected 2 cells as in the header, got 1"),
        ("prompt,n\na,1,2\n", "line 2: expected 2 cells as in the header, got 3; a cell with ',' .* needs quotes"),
        ('prompt,n\n"a\n\nb",1\nc,"never closed', "line 5 is no CSV"),
        ('prompt,n\n"a"b,1\n', "line 2 is no CSV"),
        ("prompt,prompt\na,b\n", "line 1: expected a header of different names"),
        ("prompt,,n\na,b,c\n", "line 1: expected a header of different names"),
    ],
)
def test_bad_tables_are_named_with_the_line(tmp_path, text, message):
    path = file(tmp_path, "a.csv", text)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_tables_of_arrow_and_saved_folders(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the optional package datasets")
    from pyarrow import Table, feather, parquet

    rows = [{"numbers": [1, 2], "target": "3"}, {"numbers": [2, 2], "target": "4"}]
    table = Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "a.PARQUET")
    feather.write_feather(table, str(tmp_path / "a.feather"), compression="uncompressed")
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "both")
    stream = next((tmp_path / "saved").glob("*.arrow"))  # as the datasets package writes
    for path in (tmp_path / "a.PARQUET", tmp_path / "a.feather", tmp_path / "saved", tmp_path / "one", stream):
        assert read(path) == rows
    assert [r["split"] for r in read(tmp_path / "both")] == ["train"] * 2 + ["test"] * 2
    task = tasks.get("countdown", "compact", data=str(tmp_path / "both"))
    assert task.eval_rows(9) == [
        {"prompt": "1 2=3\n<think>", "numbers": [1, 2], "target": 3},
        {"prompt": "2 2=4\n<think>", "numbers": [2, 2], "target": 4},
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: is a folder, and none that datasets.save_to_disk wrote"):
        read(tmp_path / "empty")
    datasets.Dataset.from_list([]).save_to_disk(tmp_path / "nothing")
    with pytest.raises(ValueError, match="nothing: can't be read|nothing: expected at least one record"):
        read(tmp_path / "nothing")
    (stream.parent / "state.json").write_text("{")
    with pytest.raises(ValueError, match="saved: can't be read"):
        read(stream.parent)


def test_without_the_optional_packages(tmp_path, monkeypatch):
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "state.json").touch()
    for path in (file(tmp_path, "a.parquet", b""), file(tmp_path, "a.arrow", b""), tmp_path, "dataset:x/y"):
        with pytest.raises(ImportError, match=r"pip install 'esfast\[datasets\]'"):
            read(path)


def test_splits_and_columns_are_checked_by_record(tmp_path):
    def rows(text):
        return data.split(read(file(tmp_path, "a.jsonl", text)), dict, lambda row: row["prompt"], "a.jsonl")

    train, test = rows('{"prompt": "a", "split": "train"}\n{"prompt": "b", "split": "validation"}')
    assert [r["prompt"] for r in train] == ["a"] and [r["prompt"] for r in test] == ["b"]
    for text, message in {
        '{"prompt": "a"}\n{"prompt": "b", "n": 1}': "a.jsonl: record 2: expected the columns of record 1, prompt, got prompt, n",
        '{"prompt": "a", "split": ["train"]}': "record 1: split .*: expected train, test or validation",
        '{"prompt": "a", "split": "dev"}': "record 1: split 'dev': expected train, test or validation",
        '{"prompt": "a", "split": "test"}': "all 1 records are held out",
    }.items():
        with pytest.raises(ValueError, match=message):
            rows(text)
