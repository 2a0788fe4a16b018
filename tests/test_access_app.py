"""The login over HTTP and in a real browser: what is let through, and what others cannot forge."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import logging
import os
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from app.access import COOKIE
from app.login import Gate, routes
from atlas.cli.app import streamlit_command
from atlas.db import logins, passwords, users
from atlas.db.annotations import list_heads
from atlas.db.engine import close_engines
from atlas.settings import load_settings
from tests.servers import app_served, free_port, wait_until
from tests.synthetic import MODEL, build_synthetic_release
from tests.test_app_browser import browser

SECRET = "correct horse battery"
HERE = "http://testserver"
TOGETHER = {"origin": HERE}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    quick = passwords.hash_password
    monkeypatch.setattr(users, "hash_password", lambda password: quick(password, n=16))
    monkeypatch.setattr(logins, "NOBODY", passwords.NOBODY.replace(str(passwords.N), "16"))
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    monkeypatch.setenv("ATLAS_AUTH", "password")
    found = load_settings()
    users.add_user(found, "ann", "annotator", SECRET)
    yield found
    close_engines()


async def _data(request):
    return PlainTextResponse("data")


async def _socket(socket):
    await socket.accept()
    await socket.send_text("data")
    await socket.close()


@pytest.fixture
def client(settings):
    inner = [Route("/{path:path}", _data), WebSocketRoute("/_stcore/stream", _socket)]
    served = Starlette(routes=[*routes(settings), *inner], middleware=[Middleware(Gate)])
    return TestClient(served, base_url=HERE, follow_redirects=False)


def log_in(client, next_="/", password=SECRET, headers=TOGETHER, **more):
    data = {"name": "ann", "password": password, **more}
    return client.post(f"/login?{urlencode({'next': next_})}", data=data, headers=headers)


def test_nothing_is_answered_before_the_login(client):
    asked = client.get("/head?head=L5H3&k=20", headers={"accept": "text/html"})
    assert asked.status_code == 303
    assert asked.headers["location"] == "/login?next=%2Fhead%3Fhead%3DL5H3%26k%3D20"
    for path in ("/media/x.png", "/_stcore/upload_file/a/b", "/_stcore/host-config", "/static/../media/x"):
        assert client.get(path).status_code == 401, path
    assert client.post("/anything", headers={"accept": "text/html"}).status_code == 401
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/_stcore/stream") as socket:
        socket.receive_text()


def test_what_is_open_to_all_holds_no_data(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/_stcore/health").status_code == 200
    form = client.get("/login")
    assert form.status_code == 200
    assert "default-src 'none'" in form.headers["content-security-policy"]
    assert form.headers["x-frame-options"] == "DENY"


def test_the_cookie_opens_what_was_asked_for(client, settings):
    done = log_in(client, "/head?head=L5H3")
    assert (done.status_code, done.headers["location"]) == (303, "/head?head=L5H3")
    flags = {part.strip().lower() for part in done.headers["set-cookie"].split(";")[1:]}
    assert {"httponly", "samesite=lax", "path=/", "max-age=604800"} <= flags
    assert "secure" not in flags
    assert client.get("/media/x.png").text == "data"
    with client.websocket_connect("/_stcore/stream") as socket:
        assert socket.receive_text() == "data"
    logins.log_out(settings, client.cookies[COOKIE])
    assert client.get("/media/x.png").status_code == 401


def test_behind_tls_the_cookie_is_for_tls_alone(client):
    done = log_in(client, headers={**TOGETHER, "x-forwarded-proto": "https"})
    assert "; Secure" in done.headers["set-cookie"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://elsewhere.example"},
        {"origin": "null"},
        {"origin": HERE, "sec-fetch-site": "cross-site"},
        {"origin": HERE, "sec-fetch-site": "same-site"},
    ],
)
def test_another_site_cannot_log_somebody_in(client, headers):
    refused = log_in(client, headers=headers)
    assert refused.status_code == 403
    assert "set-cookie" not in refused.headers


def test_a_new_login_ends_the_one_before_in_this_browser(client, settings):
    log_in(client)
    first = client.cookies[COOKIE]
    log_in(client)
    assert client.cookies[COOKIE] != first
    assert logins.who(settings, first) is None
    assert logins.who(settings, client.cookies[COOKIE]).name == "ann"


@pytest.mark.parametrize(
    "next_", ["//elsewhere.example/", "https://elsewhere.example", "/\\elsewhere", "x", "/a\r\nb"]
)
def test_the_way_on_stays_here(client, next_):
    assert log_in(client, next_).headers["location"] == "/"


def test_no_password_is_said_or_logged(client, caplog):
    caplog.set_level(logging.DEBUG)
    wrong = log_in(client, password="hush hush hush", name='ann"><script>')
    assert wrong.status_code == 403
    assert "the name or the password is wrong" in wrong.text
    assert "<script>" not in wrong.text
    log_in(client, "/?x=1")
    token = client.cookies[COOKIE]
    everything = wrong.text + caplog.text
    assert "a login from testclient failed" in caplog.text
    for secret in ("hush hush hush", SECRET, token):
        assert secret not in everything


def test_guessing_ends_in_429(client):
    statuses = [log_in(client, password="wrong").status_code for _ in range(logins.MOST_BY_NAME + 1)]
    assert statuses == [403] * logins.MOST_BY_NAME + [429]
    assert log_in(client).status_code == 429


def test_a_form_that_is_too_long_is_not_read(client):
    assert log_in(client, padding="x" * 10_000).status_code == 403


def test_a_database_that_is_away_lets_nobody_in(client, monkeypatch):
    log_in(client)
    monkeypatch.setenv("ATLAS_DATABASE_URL", "postgresql://atlas:hushhush@127.0.0.1:1/atlas")
    assert client.get("/media/x.png").status_code == 401
    for answer in (client.get("/healthz"), log_in(client)):
        assert answer.status_code == 503
        assert "hushhush" not in answer.text


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A release and three users."""
    home = tmp_path_factory.mktemp("access")
    build_synthetic_release(home / "releases")
    settings = load_settings({"ATLAS_HOME": str(home)})
    users.add_user(settings, "ann", "annotator", SECRET)
    users.add_user(settings, "kay@lab.example", "annotator", None)
    close_engines()
    return home


