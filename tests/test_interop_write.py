"""Export, and the way back: bit for bit through SAELens folders, the same function through the others."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from atlas.errors import ConflictError, SAEError
from atlas.interop.exporting import export, find_sae
from atlas.interop.folding import without_rescale, without_subtraction
from atlas.interop.foreign import Given
from atlas.interop.formats import WRITABLE, find_at, read
from atlas.interop.importing import import_path, keep
from atlas.sae.files import load_sae, save_sae
from atlas.sae.library import find_imported
from atlas.sae.model import SAE
from atlas.settings import load_settings
from tests import foreign
from tests.tiny import random_sae

TINY = Given(model="tiny")


def an_sae(architecture, seed=0, d_in=6, d_sae=10, site="L01.mlp_out", **info) -> SAE:
    """A random SAE of any architecture, decoder rows of many lengths."""
    g = torch.Generator().manual_seed(seed)
    base = random_sae(site, d_in=d_in, d_sae=d_sae, seed=seed)
    k = 3 if architecture in ("topk", "batchtopk", "matryoshka") else None
    about = replace(base.info, name=f"tiny/{site}.{architecture}-{d_sae}", architecture=architecture, k=k)
    more = {}
    if architecture in ("batchtopk", "matryoshka"):
        more["threshold"] = torch.full((d_sae,), 0.2)
    if architecture == "jumprelu":
        more["threshold"] = torch.rand(d_sae, generator=g)
    if architecture == "gated":
        more = {"b_gate": torch.randn(d_sae, generator=g), "r_mag": torch.randn(d_sae, generator=g) / 2}
    return replace(base, info=replace(about, **info), **more)


def same_function(one: SAE, other: SAE, tolerance=2e-5):
    x = torch.randn(50, one.d_in, generator=torch.Generator().manual_seed(3))
    assert (one.encode(x) > 0).any()
    torch.testing.assert_close(other.encode(x), one.encode(x), atol=tolerance, rtol=1e-4)
    torch.testing.assert_close(other.reconstruct(x), one.reconstruct(x), atol=tolerance, rtol=1e-4)


def imported(home, path, given=TINY):
    (outcome,) = import_path(home, path, given)
    assert outcome.error is None, outcome.error
    return outcome.entry


# ---------------------------------------------------------------- SAELens, there and back


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("old", [False, True])
def test_saelens_there_and_back_keeps_every_bit_and_key(tmp_path, architecture, dtype, old):
    about = {"my_own_key": [1, {"a": None}], "l1_coefficient": 4.5}
    path, _ = foreign.saelens(
        tmp_path / "s", architecture, dtype=dtype, old=old, metadata=about, rescale=architecture == "topk"
    )
    entry = imported(tmp_path / "home", path, Given())
    export(load_sae(entry.path), tmp_path / "back", "saelens")
    before = load_file(path / "sae_weights.safetensors")
    after = load_file(tmp_path / "back" / "sae_weights.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == dtype
        assert torch.equal(after[name], tensor), name
    theirs = json.loads((path / "cfg.json").read_text())
    ours = json.loads((tmp_path / "back" / "cfg.json").read_text())
    assert ours["metadata"].pop("head_atlas")["site"] == "L01.resid_pre"
    if not old:
        assert {key: ours[key] for key in theirs if key != "metadata"} == {
            key: theirs[key] for key in theirs if key != "metadata"
        }
        assert {key: ours["metadata"][key] for key in theirs["metadata"]} == theirs["metadata"]
        return
    # A flat file comes back as version 6: the same keys under their new names and places.
    assert int(ours["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    new_names = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
    for key, value in theirs.items():
        where = ours if key in ours else ours["metadata"]
        assert where[new_names.get(key, key)] == value, key
    if architecture == "topk":
        assert (ours["architecture"], ours["k"]) == ("topk", foreign.K)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["relu", "topk", "jumprelu", "gated", "batchtopk", "matryoshka"]))
def test_our_own_saes_come_back_from_saelens_whole(tmp_path_factory, seed, architecture):
    root = tmp_path_factory.mktemp("ours")
    sae = an_sae(architecture, seed)
    export(sae, root / "out", "saelens")
    entry = imported(root / "home", root / "out", Given())
    again = load_sae(entry.path)
    assert again.info == sae.info
    assert again.digest() == sae.digest()
    assert entry.digest == find_imported(root / "home", sae.info.name).digest


def test_what_is_said_of_our_own_saes_wins_too(tmp_path):
    export(an_sae("relu"), tmp_path / "out", "saelens")
    said = Given("somewhere/other", "L02.attn_out", "folded")
    (outcome,) = import_path(tmp_path / "home", tmp_path / "out", said)
    info = load_sae(outcome.entry.path).info
    assert (info.name, info.model, info.site.name) == ("other/L01.mlp_out.relu-10", "other", "L02.attn_out")
    (named,) = import_path(tmp_path / "home", tmp_path / "out", Given(name="mine"))
    assert (named.entry.name, named.entry.processing) == ("tiny/mine", "raw")


def test_a_site_given_against_the_file_is_written(tmp_path):
    path, _ = foreign.saelens(tmp_path / "s", hook="hook_embed")
    entry = imported(tmp_path / "home", path, Given(site="L00.resid_pre"))
    export(load_sae(entry.path), tmp_path / "back", "saelens")
    about = json.loads((tmp_path / "back" / "cfg.json").read_text())["metadata"]
    assert about["hook_name"] == "blocks.0.hook_resid_pre"


# ---------------------------------------------------------------- other formats


CAN = {
    "saelens": ("relu", "topk", "jumprelu", "gated", "batchtopk", "matryoshka"),
    "sparsify": ("topk",),
    "dictionary_learning": ("relu", "topk", "jumprelu", "gated", "batchtopk", "matryoshka"),
    "openmoss": ("relu", "topk", "jumprelu", "batchtopk", "matryoshka"),
}
PAIRS = [(kind, architecture) for kind, some in CAN.items() for architecture in some]


@pytest.mark.parametrize(("kind", "architecture"), PAIRS)
@pytest.mark.parametrize("processing", ["raw", "folded"])
def test_the_same_function_and_facts_come_back(tmp_path, kind, architecture, processing):
    sae = an_sae(architecture, processing=processing, site="L01.H02.q", tokens_trained=77, corpus="c")
    export(sae, tmp_path / "out", kind)
    root, (found,) = find_at(tmp_path / "out")
    assert found.format.name == kind
    again = read(found, root, Given(), "here")
    same_function(sae, again)
    info = again.info
    assert (info.site, info.model, info.processing) == (sae.info.site, "tiny", processing)
    assert (info.tokens_trained, info.corpus, info.context, info.seed) == (77, "c", 10, 0)


@pytest.mark.parametrize(("kind", "architecture"), PAIRS)
def test_flags_that_a_format_has_no_word_for_are_folded(tmp_path, kind, architecture):
    flags = {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}
    if kind in ("sparsify", "dictionary_learning") and architecture in ("topk", "gated"):
        flags["apply_b_dec_to_input"] = True
    sae = an_sae(architecture, **flags)
    export(sae, tmp_path / "out", kind)
    root, (found,) = find_at(tmp_path / "out")
    again = read(found, root, Given(), "here")
    if kind == "saelens" and architecture != "topk":
        assert not again.info.rescale_acts_by_decoder_norm
    same_function(sae, again)


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "gated"])
def test_folding_changes_nothing_but_the_words(architecture):
    sae = an_sae(architecture, rescale_acts_by_decoder_norm=True)
    assert without_subtraction(without_rescale(sae)).info.apply_b_dec_to_input is False
    same_function(sae, without_rescale(sae))
    same_function(sae, without_subtraction(sae))
    same_function(sae, without_subtraction(without_rescale(sae)))
    assert without_rescale(without_rescale(sae)).info == replace(sae.info, rescale_acts_by_decoder_norm=False)


@pytest.mark.parametrize(
    ("kind", "maker", "architecture"),
    [
        ("sparsify", foreign.sparsify, "topk"),
        ("openmoss", lambda f: foreign.openmoss(f, "jumprelu"), "jumprelu"),
        ("dictionary_learning", lambda f: foreign.dictionary_learning(f, "AutoEncoder"), "relu"),
        ("dictionary_learning", lambda f: foreign.dictionary_learning(f, "AutoEncoderTopK"), "topk"),
        ("dictionary_learning", lambda f: foreign.dictionary_learning(f, "GatedAutoEncoder"), "gated"),
        ("dictionary_learning", lambda f: foreign.dictionary_learning(f, "BatchTopKSAE"), "batchtopk"),
        ("dictionary_learning", lambda f: foreign.dictionary_learning(f, "JumpReluAutoEncoder"), "jumprelu"),
    ],
)
def test_written_files_have_the_tensors_of_the_published_ones(tmp_path, kind, maker, architecture):
    theirs = maker(tmp_path / "theirs")[0]
    export(an_sae(architecture), tmp_path / "ours", kind)

    def described(folder):
        weights = next(p for p in folder.iterdir() if p.suffix in (".pt", ".safetensors"))
        read_file = load_file if weights.suffix == ".safetensors" else torch.load
        return {name: (tuple(t.shape), t.dtype) for name, t in read_file(weights).items()}

    def keys(folder):
        config = json.loads((folder / ("cfg.json" if kind == "sparsify" else "config.json")).read_text())
        return set(config.get("trainer", config)) - {"head_atlas"}

    assert described(tmp_path / "ours") == described(theirs)
    own = {"trainer_class", "layer", "submodule_name", "top_k", "dtype", "device"}
    assert keys(tmp_path / "ours") - own == keys(theirs) - own


@pytest.mark.parametrize("architecture", ["relu", "topk", "gated", "batchtopk"])
def test_nothing_is_lost_where_the_format_has_the_words(tmp_path, architecture):
    sae = an_sae(architecture)
    export(sae, tmp_path / "out", "dictionary_learning")
    root, (found,) = find_at(tmp_path / "out")
    assert read(found, root, Given(), "here").digest() == sae.digest()


@pytest.mark.parametrize(
    ("kind", "architecture", "info", "says"),
    [
        ("sparsify", "relu", {}, "it has TopK alone, and this SAE is relu"),
        ("sparsify", "gated", {}, "it has TopK alone, and this SAE is gated"),
        ("sparsify", "topk", {"normalize_activations": "layer_norm"}, "it has no layer_norm"),
        ("sparsify", "topk", {"apply_b_dec_to_input": False}, "it always subtracts b_dec"),
        (
            "dictionary_learning",
            "relu",
            {"normalize_activations": "constant_norm_rescale"},
            "it has no constant",
        ),
        ("dictionary_learning", "gated", {"apply_b_dec_to_input": False}, "always subtract b_dec"),
        ("openmoss", "gated", {}, "it has no gated SAEs"),
        ("openmoss", "relu", {"normalize_activations": "layer_norm"}, "it has no layer_norm"),
        ("kissane", "relu", {}, "format 'kissane' is not known; allowed: saelens, sparsify"),
    ],
)
def test_formats_that_cannot_say_what_an_sae_is(tmp_path, kind, architecture, info, says):
    with pytest.raises(SAEError) as caught:
        export(an_sae(architecture, **info), tmp_path / "out", kind)
    assert says in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_openmoss_keeps_the_tokens_own_norm(tmp_path):
    sae = an_sae("relu", normalize_activations="constant_norm_rescale")
    export(sae, tmp_path / "out", "openmoss")
    root, (found,) = find_at(tmp_path / "out")
    same_function(sae, read(found, root, Given(), "here"))


@pytest.mark.parametrize("kind", WRITABLE)
def test_an_existing_folder_is_never_touched(tmp_path, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConflictError):
        export(an_sae("topk"), tmp_path / "out", kind)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_head_atlas_wrote_is_checked_too(tmp_path):
    export(an_sae("topk"), tmp_path / "out", "sparsify")
    path = tmp_path / "out" / "cfg.json"
    config = json.loads(path.read_text())
    for key, value in (("site", "L99"), ("processing", "cooked"), ("seed", None)):
        bad = {k: v for k, v in config["head_atlas"].items() if k != key} | ({key: value} if value else {})
        path.write_text(json.dumps(config | {"head_atlas": bad}))
        root, (found,) = find_at(tmp_path / "out")
        with pytest.raises(SAEError, match="'head_atlas' is damaged"):
            read(found, root, Given(), "here")


# ---------------------------------------------------------------- by name


def test_saes_are_found_in_the_library_and_in_steps_newest_first(tmp_path):
    import os

    config = load_settings({"ATLAS_HOME": str(tmp_path)})
    with pytest.raises(SAEError, match="neither imported nor trained here; there are: none yet"):
        find_sae(config, "tiny/x")
    for age, step in enumerate(("train-new", "train-old")):
        sae = an_sae("relu", seed=age)
        save_sae(sae, config.steps / step / "00000")
        os.utime(config.steps / step, (1e9 - age, 1e9 - age))
    save_sae(an_sae("topk"), config.steps / ".work-train-x" / "00000")
    assert find_sae(config, "tiny/L01.mlp_out.relu-10").digest() == an_sae("relu", seed=0).digest()
    with pytest.raises(SAEError, match=r"no SAE is called 'nope', .*: tiny/L01.mlp_out.relu-10$"):
        find_sae(config, "nope")
    imported_one = replace(an_sae("gated"), info=replace(an_sae("gated").info, name="tiny/mine"))
    keep(tmp_path, imported_one, None)
    assert find_sae(config, "tiny/mine").digest() == imported_one.digest()


def test_damaged_neighbours_do_not_hide_an_sae(tmp_path):
    config = load_settings({"ATLAS_HOME": str(tmp_path)})
    save_sae(an_sae("relu"), config.steps / "train-a" / "00001")
    (config.steps / "train-a" / "00000").mkdir()
    (config.steps / "train-a" / "00000" / "cfg.json").write_text("[]")
    assert find_sae(config, "tiny/L01.mlp_out.relu-10").d_sae == 10
    save_file({"x": torch.zeros(1)}, config.steps / "train-a" / "00001" / "sae_weights.safetensors")
    with pytest.raises(SAEError, match="lacks the tensors"):
        find_sae(config, "tiny/L01.mlp_out.relu-10")
