"""From a release to traces, scans, IOI tables, live answers and pages: the same numbers everywhere."""

import json

import pytest
import torch
from click.testing import CliRunner
from streamlit.runtime.scriptrunner_utils.script_run_context import get_script_run_ctx
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from app import live as app_live
from app.circuit_tree import term_rows, tree_html
from atlas.circuits import ioi_study
from atlas.circuits.edits import ablate
from atlas.circuits.ioi_study import Choices, IOIStudy
from atlas.circuits.nodes import Bounds, read_trace
from atlas.circuits.opening import open_circuits, release_text
from atlas.cli import cli
from atlas.cli.app import main_file
from atlas.errors import ConfigError, ModelError, SAEError, StoreError
from atlas.live import calls, loaded
from atlas.pipeline.inputs import write_rows
from atlas.sae.files import save_sae
from atlas.settings import load_settings
from atlas.store.release import publish
from atlas.store.studies import study_table, write_study
from tests import circuit_world as world
from tests.builds import Quiet
from tests.tiny import WORDS, random_tokens

TEXT = "w3 w1 w4 w1 w5 w9 w2"


def sae_row(sae):
    info = sae.info
    return {
        "sae": info.name, "model": "toy", "site": info.site.kind, "layer": info.site.layer, "d_in": sae.d_in,
        "d_sae": sae.d_sae, "architecture": info.architecture, "normalize_activations": "none",
        "processing": "raw", "include_bos": False, "tokens_trained": 1, "corpus": "toy", "n_tokens": 1,
        "seed": 0, "origin": "trained", "settings": "{}", "digest": sae.digest(), "code_version": "0",
    }  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A release of the toy model with SAEs on z and resid_pre of three layers."""
    folder, model = tmp_path_factory.mktemp("circuits"), world.model()
    z, resid = world.saes()
    parts, saes = folder / "parts", [*z.values(), *resid.values()]
    parts.mkdir()
    for item, sae in enumerate(saes):
        save_sae(sae, folder / "steps" / "train-a" / f"{item:05d}")
    shape = model.shape
    tokens = random_tokens(4, 9, seed=2).tolist()
    rows = {
        "models": [{"model": "toy", "processing": "raw", **shape._asdict(), "source": "local folder",
                    "digest": model.files.digest}],
        "vocab": [{"model": "toy", "token": n, "text": w, "bytes": w.encode()} for n, w in enumerate(WORDS)],
        "docs": [{"corpus": "toy", "block": n, "tokens": one, "source": "d"} for n, one in enumerate(tokens)],
        "saes": [sae_row(sae) for sae in saes],
    }  # fmt: skip
    for name, some in rows.items():
        write_rows(parts, name, some)
    config = json.dumps({"model": {"name": str(world.folder()), "processing": "raw"}})
    tables = {name: [parts / f"{name}.parquet"] for name in rows}
    publish(folder / "releases", "toy", tables, {"config": config})
    return folder


@pytest.fixture
def atlas(home, monkeypatch, tmp_path):
    monkeypatch.setenv("ATLAS_HOME", str(home))
    monkeypatch.setenv("ATLAS_DATABASE_URL", f"sqlite:///{tmp_path / 'notes.sqlite'}")
    monkeypatch.setenv("ATLAS_DEVICE", "cpu")
    monkeypatch.setattr(loaded, "_KEPT", [])
    return load_settings()


def run(*words):
    result = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_bench_splices_and_traces(atlas):
    bench = open_circuits()
    assert len(bench.saes) == 6
    name = bench.name("L00.z")
    tokens = bench.tokens(TEXT)
    with bench.splice() as whole:
        clean = whole.logits(tokens)
    assert torch.equal(clean, world.model().bridge(tokens, return_type="logits"))
    with bench.splice(["L00.z"], [ablate(name)]) as run_:
        changed = run_.logits(tokens)
    assert (changed - clean).abs().max() > 1e-3
    later = bench.name("L02.z")
    trace = bench.tracer().trace(TEXT, later, bench.tracer().strongest(tokens[0], later, 1)[0][0])
    assert trace.largest_remainder < 1e-5
    assert trace.tokens == tokens[0].tolist()
    assert release_text(bench.release, 2).shape == (2, 9)


def test_what_is_not_there_is_named(atlas, home, monkeypatch):
    bench = open_circuits(saes=["*L00*"])
    assert {sae.info.site.layer for sae in bench.saes.values()} == {0}
    with pytest.raises(SAEError, match=r"'L05\.z' is not known; allowed: tiny/L00"):
        bench.name("L05.z")
    with pytest.raises(SAEError, match=r"no SAE of release .* 'nothing'"):
        open_circuits(saes=["nothing"])
    with pytest.raises(StoreError, match="no release 'other'"):
        open_circuits("other")
    with pytest.raises(ConfigError, match="prompt of 60 tokens is too long; allowed: 47"):
        bench.tokens("w1 " * 60)
    monkeypatch.setattr("atlas.circuits.opening.find_sae", lambda *_: world.random_sae("L00.z", seed=99))
    with pytest.raises(SAEError, match="are not those of the release"):
        open_circuits()
    monkeypatch.setattr("atlas.circuits.opening._rows", lambda *_: [("0" * 64,)])
    with pytest.raises(ModelError, match="has other weights"):
        open_circuits()


def test_commands_print_and_write(atlas, tmp_path):
    told = run("circuit", "features", TEXT, "--sae", "L02.z", "--top", "3").splitlines()
    assert len(told) == 3
    feature = told[0].split()[2]
    own, graph = tmp_path / "t.json", tmp_path / "g.json"
    out = run("circuit", "trace", TEXT, "--sae", "L02.z", "--feature", feature, "--json", str(own),
              "--graph", str(graph))  # fmt: skip
    assert out.startswith(f"A2.{feature} at 7 w2")
    trace = read_trace(json.loads(own.read_text()))
    assert trace.nodes[trace.root].feature == int(feature)
    assert json.loads(graph.read_text())["metadata"]["slug"] == "g"
    out = run("circuit", "scan", "--blocks", "2", "--share", "0.01")
    rows = study_table(atlas, "circuit_paths").to_pylist()
    assert f"{len(rows)} paths over 2 blocks" in out
    assert rows
    assert "paths-toy  paths  toy" in run("circuit", "studies")
    assert "removed paths-toy" in run("circuit", "studies", "--remove", "paths-toy")


@pytest.fixture
def study(atlas, monkeypatch):
    monkeypatch.setattr(ioi_study, "words_of", lambda _: world.WORDS)
    return IOIStudy(
        open_circuits(), Choices(prompts=4, layers=(0,), receivers=((1, 0), (1, 2)), movers=((2, 1),))
    )


def test_a_study_fills_every_table(study, atlas):
    rows = study.rows(Quiet())
    assert {name for name, some in rows.items() if some} == {
        "ioi_splice", "ioi_features", "ioi_heads", "ioi_noise", "qk_pairs", "qk_explained",
    }  # fmt: skip
    assert {r["route"] for r in rows["qk_explained"]} == {"L0 > L1H0 > L2H1", "L0 > L1H2 > L2H1"}
    write_study(atlas, "ioi-toy", study.about("atlas ioi"), rows)
    for name, some in rows.items():
        assert study_table(atlas, name).num_rows == len(some)
    assert json.loads(study_table(atlas, "studies")["settings"][0].as_py())["receivers"] == [[1, 0], [1, 2]]


def test_what_is_not_named_is_chosen_by_rule(study):
    bench = study.bench
    free = IOIStudy(bench, Choices(prompts=4))
    drops = {layer: free._drop(layer) for layer in (0, 1)}
    assert free.choices.layers == tuple(sorted(drops))
    assert all(layer > 0 for layer, _ in free.choices.receivers)
    assert len(free.choices.receivers) == 4
    for choices, message in [
        (Choices(prompts=4, layers=(7,)), "layer 7 has no SAE .* allowed: 0, 1, 2"),
        (Choices(prompts=4, receivers=((1, 9),)), "head L1H9 does not exist"),
        (Choices(prompts=3), "3 prompts are not allowed"),
    ]:
        with pytest.raises(ConfigError, match=message):
            IOIStudy(bench, choices)


def asked(bench):
    model = {"name": str(world.folder()), "processing": "raw", "digest": bench.model.files.digest}
    return {"model": model, "saes": [{"name": n, "digest": s.digest()} for n, s in bench.saes.items()]}


def test_live_answers_are_the_same_numbers(atlas):
    bench = open_circuits()
    given, tracer = asked(bench), bench.tracer()
    found = calls.answer("circuit_firing", {**given, "text": TEXT, "tokens": [], "position": -1, "k": 3})
    name = bench.name("L02.z")
    acts = tracer.look(bench.tokens(TEXT)[0]).attention(2).acts[-1]
    feature, activation = found["saes"][name][0]
    assert activation == pytest.approx(acts.max().item())
    assert found["texts"] == ["<bos>", *TEXT.split()]
    bounds = {"breadth": 4, "depth": 2, "nodes": 50}
    where = {"sae": name, "feature": feature, "position": 7, "bounds": bounds}
    answer = calls.answer("circuit_trace", {**given, "text": "", "tokens": found["tokens"], **where})
    json.dumps(answer)
    direct = tracer.trace(TEXT, name, feature, 7, Bounds(4, 2, 50)).to_plain()
    assert answer["trace"] == direct
    by_position = answer["trace"]["nodes"][direct["root"]]["by_position"]
    assert torch.tensor(answer["by_head"]).sum(0).tolist() == pytest.approx(by_position, rel=1e-4, abs=1e-5)
    with pytest.raises(ConfigError, match="position 8 does not exist"):
        calls.answer("circuit_firing", {**given, "text": TEXT, "tokens": [], "position": 8, "k": 3})
    with pytest.raises(ConfigError, match="are not a prompt"):
        calls.answer("circuit_firing", {**given, "text": "", "tokens": [999], "position": 0, "k": 3})


def show(view, **params):
    at = AppTest.from_file(str(main_file()), default_timeout=300)
    at._page_hash = calc_hash(view)
    for name, value in params.items():
        at.query_params[name] = value
    at.run()
    assert not at.exception, [e.message for e in at.exception]
    return at


def markup(at):
    return "\n".join(e.proto.body for e in at.get("html"))


@pytest.fixture
def page(atlas, monkeypatch):
    """The app over the release, its live calls answered in this process."""
    assert get_script_run_ctx(suppress_warning=True) is None
    monkeypatch.setattr(app_live, "ask_live", lambda _settings, call, given: calls.answer(call, given))
    monkeypatch.setattr(app_live, "prepare", lambda *_: None)
    return atlas


def test_the_explorer_goes_from_prompt_to_tree(page):
    bench = open_circuits()
    at = show("circuit")
    assert "No scan has been made" in "\n".join(c.value for c in at.caption)
    at = show("circuit", text=TEXT)
    assert "ha-tokens" in markup(at)
    rows = at.dataframe[0].value
    assert set(rows["sae"]) == {bench.name(f"L0{n}.z") for n in range(3)}
    name, feature = rows["sae"][0], int(rows["feature"][0])
    at = show("circuit", text=TEXT, sae=name, feature=str(feature), position="7")
    body = markup(at)
    assert "ha-tree" in body
    assert "largest remainder" in body
    trace = bench.tracer().trace(TEXT, name, feature, 7)
    assert f"{trace.nodes[trace.root].value:.4g}" in body
    assert any(f"--feature {feature}" in c.value for c in at.code)
    at = show("circuit", block="1", position="5", sae=name, feature=str(feature))
    assert "ha-tree" in markup(at)
    at = show("circuit", text=TEXT, position="99")
    assert "position 99 does not exist" in "\n".join(e.value.replace("\\", "") for e in at.error)


def test_the_tree_escapes_and_its_rows_are_exact(atlas):
    bench = open_circuits()
    name = bench.name("L02.z")
    trace = bench.tracer().trace(TEXT, name, 3, 7, Bounds(4, 2, 60)).to_plain()
    trace["texts"] = ["<script>alert(1)</script>"] * len(trace["texts"])
    body = tree_html(trace, 2, text="'><img>")
    assert "<script>" not in body
    assert "<img>" not in body
    assert body.count("<details") == body.count("</details>") > 3
    rows = term_rows(trace)
    assert len(rows) == sum(len(node["terms"]) for node in trace["nodes"].values())
    assert sum(r["weight"] for r in rows if r["node"] == trace["root"]) == pytest.approx(
        trace["nodes"][trace["root"]]["value"] - trace["nodes"][trace["root"]]["rest"], abs=1e-4
    )


def test_the_ioi_page_shows_a_study(page, study):
    write_study(page, "ioi-toy", study.about("atlas ioi --prompts 4"), study.rows(Quiet()))
    at = show("ioi")
    assert any("atlas ioi --prompts 4" in c.value for c in at.code)
    body = markup(at)
    for part in ("SAEs without error terms", "Features at S2", "other prompts", "Scores of movers"):
        assert part in body
    assert "L1H0, L1H2" in body
