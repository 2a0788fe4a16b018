"""Who may do what: roles, users, passwords, logins, on both databases; nothing secret is ever said."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
import ast
import base64
import hashlib
import multiprocessing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import select, text

import atlas.db
from atlas import access
from atlas.access import ACTIONS, ROLES, Actor, demand, may, os_user, use_source
from atlas.cli.app import app
from atlas.cli.users import users as users_command
from atlas.db import logins, passwords, users
from atlas.db.annotations import save_feature, save_head
from atlas.db.backup import dump, load
from atlas.db.engine import forget_engine
from atlas.db.leases import request_cancel
from atlas.db.models import LoginAttempt, LoginSession, User
from atlas.db.notes import FeatureAnnotation, HeadAnnotation
from atlas.db.runs import create_run, load_run
from atlas.db.session import reading, writing
from atlas.errors import AccessError, ConfigError, ConflictError, DatabaseError
from atlas.oidc import VARIABLES, identity, oidc_secrets
from atlas.settings import load_settings
from tests.servers import database, empty_database, postgres_server
from tests.workers_plan import fake_plan

SECRET = "correct horse battery"
FAST = 16
"""scrypt's N in tests that are not about its cost."""


@pytest.fixture(autouse=True)
def _own_source():
    """Whatever a test makes of who is acting ends with it."""
    before = access._Source.actor
    yield
    use_source(before)


@pytest.fixture
def cheap(monkeypatch):
    """Passwords that are made and refused fast."""
    quick = passwords.hash_password
    monkeypatch.setattr(users, "hash_password", lambda password: quick(password, n=FAST))
    monkeypatch.setattr(logins, "NOBODY", passwords.NOBODY.replace(str(passwords.N), str(FAST)))


def acting(name, role):
    use_source(lambda: Actor(name, role, known=True))


def test_roles_grow():
    allowed = [{action for action in ACTIONS if may(role, action)} for role in ROLES]
    assert allowed[0] == {"read"}
    assert allowed[0] < allowed[1] < allowed[2] == set(ACTIONS)
    assert {"jobs", "imports", "users", "restore"} <= allowed[2] - allowed[1]
    with pytest.raises(ConfigError, match="action 'fly' is not known"):
        may("admin", "fly")


def test_the_command_line_is_the_user_of_the_system(monkeypatch):
    monkeypatch.setenv("ATLAS_ANNOTATOR", "kim")
    assert os_user() == Actor("kim", "admin", known=False)
    monkeypatch.delenv("ATLAS_ANNOTATOR")
    monkeypatch.delenv("USER", raising=False)
    monkeypatch.setattr("getpass.getuser", lambda: (_ for _ in ()).throw(KeyError("uid not found")))
    assert os_user().name.startswith("uid-")


def test_nobody_may_do_nothing():
    use_source(lambda: None)
    for action in ACTIONS:
        with pytest.raises(AccessError, match="nobody is logged in"):
            demand(action)


NOTE = HeadAnnotation("m", 0, 1, "ann")
WRITES = {
    "annotate": lambda s: save_head(s, NOTE, 0),
    "annotate ": lambda s: save_feature(s, FeatureAnnotation("m/x", 1, "ann"), 0),
    "restore": lambda s: load(s, []),
    "jobs": lambda s: create_run(s, fake_plan()),
    "jobs ": lambda s: request_cancel(s, "no-run"),
    "users": lambda s: users.add_user(s, "eve", "admin", None),
    "users ": lambda s: users.set_role(s, "ann", "admin"),
    "users  ": lambda s: users.set_password(s, "ann", SECRET),
    "users   ": lambda s: users.remove_user(s, "ann"),
}


@pytest.mark.parametrize("action", WRITES)
@pytest.mark.parametrize("role", ROLES)
def test_functions_that_write_ask_first(tmp_path, action, role, cheap):
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    users.add_user(settings, "ann", role, SECRET)
    acting("ann", role)
    if may(role, action.strip()):
        try:
            WRITES[action](settings)
        except ConfigError as error:
            assert "no-run" in str(error)  # noqa: PT017 - cancelling got as far as looking for the run
    else:
        with pytest.raises(AccessError, match=rf"ann is {role} and may not do this \({action.strip()}\)"):
            WRITES[action](settings)


def test_a_login_writes_under_its_own_name_only(tmp_path):
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    acting("ann", "admin")
    with pytest.raises(AccessError, match="ann cannot write as 'bob'; allowed: 'ann'"):
        save_head(settings, replace(NOTE, annotator="bob"), 0)
    assert save_head(settings, NOTE, 0).annotator == "ann"


