"""Preparation: rows of every format as tokens, mixes, what is held out, and parallel processes."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import Tiny, write_jsonl

from distft.config.loading import load_recipe
from distft.data import overlap, streams
from distft.data.cache import PROGRESS_FD
from distft.data.formats import IGNORE, Example
from distft.data.reading import check_files
from distft.errors import DataError
from distft.train.data import Prepared, load_prepared
from distft.train.progress import SECONDS, Progress
from distft.train.show_rows import show
from distft.views.summary import data_lines

WORDS = ["read", "file", "list", "dict", "node", "open", "path", "rank", "step"]


def prepared(tiny: Tiny, folder: Path, rows: list[Any] | None = None, **changes: Any) -> Prepared:
    if rows is not None:
        write_jsonl(folder / "rows.jsonl", rows)
        changes["data__train"] = str(folder / "rows.jsonl")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.recipe(**{"data__packing": False} | changes)))
    return load_prepared(load_recipe(folder / "recipe.yaml"))


def documents(found: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in found)


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def answer_of(tiny: Tiny) -> Any:
    """The token ids of a conversation by transformers, and the mask of its one answer by counting: not distft's way."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.path / "model")

    def encode(question: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        whole = tokenizer.apply_chat_template(chat(question, answer), return_dict=False)
        prompt = tokenizer.apply_chat_template(
            chat(question, answer)[:1], add_generation_prompt=True, return_dict=False
        )
        assert whole[: len(prompt)] == prompt
        return tuple(whole), tuple([IGNORE] * len(prompt) + whole[len(prompt) :])

    return encode


ROWS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("messages", {"messages": chat("read", "file")}, {}),
    ("messages in JSON", {"messages": json.dumps(chat("read", "file"))}, {}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "read"}, {"from": "gpt", "value": "file"}]}, {}),
    ("alpaca", {"instruction": "read", "input": "", "output": "file"}, {}),
    ("query", {"query": "read", "response": "file"}, {}),
    ("conversational prompt", {"prompt": chat("read", "file")[:1], "completion": chat("read", "file")[1:]}, {}),
    ("columns", {"q": "read", "a": "file"}, {"data__columns": {"instruction": "q", "output": "a"}}),
    (
        "roles",
        {"messages": [{"role": "asker", "content": "read"}, {"role": "bot", "content": "file"}]},
        {"data__roles": {"asker": "user", "bot": "assistant"}},
    ),
    ("parts", {"messages": [{"role": "user", "content": [{"type": "text", "text": "read"}]}, chat("", "file")[1]]}, {}),
]


@pytest.mark.parametrize(("row", "changes"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_every_format_of_a_conversation_trains_its_answer(
    tiny: Tiny, tmp_path: Path, answer_of: Any, row: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert documents(prepared(tiny, tmp_path, [row], **changes).train) == [answer_of("read", "file")]


def test_roles_as_the_page_on_data_shows_them(tiny: Tiny, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith('    {"dialog": '))
    settings = yaml.safe_load(
        page[page.index("    data:\n      train: rows.jsonl\n      columns: ") :].partition("\n\n")[0]
    )
    (tmp_path / "rows.jsonl").write_text(row.strip() + "\n")
    recipe = tiny.recipe()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"data": settings["data"] | {"max_length": 64}}))
    [shown] = show(load_recipe(tmp_path / "recipe.yaml"), ["train"], 1, 0)["train"]["shown"]
    assert shown["roles"] == [("system", False), ("user", False), ("assistant", True)]
    assert [text for text, is_trained in shown["pieces"] if is_trained] == ["Hello<eos>"]


def test_tokens_are_trained_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    found = prepared(tiny, tmp_path, [row, {"input_ids": [9, 8, 7]}])
    assert documents(found.train) == [((5, 6, 7, 8), (IGNORE, IGNORE, 7, 8)), ((9, 8, 7), (IGNORE, 8, 7))]
    with pytest.raises(DataError, match=r"rows.jsonl:1: input_ids\[1\]: got 123456, and the tokenizer has \d+ tokens"):
        prepared(tiny, tmp_path, [{"input_ids": [1, 123456, 3]}])


def test_rows_that_say_so_are_left_out_and_counted(tiny: Tiny, tmp_path: Path) -> None:
    rows = [{"prompt": "read ", "completion": "file", "label": label} for label in (True, False, False, True)]
    found = prepared(tiny, tmp_path, rows)
    assert len(found.train) == 2
    [(kind, (number, place, text))] = found.counts["train"]["untrained"].items()
    assert (kind, number, place) == ("label-false", 2, f"{tmp_path}/rows.jsonl:2") and text.startswith("label: false")


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"read {n} ", "completion": f"file {n}"} for n in range(start, start + count)]