@pytest.fixture
def page(browser):
    browser.clear_cookies()
    page = browser.new_page()
    yield page
    page.close()


@pytest.mark.browser
def test_annotating_with_a_password(page, home):
    from playwright.sync_api import expect

    settings = load_settings({"ATLAS_HOME": str(home)})
    with app_served(home, ATLAS_AUTH=lambda _: "password") as address:
        page.goto(f"{address}/head?head=L0H1&annotator=somebody-else")
        page.get_by_label("Name").fill("ann")
        page.get_by_label("Password").fill("wrong password")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_have_text("the name or the password is wrong")
        page.get_by_label("Name").fill("ann")
        page.get_by_label("Password").fill(SECRET)
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("heading", name="L0H1", exact=True).wait_for()
        assert page.url == f"{address}/head?head=L0H1&annotator=somebody-else"
        page.get_by_label("Label", exact=True).fill("mine alone")
        expect(page.get_by_text("draft, version 1")).to_be_visible()
        (note,) = list_heads(settings, MODEL, layer=0, head=1)
        assert (note.annotator, note.label) == ("ann", "mine alone")
        users.set_role(settings, "ann", "reader")
        page.reload()
        page.get_by_text("Your role is reader").wait_for()
        expect(page.get_by_label("Label", exact=True)).to_have_count(0)
        users.set_role(settings, "ann", "annotator")
        page.get_by_test_id("stExpandSidebarButton").click()
        page.get_by_role("button", name="Log out").click()
        page.get_by_role("link", name="Log in").click()
        page.get_by_label("Password").wait_for()
    close_engines()
    log = (home / "app.log").read_text()
    assert SECRET not in log
    assert "wrong password" not in log


