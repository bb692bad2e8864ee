"""A launch whose data is of the hub, from a server on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from hub_server import FIRST, SECOND, served
from running import launch
from tiny import WORDS, Tiny


def test_two_ranks_train_a_commit_of_the_hub_and_again_without_a_network(tiny: Tiny, tmp_path: Path) -> None:
    """The commit is the one that the branch stood for when its files were last read."""
    chats = [[{"role": "user", "content": word}, {"role": "assistant", "content": word}] for word in WORDS]
    lines = [json.dumps({"messages": chat}).encode() + b"\n" for chat in chats]
    extra = "data/extra-00000-of-00001.jsonl"
    old = {extra: b"".join(lines[:4])}
    new = {extra: b"".join(lines[4:]), "data/train-00000-of-00001.jsonl": lines[0]}
    recipe = tiny.recipe(data__train="owner/name@main:extra", data__packing=False, training__max_steps=2)

    results, home = [], tmp_path / "home"
    with served({FIRST: old, SECOND: new}) as hub:
        for offline in (False, True):
            hub.asked.clear()
            env = hub.environment(home, offline) | {"DISTFT_CACHE": str(tmp_path / str(offline))}  # prepared anew
            results.append(launch(recipe, tmp_path, ranks=2, env=env | {"DISTFT_RECORD_ROWS": "1"}))
            assert bool(hub.asked) != offline
            assert not any(path.endswith("train-00000-of-00001.jsonl") for path in hub.asked)  # of the other split
    for result in results:
        written = yaml.safe_load((result.run_dir / "recipe.yaml").read_text())
        assert written["data"]["train"] == f"owner/name@{SECOND}:extra"
        files = sorted((result.run_dir / "logs").glob("samples-*.jsonl"))
        assert len(files) == 2  # one of each rank
        steps = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        assert len({tuple(row) for step in steps for row in step["rows"]}) == len(WORDS) - 4  # each row once
        assert sum(len(step["rows"]) for step in steps) == 16
    assert results[0].column("loss") == results[1].column("loss")
