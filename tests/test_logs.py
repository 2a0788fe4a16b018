# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
"""Log lines: their form, the last ones kept with each step on both databases, and never a secret."""

import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import delete

from atlas.cli.logs import logs
from atlas.cli.retry import retry
from atlas.cli.status import status
from atlas.configs import BuildConfig
from atlas.db.engine import UnreachableError
from atlas.db.leases import claim_step, fail_step, finish_step
from atlas.db.models import Run
from atlas.db.progress import DbProgress
from atlas.db.runs import create_run, load_run
from atlas.db.session import writing
from atlas.db.step_log import KEEP_LINES, LINE_LENGTH, StepLog, append_lines, read_lines
from atlas.errors import Cancelled, CorpusError
from atlas.logs import HIDDEN, JsonLines, TextLines, explained, redact, set_up_logging, working_on
from atlas.settings import load_settings
from atlas.units import Unit
from tests.servers import database, empty_database, postgres_server
from tests.workers_plan import fake_plan, step

SECRET = "tr0ub4dor&3"


def lines_of(settings, run, **options):
    return [(line.step, line.level, line.line) for line in read_lines(settings, run.id, **options)]


def run_of(settings, *names):
    return create_run(settings, fake_plan([step(name) for name in names]))


def record(message, *, error=None, level=logging.INFO):
    trace = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("atlas.test", level, __file__, 1, message, (), trace)


def raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


def test_a_json_line_has_the_fields_and_is_one_line():
    with working_on("20260101-000000-aa", "train"):
        text = JsonLines().format(record("two\nlines", error=raised(ValueError("bad")), level=logging.ERROR))
    assert "\n" not in text
    fields = json.loads(text)
    assert (fields["run"], fields["step"], fields["level"]) == ("20260101-000000-aa", "train", "ERROR")
    assert fields["message"] == "two\nlines"
    assert fields["error"].startswith("Traceback")
    assert fields["error"].endswith("ValueError: bad")
    assert fields["worker"].endswith(f"/{os.getpid()}")
    assert fields["time"].endswith("Z")
    assert {"run", "step"} & json.loads(JsonLines().format(record("after"))).keys() == set()


def test_a_message_cannot_forge_a_line():
    text = TextLines().format(record("x\n2026-01-01T00:00:00.000Z ERROR forged"))
    assert len(text.splitlines()) == 1
    assert "x\\n2026" in text


WHERE = {
    "a URL": f"cannot reach postgresql://atlas:{SECRET}@db:5432/atlas now",
    "a URL without a user": f"redis://:{SECRET}@redis:6379/0",
    "libpq's words": f"host=db password={SECRET} dbname=atlas",
    "libpq's quotes": f"password='{SECRET} and more'",
    "a dict": f"{{'password': '{SECRET}'}}".replace("'password'", "password"),
}


@pytest.mark.parametrize("where", WHERE)
def test_a_password_never_passes(where):
    assert SECRET not in redact(WHERE[where])
    assert HIDDEN in redact(WHERE[where])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATLAS_DATABASE_URL", f"postgresql://atlas:{SECRET}@db/atlas"),
        ("ATLAS_BROKER_URL", f"rediss://:{SECRET}@redis:6379/0"),
        ("ATLAS_DB_PASSWORD", SECRET),
        ("HF_TOKEN", SECRET),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
    ],
)
def test_a_secret_of_the_environment_never_passes_wherever_it_stands(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert redact(f"the server said {SECRET}!") == f"the server said {HIDDEN}!"
    error = raised(RuntimeError(f"tried {SECRET}"))
    for form in (JsonLines(), TextLines()):
        assert SECRET not in form.format(record("oh", error=error, level=logging.ERROR))
    assert SECRET not in explained(error)


PRINTED = st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="@'\"")


@given(st.text(alphabet=PRINTED, min_size=1))
def test_any_password_in_a_url_is_hidden(password):
    said = redact(f"postgresql://someone:{password}@host/db")
    assert said == f"postgresql://someone:{HIDDEN}@host/db"


@given(st.text(alphabet="abc defghij=[]().,0123456789-", max_size=200))
def test_ordinary_text_is_left_alone(text):
    assert redact(text) == text


def test_explained_names_the_cause_once():
    error = CorpusError("corpus 'x' cannot be downloaded")
    error.__cause__ = ConnectionResetError("reset\nby peer")
    said = explained(error)
    assert said == "corpus 'x' cannot be downloaded; caused by ConnectionResetError: reset by peer"
    error = CorpusError("text cannot be written: disk full")
    error.__cause__ = OSError("disk full")
    assert explained(error) == "text cannot be written: disk full"
    error.__cause__ = error
    assert explained(error) == "text cannot be written: disk full"


