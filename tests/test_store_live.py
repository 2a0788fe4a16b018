"""Reading the logs of running trainings: whatever state the file is in, and each byte once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas.settings import load_settings
from atlas.store.live import LiveLog, LiveReader, live_trainings, parse_row
from tests.synthetic_training import log_rows, training_tables


def lines(tables):
    return [json.dumps({"table": name, **row}) + "\n" for name, rows in tables.items() for row in rows]


@pytest.fixture
def live(tmp_path):
    path = load_settings().steps / ".scratch-train-00ff" / "live.jsonl"
    path.parent.mkdir(parents=True)
    return path


def test_every_row_is_read_and_the_newest_training_comes_first(live):
    tables = training_tables("m/L00.z.topk-64", 64)
    live.write_text("".join(lines(tables)))
    (one,) = live_trainings(load_settings())
    assert one.step == "train-00ff"
    assert one.changed == live.stat().st_mtime
    for name, rows in tables.items():
        key = ["step", *(["bin"] if "bin" in rows[0] else []), *(["feature"] if "feature" in rows[0] else [])]
        got = one.tables[name].to_pylist()
        assert [[row[k] for k in key] for row in got] == sorted([row[k] for k in key] for row in rows)
    assert one.tables["training_log"].to_pylist() == tables["training_log"]


def test_no_training_runs():
    assert live_trainings(load_settings()) == []


def test_a_finished_step_is_gone_and_another_scratch_folder_is_no_training(live):
    reader = LiveReader()
    live.write_text("".join(lines({"training_log": log_rows("s")})))
    assert len(reader.trainings(load_settings())) == 1
    live.unlink()
    other = load_settings().steps / ".scratch-evaluate-1" / "live.jsonl"
    other.parent.mkdir()
    other.write_text("{}")
    assert reader.trainings(load_settings()) == []


@given(cuts=st.lists(st.integers(0, 2500), max_size=6))
def test_read_in_any_pieces_it_is_the_same(tmp_path_factory, cuts):
    """A line may be half written at any moment, in the middle of a character too."""
    path = tmp_path_factory.mktemp("log") / "live.jsonl"
    rows = log_rows("m/ä→s")
    whole = "".join(lines({"training_log": rows})).encode()
    log = LiveLog(path)
    for cut in sorted({*cuts, len(whole)}):
        path.write_bytes(whole[:cut])
        log.read()
    assert log.tables["training_log"].to_pylist() == rows


def test_only_new_bytes_are_parsed(live, monkeypatch):
    from atlas.store import live as module

    parsed = []
    monkeypatch.setattr(module, "parse_row", lambda line: parsed.append(line) or parse_row(line))
    rows = log_rows("s")
    log = LiveLog(live)
    for n in (3, 3, 8):
        live.write_text("".join(lines({"training_log": rows[:n]})))
        log.read()
    assert len(parsed) == 8
    assert log.tables["training_log"].num_rows == 8


@pytest.mark.parametrize("kept", [0, 1, 5, 11])
def test_a_file_written_anew_after_a_resume_is_read_anew(live, kept):
    """Rows that the resumed training has not reached again are no longer true."""
    before, after = log_rows("s"), [{**row, "l0": row["l0"] + 1} for row in log_rows("s")[:kept]]
    log = LiveLog(live)
    live.write_text("".join(lines({"training_log": before[:6]})))
    log.read()
    live.write_text("".join(lines({"training_log": after})))
    log.read()
    table = log.tables.get("training_log")
    assert (table.to_pylist() if table is not None else []) == after


def test_the_last_of_two_rows_of_one_step_wins(live):
    rows = log_rows("s")
    again = {**rows[2], "l0": 99.0}
    live.write_text("".join(lines({"training_log": [*rows[:4], again]})))
    (one,) = live_trainings(load_settings())
    assert one.tables["training_log"]["l0"].to_pylist() == [rows[0]["l0"], rows[1]["l0"], 99.0, rows[3]["l0"]]


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "null",
        "[1, 2]",
        "{",
        '{"table": "saes"}',
        '{"table": ["training_log"]}',
        "\x00\x00",
        '{"table": "training_watched", "sae": 3, "step": 1, "feature": 0, "max_activation": 1.0}',
        '{"table": "training_watched", "sae": "s", "step": 1.5, "feature": 0, "max_activation": 1.0}',
        '{"table": "training_watched", "sae": "s", "step": 9999999999999, "feature": 0, "max_activation": 1}',
        '{"table": "training_watched", "sae": "s", "step": true, "feature": 0, "max_activation": 1.0}',
        '{"table": "training_watched", "sae": "s", "step": 1, "feature": 0, "max_activation": null}',
    ],
)
def test_what_is_no_row_is_passed_over(live, bad):
    rows = log_rows("s")[:2]
    good = lines({"training_log": rows})
    live.write_text(good[0] + bad + "\n" + good[1])
    (one,) = live_trainings(load_settings())
    assert one.tables["training_log"].to_pylist() == rows
    assert one.tables["training_watched"].num_rows == 0
