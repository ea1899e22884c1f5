"""A hub on this machine: it answers what the hub's client asks when it makes a repository and commits to it."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class LocalHub:
    """What has arrived so far."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    """Path in the repository -> newest content"""
    commits: list[list[str]] = field(default_factory=list)
    """Paths of each commit"""
    tokens: set[str | None] = field(default_factory=set)
    """The authorization of each request"""
    created: list[dict[str, Any]] = field(default_factory=list)
    is_open: bool = True
    """False: every request is refused"""


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Run a hub, in threads of this process."""
    hub = LocalHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, content: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            parts = self.path.partition("?")[0].strip("/").split("/")
            if not hub.is_open:
                self.answer({"error": "not allowed"}, 403)
            elif parts == ["api", "repos", "create"]:
                hub.created.append(json.loads(body))
                self.answer({"url": f"{hub.url}/ada/{hub.created[-1]['name']}"})
            elif "preupload" in parts:
                paths = [file["path"] for file in json.loads(body)["files"]]
                self.answer(
                    {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
                )
            elif "commit" in parts:
                lines = [json.loads(line) for line in body.splitlines()]
                added = [line["value"] for line in lines if line["key"] == "file"]
                hub.files |= {file["path"]: base64.b64decode(file["content"]) for file in added}
                hub.commits.append([file["path"] for file in added])
                self.answer(
                    {"commitUrl": f"{hub.url}/ada/policy/commit/c0ffee", "commitOid": "c0ffee", "pullRequestUrl": None}
                )
            else:
                self.answer({"warnings": []})  # of the card's header

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