def test_runs_say_who_started_and_who_cancelled_them(database):
    acting("ann", "admin")
    run = create_run(database, fake_plan())
    acting("bob", "admin")
    request_cancel(database, run.id)
    found = load_run(database, run.id)
    assert (found.started_by, found.cancelled_by) == ("ann", "bob")


ASKED_ELSEWHERE = {
    "leases": {"claim_step", "heartbeat", "_end", "release_left_steps"},
    "locks": {"take_lock", "renew_lock", "drop_lock"},
    "logins": {"log_in", "_count_attempt", "log_out"},
    "runs": {"mark_enqueued"},
    "saved": {"note_query"},  # through save_question
    "step_log": {"append_lines"},
    "workers": {"note_worker", "forget_worker"},
}
"""Writers that no person calls: workers on their own steps, and logging in itself."""


def _calls(function):
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "id", getattr(node.func, "attr", None))


def test_no_writer_forgets_to_ask():
    """Every function of atlas.db that opens a writing session asks who is acting."""
    seen = set()
    for file in sorted(Path(atlas.db.__file__).parent.glob("*.py")):
        for function in ast.parse(file.read_text()).body:
            if not isinstance(function, ast.FunctionDef) or function.name == "writing":
                continue
            calls = set(_calls(function))
            if "writing" in calls and function.name not in ASKED_ELSEWHERE.get(file.stem, ()):
                assert "demand" in calls, f"{file.name}: {function.name} writes without asking who is acting"
                seen.add(function.name)
    assert {"save_head", "save_feature", "load", "create_run", "request_cancel", "add_user"} <= seen


def test_a_stored_password_is_scrypt_with_its_salt():
    one, two = passwords.hash_password(SECRET), passwords.hash_password(SECRET)
    assert one != two
    name, n, r, p, salt, digest = one.split("$")
    assert (name, int(n) * int(r) * int(p) >= 2**15 * 8 * 3) == ("scrypt", True)
    again = hashlib.scrypt(
        SECRET.encode(), salt=base64.b64decode(salt), n=int(n), r=int(r), p=int(p), maxmem=2**26, dklen=32
    )
    assert base64.b64decode(digest) == again
    assert passwords.fits(SECRET, one)
    assert not passwords.fits(SECRET + " ", one)
    assert not passwords.fits("x" * 10**6, one)
    assert not passwords.fits(SECRET, "")


def test_nobodys_password_costs_what_anybodys_does():
    assert passwords.NOBODY.split("$")[1:4] == passwords.hash_password(SECRET).split("$")[1:4]
    assert not passwords.fits("", passwords.NOBODY)


@pytest.mark.parametrize("password", ["x" * 9, "x" * 201, ""])
def test_a_refused_password_is_not_repeated(tmp_path, password):
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    with pytest.raises(ConfigError, match="allowed: 10 to 200") as caught:
        users.add_user(settings, "ann", "admin", password)
    assert not password or password not in str(caught.value)
    assert users.list_users(settings) == []


def test_users_come_and_go(database, cheap):
    users.add_user(database, "Ann", "annotator", SECRET)
    users.add_user(database, "bob@lab.example", "reader", None)
    with pytest.raises(ConflictError, match="'ann' is there already"):
        users.add_user(database, "ann", "admin", SECRET)
    for name in ("", " ann", "a\nb", "x" * 81, "zero\u200bwidth"):
        with pytest.raises(ConfigError):
            users.add_user(database, name, "admin", SECRET)
    assert [(u.name, u.role, u.has_password, u.logins) for u in users.list_users(database)] == [
        ("Ann", "annotator", True, 0),
        ("bob@lab.example", "reader", False, 0),
    ]
    assert users.find_actor(database, "BOB@lab.example") == Actor("bob@lab.example", "reader", known=True)
    users.set_role(database, "Ann", "admin")
    assert users.find_actor(database, "Ann").role == "admin"
    users.remove_user(database, "Ann")
    assert users.find_actor(database, "Ann") is None
    with pytest.raises(ConfigError, match="user 'Ann' does not exist; allowed: bob@lab"):
        users.remove_user(database, "Ann")


