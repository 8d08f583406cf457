"""A Hub on the loopback: the part of the Hugging Face HTTP interface that reads need, served from
local folders.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """folders: what is served, by `org/name`. gated, private: ids answered 403 or 401. asked: every
    request for a file, in order.

    elsewhere: answer every request for a file with a redirect to another path, as the real one does
    to its storage. breaks: how many replies with more than 1000 bytes of weights are cut off half
    way, the connection closed.
    """

    folders: Mapping[str, Path]
    gated: frozenset[str] = frozenset()
    private: frozenset[str] = frozenset()
    ranges: bool = True  # False: serve whole files only, whatever is asked
    elsewhere: bool = False
    breaks: int = 0
    url: str = ""
    asked: list[tuple[str, str, tuple[int, int]]] = field(
        default_factory=list
    )  # (method, file, bytes sent as start and stop)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on an ephemeral port of 127.0.0.1; its `url` is the endpoint."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+))?/?", path
        ):
            self._about(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if (
                self.hub.elsewhere
                and self._known(match[1], match[2])
                and (self.hub.folders[match[1]] / match[3]).is_file()
            ):
                tag = _etag(self.hub.folders[match[1]] / match[3])
                size = (self.hub.folders[match[1]] / match[3]).stat().st_size
                where = f"{self.hub.url}/storage/{match[1]}/{match[3]}"
                headers = {
                    "Location": where,
                    "ETag": f'"{tag}"',
                    "X-Linked-ETag": f'"{tag}"',
                    "X-Linked-Size": str(size),
                }
                self._reply(302, b"", headers | {"X-Repo-Commit": COMMIT})
            elif not self.hub.elsewhere:
                self._file(match[1], match[2], match[3])
            elif match[1] in self.hub.folders and match[2] in ("main", COMMIT):
                self._refuse(404, "EntryNotFound")
        elif match := re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path):
            self._file(match[1], COMMIT, match[2])
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET  # a reply to HEAD has the same headers; `_reply` leaves its body out

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def _known(self, repo: str, revision: str) -> bool:
        if repo in self.hub.private or repo not in self.hub.folders:
            self._refuse(401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _about(self, repo: str, part: str | None, revision: str | None) -> None:
        """Model info, or the list of files.

        Like the real one, this is open for gated repositories.
        """
        if not self._known(repo, revision or "main"):
            return
        files = sorted(p for p in self.hub.folders[repo].iterdir() if p.is_file())
        if part in ("tree", "paths-info"):
            reply: Any = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _etag(p)}
                for p in files
            ]
        else:
            siblings = [
                {"rfilename": p.name, "size": p.stat().st_size, "lfs": _lfs(p)} for p in files
            ]
            reply = {
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "private": False,
                "siblings": siblings,
            }
        self._reply(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, name: str) -> None:
        if not self._known(repo, revision):
            return
        if repo in self.hub.gated:
            self._refuse(403, "GatedRepo")
            return
        path = self.hub.folders[repo] / name
        if Path(name).name != name or not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        data, headers = (
            path.read_bytes(),
            {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"},
        )
        start, stop, status = 0, len(data), 200
        if self.hub.ranges and (
            match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        ):
            start, stop, status = int(match[1]), min(int(match[2] or stop) + 1, stop), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.hub.asked.append(
            (self.command, name, (start, start if self.command == "HEAD" else stop))
        )
        self._reply(status, data[start:stop], headers)

    def _refuse(self, status: int, code: str) -> None:
        self._reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.breaks and len(body) > 1000 and self.path.endswith(".safetensors"):
            self.hub.breaks -= 1
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)


def _lfs(path: Path) -> dict[str, Any] | None:
    """What the Hub keeps of large files; here of the weights."""
    if path.suffix != ".safetensors":
        return None
    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size": path.stat().st_size,
        "pointerSize": 134,
    }


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
