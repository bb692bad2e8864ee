"""Files → rows: every kind, every compression, and what is wrong with a file as one clear error."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.data.files import named_file
from distft.data.json_rows import Lines
from distft.data.problems import RowProblem
from distft.data.readers import read_batches, read_files
from distft.errors import DataError

ROWS = [{"prompt": f"read {n} ", "completion": f'open, "path"\n{n} ünï 🙂'} for n in range(5)]

GZIP = gzip.compress(b"{}", mtime=0)  # the time would be in the test's id


def rows(path: Path) -> list[Any]:
    return [row for _, row in read_files([named_file(path)])]


def places(path: Path) -> list[str]:
    return [place.removeprefix(str(path)) for place, _ in read_files([named_file(path)])]


def error(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        rows(path)
    (line,) = str(caught.value).splitlines()
    return line.removeprefix(str(path))


def problems(path: Path) -> list[str]:
    found = [(place, row) for place, row in read_files([named_file(path)]) if isinstance(row, RowProblem)]
    return [f"{place.removeprefix(str(path))}: {row.kind}: {row.text}" for place, row in found]


# ---- what is right


def as_lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def as_csv(separator: str = ",", end: str = "\n") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=separator, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def as_parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=2)
    return file.getvalue()


def as_arrow(stream: bool) -> bytes:
    import pyarrow

    file, table = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    import pyarrow

    half = len(data) // 2  # two frames, as parallel compressors write
    return b"".join(pyarrow.compress(part, codec="zstd", asbytes=True) for part in (data[:half], data[half:]))


KINDS: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: as_lines(ROWS),
    "rows.JSONL": lambda: as_lines(ROWS),
    "rows.ndjson": lambda: as_lines(ROWS),
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + as_lines(ROWS),
    "crlf.jsonl": lambda: as_lines(ROWS).replace(b"\n", b"\r\n"),
    "blank.jsonl": lambda: b"\n  \n" + as_lines(ROWS).replace(b"\n", b"\n\n"),
    "no-end.jsonl": lambda: as_lines(ROWS).rstrip(),
    "list.jsonl": lambda: json.dumps(ROWS).encode(),
    "rows.json": lambda: json.dumps(ROWS).encode(),
    "pretty.json": lambda: json.dumps(ROWS, indent=4, ensure_ascii=False).encode(),
    "bom.json": lambda: b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "lines.json": lambda: as_lines(ROWS),
    "objects.json": lambda: "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "rows.csv": as_csv,
    "bom.csv": lambda: b"\xef\xbb\xbf" + as_csv(),
    "crlf.csv": lambda: as_csv(end="\r\n"),
    "semicolons.csv": lambda: as_csv(";"),
    "tabs.csv": lambda: as_csv("\t"),
    "rows.tsv": lambda: as_csv("\t"),
    "rows.parquet": as_parquet,
    "file.arrow": lambda: as_arrow(False),
    "stream.arrow": lambda: as_arrow(True),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str, compression: str) -> None:
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESSIONS[compression](KINDS[name]()))
    assert rows(path) == ROWS


def test_places(tmp_path: Path) -> None:
    for name, expected in (
        ("blank.jsonl", [":3", ":5", ":7", ":9", ":11"]),
        ("rows.json", [":[1]", ":[2]", ":[3]", ":[4]", ":[5]"]),
        ("objects.json", [":1", ":5", ":9", ":13", ":17"]),
        ("rows.csv", [":2", ":4", ":6", ":8", ":10"]),  # the line on which a row begins
        ("rows.parquet", [":[1]", ":[2]", ":[3]", ":[4]", ":[5]"]),
        ("stream.arrow", [":[1]", ":[2]", ":[3]", ":[4]", ":[5]"]),
    ):
        path = tmp_path / name
        path.write_bytes(KINDS[name]())
        assert places(path) == expected, name


def test_large_fields_and_lines(tmp_path: Path) -> None:
    """Fields of more than csv's 128 KiB; lines and values of more than a block."""
    text = 'x "é", ' * 600_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n" + '{"text": "b"}\n')
    (tmp_path / "a.json").write_text(json.dumps([{"text": text}, {"text": "b"}], indent=1, ensure_ascii=False))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], [text], ["b"]])
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert rows(tmp_path / name) == [{"text": text}, {"text": "b"}], name


def test_values_are_found_wherever_a_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"a": ["\\", '"', "é🙂", True, None, -1.5e3, {"b": {}}]}, {}, {"c": "]}"}] * 3
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False))
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr("distft.data.streams.BLOCK", block)
        monkeypatch.setattr("distft.data.json_rows.BLOCK", block)
        assert rows(path) == values, block


