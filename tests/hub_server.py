"""Just enough of the hub's protocol on a local port: a repository's tree, its files, ranges, and faults."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 2000
"""Files from this size on are listed as the hub lists large ones, by SHA-256."""


class Hub:
    """Repositories by name, each a folder; ``stop_after`` bytes of a file the connection breaks off."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.stop_after: int | None = None
        self.ignore_ranges = False
        self.corrupt = False
        self.refuse = False
        self.requests: list[tuple[str, str]] = []
        self.sent = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(to.path).path)
        self.requests.append((path, to.headers.get("Range", "")))
        if self.refuse:
            return self._say(to, 503, b"busy")
        for name, folder in self.repos.items():
            tree, files = f"/api/models/{name}/tree/main", f"/{name}/resolve/main/"
            if path == tree or path.startswith(tree + "/"):
                return self._tree(to, folder, path[len(tree) :].strip("/"))
            if path.startswith(files):
                return self._file(to, folder / path[len(files) :])
        return self._say(to, 404, b'{"error": "Repository not found"}')

    def _tree(self, to, folder: Path, inside: str) -> None:
        start = folder / inside
        if not start.is_dir():
            return self._say(to, 404, b'{"error": "no such folder"}')
        rows = []
        for path in sorted(start.rglob("*")):
            row = {"path": path.relative_to(folder).as_posix(), "type": "directory", "oid": "0" * 40}
            if path.is_file():
                data = path.read_bytes()
                git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
                row |= {"type": "file", "size": len(data), "oid": git}
                if len(data) >= LARGE:
                    sha = hashlib.sha256(data).hexdigest()
                    row["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
            rows.append(row)
        return self._say(to, 200, json.dumps(rows).encode(), {"Content-Type": "application/json"})

    def _file(self, to, path: Path) -> None:
        if not path.is_file():
            return self._say(to, 404, b"Entry not found")
        data = path.read_bytes()
        if self.corrupt:
            data = bytes(255 - byte for byte in data)
        start = 0
        asked = to.headers.get("Range", "")
        if asked.startswith("bytes=") and not self.ignore_ranges:
            start = int(asked.removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        broken = self.stop_after is not None and len(body) > self.stop_after
        return self._say(to, 206 if start else 200, body, headers, self.stop_after if broken else None)

    def _say(self, to, status: int, body: bytes, headers=None, cut: int | None = None) -> None:
        to.send_response(status)
        for key, value in (headers or {}).items():
            to.send_header(key, value)
        to.send_header("Content-Length", str(len(body)))
        to.end_headers()
        if cut is not None:
            to.wfile.write(body[:cut])
            to.wfile.flush()
            self.sent += cut
            # From now on nothing is answered, as when the network is gone.
            self.refuse = True
            to.close_connection = True
            to.connection.close()
            return
        to.wfile.write(body)
        self.sent += len(body)