def test_a_login_lasts_until_it_ends(database, cheap):
    users.add_user(database, "ann", "annotator", SECRET)
    token = logins.log_in(database, "ann", SECRET, "10.0.0.1")
    other = logins.log_in(database, "ann", SECRET, "10.0.0.2")
    assert logins.who(database, token) == Actor("ann", "annotator", known=True)
    with reading(database) as session:
        assert token not in session.scalars(select(LoginSession.token_digest)).all()
    users.set_role(database, "ann", "reader")
    assert logins.who(database, token).role == "reader"
    logins.log_out(database, token)
    assert logins.who(database, token) is None
    assert logins.who(database, other) is not None
    users.set_password(database, "ann", SECRET + "!")
    assert logins.who(database, other) is None
    for wrong in (None, "", "x", token[:-1]):
        assert logins.who(database, wrong) is None
    third = logins.log_in(database, "ann", SECRET + "!", "10.0.0.1")
    users.remove_user(database, "ann")
    assert logins.who(database, third) is None


def test_a_login_runs_out(database, cheap):
    users.add_user(database, "ann", "annotator", SECRET)
    token = logins.log_in(replace(database, session_hours=2.0), "ann", SECRET, "here")
    with writing(database) as session:
        row = session.scalars(select(LoginSession)).one()
        assert row.expires_at - row.created_at == timedelta(hours=2)
        row.expires_at = row.created_at
    assert logins.who(database, token) is None
    logins.log_in(database, "ann", SECRET, "here")
    with reading(database) as session:
        assert len(session.scalars(select(LoginSession)).all()) == 1, "the one that ran out is gone"


def test_a_wrong_name_and_a_wrong_password_look_alike(database, cheap):
    users.add_user(database, "ann", "annotator", SECRET)
    users.add_user(database, "provider@lab.example", "annotator", None)
    said = set()
    for name, password in (
        ("ann", "wrong"),
        ("nobody", SECRET),
        ("provider@lab.example", ""),
        ("\0", SECRET),
    ):
        with pytest.raises(AccessError) as caught:
            logins.log_in(database, name, password, "here")
        said.add(str(caught.value))
    assert said == {"the name or the password is wrong"}


def test_guessing_is_slowed_by_name_and_by_address(database, cheap):
    users.add_user(database, "ann", "annotator", SECRET)
    users.add_user(database, "bob", "annotator", SECRET)

    def guess(name, address, password="wrong"):
        with pytest.raises(AccessError) as caught:
            logins.log_in(database, name, password, address)
        return isinstance(caught.value, logins.TooManyAttemptsError)

    assert not any(guess("ann", f"10.0.0.{i}") for i in range(logins.MOST_BY_NAME))
    assert guess("ann", "10.0.0.99", SECRET), "the right password is not looked at either"
    assert logins.log_in(database, "bob", SECRET, "10.0.0.99")
    assert not any(guess(f"name{i}", "10.1.1.1") for i in range(logins.MOST_BY_ADDRESS))
    assert guess("bob", "10.1.1.1", SECRET)
    with writing(database) as session:
        rows = session.scalars(select(LoginAttempt)).all()
        for row in rows:
            row.at -= logins.WINDOW
    assert logins.log_in(database, "ann", SECRET, "10.0.0.99")


def test_a_success_forgets_the_failures_before_it(database, cheap):
    users.add_user(database, "ann", "annotator", SECRET)
    for _ in range(3):
        for _ in range(logins.MOST_BY_NAME - 1):
            with pytest.raises(AccessError, match="wrong"):
                logins.log_in(database, "ann", "wrong", "here")
        assert logins.log_in(database, "ann", SECRET, "here")


def test_the_commands(tmp_path, monkeypatch, cheap):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    said = []

    def run(*words, stdin=None):
        done = CliRunner().invoke(users_command, words, input=stdin, catch_exceptions=False)
        said.append(done.output)
        assert done.exit_code == 0, done.output
        return done.output

    assert "nobody yet" in run("list")
    run("add", "ann", "--role", "admin", stdin=f"{SECRET}\n{SECRET}\n")
    run("add", "bob", "--password-stdin", stdin=f"{SECRET}\n")
    run("add", "c@lab.example", "--no-password", "--role", "reader")
    settings = load_settings()
    token = logins.log_in(settings, "bob", SECRET, "here")
    assert run("list").splitlines()[2].split() == ["bob", "annotator", "yes", "1"]
    run("passwd", "bob", "--password-stdin", stdin="another long one\n")
    assert logins.who(settings, token) is None
    run("role", "bob", "reader")
    run("remove", "ann")
    assert [u.name for u in users.list_users(settings)] == ["bob", "c@lab.example"]
    with reading(settings) as session:
        stored = session.get(User, "bob").password
    everything = "".join(said)
    assert SECRET not in everything
    assert stored not in everything
    assert "another long one" not in everything


