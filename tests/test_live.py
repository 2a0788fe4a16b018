"""Live calls: a child process that answers the app, and a worker that does through the queue."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import json
import os
import socket
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from celery.contrib.testing.worker import start_worker

from atlas.analysis import own_text
from atlas.errors import ConfigError, ModelError, SAEError
from atlas.live import calls, client, loaded, serve
from atlas.live.client import Child, LiveBusyError, LiveError, ask_live
from atlas.live.loaded import Loaded, size_of
from atlas.live.remote import ask_worker
from atlas.queue import BrokerError, make_app
from atlas.sae.files import save_sae
from atlas.settings import load_settings
from tests.servers import PATIENCE, broker, redis_server, wait_until
from tests.tiny import model_folder, random_sae, tiny_model

TEXT = "w3 w1 w4 w1 w5 w9 w2 w6"
SILENT = [sys.executable, "-c", "import sys; sys.stdin.read()"]
BROKEN = [sys.executable, "-c", "import sys; sys.stdin.readline()"]


def asked_model(**other):
    model = tiny_model()
    return {"name": str(model_folder()), "processing": "raw", "digest": model.files.digest, **other}


def asked_sae(sae, **other):
    return {"name": sae.info.name, "digest": sae.digest(), **other}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home in which training steps left two SAEs, one of them twice with different weights."""
    folder = tmp_path_factory.mktemp("live")
    old, new = random_sae("L01.z", seed=1), random_sae("L01.z", seed=2)
    other = random_sae("L00.z")
    for step, saes in (("train-a", [old, other]), ("train-b", [new])):
        for item, sae in enumerate(saes):
            save_sae(sae, folder / "steps" / step / f"{item:05d}")
    return folder, old, new, other


@pytest.fixture(scope="module")
def child(home):
    child = Child({**os.environ, "ATLAS_HOME": str(home[0]), "ATLAS_THREADS": "1", "ATLAS_DEVICE": "cpu"})
    yield child
    child.close()


@pytest.fixture
def here(home, monkeypatch):
    found = Loaded(load_settings({"ATLAS_HOME": str(home[0]), "ATLAS_DEVICE": "cpu"}))
    monkeypatch.setattr(loaded, "_KEPT", [found])
    return found


# ---------------------------------------------------------------- what a call gives


def test_a_feature_on_a_text_through_the_child(child, home):
    sae = home[1]
    given = {"model": asked_model(), "sae": asked_sae(sae), "feature": 4, "text": TEXT, "most": 24}
    reply = child.ask("feature_on_text", given, PATIENCE)["ok"]
    read = own_text.read_text(tiny_model(), TEXT)
    direct = own_text.feature_on_text(tiny_model(), sae, read.tokens, 4)
    assert reply["tokens"] == read.tokens.tolist()
    assert reply["pre"] == pytest.approx(direct["pre"], rel=1e-5)
    assert len(reply["dfa"]) == len(direct["dfa"]) > 0
    assert reply["dfa"][0]["by_head"] == pytest.approx(direct["dfa"][0]["by_head"], rel=1e-4, abs=1e-6)
    pid = child.pid
    said = child.ask("nothing", {}, PATIENCE)["error"]
    assert said.startswith("live call 'nothing' is not known; allowed: warm")
    assert child.pid == pid, "one child answers all"


def test_the_strongest_features_by_sae(here, home):
    old, other = home[1], home[3]
    given = {
        "model": asked_model(),
        "saes": [asked_sae(old), asked_sae(other)],
        "text": TEXT,
        "most": 24,
        "k": 3,
    }
    reply = serve.reply_to("features_on_text", given)["ok"]
    tokens = torch.tensor(reply["tokens"])
    direct = own_text.firing_features(tiny_model(), [old, other], tokens, 3)
    assert reply["saes"] == {old.info.name: direct[0], other.info.name: direct[1]}
    json.dumps(reply)


def test_the_weights_of_the_release_and_no_others(here, home):
    _, old, new, _ = home
    assert torch.equal(here.sae(asked_sae(old)).W_enc, old.W_enc)
    assert torch.equal(here.sae(asked_sae(new)).W_enc, new.W_enc)
    with pytest.raises(SAEError, match="are not those of the release"):
        here.sae(asked_sae(old, digest="0" * 64))
    with pytest.raises(SAEError, match="are not on this machine"):
        here.sae(asked_sae(old, name="tiny/nowhere"))
    with pytest.raises(ModelError, match="has other weights than the one"):
        here.model(asked_model(digest="0" * 64))


def test_saes_are_kept_up_to_a_bound(home):
    _, old, new, other = home
    bound = size_of(old) + size_of(other)
    here = Loaded(load_settings({"ATLAS_HOME": str(home[0]), "ATLAS_DEVICE": "cpu"}), bound)
    kept = [here.sae(asked_sae(one)) for one in (old, other)]
    assert here.sae(asked_sae(old)) is kept[0]
    here.sae(asked_sae(new))
    assert [digest for _, digest in here.saes] == [old.digest(), new.digest()], (
        "the one used longest ago goes"
    )


def test_what_goes_wrong_is_said(here, monkeypatch):
    missing = serve.reply_to("warm", {"model": asked_model()})
    assert "does not take these arguments" in missing["error"]
    empty = {"model": asked_model(), "saes": [], "text": " ", "most": 9, "k": 1}
    assert "the text is empty" in serve.reply_to("features_on_text", empty)["error"]

    def fail(**_):
        raise ZeroDivisionError("by chance")

    monkeypatch.setattr("atlas.live.rooms.warm", fail)
    assert serve.reply_to("warm", {}) == {"failed": "ZeroDivisionError: by chance"}


