"""``/healthz`` and ``/metrics`` over HTTP."""

import json
from collections.abc import Callable
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from atlas.errors import ConfigError
from atlas.observe.health import Check

Health = Callable[[], list[Check]]


def serve(address: str, port: int, registry: CollectorRegistry, health: Health) -> ThreadingHTTPServer:
    """A server that is bound and not yet running (``serve_forever``); ConfigError when the port is taken.

    ``/healthz`` answers 200 when all checks are well and 503 otherwise, with the checks as JSON; ``/metrics``
    answers in Prometheus's text format.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version = "atlas"
        sys_version = ""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/healthz":
                checks = health()
                body = json.dumps({"ok": all(c.ok for c in checks), "checks": [asdict(c) for c in checks]})
                self._answer(200 if all(c.ok for c in checks) else 503, "application/json", body.encode())
            elif path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
            else:
                self._answer(404, "text/plain", b"allowed: /healthz, /metrics\n")

        def _answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """One scrape every few seconds is no news."""

    try:
        return ThreadingHTTPServer((address, port), Handler)
    except OSError as error:
        raise ConfigError(f"{address}:{port} cannot be listened on: {error.strerror}") from None