def test_secrets_are_not_shown_by_settings():
    given = {
        "ATLAS_DATABASE_URL": "postgresql://atlas:hushhush@db/atlas",
        "ATLAS_BROKER_URL": "redis://:hushhush@redis/0",
    }
    assert "hushhush" not in repr(load_settings(given))


class Ended:
    """A server that ends at once."""

    def __init__(self, *_, **__):
        pass

    def wait(self):
        return 0


OIDC = {
    "ATLAS_OIDC_CLIENT_ID": "atlas",
    "ATLAS_OIDC_CLIENT_SECRET": "hushhush",
    "ATLAS_OIDC_METADATA_URL": "https://id.lab.example/.well-known/openid-configuration",
    "ATLAS_OIDC_REDIRECT_URI": "https://atlas.lab.example/oauth2callback",
    "ATLAS_COOKIE_SECRET": "hushhush" * 4,
}


def test_the_identity_provider_is_named_by_settings():
    assert oidc_secrets(OIDC) == {name: OIDC[variable] for name, variable in VARIABLES.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ATLAS_COOKIE_SECRET": "hushhush"}, "ATLAS_COOKIE_SECRET is too short"),
        ({"ATLAS_OIDC_CLIENT_SECRET": ""}, "needs ATLAS_OIDC_CLIENT_SECRET$"),
        (
            {"ATLAS_OIDC_METADATA_URL": "http://hushhush@id.lab.example/"},
            "METADATA_URL must begin with https",
        ),
        ({"ATLAS_OIDC_REDIRECT_URI": "https://atlas.lab.example/"}, "must end in /oauth2callback"),
        ({"ATLAS_OIDC_ROLE": "admin"}, "ATLAS_OIDC_ROLE 'admin' is not known"),
    ],
)
def test_what_is_wrong_with_them_is_said_without_secrets(change, said):
    with pytest.raises(ConfigError, match=said) as caught:
        oidc_secrets({**OIDC, **change})
    assert "hushhush" not in str(caught.value)


def test_only_a_verified_address_counts():
    claims = {"email": "ann@lab.example", "sub": "42", "email_verified": True}
    assert identity(claims, {}) == "ann@lab.example"
    for unverified in (False, "false", None, 1.5, ""):
        assert identity({**claims, "email_verified": unverified}, {}) is None
    assert identity(claims, {"ATLAS_OIDC_CLAIM": "sub"}) == "42"
    assert identity(claims, {"ATLAS_OIDC_CLAIM": "upn"}) is None
    assert identity({**claims, "email": ["ann@lab.example"]}, {}) is None


@pytest.mark.parametrize(
    ("environment", "arguments", "said"),
    [
        ({}, ["--address", "0.0.0.0"], "ATLAS_AUTH=none lets everybody write"),
        ({"ATLAS_AUTH": "password"}, [], "nobody can log in yet"),
    ],
)
def test_serving_others_without_a_login_is_warned_of(tmp_path, monkeypatch, environment, arguments, said):
    monkeypatch.setattr("atlas.cli.app.subprocess.Popen", Ended)
    for key, value in {"ATLAS_HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(key, value)
    assert said in CliRunner().invoke(app, arguments).stderr
    assert "warning" not in CliRunner().invoke(app, [], env={"ATLAS_AUTH": "none"}).stderr


def test_an_older_or_newer_database_is_told_at_start(tmp_path, monkeypatch):
    """Who only reads gets a warning; where a login is needed, nobody could log in."""
    monkeypatch.setattr("atlas.cli.app.subprocess.Popen", Ended)
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    with writing(load_settings()) as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    forget_engine(load_settings().database_url)
    monkeypatch.setattr("atlas.db.schema._READY", set())
    said = CliRunner().invoke(app, [])
    assert said.exit_code == 0
    assert "warning: database sqlite" in said.stderr
    assert "'9999', which this version does not know" in said.stderr
    refused = CliRunner().invoke(app, [], env={"ATLAS_AUTH": "password"})
    assert isinstance(refused.exception, DatabaseError)


def test_an_unknown_way_to_log_in_is_refused():
    with pytest.raises(ConfigError, match="ATLAS_AUTH 'ldap' is not known; allowed: none, password, oidc"):
        load_settings({"ATLAS_AUTH": "ldap"})