def test_every_call_exists():
    for name, place in calls.CALLS.items():
        module, _, function = place.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function)), name


# ---------------------------------------------------------------- the child process


def test_a_call_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(client, "START_SECONDS", 0.0)
    child = Child(command=SILENT)
    with pytest.raises(LiveError, match="no answer came in time"):
        child.ask("warm", {}, seconds=0.3)
    assert child.pid is None


def test_a_child_that_dies_is_said_and_replaced():
    child = Child(command=BROKEN)
    for _ in range(2):
        with pytest.raises(LiveError, match="ended before it answered"):
            child.ask("warm", {}, seconds=PATIENCE)


def test_one_call_at_a_time(monkeypatch):
    monkeypatch.setattr(client, "START_SECONDS", 0.0)
    child = Child(command=SILENT)

    def ask_first():
        with pytest.raises(LiveError):
            child.ask("warm", {}, seconds=PATIENCE)

    first = threading.Thread(target=ask_first)
    first.start()
    wait_until("the first call is under way", lambda: child.pid)
    with pytest.raises(LiveBusyError, match="another question"):
        child.ask("warm", {}, seconds=0.2)
    while first.is_alive():  # one killed before it was asked is replaced
        child.kill()
        first.join(0.1)


@pytest.mark.parametrize(
    ("before", "at_its_turn", "waits", "has"),
    [(False, False, 22.0, 22.0), (False, True, 22.0, 2.0), (True, True, 2.0, 2.0)],
    ids=["first", "behind the first", "later"],
)
def test_a_question_waits_while_the_child_gets_ready(monkeypatch, before, at_its_turn, waits, has):
    """The first call loads everything; the one behind it has its own time from when it is its turn."""
    child, now, times = Child(), [1000.0], []

    class Turn:
        """A lock that is had after a second, in which the child may have answered the call before."""

        def acquire(self, timeout):
            times.append(timeout)
            now[0] += 1
            child._answered = at_its_turn
            return True

        def release(self):
            pass

    def exchange(data, deadline):
        times.append(deadline - now[0])
        return {}

    monkeypatch.setattr(client, "START_SECONDS", 20.0)
    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Child, "pid", os.getpid())
    child._lock, child._exchange, child._answered = Turn(), exchange, before
    child.ask("warm", {}, seconds=2.0)
    assert times == [waits, has]
    assert child._answered


def test_too_long_a_question():
    with pytest.raises(LiveError, match="allowed: at most 60,000"):
        Child(command=BROKEN).ask("warm", {"text": "x" * 70_000})


def test_the_loop_ends_with_the_other_side_or_for_want_of_calls():
    for close in (True, False):
        source, sink = os.pipe()
        got, out = os.pipe()
        os.write(sink, b'{"id": 1, "call": "nothing", "given": {}}\n')
        if close:
            os.close(sink)
        serve.serve(source, out, idle_seconds=20 if close else 0.1)
        reply = json.loads(os.read(got, 1 << 16))
        assert reply["id"] == 1
        assert "is not known" in reply["error"]


def test_without_a_broker_the_app_asks_the_child(monkeypatch):
    asked = []
    replies = [{"ok": {"x": 1}}, {"error": "no such head"}, {"failed": "KeyError: 'x'"}]

    class Fake:
        def ask(self, call, given, seconds):
            asked.append((call, given))
            return replies[len(asked) - 1]

    monkeypatch.setattr(client, "_CHILD", Fake())
    settings = load_settings({})
    assert ask_live(settings, "warm", {"a": 1}) == {"x": 1}
    with pytest.raises(LiveError, match=r"^no such head$"):
        ask_live(settings, "warm", {})
    with pytest.raises(LiveError, match="on the machine that computes: KeyError"):
        ask_live(settings, "warm", {})
    assert asked[0] == ("warm", {"a": 1})


# ---------------------------------------------------------------- through the queue


@pytest.mark.server
def test_a_worker_answers_through_the_queue(broker, here, home):
    settings = load_settings({"ATLAS_HOME": str(home[0]), "ATLAS_BROKER_URL": broker})
    app = make_app(settings, include=("workers.live",))
    app.loader.import_default_modules()
    given = {"model": asked_model(), "saes": [asked_sae(home[1])], "text": TEXT, "most": 24, "k": 2}
    with pytest.raises(LiveError, match="does one serve the queue 'interactive'"):
        ask_worker(settings, "warm", {}, seconds=0.3)
    options = {"perform_ping_check": False, "shutdown_timeout": PATIENCE}
    with start_worker(app, pool="solo", queues=["interactive"], **options):
        reply = ask_live(settings, "features_on_text", given, PATIENCE)
        assert reply == json.loads(json.dumps(serve.reply_to("features_on_text", given)["ok"]))
        with pytest.raises(LiveError, match="live call 'nothing' is not known"):
            ask_live(settings, "nothing", {}, PATIENCE)


def test_a_broker_that_is_not_there():
    with socket.socket() as taken:  # bound and not listening, so that nobody else answers there
        taken.bind(("127.0.0.1", 0))
        settings = load_settings(
            {"ATLAS_BROKER_URL": f"redis://:secret@127.0.0.1:{taken.getsockname()[1]}/0"}
        )
        with pytest.raises(BrokerError, match="cannot be reached") as caught:
            ask_worker(settings, "warm", {}, seconds=2)
    assert "secret" not in str(caught.value)
