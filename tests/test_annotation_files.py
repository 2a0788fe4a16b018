"""Notes as files: every form gives back what was written, and nothing half-read is saved."""

import csv
import io
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from atlas.cli.annotations import annotations
from atlas.db.annotations import head_history, list_features, list_heads, load_head, save_feature, save_head
from atlas.db.engine import close_engines
from atlas.db.exchange import FORMS, decode, encode, notes_of
from atlas.db.loading import put_notes
from atlas.db.notes import FeatureAnnotation, HeadAnnotation
from atlas.errors import ConfigError, ConflictError, StoreError
from atlas.judging import FeatureVerdict
from atlas.settings import load_settings

MODEL, SAE = "docs-12l", "docs-12l/L05.z.topk-768"
HOSTILE = "=cmd|' /C calc'!A0 <script>alert(1)</script>; \u202eעברית, \"🧠\"\n- line"
FULL = HeadAnnotation(
    MODEL, 5, 1, "ann", "@label", ("a; b", "c\\d", "-x", "'q'"), "nearly_monosemantic", 4, "+role", True,
    True, HOSTILE, (FeatureVerdict(SAE, 3, "group", "a; b=c"), FeatureVerdict(SAE, 9, "odd"),
              FeatureVerdict(SAE, 10, "unsure"), FeatureVerdict("sae with blanks", 1, "group", "?odd one")),
    "done", 81.123456789,
)  # fmt: skip
EMPTY = HeadAnnotation(MODEL, 0, 0, "bob")
FEATURES = [
    FeatureAnnotation(SAE, 3, "ann", HOSTILE[:50], ("x; y",), "partly", HOSTILE),
    FeatureAnnotation(SAE, 4, "ann"),
]


@pytest.fixture
def sqlite(tmp_path):
    yield load_settings({"ATLAS_HOME": str(tmp_path / "sqlite")})
    close_engines()


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_every_field_comes_back(form):
    assert decode(encode([FULL, EMPTY], "heads", form), "heads", form) == [FULL, EMPTY]
    assert decode(encode(FEATURES, "features", form), "features", form) == FEATURES
    assert decode(encode([], "heads", form), "heads", form) == []


_TEXT = st.text(st.characters(exclude_characters="\0\r", exclude_categories=("Cs",)), max_size=20)
_WORD = _TEXT.map(lambda text: " ".join(text.split())).filter(bool)


@hypothesis_settings(max_examples=40)
@given(label=_TEXT, notes=_TEXT, words=st.lists(_WORD, max_size=4, unique=True), form=st.sampled_from(FORMS))
@example(label="a\x85b\u2028c\u2029d\x0be\x1cf", notes="\x85", words=["g"], form="jsonl")
def test_any_text_comes_back(label, notes, words, form):
    note = replace(EMPTY, label=label, notes=notes, groupings=tuple(words), status="done")
    assert decode(encode([note], "heads", form), "heads", form, model=MODEL) == [note]


def test_the_spreadsheet_holds_what_the_seed_kept():
    data = encode([FULL], "heads", "spreadsheet")
    row = next(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    assert (row["Layer"], row["Head"], row["Notable"], row["New grouping"]) == ("5", "1", "*", "yes")
    assert row["Semanticity"] == "nearly monosemantic"
    assert (row["Role"], row["Description"]) == ("'+role", "'@label")
    back = decode(data, "heads", "spreadsheet", model=MODEL)
    assert back == [replace(FULL, verdicts=(), seconds_spent=0.0)]
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row.values())


def test_a_file_filled_in_by_hand_needs_few_columns():
    data = b"layer,head,label,groupings,star\n5,1,of,bigram; code,yes\n5,2,on,,\n"
    one, two = decode(data, "heads", "csv", model=MODEL, annotator="cy")
    assert (one.annotator, one.label, one.groupings, one.star) == ("cy", "of", ("bigram", "code"), True)
    assert (two.head, two.groupings, two.star, two.status) == (2, (), False, "draft")


