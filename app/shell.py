"""Something to see at once: the empty page that loads the app's scripts gets a frame and the app's name.

Streamlit's page is blank until two megabytes of scripts have been read. Scripts replace what stands in its
root; until then it shows this. Scripts that every view needs, and that would only be asked for when the first
part of the page has come, are asked for together with the others. Keys that are pressed until then are
held by a script of the page's own (``components/keys_early.js``).
"""

from pathlib import Path

import streamlit
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROOT = b'<div id="root"></div>'
EARLY = ("Html", "purify.es", "BidiComponent", "serialization", "recordbatch", "Selectbox", "ButtonGroup")
"""Scripts by the first part of their names; the rest changes with every version."""
_STYLES = [Path(__file__).with_name(name) for name in ("style.css", "early.css")]
_KEYS = Path(__file__).parent / "components" / "keys_early.js"
_FRAME = """<div id="root"><style>
:root{color-scheme:light dark}body{margin:0;background:Canvas}
#ha-shell{font:15px/1.5 system-ui,sans-serif;color:GrayText;padding:1rem 2rem}
#ha-shell b{color:CanvasText;font-weight:600}
#ha-shell i{display:block;height:.9rem;margin:1.1rem 0;border-radius:.3rem;background:GrayText;opacity:.12}
</style><div id="ha-shell" role="status"><b>Head Atlas</b> is loading
<i style="width:22%;margin-top:3rem"></i><i style="width:64%"></i><i style="width:58%"></i></div></div>"""


def early_scripts(folder: Path) -> str:
    """Links that make the browser read some scripts early; those that this version has not are left out."""
    names = [path.name for stem in EARLY for path in sorted(folder.glob(f"{stem}.*.js"))[:1]]
    return "".join(f'<link rel="modulepreload" crossorigin href="./static/js/{name}">' for name in names)


def with_frame(page: bytes, links: str) -> bytes:
    """The page that loads the app with its frame; any other as it is.

    >>> with_frame(b"<head><title>Streamlit</title></head>" + ROOT, "").count(b"Head Atlas")
    2
    >>> with_frame(b"<p>no root</p>", "")
    b'<p>no root</p>'
    """
    if ROOT not in page:
        return page
    page = page.replace(b"<title>Streamlit</title>", b"<title>Head Atlas</title>")
    return page.replace(b"</head>", links.encode() + b"</head>").replace(ROOT, _FRAME.encode())


class Shell:
    """Puts the frame into the app's page on its way out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        links = early_scripts(Path(streamlit.__file__).parent / "static" / "static" / "js")
        style = "".join(path.read_text("utf-8") for path in _STYLES)
        self._links = f"<style>{style}</style>{links}<script>{_KEYS.read_text('utf-8')}</script>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask for the page uncompressed and whole, and send it on with its frame."""
        wanted = Headers(scope=scope).get("accept", "") if scope["type"] == "http" else ""
        if scope.get("method") != "GET" or "text/html" not in wanted:
            await self._app(scope, receive, send)
            return
        left_out = (b"accept-encoding", b"if-none-match", b"if-modified-since", b"range")
        headers = [(name, value) for name, value in scope["headers"] if name not in left_out]
        await self._app({**scope, "headers": headers}, receive, _Rewritten(send, self._links))


class _Rewritten:
    """Holds an answer of HTML back until it is whole; all others pass."""

    def __init__(self, send: Send, links: str) -> None:
        self._send, self._links = send, links
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            if kind.startswith("text/html"):
                self._start = message
                return
        elif self._start is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            message = await self._begin(self._start)
        await self._send(message)

    async def _begin(self, start: Message) -> Message:
        body = with_frame(self._body, self._links)
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-length"] = str(len(body))
        if body != self._body:
            del headers["etag"], headers["last-modified"]
        await self._send({**start, "headers": headers.raw})
        return {"type": "http.response.body", "body": body}
