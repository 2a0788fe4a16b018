"""A real S3-protocol server on a loopback port, and a wire to it that can be cut; gone when the session ends.

Run as a program it serves: one request at a time, so that of two conditional writes one comes first.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from tests.conftest import need
from tests.servers import free_port, stop, wait_until

KEYS = {
    "AWS_ACCESS_KEY_ID": "atlas-test",
    "AWS_SECRET_ACCESS_KEY": "hush-hush-hush",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3Server:
    """An S3 server; ``bucket()`` makes a fresh bucket in it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.s3_server", str(self.port)]
        root = Path(__file__).parent.parent
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, cwd=root, stdout=quiet, stderr=quiet)
        wait_until("the S3 server answers", self._answers, 120)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """Variables by which boto finds this server."""
        return {**KEYS, "AWS_ENDPOINT_URL": endpoint or self.url}

    def bucket(self) -> str:
        """The URL of a prefix in a new bucket."""
        import boto3

        name = f"atlas-{uuid4().hex[:12]}"
        boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        ).create_bucket(Bucket=name)
        return f"s3://{name}/lake"

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process)


class Wire:
    """A TCP connection to a server that passes on so many bytes and is then cut, for good or until mended."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.left: float = float("inf")
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, sent: float) -> None:
        """Let so many more bytes through to the server."""
        self.left = sent

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.left <= 0:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._pass, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with suppress(OSError):
            while (data := source.recv(65536)) and self.left > 0:
                if counted:
                    data = data[: int(min(self.left, len(data)))]
                    self.left -= len(data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.left = 0
        self._listener.close()


def _there() -> bool:
    return all(importlib.util.find_spec(name) for name in ("moto", "flask", "flask_cors", "s3fs"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running S3 server."""
    need(_there(), "moto[s3] with flask, and s3fs")
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty lake in S3; the variables of this process lead there."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # another module's server may have been meant before
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server.bucket()


@pytest.fixture
def wire(s3_server: S3Server) -> Iterator[Wire]:
    """A wire to the S3 server."""
    found = Wire(s3_server.port)
    yield found
    found.close()


if __name__ == "__main__":
    os.environ["MOTO_ALLOW_NONEXISTENT_REGION"] = "true"
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    service = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", int(sys.argv[1]), service, threaded=False)
