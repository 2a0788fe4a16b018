"""The frame of the app's page: there at once, on that page alone, and never a broken answer."""

from pathlib import Path

import pytest
import streamlit
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from app.shell import EARLY, ROOT, Shell, early_scripts

STATIC = Path(streamlit.__file__).parent / "static"
PAGE = STATIC / "index.html"
HTML = {"accept": "text/html,application/xhtml+xml,*/*"}


async def in_pieces():
    for start in range(0, 4000, 1000):
        yield PAGE.read_bytes().ljust(4000)[start : start + 1000]
    yield PAGE.read_bytes()[4000:]


@pytest.fixture(scope="module")
def client():
    routes = [
        Route("/", lambda _: FileResponse(PAGE)),
        Route("/pieces", lambda _: StreamingResponse(in_pieces(), media_type="text/html")),
        Route("/login", lambda _: HTMLResponse("<p>" + "name " * 500)),
        Route("/data", lambda _: JSONResponse({"root": ROOT.decode()})),
    ]
    app = Starlette(
        routes=routes, middleware=[Middleware(Shell), Middleware(GZipMiddleware, minimum_size=10)]
    )
    return TestClient(app)


@pytest.mark.parametrize("path", ["/", "/pieces"])
def test_the_page_has_its_frame_scripts_and_name(client, path):
    answer = client.get(path, headers=HTML)
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert '<div id="ha-shell" role="status">' in answer.text
    assert answer.text.count('id="root"') == 1
    assert "<title>Head Atlas</title>" in answer.text
    assert "min-height: 2300px" in answer.text.split("</head>")[0]  # the place of the cards
    before, after = PAGE.read_text(), answer.text
    assert [line for line in before.splitlines() if "index." in line and line not in after] == []


def test_the_answer_is_never_taken_from_what_a_browser_kept(client):
    etag = client.get("/", headers={"accept": "*/*"}).headers["etag"]
    again = client.get("/", headers={**HTML, "if-none-match": etag})
    assert again.status_code == 200
    assert "etag" not in again.headers


def test_other_pages_and_other_askers_get_what_they_would_get(client):
    login = client.get("/login", headers=HTML)
    assert login.text == "<p>" + "name " * 500
    assert client.get("/data", headers=HTML).json() == {"root": ROOT.decode()}
    assert client.get("/", headers={"accept": "*/*"}).content == PAGE.read_bytes()
    packed = client.get("/login", headers={"accept": "*/*", "accept-encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert client.head("/", headers=HTML).content == b""


def test_every_early_script_is_there_in_this_version():
    links = early_scripts(STATIC / "static" / "js")
    assert links.count("modulepreload") == len(EARLY)
    for name in links.split('"./static/js/')[1:]:
        assert (STATIC / "static" / "js" / name.partition('"')[0]).is_file()
    assert early_scripts(STATIC / "nowhere") == ""