def test_empty_files_have_no_rows(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", b""), ("b.jsonl", b"\n\n"), ("c.json", b"[]"), ("d.json", b" "), ("e.csv", b"")):
        (tmp_path / name).write_bytes(data)
        assert rows(tmp_path / name) == [], name
    (tmp_path / "f.csv").write_text("prompt,completion\n")
    assert rows(tmp_path / "f.csv") == []


def test_batches_can_be_sent_to_another_process(tmp_path: Path) -> None:
    import pickle

    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "stream.arrow"):
        path = tmp_path / name
        path.write_bytes(KINDS[name]())
        sent = pickle.loads(pickle.dumps(list(read_batches([named_file(path)]))))
        assert [row for batch in sent for _, row in batch.rows()] == ROWS, name
    assert isinstance(next(iter(read_batches([named_file(tmp_path / "rows.jsonl")]))), Lines)  # not parsed yet


def test_memory_is_bounded(tmp_path: Path) -> None:
    """120 MB of each kind, with less than 60 MB more than at the start."""
    code = """
import json, resource, sys
from pathlib import Path
from distft.data.files import named_file
from distft.data.readers import read_files
folder, name = Path(sys.argv[1]), sys.argv[2]
row = json.dumps({"text": "x" * 10_000})
with (folder / name).open("w") as file:
    file.write("[" if name.endswith("json") else "text\\n" if name.endswith("csv") else "")
    for n in range(12_000):
        file.write("x" * 10_000 + "\\n" if name.endswith("csv") else row + (",\\n" if name.endswith("json") else "\\n"))
    file.write(row + "]" if name.endswith("json") else "")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in read_files([named_file(folder / name)]))
print(count // 12_000, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    for name in ("a.jsonl", "a.json", "a.csv"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), name], capture_output=True, text=True)
        count, megabytes = map(int, done.stdout.split())
        assert count == 1
        assert megabytes < 60, name
        (tmp_path / name).unlink()


# ---- Arrow


def test_nulls_that_arrow_adds_are_removed(tmp_path: Path) -> None:
    """All structs of a column have the same fields there."""
    import pyarrow
    import pyarrow.parquet

    values = [
        {
            "messages": [{"role": "user", "content": None}, {"role": "assistant", "calls": [{"arguments": {"a": 1}}]}],
            "tools": None,
        },
        {
            "messages": [
                {"role": "tool", "content": "x", "calls": [{"arguments": {"city": "Rome", "tags": [None, "y"]}}]}
            ]
        },
        {"messages": [], "tools": None},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    assert rows(path) == [
        {"messages": [{"role": "user"}, {"role": "assistant", "calls": [{"arguments": {"a": 1}}]}], "tools": None},
        {"messages": values[1]["messages"], "tools": None},
        {"messages": [], "tools": None},
    ]


def test_maps_and_json_columns(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    path = tmp_path / "a.parquet"
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([[("x", 1)], None], kind)}), path)
    assert rows(path) == [{"a": {"x": 1}}, {"a": None}]
    mixed = [{"calls": [{"arguments": {"x": 1}}, {"arguments": {"x": "one", "y": [1, "z"]}}]}]
    dataset = Dataset.from_list(mixed, on_mixed_types="use_json")
    dataset.to_parquet(path)
    assert rows(path) == mixed
    dataset.save_to_disk(tmp_path / "saved")
    assert rows(next((tmp_path / "saved").glob("*.arrow"))) == mixed


# ---- what is wrong


def test_rows_that_are_wrong_are_found_all_at_once(tmp_path: Path) -> None:
    deep = "[" * 2000 + "]" * 2000
    lines = ['{"a": 1}', '{"a": }', "[1]", '"x"', f'{{"a": {deep}}}', '{"a": ' + "1" * 5000 + "}", "null", '{"b": "']
    lines.insert(1, '{"a": [{"role": "x", "n": 1, "role": "x"}]}')
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\xff"}')
    assert problems(path) == [
        ':2: key-twice: "role" is there twice in one object; leave one of them out',
        ":3: not-json: not JSON (Expecting value, column 7)",
        ":4: not-an-object: got a JSON list, need an object with fields",
        ":5: not-an-object: got a JSON string, need an object with fields",
        ":6: nested-too-deeply: nested too deeply to be read",
        ":7: not-json: not JSON (Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; "
        "use sys.set_int_max_str_digits() to increase the limit)",
        ":8: not-an-object: got a JSON null, need an object with fields",
        ":9: not-utf8: not JSON in UTF-8 (byte 8); save the file as UTF-8",
    ]
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n3\n\n4,5,6\n")
    assert problems(path) == [
        ":3: fields-differ: got 1 fields, need 2 as in the header; quote fields that hold a comma",
        ":5: fields-differ: got 3 fields, need 2 as in the header; quote fields that hold a comma",
    ]
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, 5, "x"]')
    assert problems(path) == [
        ":[2]: not-an-object: got a JSON number, need an object with fields",
        ":[3]: not-an-object: got a JSON string, need an object with fields",
    ]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.json", b'[{"a": 1},\n {"a": }]', ":2: not JSON (Expecting value)"),
        ("a.json", b'[{"a": 1},\n {"b": {"a": 1, "a": 2}}]', ':2: "a" is there twice in one object; leave one of them'),
        ("a.json", b'[{"a": 1}\n {"a": 2}]', ":2: not JSON (expecting ',' between objects)"),
        ("a.json", b'[{"a": 1},\n {"a": 2}', ":2: not JSON (the list does not end)"),
        ("a.json", b'[{"a": 1}, {"a": "', ":1: not JSON (Unterminated string starting at)"),
        ("a.json", b'[{"a": 1}]\n[', ":2: not JSON (more text after the list)"),
        ("a.json", b"{" * 3, ":1: not JSON (Expecting property name enclosed in double quotes)"),
        ("a.json", b"[" + b"[" * 2000 + b"]" * 2000 + b"]", ":1: not JSON (nested too deeply)"),
        ("a.json", b'[{"a": "\xff"}]', ":1: not UTF-8 (byte 9); save it as UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), ": got UTF-16, need UTF-8; save it as UTF-8"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), ": got UTF-16, need UTF-8; save it as UTF-8"),
        ("a.csv", "a,b\n1,2\n3,ü\n".encode("latin1"), ":3: not UTF-8 (byte 3); save it as UTF-8"),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', ":3: not CSV (unexpected end of data)"),
        ("a.csv", b"a,b,a\n1,2,3\n", ":1: two columns are called 'a'; rename one"),
        ("a.parquet", b"", ": not parquet, or damaged (Parquet file size is 0 bytes)"),
        ("a.arrow", b"not really", ": not Arrow, or damaged ("),
        ("a.jsonl", GZIP, ": is compressed, and its name does not say so; add .gz to its name"),
        ("a.csv", b"\x28\xb5\x2f\xfd\x00", ": is compressed, and its name does not say so; add .zst to its name"),
        ("a.csv", b"PAR1\x15", ": is parquet; give it a name that ends in .parquet"),
        ("a.jsonl", b"ARROW1\0\0", ": is Arrow; give it a name that ends in .arrow"),
        ("a.json", b"PK\x03\x04\x14", ": is a zip archive (or a workbook of Excel's); unpack it, or save it as CSV"),
        ("a.jsonl.gz", gzip.compress(b"PAR1\x15", mtime=0), ": is parquet; give it a name that ends in .parquet"),
        ("a.parquet.gz", b"not gzip", ": is not compressed with gzip; remove the last suffix of its name"),
        ("a.jsonl.gz", b"\x28\xb5\x2f\xfd\x00", ": is not compressed with gzip; name it .zst instead"),
        ("a.jsonl.zst", b"not zstd", ": is not compressed with zstd; remove the last suffix of its name"),
        ("a.jsonl.xz", b"not xz", ": is not compressed with xz; remove the last suffix of its name"),
        ("a.jsonl.bz2", b"not bz2", ": is not compressed with bz2; remove the last suffix of its name"),
        ("a.csv", b'{"text": "a"}\n{"text": "b"}\n', ": is JSON and no CSV; give it a name that ends in .jsonl"),
        (
            "a.jsonl",
            b'{\n "text": "a"\n}\n',
            ": is JSON with objects over several lines, and .jsonl has one on each; g",
        ),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert error(tmp_path / name).startswith(expected)


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name.islower()])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_files_that_were_cut(tmp_path: Path, kind: str, compression: str) -> None:
    path = tmp_path / f"rows.{kind}{compression}"
    data = COMPRESSIONS[compression](KINDS[f"rows.{kind}"]() * 1)
    path.write_bytes(data[:-5])
    assert "it is damaged, or only a part of it was copied" in error(path)


@pytest.mark.parametrize("name", ["rows.parquet", "file.arrow", "stream.arrow"])
def test_damaged_tables(tmp_path: Path, name: str) -> None:
    """Whatever is cut off or overwritten: the same rows, or one error."""
    path, data = tmp_path / name, KINDS[name]()
    for start in range(0, len(data) - 8, 97):
        for damaged in (data[:start], data[:start] + b"\xff" * 8 + data[start + 8 :]):
            path.write_bytes(damaged)
            try:
                rows(path)
            except DataError as caught:
                assert len(str(caught).splitlines()) == 1


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    """As another user: root may read everything."""
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    path.chmod(0)
    code = (
        "import os; from pathlib import Path; from distft.data.files import DataFile\n"
        "from distft.data.readers import read_files; from distft.errors import DataError\n"
        f"os.chdir({str(tmp_path)!r}); os.getuid() or os.setuid(65534)\n"
        "try: list(read_files([DataFile('a.jsonl', 'jsonl', None, Path('a.jsonl'))]))\n"
        "except DataError as error: print(error)\n"
    )
    tmp_path.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "a.jsonl: cannot be read (permission denied)\n", done.stderr


def test_a_file_that_fails_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    assert error(tmp_path / "a.jsonl") == ": cannot be read (Input/output error)"


def test_zst_without_a_library(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(as_lines(ROWS)))
    code = (
        "import sys; sys.modules['pyarrow'] = sys.modules['zstandard'] = None\n"
        "from pathlib import Path; from distft.data.files import named_file\n"
        "from distft.data.readers import read_files; from distft.errors import MissingPartError\n"
        f"try: list(read_files([named_file(Path({str(tmp_path / 'a.jsonl.zst')!r}))]))\n"
        "except MissingPartError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a.jsonl.zst: reading .zst needs pip install zstandard" in done.stdout, done.stderr
