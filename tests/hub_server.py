"""A server on this machine that answers as the Hugging Face Hub does, for one data set and one model. The client is the
real one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

FIRST, SECOND = "1" * 40, "2" * 40


@dataclass
class Hub:
    """owner/name at two commits, `main` being the second; what was asked for is in `asked`."""

    url: str
    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str] = field(default_factory=lambda: {"main": SECOND})
    asked: list[str] = field(default_factory=list)

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None

    def environment(self, cache: Path, offline: bool = False) -> dict[str, str]:
        """The variables of a process whose hub this is."""
        env = {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return env | {"HF_HUB_OFFLINE": "1" if offline else "0", "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def served(commits: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """Args:
    commits: their files, by name.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            made.asked.append(path)
            for start, what in (
                ("/api/datasets/owner/name/revision/", "info"),
                ("/api/models/owner/model/revision/", "info"),
                ("/api/datasets/owner/name/tree/", "tree"),
            ):
                if path.startswith(start):
                    found = made.find(path.removeprefix(start).strip("/"))
                    if found is None:
                        return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                    commit, files = found
                    items = [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in files.items()
                    ]
                    info = {"id": "owner/name", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
                    return self.answer(
                        200, json.dumps(info if what == "info" else items).encode(), Content_Type="application/json"
                    )
            if path.startswith(("/datasets/owner/name/resolve/", "/owner/model/resolve/")):
                revision, _, name = path.partition("/resolve/")[2].partition("/")
                found = made.find(revision)
                if found and name in found[1]:
                    data = found[1][name]
                    return self.answer(200, data, X_Repo_Commit=found[0], ETag=f'"{hashlib.sha1(data).hexdigest()}"')
                return self.answer(404, X_Error_Code="EntryNotFound")
            if "secret" in path:
                return self.answer(403, b"{}", X_Error_Code="GatedRepo")
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Hub(f"http://127.0.0.1:{server.server_port}", commits)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield made
    server.shutdown()
