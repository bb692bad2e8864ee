"""The pages that people read: their links lead somewhere, and the commands in them have these names and options."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from distft.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("[!.]*/README.md")])
FENCED = re.compile(r"^```\w*\n.*?^```$", re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """As the forge makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> list[list[str]]:
    """The words of each `distft ...` in shell blocks and in code within sentences."""
    text = page.read_text()
    lines = [
        line
        for block in re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]
    lines += [line for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`(distft [^`]*)`", FENCED.sub("", text).replace("\n", " "))
    found = [re.search(r"(?:^|\s)distft (?=[a-z-])(.*)", line.split(" #")[0].split("; ")[0]) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


def test_pages_are_found() -> None:
    assert {"README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/index.md", "tests/README.md"} <= set(map(name, PAGES))
    assert len((ROOT / "README.md").read_text().splitlines()) < 160
    index = (ROOT / "docs" / "index.md").read_text()
    unlisted = [page.name for page in PAGES if page.parent == ROOT / "docs" and f"({page.name})" not in index]
    assert unlisted == ["index.md"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)  # has old names
def test_commands_exist(page: Path) -> None:
    for words in commands(page):
        command: click.Command = main
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            within = command.get_command(click.Context(command), words[0])
            assert within, f"distft {' '.join(words)}"
            command, words = within, words[1:]
        known = {option for parameter in command.params for option in parameter.opts} | {"-h", "--help", "--version"}
        own = words[: words.index("--")] if "--" in words else words  # behind it: a script's
        used = {word.partition("=")[0] for word in own if re.match(r"--?[a-z]", word)}
        assert used <= known, f"distft {command.name} has no {used - known}"


def test_commands_are_found() -> None:
    found = [words[0] for page in PAGES for words in commands(page)]
    assert len(found) > 60
    assert {"launch", "plan", "resume", "merge", "verify", "cluster"} <= set(found)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_files_exist(page: Path) -> None:
    """Files of this repository in code within sentences: by their path from its root, or from distft/."""
    words = re.findall(r"`([\w./]+/[\w.]*\.(?:py|txt|sh|jinja|toml))`", FENCED.sub("", page.read_text()))
    assert [word for word in words if not (ROOT / word).exists() and not (ROOT / "distft" / word).exists()] == []


def test_rooms_are_the_contract() -> None:
    """The table in design.md has the layers of import-linter's contract, in their order."""
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    table = (ROOT / "docs" / "design.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    rows = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in table.splitlines()[2:]]
    assert contract
    assert rows == [set(re.findall(r"\w+", line)) for line in contract[1].splitlines()]
    rooms = {path.parent.name for path in (ROOT / "distft").glob("*/__init__.py")}
    assert rooms <= set().union(*rows)


def messages() -> str:
    """Every string of the code, a line each, and the job script."""
    found = [(ROOT / "distft/schedulers/templates/job.sbatch.jinja").read_text()]
    for path in (ROOT / "distft").rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        found += [node.value for node in nodes if isinstance(node.value, str)]
    return "\n".join(found)


def test_symptoms_are_messages() -> None:
    """What slurm.md says that people see is what they see: each quotation, without the words that are filled in."""
    table = (ROOT / "docs" / "slurm.md").read_text().partition("## 3.")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    parts = [part.strip(" ;") for text in quoted for part in re.split(r"…|\d+\b|\b[NX]\b|\bID\b|\bSIG\w+|: ", text)]
    sentences = [part for part in parts if " " in part]
    assert len(sentences) > 15
    known = messages()
    assert [sentence for sentence in sentences if sentence not in known] == []