class Provider:
    """An identity provider of one person, who always agrees; speaks as much OpenID Connect as needed."""

    def __init__(self):
        from joserfc.jwk import RSAKey

        self.key = RSAKey.generate_key(2048, {"kid": "1"})
        self.url = f"http://127.0.0.1:{free_port()}"
        self.email, self.nonces = "", {}

    async def about(self, request):
        here = {name: f"{self.url}/{name}" for name in ("authorize", "token", "jwks")}
        return JSONResponse(
            {
                "issuer": self.url,
                "authorization_endpoint": here["authorize"],
                "token_endpoint": here["token"],
                "jwks_uri": here["jwks"],
                "id_token_signing_alg_values_supported": ["RS256"],
                "code_challenge_methods_supported": ["S256"],
            }
        )

    async def authorize(self, request):
        asked = request.query_params
        assert asked["code_challenge_method"] == "S256"
        self.nonces["code"] = asked["nonce"]
        return RedirectResponse(
            f"{asked['redirect_uri']}?{urlencode({'code': 'code', 'state': asked['state']})}"
        )

    async def token(self, request):
        from joserfc import jwt

        fields = parse_qs((await request.body()).decode())
        assert fields["code"] == ["code"]
        assert "code_verifier" in fields
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": "atlas",
            "sub": "1",
            "iat": now,
            "exp": now + 300,
            "nonce": self.nonces["code"],
            "email": self.email,
            "email_verified": True,
        }
        signed = jwt.encode({"alg": "RS256", "kid": "1"}, claims, self.key)
        return JSONResponse({"access_token": "a", "token_type": "Bearer", "id_token": signed})

    async def jwks(self, request):
        return JSONResponse({"keys": [self.key.as_dict(private=False)]})

    @contextmanager
    def running(self):
        import uvicorn

        table = [
            Route("/.well-known/openid-configuration", self.about),
            Route("/authorize", self.authorize),
            Route("/token", self.token, methods=["POST"]),
            Route("/jwks", self.jwks),
        ]
        config = uvicorn.Config(
            Starlette(routes=table), host="127.0.0.1", port=urlsplit(self.url).port, log_level="error"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until("the provider answers", lambda: server.started)
        yield self
        server.should_exit = True
        thread.join(10)


@pytest.mark.browser
def test_logging_in_with_an_identity_provider(page, home):
    client_secret, cookie_secret = "hush-client-secret", "hush-cookie-secret" * 3
    with Provider().running() as provider:
        environment = {
            "ATLAS_AUTH": lambda _: "oidc",
            "ATLAS_OIDC_CLIENT_ID": lambda _: "atlas",
            "ATLAS_OIDC_CLIENT_SECRET": lambda _: client_secret,
            "ATLAS_OIDC_METADATA_URL": lambda _: f"{provider.url}/.well-known/openid-configuration",
            "ATLAS_OIDC_REDIRECT_URI": lambda port: f"http://127.0.0.1:{port}/oauth2callback",
            "ATLAS_COOKIE_SECRET": lambda _: cookie_secret,
        }
        with app_served(home, **environment) as address:
            provider.email = "eve@lab.example"
            page.goto(f"{address}/overview")
            page.get_by_role("button", name="Log in").click()
            page.get_by_text("the identity provider knows you, and this atlas does not").wait_for()
            page.get_by_role("button", name="Log out").click()
            provider.email = "Kay@lab.example"
            page.get_by_role("button", name="Log in").click()
            page.get_by_test_id("stExpandSidebarButton").click()
            page.get_by_text("kay@lab.example · annotator").wait_for()
    log = (home / "app.log").read_text()
    assert client_secret not in log
    assert cookie_secret not in log
