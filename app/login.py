"""The login with a password over HTTP: its page, its cookie, and the gate before everything else.

The token is in a cookie that no script can read (HttpOnly) and that other sites' forms and sockets do not
carry (SameSite=Lax); what changes something is a POST that has to come from our own page.
"""

import html
import logging
from urllib.parse import parse_qs, quote, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from app.access import COOKIE, LOGIN
from atlas.db import logins
from atlas.db.schema import current_revision, ensure_schema
from atlas.errors import AccessError, AtlasError
from atlas.settings import Settings, load_settings

OPEN = (LOGIN, "/healthz", "/_stcore/health")
"""What answers without a login; also the program's own scripts under ``/static/``, which hold no data."""
LONGEST_FORM = 4096
_SAFE = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Log in · Head Atlas</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root{{color-scheme:light dark}}
body{{font:16px/1.5 system-ui,sans-serif;margin:12vh auto;max-width:20rem;padding:1rem}}
label{{display:block;margin-top:.8rem}}input,button{{font:inherit;width:100%;box-sizing:border-box;padding:.45rem}}
button{{margin-top:1.2rem;background:#0072b2;color:#fff;border:0;border-radius:.4rem;padding:.55rem}}
[role=alert]{{border-left:4px solid #d55e00;padding-left:.6rem}}</style></head><body>
<h1>Head Atlas</h1>{said}<form method="post" action="{action}">
<label>Name<input name="name" autocomplete="username" required autofocus maxlength="80"></label>
<label>Password<input name="password" type="password" autocomplete="current-password" required
maxlength="200"></label>
<button>Log in</button></form></body></html>"""
log = logging.getLogger("atlas.login")


def local_path(asked: str | None) -> str:
    r"""Where to go after the login: an address of ours, never another site's.

    >>> [local_path(asked) for asked in ("/head?head=L5H3", "//elsewhere/", "/\\elsewhere", None)]
    ['/head?head=L5H3', '/', '/', '/']
    """
    text = asked or "/"
    plain = text.isprintable() and "\\" not in text
    return text if plain and text.startswith("/") and not text.startswith("//") else "/"


def from_own_page(headers: Headers) -> bool:
    """Whether a POST comes from a page of ours, as the browser says; scripts of other sites cannot forge it.

    >>> from_own_page(Headers({"origin": "http://atlas:8501", "host": "atlas:8501"}))
    True
    >>> from_own_page(Headers({"origin": "http://elsewhere", "host": "atlas:8501"}))
    False
    """
    told = headers.get("sec-fetch-site")
    if told is not None:
        return told == "same-origin"
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc == headers.get("host")


def _page(next_: str, said: str = "", status: int = 200, headers: dict[str, str] | None = None) -> Response:
    told = f'<p role="alert">{html.escape(said)}</p>' if said else ""
    action = html.escape(f"{LOGIN}?next={quote(next_, safe='')}")
    body = _PAGE.format(said=told, action=action)
    return HTMLResponse(body, status, {**_SAFE, **(headers or {})})


async def _fields(request: Request) -> dict[str, str]:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST_FORM:
            return {}
    return {name: values[0] for name, values in parse_qs(body.decode("utf8", "replace")).items()}


async def _show(request: Request) -> Response:
    return _page(local_path(request.query_params.get("next")))


async def _try(request: Request) -> Response:
    next_ = local_path(request.query_params.get("next"))
    if not from_own_page(request.headers):
        return _page(next_, "That did not come from this page. Please try again here.", 403)
    fields = await _fields(request)
    settings = load_settings()
    address = request.client.host if request.client else "unknown"
    name, password = fields.get("name", ""), fields.get("password", "")
    try:
        token = await run_in_threadpool(logins.log_in, settings, name, password, address)
        await run_in_threadpool(logins.log_out, settings, request.cookies.get(COOKIE))
    except logins.TooManyAttemptsError as error:
        log.warning("too many attempts to log in from %s", address)
        return _page(next_, str(error), 429, {"Retry-After": str(round(logins.WINDOW.total_seconds()))})
    except AccessError as error:
        # Not the name: people type their password into the wrong field.
        log.warning("a login from %s failed", address)
        return _page(next_, str(error), 403)
    except AtlasError as error:
        log.error("login: %s", error)
        return _page(next_, "The database does not answer; try again later.", 503)
    response = RedirectResponse(next_, 303, {"Cache-Control": "no-store"})
    response.set_cookie(
        COOKIE,
        token,
        max_age=round(settings.session_hours * 3600),
        secure=_encrypted(request),
        httponly=True,
        samesite="lax",
    )
    return response


def _encrypted(request: Request) -> bool:
    """Whether the browser speaks TLS, with us or with the proxy before us."""
    return "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))


def _ask_database(settings: Settings) -> None:
    ensure_schema(settings)
    current_revision(settings)


async def _health(_: Request) -> Response:
    """Whether the app can do its work: it answers, and its database is there at the right schema."""
    try:
        await run_in_threadpool(_ask_database, load_settings())
    except AtlasError as error:
        log.error("healthz: %s", error)
        return JSONResponse({"status": "failing", "problem": type(error).__name__}, 503)
    return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})


def routes(settings: Settings) -> list[Route]:
    """Addresses beside Streamlit's own."""
    found = [Route("/healthz", _health, methods=["GET"])]
    if settings.auth == "password":
        found += [Route(LOGIN, _show, methods=["GET"]), Route(LOGIN, _try, methods=["POST"])]
    return found


class Gate:
    """Nothing that may hold data is answered without a login: pages lead to the form, the rest is refused."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket") or await self._passes(HTTPConnection(scope)):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._refusal(Request(scope))(scope, receive, send)

    async def _passes(self, asked: HTTPConnection) -> bool:
        path = asked.scope["path"]
        if path in OPEN or path.startswith("/static/"):
            return True
        try:
            actor = await run_in_threadpool(logins.who, load_settings(), asked.cookies.get(COOKIE))
        except AtlasError as error:
            log.error("login: %s", error)
            return False
        return actor is not None

    @staticmethod
    def _refusal(request: Request) -> Response:
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(
                f"{LOGIN}?next={quote(here, safe='')}", 303, {"Cache-Control": "no-store"}
            )
        return PlainTextResponse("log in first\n", 401, {"Cache-Control": "no-store"})
