"""A local server that speaks the hub's protocol and ModelScope's, and fails as it is told to."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@cache
def digests(path: Path) -> tuple[int, str, str]:
    """Size, SHA-256 and git's digest of a file that does not change."""
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return len(data), hashlib.sha256(data).hexdigest(), blob


@dataclass
class Hub:
    """``cuts`` connections end early, after ``cut_after`` bytes of a body; ``resumes`` says whether
    ranges are honoured; ``lies`` are files whose bytes are not those announced."""

    folder: Path
    repository: str
    address: str = ""
    cuts: int = 0
    cut_after: int = 1000
    resumes: bool = True
    lies: set[str] = field(default_factory=set)
    page: int = 4
    failures: int = 0
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def describe(self, path: Path) -> dict[str, object]:
        size, sha256, blob = digests(path)
        found: dict[str, object] = {
            "type": "file",
            "path": path.relative_to(self.folder).as_posix(),
            "size": size,
            "oid": blob,
        }
        if path.suffix == ".safetensors":
            found["lfs"] = {"oid": sha256, "size": size}
        return found


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A connection that was cut on purpose is no news."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        path = unquote(parts.path)
        self.hub.asked.append((path, self.headers.get("Range")))
        if path == f"/api/models/{self.hub.repository}/tree/main":
            self.tree(int(query.get("cursor", ["0"])[0]))
        elif path == f"/api/v1/models/{self.hub.repository}/repo/files":
            self.modelscope_tree()
        elif path == f"/api/v1/models/{self.hub.repository}/repo":
            self.body(query["FilePath"][0])
        elif path.startswith(f"/{self.hub.repository}/resolve/main/"):
            self.body(path.split("/resolve/main/")[1])
        else:
            self.send_error(404)

    def json(self, value: object, **headers: str) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        for name, said in headers.items():
            self.send_header(name, said)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def tree(self, start: int) -> None:
        items = [self.hub.describe(path) for path in self.hub.files()]
        items.append({"type": "directory", "path": "vae", "oid": "0", "size": 0})
        end = start + self.hub.page
        headers = {}
        if end < len(items):
            url = f"{self.hub.address}/api/models/{self.hub.repository}/tree/main?cursor={end}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.json(items[start:end], **headers)

    def modelscope_tree(self) -> None:
        files = []
        for path in self.hub.files():
            data = path.read_bytes()
            name = path.relative_to(self.hub.folder).as_posix()
            digest = hashlib.sha256(data).hexdigest()
            files.append({"Type": "blob", "Path": name, "Size": len(data), "Sha256": digest})
        self.json({"Code": 200, "Data": {"Files": files}})

    def body(self, name: str) -> None:
        data = (self.hub.folder / name).read_bytes()
        if self.hub.failures:
            self.hub.failures -= 1
            self.send_error(503)
            return
        if name in self.hub.lies:
            data = bytes(len(data))
        begin = 0
        asked = self.headers.get("Range")
        if asked and self.hub.resumes:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if asked and self.hub.resumes else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        rest = data[begin:]
        if self.hub.cuts and len(rest) > self.hub.cut_after:
            self.hub.cuts -= 1
            self.wfile.write(rest[: self.hub.cut_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(rest)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
