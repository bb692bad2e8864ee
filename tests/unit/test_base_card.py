"""What is taken over from the card of a base model."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.config.recipe import Model
from distft.runs.base_card import base_card


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: mit\nlicense_link: 7\n---\ntext", {"license": "mit"}),
        ("---\r\nlicense: other\r\nlicense_name: x\r\n---\r\n", {"license": "other", "license_name": "x"}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n: : :\n- !!python/object:os.system x\n---\n", {}),
        ("---\njust text\n---\n", {}),
        ("# no front matter\n", {}),
        (None, {}),
    ],
)
def test_licence(tmp_path: Path, readme: str | None, found: dict[str, str]) -> None:
    folder = tmp_path / "models--owner--a-base" / "snapshots" / "1a2b"
    for place in (tmp_path / "plain", folder):
        place.mkdir(parents=True)
        if readme is not None:
            (place / "README.md").write_bytes(readme.encode())
    assert base_card(Model(name_or_path=str(tmp_path / "plain"))) == found
    assert base_card(Model(name_or_path=str(folder))) == {"id": "owner/a-base", **found}  # the hub's cache


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert base_card(Model(name_or_path="owner/nowhere")) == {"id": "owner/nowhere"}