def test_a_file_without_rows_and_a_column_that_no_row_has_are_told(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    write_jsonl(tmp_path / "some.jsonl", [{"messages": chat("read", "file"), "system_promt": "list"}] * 2)
    files = [str(tmp_path / name) for name in ("empty.jsonl", "some.jsonl")]
    found = prepared(tiny, tmp_path, data__train=files, data__columns={"system": "system_prompt"})
    assert found.counts["train"]["empty"] == files[:1]
    assert found.counts["train"]["notes"] == [
        "data.columns: system: no row of data.train has system_prompt; did you mean system_promt?",
    ]


def test_prepared_data_of_another_recipe_is_told_with_the_names_of_this_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache knows content alone. What it says must not name the files of the recipe that came first."""
    rows = {
        "long": [{"prompt": "read " * 100, "completion": "file"}, {"prompt": "read", "completion": "file " * 100}],
        "untrained": [{"prompt": "read ", "completion": "file", "label": label} for label in (True, False)],
        "empty": [],
    }
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    said = []
    for name in ("one", "two"):
        (folder := tmp_path / name).mkdir()
        for file, content in rows.items():
            write_jsonl(folder / f"{file}-{name}.jsonl", content)
        sources = [{"path": str(folder / f"{file}-{name}.jsonl"), "epochs": 1} for file in rows]
        sources[0]["epochs"] = 2
        counts = prepared(tiny, folder, data__train=sources, data__long_rows="truncate").counts
        said.append("\n".join(data_lines(counts)))
    assert len(list(tmp_path.glob("cache/data/*/counts.json"))) == 1
    assert said[1] == said[0].replace("one", "two")
    for what in ("two/long-two.jsonl:1: 1", "the first: {0}/two/long-two.jsonl:1", "two/untrained-two.jsonl:2: label"):
        assert what.format(tmp_path) in said[1]
    assert f"no rows in {tmp_path}/two/empty-two.jsonl" in said[1]
    assert f"of {tmp_path}/two/untrained-two.jsonl: 1 taken" in said[1]


def test_a_fraction_is_held_out_by_content(tiny: Tiny, tmp_path: Path) -> None:
    """The same rows whatever the order, the other rows and the files; none is lost, none is in both."""
    rows = pairs(300)
    found = prepared(tiny, tmp_path, rows, data__eval=0.1)
    assert found.eval is not None
    held, trained = documents(found.eval), documents(found.train)
    assert len(held) + len(trained) == 300 and not set(held) & set(trained)
    assert 15 < len(held) < 45
    wanted = {row["prompt"] for row in rows if Example("prompt_completion", row).is_held_out(0.1)}
    assert len(wanted) == len(held) == found.counts["eval"]["documents"]
    random.Random(1).shuffle(rows)
    write_jsonl(tmp_path / "one.jsonl", rows[:70])
    write_jsonl(tmp_path / "two.jsonl", rows[70:] + pairs(40, 1000))
    other = prepared(
        tiny, tmp_path, data__train=[str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")], data__eval=0.1
    )
    assert set(held) <= set(documents(other.eval)) and not set(held) & set(documents(other.train))


def test_a_fraction_of_too_few_rows_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    left = r"data\.eval: a fraction of 0\.001 leaves none of the \d+ rows of data\.train for data\.eval; raise it, "
    with pytest.raises(DataError, match=left):
        prepared(tiny, tmp_path, pairs(3), data__eval=0.001)


def mix(tmp_path: Path, shares: list[dict[str, Any]], counts: list[int]) -> list[dict[str, Any]]:
    sources = []
    for number, (share, count) in enumerate(zip(shares, counts, strict=True)):
        write_jsonl(tmp_path / f"{number}.jsonl", pairs(count, 1000 * number))
        sources.append({"path": str(tmp_path / f"{number}.jsonl"), **share})
    return sources


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [
        ([{"rows": 10}, {}], [10, 30]),  # a sample
        ([{"rows": 250}, {"epochs": 0.5}], [250, 15]),  # more rows than there are: each twice, half of them three times
        ([{"weight": 0.5}, {"weight": 0.5}], [30, 30]),  # as many as the smaller one allows
        ([{"weight": 2}, {"weight": 1}], [60, 30]),
        ([{"epochs": 2}, {"epochs": 1}], [200, 30]),
    ],
)
def test_a_mix(tiny: Tiny, tmp_path: Path, shares: list[dict[str, Any]], wanted: list[int]) -> None:
    sources = mix(tmp_path, shares, [100, 30])
    found = prepared(tiny, tmp_path, data__train=sources)
    whole = [documents(prepared(tiny, tmp_path, data__train=source["path"]).train) for source in sources]
    trained = documents(found.train)
    for rows, number in zip(whole, wanted, strict=True):
        times = sorted(trained.count(row) for row in rows)
        assert sum(times) == number and times[-1] - times[0] <= 1
    count = found.counts["train"]
    assert count["mix"] == [
        [source["path"], have, number] for source, have, number in zip(sources, [100, 30], wanted, strict=True)
    ]
    assert count["documents"] == sum(wanted)
    assert count["tokens"] == sum(len(ids) for ids, _ in trained)
    assert count["trained_tokens"] == sum(label != IGNORE for _, labels in trained for label in labels)


@pytest.mark.parametrize("shares", [[{"weight": 1}, {"weight": 1}], [{"epochs": 0.01}, {}]])
def test_a_mix_of_no_row_is_refused(tiny: Tiny, tmp_path: Path, shares: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"data\.train: the mix takes no row \(0 of 3 of .*0\.jsonl, 0 of 0 of .*1"):
        prepared(tiny, tmp_path, data__train=mix(tmp_path, shares, [3, 0]))


def test_a_mix_is_of_rows_and_not_of_their_pieces(tiny: Tiny, tmp_path: Path) -> None:
    """A row that is split is taken whole. What is held out is held out of each source alike."""
    texts = [" ".join(["read", *random.Random(n).sample(WORDS * 4, 36)]) for n in range(40)]  # of the same length
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    changes = {"data__max_length": 16, "data__long_rows": "split"}
    whole = prepared(tiny, tmp_path, data__train=str(tmp_path / "a.jsonl"), **changes)
    half = prepared(tiny, tmp_path, data__train=[{"path": str(tmp_path / "a.jsonl"), "epochs": 0.5}], **changes)
    pieces = whole.counts["train"]["documents"] // 40
    assert pieces > 2 and whole.counts["train"]["documents"] == pieces * 40
    assert half.counts["train"]["documents"] == pieces * 20
    held = prepared(
        tiny, tmp_path, data__train=[{"path": str(tmp_path / "a.jsonl"), "epochs": 2}], data__eval=0.3, **changes
    )
    assert held.counts["train"]["documents"] + 2 * held.counts["eval"]["documents"] == 2 * pieces * 40


def test_rows_that_are_trained_and_evaluated_are_counted(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what they are trained as, whatever their files look like: in several processes, and in the check and the
    sample of `validate`."""
    monkeypatch.setattr(streams, "BLOCK", 500)  # bytes: several batches
    monkeypatch.setattr(overlap, "_SORTED", 8)
    rows = [{"id": n, "messages": chat(f"read {n}", "file")} for n in range(30)]
    held = tmp_path / "held.jsonl"
    numbers = [*range(40, 60), 3, *range(60, 80), 29, 3]
    write_jsonl(held, [{"query": f"read {n}", "response": "file"} for n in numbers])
    expected = {"trained": (3, f"{held}:21", overlap.TRAINED_TEXT)}
    found = prepared(tiny, tmp_path, rows, data__eval=str(held))
    assert (found.counts["train"]["odd"], found.counts["eval"]["odd"]) == ({}, expected)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    line = f"warning: data.eval: 3 rows {overlap.TRAINED_TEXT}; the first: {held}:21"
    assert line in data_lines(found.counts)
    assert [text for text in check_files(recipe) if text.startswith("warning")] == [line]
    reports = show(recipe, ["train", "eval"], None, 1000)
    assert (reports["train"]["counts"]["odd"], reports["eval"]["counts"]["odd"]) == ({}, expected)
    # Rows that a hash tells apart are not compared.
    found = prepared(tiny, tmp_path, rows * 2, data__eval=0.3)
    assert found.counts["eval"]["documents"] and not found.counts["eval"]["odd"]


@pytest.fixture
def cores() -> Iterator[set[int]]:
    """Those that this process may use; restored after the test."""
    found = os.sched_getaffinity(0)
    yield found
    os.sched_setaffinity(0, found)


def test_many_rows_in_parallel_processes_are_the_same(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: set[int]
) -> None:
    """The same documents in the same order; problems of all batches are counted, the first three are named."""
    rows = pairs(40_000)  # several blocks of the file

    def of_children() -> float:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime

    before = of_children()
    parallel = prepared(tiny, tmp_path, rows)
    assert (of_children() > before) == (len(cores) > 1)  # they did the work
    os.sched_setaffinity(0, {min(cores)})
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "own"))
    before = of_children()
    alone = prepared(tiny, tmp_path, rows)
    assert of_children() == before
    os.sched_setaffinity(0, cores)
    assert parallel.train.data.table.equals(alone.train.data.table) and parallel.counts == alone.counts
    assert parallel.counts["train"]["documents"] == len(rows)
    for n in (7, 500, 1000, len(rows) - 1):
        rows[n]["completion"] = ""
    with pytest.raises(DataError) as raised:
        prepared(tiny, tmp_path, rows)
    assert str(raised.value).splitlines() == [
        *[f"{tmp_path}/rows.jsonl:{n + 1}: completion: empty" for n in (7, 500, 1000)],
        "... and 1 more of this kind (empty)",
        "data.train: 4 of 40,000 rows do not fit (empty 4)",
    ]


def test_progress_is_one_line_that_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    end, descriptor = os.pipe()
    monkeypatch.setenv(PROGRESS_FD, str(descriptor))
    with Progress("data.train") as progress:
        progress.show(10)  # too soon
        time.sleep(SECONDS + 0.01)
        progress.show(2000)
    os.close(descriptor)
    with open(end, newline="") as file:
        assert re.fullmatch(r"\rdata\.train: 2,000 rows, [\d,]+ rows/s\x1b\[K\r\x1b\[K", file.read())
