"""What a path in data.train or data.eval stands for. The splits of folders are compared with those of `datasets`."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.config.recipe import Data, Source
from distft.data.files import LeftOut
from distft.data.folder import local_folder
from distft.data.sources import find, find_data
from distft.data.splits import IGNORED, choose_config, find_splits, read_configs
from distft.errors import DataError

ROWS = [{"text": f"row {n}"} for n in range(3)]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> None:
    """A file of rows, of the kind and compression that its name says; an empty one for any other name."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    name, suffix = path.name.lower(), path.suffix.lower()
    compress: Callable[[bytes], bytes] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    }.get(suffix, lambda data: data)
    if ".parquet" in name:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ".csv" in name or ".tsv" in name:
        path.write_bytes(compress("\n".join(["text", *(row["text"] for row in rows)]).encode()))
    elif ".jsonl" in name or ".ndjson" in name:
        path.write_bytes(compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif name in IGNORED:
        path.write_text("{}")
    elif ".json" in name:
        path.write_bytes(compress(json.dumps(rows).encode()))
    else:
        path.write_text("")


def make(folder: Path, names: str, readme: str = "") -> Path:
    """A folder with files of different rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names.split()):
        write(folder / name.replace("+", " "), [{"text": f"{name} {row['text']} {n}"} for row in ROWS])
    if readme:
        (folder / "README.md").write_text(f"---\n{readme}---\n# A data set\n")
    return folder


def our_splits(folder: Path, config: str | None = None) -> dict[str, set[str]]:
    """split → the files in it."""
    found = local_folder(folder)
    configs = read_configs(found.text("README.md"), found.text(".huggingface.yaml"), str(folder))
    files = find_splits(found.names, choose_config(configs, config, str(folder)), str(folder)).files
    return {split: set(names) for split, names in files.items() if names}


def their_splits(folder: Path, config: str | None = None) -> dict[str, set[str]]:
    import datasets

    builder = datasets.load_dataset_builder(str(folder), config, cache_dir=str(folder.parent / "cache"))
    files = {str(split): list(names) for split, names in builder.config.data_files.items()}
    return {
        split: {os.path.relpath(name, folder.resolve()) for name in names} for split, names in files.items() if names
    }


LAYOUTS = {
    "one file": "rows.jsonl",
    "several files": "a.jsonl b.jsonl c.jsonl",
    "nested": "a.jsonl deep/er/b.jsonl",
    "names of files": "train.jsonl test.jsonl validation.jsonl",
    "all keywords": "training.csv valid.csv testing.csv",
    "other keywords": "train.csv dev.csv evaluation.csv",
    "val and eval": "train.csv val.csv eval.csv",
    "separators": "my-train.jsonl my_test.jsonl my.dev.jsonl",
    "keyword and number": "train1.jsonl train2.jsonl test1.jsonl",
    "keyword with a space": "my+train+set.jsonl my+test+set.jsonl",
    "part of a word is no keyword": "trainer.jsonl latest.jsonl device.jsonl",
    "a file in no split": "train.jsonl extra.jsonl",
    "keyword in the middle": "x-train-2024.jsonl x-test-2024.jsonl",
    "upper case is no keyword": "Train.jsonl TEST.jsonl",
    "only a test file": "test.jsonl",
    "shards": "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet",
    "shards with a hash": "data/train-00000-of-00001-3f2a.parquet data/validation-00000-of-00001-77.parquet",
    "shards of any split": "data/train_sft-00000-of-00001.parquet data/test_gen-00000-of-00001.parquet",
    "shards beside other files": "data/train-00000-of-00001.parquet extra.parquet data/more.parquet",
    "shards not below data": "train-00000-of-00002.parquet train-00001-of-00002.parquet test-00000-of-00001.parquet",
    "shards in a deeper folder": "x/data/train-00000-of-00001.parquet x/data/test-00000-of-00001.parquet",
    "folders": "train/a.jsonl train/b.jsonl test/c.jsonl",
    "folders before files": "train/a.jsonl test.jsonl",
    "folders with separators": "my-train/a.jsonl my_test_2/b.jsonl",
    "folders within folders": "x/train/deep/a.jsonl x/valid/b.jsonl y/a.jsonl",
    "keyword in folder and file": "train/test.jsonl train/a.jsonl",
    "two splits in a name": "train-test.jsonl dev.jsonl",
    "twice the same keyword": "train/train-a.jsonl my-train/b.jsonl",
    "hidden file": "train.jsonl .train.jsonl test.jsonl",
    "hidden folder": "a.jsonl .ipynb_checkpoints/a-checkpoint.jsonl",
    "checkpoints with a keyword": "train.jsonl .ipynb_checkpoints/train-checkpoint.jsonl test.jsonl",
    "resource forks": "train.jsonl ._train.jsonl",
    "special folder": "a.jsonl __pycache__/b.jsonl __MACOSX/c.jsonl",
    "metadata": "a.jsonl dataset_infos.json config.json dataset_info.json",
    "gz": "train.jsonl.gz test.jsonl.gz",
    "zst": "train.jsonl.zst test.jsonl.zst",
    "xz and bz2": "train.csv.xz test.csv.bz2",
    "json": "train.json test.json",
    "ndjson": "train.ndjson dev.ndjson",
    "tsv": "train.tsv dev.tsv",
    "dates": "2024-01-01.jsonl 2024-01-02.jsonl",
    "names with brackets": "train[1].jsonl test[1].jsonl",
    "other files beside": "train.jsonl LICENSE notes",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_of_datasets(tmp_path: Path, layout: str) -> None:
    folder = make(tmp_path / "data", LAYOUTS[layout])
    assert our_splits(folder) == their_splits(folder)


def test_upper_case_is_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", "Train.jsonl TEST.jsonl")
    assert find_splits(local_folder(folder).names, None, "").how == (
        "no split in the names, which count in lower case only"
    )


CONFIGS = {
    "a pattern": "configs:\n- config_name: default\n  data_files: 'a*.jsonl'\n",
    "patterns": "configs:\n- config_name: default\n  data_files: ['a*.jsonl', 'x/*']\n",
    "splits": "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: x/**\n"
    "  - split: test\n    path: [a.jsonl, b.jsonl]\n",
    "splits of any name": "configs:\n- config_name: main\n  data_files:\n  - split: sft_train\n    path: a.jsonl\n",
    "a folder": "configs:\n- config_name: main\n  data_dir: x\n",
    "files below a folder": "configs:\n- config_name: main\n  data_dir: x\n  data_files: '*.jsonl'\n",
    "one of several": "configs:\n- config_name: small\n  data_files: a.jsonl\n"
    "- config_name: large\n  data_files: b.jsonl\n  default: true\n",
    "default among several": "configs:\n- config_name: small\n  data_files: a.jsonl\n"
    "- config_name: default\n  data_files: b.jsonl\n",
    "hidden on purpose": "configs:\n- config_name: default\n  data_files: '.h/*.jsonl'\n",
    "sets of characters": "configs:\n- config_name: default\n  data_files: '[!b-z].jsonl'\n",
    "any folders between": "configs:\n- config_name: default\n  data_files: '**/train/*.jsonl'\n",
    "no configs": "license: mit\n",
}


@pytest.mark.parametrize("readme", CONFIGS)
def test_configurations_are_those_of_datasets(tmp_path: Path, readme: str) -> None:
    names = "a.jsonl b.jsonl x/train.jsonl x/test.jsonl x/train/c.jsonl .h/d.jsonl"
    folder = make(tmp_path / "data", names, CONFIGS[readme])
    assert our_splits(folder) == their_splits(folder)


def test_a_configuration_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", "a.jsonl b.jsonl", CONFIGS["one of several"])
    for config in ("small", "large"):
        assert our_splits(folder, config) == their_splits(folder, config)
    assert files(find(Source(path=f"{folder}@small"), "train")) == ["a.jsonl"]
    assert files(find(Source(path=f"{folder}@large:train"), "train")) == ["b.jsonl"]
    assert files(find(Source(path=str(folder), config="small"), "train")) == ["a.jsonl"]
    with pytest.raises(DataError, match="no configuration medium; it has small, large"):
        find(Source(path=f"{folder}@medium"), "train")


def test_rows_are_those_of_datasets(tmp_path: Path) -> None:
    """Not only the names: what `datasets` reads of the splits."""
    import datasets

    from distft.data.readers import read_files

    for n, names in enumerate((LAYOUTS["shards"], LAYOUTS["names of files"], LAYOUTS["xz and bz2"])):
        folder = make(tmp_path / f"data{n}", names)
        theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
        for split, rows in theirs.items():
            found = find(Source(path=f"{folder}:{split}"), "train")
            assert [dict(row) for _, row in read_files(found.files)] == list(rows)


# ---- where distft goes further than `datasets`


def files(found: Any) -> list[str]:
    return [file.name.removeprefix(f"{found.folder}/") for file in found.files]


def left_out(found: Any) -> dict[str, str]:
    return {left.name.removeprefix(f"{found.folder}/"): left.why for left in found.left_out}


def test_files_that_are_no_data_do_not_count(tmp_path: Path) -> None:
    """`datasets` refuses a folder in which a script alone has the name of a split."""
    folder = make(tmp_path / "data", "train.py rows.jsonl test.md")
    found = find(Source(path=str(folder)), "train")
    assert files(found) == ["rows.jsonl"]
    assert left_out(found) == {"train.py": "not a data file (.py)", "test.md": "not a data file (.md)"}


def test_suffixes_in_any_case(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", "a.JSONL b.Csv c.parquet.d e.JSONL.GZ")
    assert files(find(Source(path=str(folder)), "train")) == ["a.JSONL", "b.Csv", "e.JSONL.GZ"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", "a.jsonl sub/b.jsonl")
    make(tmp_path / "elsewhere", "c.jsonl")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "sub")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "top").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "elsewhere")
    (folder / "d.jsonl").symlink_to(folder / "a.jsonl")
    (folder / "gone.jsonl").symlink_to(folder / "nowhere.jsonl")
    found = find(Source(path=str(folder)), "train")
    assert files(found) == ["a.jsonl", "linked/c.jsonl", "sub/b.jsonl"]
    assert left_out(found) == {
        "again": "a link to a folder that is already there",
        "sub/up": "a link to a folder above it",
        "top": "a link to a folder above it",
        "linked/circle": "a link to a folder that is already there",
        "d.jsonl": "the same file as a.jsonl",
        "gone.jsonl": "a link to nothing",
    }


def test_what_is_used_and_what_is_left_out(tmp_path: Path) -> None:
    folder = make(
        tmp_path / "data", "train.jsonl test.jsonl extra.jsonl .ipynb_checkpoints/train.jsonl notes.txt a/dev.csv"
    )
    found = find(Source(path=str(folder)), "train")
    assert files(found) == ["train.jsonl"]
    assert left_out(found) == {
        "test.jsonl": "split test",
        "a/dev.csv": "split validation",
        "extra.jsonl": "in no split",
        ".ipynb_checkpoints/": "hidden",
        "notes.txt": "not a data file (.txt)",
    }
    assert found.lines() == [
        f"{folder}: 1 file of split train (names of files): train.jsonl",
        "  left out, hidden: .ipynb_checkpoints/",
        "  left out, not a data file (.txt): notes.txt",
        "  left out, split validation: a/dev.csv",
        "  left out, in no split: extra.jsonl",
        "  left out, split test: test.jsonl",
    ]


def test_the_same_rows_in_two_forms(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", "rows.jsonl rows.csv.gz")
    with pytest.raises(DataError, match=r"rows.csv.gz and rows.jsonl have the same name"):
        find(Source(path=str(folder)), "train")
    assert files(find(Source(path=f"{folder}/*.jsonl"), "train")) == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("names", "use", "after", "expected"),
    [
        ("train.jsonl test.jsonl dev.jsonl", "train", "", "train"),
        ("train.jsonl test.jsonl dev.jsonl", "eval", "", "validation"),
        ("train.jsonl test.jsonl", "eval", "", "test"),
        ("train.jsonl test.jsonl", "train", ":test", "test"),
        ("rows.jsonl", "eval", "", "train"),  # a folder of evaluation data, without splits
        ("data/sft-00000-of-00001.parquet data/test-00000-of-00001.parquet", "train", ":sft", "sft"),
    ],
)
def test_the_split_that_is_taken(tmp_path: Path, names: str, use: Any, after: str, expected: str) -> None:
    folder = make(tmp_path / "data", names)
    assert find(Source(path=f"{folder}{after}"), use).split == expected


@pytest.mark.parametrize(
    ("names", "use", "after", "expected"),
    [
        (
            "dev.jsonl a.jsonl",
            "train",
            "",
            "no split train: beside the files of validation, a.jsonl count to no split; name what is trained on",
        ),
        ("test.jsonl dev.jsonl", "train", "", "no split train; it has validation, test: name one after a colon"),
        ("train.jsonl", "train", ":test", "no split test; it has train"),
        ("train.jsonl dev.jsonl", "train", ":valid", ":validation$"),
        ("data/train-00000-of-00001.jsonl data/extra-00000-of-00001.jsonl", "train", ":extras", ":extra$"),
        ("a/sft.jsonl a/x.txt", "train", "@big", "no configuration big; it has none"),
        ("notes.txt", "train", "", "no data file in this folder; need .jsonl, .ndjson"),
        ("data/a+b-00000-of-00001.parquet", "train", "", "cannot be the name of a split"),
    ],
)
def test_splits_that_are_not_there(tmp_path: Path, names: str, use: Any, after: str, expected: str) -> None:
    folder = make(tmp_path / "data", names)
    with pytest.raises(DataError, match=expected):
        find(Source(path=f"{folder}{after}"), use)


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("configs: 5\n", "need a list of mappings"),
        ("configs:\n- data_files: a.jsonl\n", r"configs\[0\].config_name: got None"),
        ("configs:\n- config_name: a\n  data_files: {x: 1}\n", "need a path, a list of paths"),
        ("configs:\n- config_name: a\n  data_files: gone.jsonl\n", "gone.jsonl is not there"),
        ("configs:\n- config_name: a\n  field: data\n", r"configs\[0\].field: not supported"),
        ("configs: [\n", "its YAML cannot be read"),
        ("configs:\n- config_name: a\n- config_name: b\n", "several configurations; name one .*: a, b"),
        ("configs:\n- config_name: a\n  data_files: '*.parquet'\n", "no data file"),
    ],
)
def test_a_readme_that_is_wrong(tmp_path: Path, readme: str, expected: str) -> None:
    folder = make(tmp_path / "data", "a.jsonl", readme)
    with pytest.raises(DataError, match=expected):
        find(Source(path=str(folder)), "train")


def test_patterns(tmp_path: Path) -> None:
    folder = make(tmp_path / "data[1]", "a.jsonl b.jsonl x/c.jsonl x/d.csv notes.txt .e.jsonl dataset_info.json")
    assert files(find(Source(path=f"{folder}/*.jsonl"), "train")) == ["a.jsonl", "b.jsonl"]
    assert len(find(Source(path=f"{folder}/**/*"), "train").files) == 4
    found = find(Source(path=f"{folder}/*"), "train")
    assert left_out(found) == {
        "dataset_info.json": "metadata",
        "notes.txt": "not a data file (.txt)",
        "x": "a folder (** matches what is in it)",
    }
    with pytest.raises(DataError, match="no data file matches"):
        find(Source(path=f"{folder}/*.txt"), "train")


def test_a_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    for name in ("test.jsonl", "a*.jsonl", "x:train.jsonl", "x@y.csv"):
        write(tmp_path / name)
        assert find(Source(path=str(tmp_path / name)), "train").is_named


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "rows").write_text("")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name, expected in (
        ("pipe.jsonl", "is a named pipe; need a file"),
        ("s.jsonl", "is a socket"),
        ("folder.jsonl", "no data file in this folder"),
        ("rows", "got a suffix-less file, need .jsonl"),
        ("gone.jsonl", "no such file"),
        ("loop.jsonl", "cannot be read"),
    ):
        with pytest.raises(DataError, match=expected):
            find(Source(path=str(tmp_path / name)), "train")
    with pytest.raises(DataError, match="is a device"):
        find(Source(path="/dev/null"), "train")
    write(tmp_path / "a.jsonl")
    found = find(Source(path=str(tmp_path)), "train")
    assert files(found) == ["a.jsonl"]
    assert left_out(found)["pipe.jsonl"] == "a named pipe"


def test_a_folder_named_like_a_file(tmp_path: Path) -> None:
    """As Spark writes them."""
    folder = make(tmp_path / "rows.jsonl", "part-0.jsonl part-1.jsonl _SUCCESS")
    assert files(find(Source(path=str(folder)), "train")) == ["part-0.jsonl", "part-1.jsonl"]


def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    """As another user: root may read everything."""
    folder = make(tmp_path / "data", "a.jsonl sub/b.jsonl")
    (folder / "sub").chmod(0)
    code = (
        "import os, sys; from distft.data.sources import find; from distft.config.recipe import Source\n"
        "from distft.errors import DataError\n"
        "os.getuid() or os.setuid(65534)\n"
        f"os.chdir({str(folder)!r})\n"
        "try: find(Source(path=os.getcwd()), 'train')\n"
        "except DataError as error: print(error)\n"
    )
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_mode & 0o055 != 0o055:
            above.chmod(above.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (folder / "sub").chmod(0o755)
    assert done.stdout == f"{folder}/sub: cannot be read (permission denied)\n", done.stderr


# ---- what save_to_disk writes


def test_saved(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    loaded = Dataset.load_from_disk(str(tmp_path / "one"))
    loaded.map(lambda row: {"text": row["text"] + "!"}).filter(lambda row: True)  # leaves files of the cache
    assert list((tmp_path / "one").glob("cache-*"))
    found = find(Source(path=str(tmp_path / "one")), "train")
    assert files(found) == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    DatasetDict(train=rows, test=rows, extra=rows).save_to_disk(tmp_path / "several")
    for after, use, split in (("", "train", "train"), ("", "eval", "test"), (":extra", "train", "extra")):
        found = find(Source(path=f"{tmp_path}/several{after}"), use)
        assert files(found) == [f"{split}/data-00000-of-00001.arrow"]
    nested = find(Source(path=str(tmp_path)), "train")
    assert sorted(files(nested)) == ["several/train/data-00000-of-00001.arrow"]
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow: state.json lists it, and it is not there"):
        find(Source(path=str(tmp_path / "one")), "train")


# ---- training data that is evaluated too


def found_data(train: Any, evaluated: Any) -> dict[str, list[list[str]]]:
    found = find_data(Data(train=train, eval=evaluated))
    return {use: [files(one) for one in several] for use, several in found.items()}


def test_evaluated_files_in_the_training_folder_are_left_out(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", "a.jsonl b.jsonl held/c.jsonl")
    for held, name in ((f"{folder}/b.jsonl", "b.jsonl"), (f"{folder}/held", "held/c.jsonl")):
        found = find_data(Data(train=str(folder), eval=held))
        assert name not in files(found["train"][0]) and len(found["train"][0].files) == 2
        assert found["train"][0].left_out == (LeftOut(f"{folder}/{name}", "in data.eval"),)
    found = find_data(Data(train=f"{folder}/*.jsonl", eval=f"{folder}/b.jsonl"))
    assert files(found["train"][0]) == ["a.jsonl"]


def test_splits_of_one_folder(tmp_path: Path) -> None:
    folder = str(make(tmp_path / "data", "train.jsonl dev.jsonl test.jsonl"))
    assert found_data(folder, folder) == {"train": [["train.jsonl"]], "eval": [["dev.jsonl"]]}
    assert found_data(folder, f"{folder}:test") == {"train": [["train.jsonl"]], "eval": [["test.jsonl"]]}
    assert found_data(folder, 0.1) == {"train": [["train.jsonl"]], "eval": []}


@pytest.mark.parametrize(
    ("train", "evaluated"),
    [
        ("a.jsonl", "a.jsonl"),
        ("a.jsonl", "."),
        (".", "."),
        ("*.jsonl", "*.jsonl"),
        (["a.jsonl", "b.jsonl"], ["c.csv", "b.jsonl"]),
        (".", [".", "c.csv"]),
        ("linked.jsonl", "a.jsonl"),
    ],
)
def test_data_that_is_trained_and_evaluated(tmp_path: Path, train: Any, evaluated: Any) -> None:
    folder = make(tmp_path / "data", "a.jsonl b.jsonl c.csv")
    (tmp_path / "data" / "linked.jsonl").symlink_to(folder / "a.jsonl")

    def absolute(value: Any) -> Any:
        return [absolute(one) for one in value] if isinstance(value, list) else os.path.normpath(folder / value)

    with pytest.raises(DataError, match=r"is also trained on, by data.train"):
        find_data(Data(train=absolute(train), eval=absolute(evaluated)))


def test_copies(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", "a.jsonl b.jsonl")
    (tmp_path / "held.jsonl").write_bytes((folder / "b.jsonl").read_bytes())
    with pytest.raises(DataError, match=rf"held.jsonl has the same content as {folder}/b.jsonl"):
        find_data(Data(train=str(folder), eval=str(tmp_path / "held.jsonl")))
    with pytest.raises(DataError, match=r"a.jsonl is in .* to train on it more than once"):
        find_data(Data(train=[str(folder), str(folder / "a.jsonl")]))
    (folder / "a (1).jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"a.jsonl has the same content as .*a \(1\).jsonl; remove one"):
        find_data(Data(train=str(folder)))
    for name in ("a (1).jsonl", "a.jsonl"):  # without rows they do no harm
        (folder / name).write_bytes(b"")
    assert len(find_data(Data(train=str(folder)))["train"][0].files) == 3