def test_chosen_format_writes_every_event_and_none_means_warnings(tmp_path, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    log, before = logging.getLogger("atlas.test"), list(logging.root.handlers)
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    try:
        set_up_logging(settings)
        log.info("quiet")
        log.warning("loud")
        logging.getLogger("atlas.step").error("said by the command itself")
        set_up_logging(replace(settings, log_format="json"))
        log.info("told")
    finally:
        log.parent.setLevel(logging.NOTSET)
        logging.root.handlers[:] = before
    text, told = said.getvalue().splitlines()
    assert "loud" in text
    assert json.loads(told)["message"] == "told"


def test_a_step_keeps_what_was_logged_while_it_ran(database):
    run = run_of(database, "train")
    claim_step(database, run.id, "train", "host/1/2/x")
    other = logging.getLogger("somebody.else")
    logging.getLogger("atlas.before").warning("not of this step")
    with DbProgress(database, run.id, "train", "host/1/2/x", unit=Unit("steps", 4), every=0) as progress:
        progress.update(1, 4, "loss 2.0")
        logging.getLogger("atlas.sae").info("a checkpoint was written")
        other.info("noise")
        other.warning("password=%s", SECRET)
    logging.getLogger("atlas.after").warning("not of this step")
    found = lines_of(database, run)
    assert [level for _, level, _ in found] == ["INFO", "INFO", "WARNING", "INFO"]
    said = [line for _, _, line in found]
    assert said[:3] == ["begins", "a checkpoint was written", f"password={HIDDEN}"]
    assert said[3].startswith("done in ")
    assert "MB" in said[3]


def broken(settings, run_id, name, error):
    with DbProgress(settings, run_id, name, "host/1/2/x", unit=Unit("blocks")) as progress:
        progress.update(3, 9, "reading")
        raise error


def test_a_failure_is_kept_with_its_traceback_and_a_cancelled_step_says_so(database):
    run = run_of(database, "bug", "bad", "stop")
    for name, error in (
        ("bug", TypeError("no\nway")),
        ("bad", CorpusError("empty")),
        ("stop", Cancelled("x")),
    ):
        claim_step(database, run.id, name, "host/1/2/x")
        with pytest.raises(type(error)):
            broken(database, run.id, name, error)
    bug = read_lines(database, run.id, step="bug")[-1]
    assert bug.level == "ERROR"
    assert "at 3/9 blocks" in bug.line
    assert "TypeError: no way\nTraceback (most recent call last)" in bug.line
    bad = read_lines(database, run.id, step="bad")[-1]
    assert bad.line.endswith("reading: empty")
    assert read_lines(database, run.id, step="stop")[-1].level == "INFO"


def test_only_the_last_lines_of_each_step_are_kept(database):
    run = run_of(database, "long", "short")
    with StepLog(database, run.id, "short"):
        logging.getLogger("atlas.x").info("first")
    for start in range(0, KEEP_LINES + 100, 100):
        with StepLog(database, run.id, "long"):
            for number in range(start, start + 100):
                logging.getLogger("atlas.x").info("line %d", number)
    found = lines_of(database, run, step="long")
    assert [line for _, _, line in found] == [f"line {n}" for n in range(100, KEEP_LINES + 100)]
    assert len(lines_of(database, run, step="short")) == 1
    assert [line for _, _, line in lines_of(database, run, last=2)] == ["line 498", "line 499"]
    newest = read_lines(database, run.id)[-2]
    assert len(read_lines(database, run.id, after=newest.id)) == 1


def test_a_long_line_is_cut_in_the_middle_and_a_null_byte_is_no_error(database):
    run = run_of(database, "a")
    with StepLog(database, run.id, "a"):
        logging.getLogger("atlas.x").info("begin\0 %s end", "x" * 20_000)
    (line,) = read_lines(database, run.id)
    assert len(line.line) <= LINE_LENGTH
    assert line.line.startswith("begin xxx")
    assert line.line.endswith("xxx end")


def test_lines_go_with_their_run_and_lines_of_no_run_are_dropped(database):
    run = run_of(database, "a")
    with StepLog(database, run.id, "a"):
        logging.getLogger("atlas.x").info("here")
    with writing(database) as session:
        session.execute(delete(Run).where(Run.id == run.id))
    assert read_lines(database, run.id) == []
    with StepLog(database, run.id, "a"):
        logging.getLogger("atlas.x").info("too late")
    assert read_lines(database, run.id) == []


def test_lines_wait_while_the_database_is_away(tmp_path, monkeypatch):
    settings = load_settings({"ATLAS_HOME": str(tmp_path)})
    run = run_of(settings, "a")
    away = [True, False]

    def sometimes(*arguments):
        if away.pop(0):
            raise UnreachableError("gone")
        return append_lines(*arguments)

    monkeypatch.setattr("atlas.db.step_log.append_lines", sometimes)
    with StepLog(settings, run.id, "a") as kept:
        logging.getLogger("atlas.x").info("one")
        with pytest.raises(UnreachableError):
            kept.flush_lines()
        logging.getLogger("atlas.x").info("two")
    assert [line for _, _, line in lines_of(settings, run)] == ["one", "two"]


@pytest.fixture
def ended_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    settings = load_settings()
    plan = fake_plan([step("a"), step("b", "a"), step("c", "b")], release="docs-2l")
    run = create_run(settings, plan)
    for name, error in (("a", None), ("b", "no text; caused by OSError: gone")):
        claim_step(settings, run.id, name, "host/1/2/x")
        with DbProgress(settings, run.id, name, "host/1/2/x") as progress:
            progress.update(5, 10)
            logging.getLogger("atlas.x").warning("of %s", name)
        if error is None:
            finish_step(settings, run.id, name, "host/1/2/x")
        else:
            fail_step(settings, run.id, name, "host/1/2/x", error)
    return settings, load_run(settings, run.id)


def test_atlas_logs_shows_all_steps_one_step_or_json(ended_run):
    _, run = ended_run
    ask = CliRunner().invoke
    everything = ask(logs, [run.id, "--follow"])
    assert everything.exit_code == 0
    assert [line.split()[3] for line in everything.output.splitlines()] == ["a", "a", "a", "b", "b", "b"]
    assert "of a" not in ask(logs, [run.id, "b"]).output
    found = [json.loads(line) for line in ask(logs, [run.id, "b", "--json"]).output.splitlines()]
    assert [f["message"] for f in found][1] == "of b"
    assert {(f["run"], f["step"]) for f in found} == {(run.id, "b")}
    assert len(ask(logs, [run.id, "--lines", "2"]).output.splitlines()) == 2
    assert "'d' is not known; allowed: a, b, c" in str(ask(logs, [run.id, "d"]).exception)


def test_following_shows_new_lines_once_until_the_step_ends(ended_run, monkeypatch):
    settings, _ = ended_run
    run = create_run(settings, fake_plan([step("z")], release="other"))
    claim_step(settings, run.id, "z", "host/1/2/x")
    said = iter(["one", "two"])

    def meanwhile(_):
        text = next(said, None)
        if text is None:
            finish_step(settings, run.id, "z", "host/1/2/x")
            return
        with StepLog(settings, run.id, "z"):
            logging.getLogger("atlas.x").info(text)

    monkeypatch.setattr("atlas.cli.logs.sleep", meanwhile)
    output = CliRunner().invoke(logs, [run.id, "--follow"]).output
    assert [line.rsplit(" ", 1)[1] for line in output.splitlines()[-2:]] == ["one", "two"]
    assert len(output.splitlines()) == 2 + ("no lines yet" in output)


def test_status_as_json_holds_what_the_tables_show(ended_run):
    _, run = ended_run
    one = json.loads(CliRunner().invoke(status, [run.id, "--json"]).output)
    assert one["status"] == "failed"
    assert one["config"]["model"]["name"] == BuildConfig().model.name
    assert [(s["name"], s["status"]) for s in one["steps"]] == [
        ("a", "done"),
        ("b", "failed"),
        ("c", "cancelled"),
    ]
    assert one["steps"][1]["error"].endswith("caused by OSError: gone")
    assert one["steps"][0]["peak_rss_mb"] > 1
    assert one["steps"][0]["started_at"].startswith("20")
    many = json.loads(CliRunner().invoke(status, ["--json"]).output)
    assert [r["id"] for r in many] == [run.id]


def test_retry_builds_the_same_config_and_refuses_what_runs(ended_run, monkeypatch):
    settings, run = ended_run
    asked = []
    monkeypatch.setattr("atlas.cli.retry.run_build", lambda config, detach: asked.append((config, detach)))
    assert CliRunner().invoke(retry, [run.id, "--detach"]).exit_code == 0
    assert asked == [(BuildConfig.from_json(run.config_json), True)]
    other = create_run(settings, fake_plan([step("z")], release="other"))
    assert "allowed: a run that failed or was cancelled" in str(
        CliRunner().invoke(retry, [other.id]).exception
    )
    assert len(asked) == 1


@pytest.mark.parametrize("command", [["status"], ["health"], ["metrics", "--once"], ["worker"]])
def test_no_command_says_the_password_of_a_server_that_is_away(command):
    away = {
        "ATLAS_DATABASE_URL": f"postgresql://atlas:{SECRET}@127.0.0.1:9/atlas",
        "ATLAS_BROKER_URL": f"redis://:{SECRET}@127.0.0.1:9/0",
        "ATLAS_LOG_FORMAT": "json",
        "ATLAS_LOG_LEVEL": "DEBUG",
    }
    done = subprocess.run(
        [sys.executable, "-m", "atlas", *command],
        env={**os.environ, **away},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "127.0.0.1" in said or "atlas_up" in said
    assert SECRET not in said
    assert "tr0ub4dor" not in said


def test_status_shows_tokens_per_second_where_units_are_text(tmp_path, monkeypatch):
    from atlas.db.leases import heartbeat

    monkeypatch.setenv("ATLAS_HOME", str(tmp_path))
    settings = load_settings()
    steps = [replace(step(name), kind=name) for name in ("train", "summarise")]
    run = create_run(settings, fake_plan(steps))
    for name in ("train", "summarise"):
        claim_step(settings, run.id, name, "elsewhere/1/0/x")
        heartbeat(settings, run.id, name, "elsewhere/1/0/x", done=1, total=11, rate=2.5)
    lines = {
        line.split()[0]: line for line in CliRunner().invoke(status, [run.id]).output.splitlines() if line
    }
    assert "10.2k tok/s" in lines["train"]
    assert "2.5/s" in lines["summarise"]
    assert "4s" in lines["train"]
