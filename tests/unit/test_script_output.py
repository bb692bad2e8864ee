"""What rank 0 of a user's script prints, line by line while it runs."""

from __future__ import annotations

from pathlib import Path

from distft.runs.directory import RunDir
from distft.views.progress import ScriptOutput


def test_lines_as_they_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    output = ScriptOutput(run)
    assert output.lines(last=False) == []  # no log yet

    def more(data: bytes, last: bool = False) -> list[str]:
        with run.rank_log(0).open("ab") as log:
            log.write(data)
        return output.lines(last)

    word = "größe".encode()
    assert more(b"one\ntwo " + word[:3]) == ["one"]
    assert more(word[3:] + b"\n") == ["two größe"]
    assert more(b" 0%|\r 50%|#\r100%|##\r\nbad \xff\n") == ["100%|##", "bad \ufffd"]
    assert more(b"no end", last=True) == ["no end"]


def test_the_traceback_of_a_failed_rank_is_left_to_the_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir()
    run.rank_log(0).write_text("caught:\nTraceback (most recent call last):\n  it goes on\n")
    output = ScriptOutput(run)
    assert len(output.lines(last=False)) == 3
    run.rank_error(0).write_text("{}")
    with run.rank_log(0).open("a") as log:
        log.write("the last words\n[rank0]: Traceback (most recent call last):\n[rank0]:   File\n")
    assert output.lines(last=False) == ["the last words"]
    with run.rank_log(0).open("a") as log:
        log.write("[rank0]: ValueError\n")
    assert output.lines(last=True) == []