@pytest.mark.parametrize(
    ("data", "form", "said"),
    [
        (b"layer,head,annotator\n5,x,ann\n", "csv", "no csv of heads"),
        (b"layer,head,lable\n5,1,of\n", "csv", "row 1: column 'lable' is not known; allowed: model, layer"),
        (b"layer,label\n5,of\n", "csv", "row 1: head is not given"),
        (b"Layer,Head\n5,1\n", "spreadsheet", "column 'Feature groups / possible roles' is missing"),
        (b"{not json}\n", "jsonl", "no jsonl of heads"),
        (b"PAR1", "parquet", "no parquet of heads"),
        (b"\xff\xfe", "csv", "no csv of heads"),
        (b"layer,head,verdicts\n5,1,three is odd\n", "csv", "verdict 'three is odd' cannot be read"),
    ],
)
def test_what_cannot_be_read(data, form, said):
    with pytest.raises(ConfigError) as caught:
        decode(data, "heads", form, model=MODEL, annotator="ann")
    assert said in str(caught.value)


def test_features_have_no_spreadsheet():
    with pytest.raises(ConfigError, match="a spreadsheet holds heads"):
        encode(FEATURES, "features", "spreadsheet")


def test_put_in_is_all_or_nothing_and_keeps_history(sqlite):
    save_head(sqlite, replace(FULL, label="old"), 0)
    with pytest.raises(ConflictError, match="is there already with another content; nothing was saved"):
        put_notes(sqlite, [EMPTY, FULL])
    assert [n.label for n in list_heads(sqlite, MODEL)] == ["old"]
    done = put_notes(sqlite, [EMPTY, FULL], replace_existing=True)
    assert (done.new, done.changed, done.same) == (1, 1, 0)
    assert load_head(sqlite, MODEL, 5, 1, "ann").notes == HOSTILE
    assert [s.payload["label"] for s in head_history(sqlite, MODEL, 5, 1, "ann")] == ["old", "@label"]
    done = put_notes(sqlite, [*notes_of(sqlite, "heads", MODEL), *FEATURES])
    assert (done.new, done.changed, done.same) == (2, 0, 2)
    with pytest.raises(ConfigError, match="semanticity 'mono' is not known"):
        put_notes(sqlite, [replace(EMPTY, head=3), replace(EMPTY, head=4, semanticity="mono")])
    assert len(list_heads(sqlite, MODEL)) == 2


def test_the_commands(tmp_path):
    environment = {"ATLAS_HOME": str(tmp_path / "home")}

    def run(*arguments, home="home"):
        env = {"ATLAS_HOME": str(tmp_path / home)}
        return CliRunner().invoke(annotations, arguments, env=env, catch_exceptions=False).output

    settings = load_settings(environment)
    save_head(settings, FULL, 0)
    save_feature(settings, FEATURES[0], 0)
    for name, form in (("a.csv", None), ("a.jsonl", None), ("a.parquet", None), ("sheet.csv", "spreadsheet")):
        file, flags = tmp_path / name, ["--form", form] if form else []
        assert "wrote 1 notes about heads" in run("export", str(file), "--of", MODEL, *flags)
        said = run("import", str(file), "--model", MODEL, *flags, home=f"to-{name}")
        assert "1 new, 0 changed, 0 there already" in said
    file = tmp_path / "f.csv"
    assert "wrote 1 notes about features" in run("export", str(file), "--of", SAE, "--kind", "features")
    run("import", str(file), "--kind", "features", home="features")
    assert list_features(load_settings({"ATLAS_HOME": str(tmp_path / "features")}), SAE)[0].tags == ("x; y",)
    said = run("summary", MODEL)
    assert "| nearly monosemantic | 100.0% (1/1) | 0.0% (0/1) |" in said
    assert "?odd one 1/4, a; b=c 1/4" in said
    with pytest.raises(StoreError, match="cannot be read"):
        run("import", str(tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match=r"ending '.txt' is not known"):
        run("export", str(tmp_path / "a.txt"), "--of", MODEL)
    close_engines()
