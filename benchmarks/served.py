"""The app's own server as browsers meet it: started as ``atlas app`` starts it, asked over its websocket.

A session sends what a browser sends when somebody opens an address, and reads until the page is whole, so
that what Streamlit adds (building, comparing and sending its messages) is part of every number.
"""

import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import urlencode
from urllib.request import urlopen

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.asyncio.client import ClientConnection, connect

from atlas.cli.app import streamlit_command

MOST_BYTES = 1 << 28
_TICK = 1000 / os.sysconf("SC_CLK_TCK")


class Spent(NamedTuple):
    """A page: milliseconds by the clock until it was whole, of the server's processors, and its size."""

    wall: float
    cpu: float
    kilobytes: float


class Waiting(NamedTuple):
    """Cards that were not sent: the fragment and the component that would show them, and their name there."""

    fragment: str
    component: str
    of: str


class Address(NamedTuple):
    """A view and what stands behind it in the address."""

    view: str
    params: Mapping[str, str]


class Server:
    """The app over one ATLAS_HOME, in a process of its own, until the ``with`` ends."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self._home = home

    def __enter__(self) -> Self:
        environment = {**os.environ, "ATLAS_HOME": str(self._home), "ATLAS_ANNOTATOR": "benchmark"}
        start = time.perf_counter()
        self._process = subprocess.Popen(
            streamlit_command(self.port, "127.0.0.1"), env=environment, stdout=subprocess.DEVNULL
        )
        while not self._answers():
            if self._process.poll() is not None or time.perf_counter() - start > 60:
                raise SystemExit("the app's server did not start")
            time.sleep(0.05)
        self.seconds_to_start = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def _answers(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/_stcore/health", timeout=1) as answer:
                return bool(answer.read())
        except OSError:
            return False

    def cpu(self) -> float:
        """Milliseconds of processors that the server has used; known to ten milliseconds."""
        after_name = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return _TICK * (int(after_name[11]) + int(after_name[12]))

    def rest(self) -> None:
        """Wait until it has done what it does at its start, such as reading ahead."""
        before = -1.0
        while self.cpu() - before > 20:
            before = self.cpu()
            time.sleep(1)

    def memory(self) -> float:
        """Its memory, in MB; pages of the release that the system keeps for it are not counted."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        ((kilobytes, _),) = [line.split()[1:] for line in lines if line.startswith("RssAnon")]
        return int(kilobytes) / 1000


class Session:
    """One browser's session with a server."""

    def __init__(self, server: Server, socket: ClientConnection) -> None:
        self._server, self._socket = server, socket
        self.errors: list[str] = []
        self.waiting: list[Waiting] = []
        """Of the page that is shown."""

    @staticmethod
    @asynccontextmanager
    async def opened(server: Server) -> AsyncIterator["Session"]:
        """A session that ends with the ``async with``."""
        address = f"ws://127.0.0.1:{server.port}/_stcore/stream"
        async with connect(address, subprotocols=["streamlit"], max_size=MOST_BYTES) as socket:  # type: ignore[list-item]
            yield Session(server, socket)

    async def forget(self) -> None:
        """Let the server forget all that it has kept, as its menu's "Clear cache" does."""
        await self._socket.send(BackMsg(clear_cache=True).SerializeToString())

    async def visit(self, address: Address) -> Spent:
        """Open an address and read until the page is whole; what it says of errors is in ``errors``."""
        asked = BackMsg()
        asked.rerun_script.query_string = urlencode(address.params)
        asked.rerun_script.page_name = address.view
        self.waiting.clear()
        return await self._answered(address, asked)

    async def more(self, address: Address) -> Spent:
        """Ask for the first cards that were not sent with the page, as a browser does near their place."""
        one = self.waiting.pop(0)
        asked = BackMsg()
        asked.rerun_script.query_string = urlencode(address.params)
        asked.rerun_script.page_name = address.view
        asked.rerun_script.fragment_id = one.fragment
        state = asked.rerun_script.widget_states.widgets.add()
        state.id, state.json_value = one.component, json.dumps({"wanted": one.of})
        return await self._answered(address, asked)

    async def _answered(self, address: Address, asked: BackMsg) -> Spent:
        start, cpu = time.perf_counter(), self._server.cpu()
        await self._socket.send(asked.SerializeToString())
        n_bytes = 0
        while True:
            data = await asyncio.wait_for(self._socket.recv(), 120)
            n_bytes += len(data)
            message = ForwardMsg.FromString(data)
            self._note(address, message)
            if message.WhichOneof("type") != "script_finished":
                continue
            if message.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN:
                break
        wall = 1000 * (time.perf_counter() - start)
        return Spent(wall, self._server.cpu() - cpu, n_bytes / 1000)

    def _note(self, address: Address, message: ForwardMsg) -> None:
        element = message.delta.new_element
        kind = element.WhichOneof("type")
        told = ""
        if kind == "bidi_component" and b'"waiting":' in element.bidi_component.bytes:
            of = json.loads(element.bidi_component.bytes)["of"]
            self.waiting.append(Waiting(message.delta.fragment_id, element.bidi_component.id, of))
        if kind == "exception":
            told = element.exception.message
        elif kind == "alert" and element.alert.format == element.alert.ERROR:
            told = element.alert.body
        elif message.WhichOneof("type") == "page_not_found":
            told = "no such page"
        if told:
            self.errors.append(f"{address.view} {dict(address.params)}: {told[:200]}")
