"""Files that are refused: each with one clear line, whatever is wrong with them."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from atlas.errors import SAEError
from atlas.interop.foreign import Given
from atlas.interop.formats import find, find_at, read
from atlas.interop.importing import import_path
from tests import foreign

MAKERS = {
    "saelens": foreign.saelens,
    "saelens-gated": lambda folder: foreign.saelens(folder, "gated"),
    "saelens-jumprelu": lambda folder: foreign.saelens(folder, "jumprelu"),
    "kissane": foreign.kissane,
    "sparsify": foreign.sparsify,
    "dictionary_learning": foreign.dictionary_learning,
    "dictionary_learning-batchtopk": lambda f: foreign.dictionary_learning(f, "BatchTopKSAE"),
    "openmoss": lambda folder: foreign.openmoss(folder, "jumprelu", "dataset-wise"),
    "openmoss-first": foreign.openmoss_first,
    "openmoss-second": foreign.openmoss_second,
}
GIVEN = Given(model="tiny", site="L01.mlp_out")


def files_of(path):
    """The config and the weights of what a maker wrote."""
    root, (found,) = find_at(path)
    names = [root / name for name in found.place.files[:2]]
    return names[0], names[1]


def load(path):
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return load_file(path)


def save(tensors, path):
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path)


def refused(path, said=GIVEN, only=None):
    """The message that everything wrong ends in: an SAEError of one line."""

    def read_all():
        root, found = find_at(path, only)
        return [read(item, root, said, "here") for item in found]

    with pytest.raises(SAEError) as caught:
        read_all()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


@pytest.fixture(params=MAKERS)
def made(request, tmp_path):
    return MAKERS[request.param](tmp_path / "made")[0]


def test_every_tensor_is_needed_finite_and_of_its_shape(made):
    _, weights = files_of(made)
    original = load(weights)
    optional = ("k", "group_sizes", "feature_act_mask", "feature_act_scale")
    for name, tensor in original.items():
        others = {key: value.clone() for key, value in original.items() if key != name}
        bad = {"longer": torch.cat([tensor, tensor]) if tensor.ndim else tensor.repeat(3)}
        bad["deeper"] = tensor[..., None].repeat_interleave(2, -1)
        if tensor.is_floating_point():
            bad["NaN"] = torch.full_like(tensor, float("nan"))
            bad["infinite"] = tensor.clone().reshape(-1).index_fill_(0, torch.tensor([0]), float("inf"))
            bad["infinite"] = bad["infinite"].reshape(tensor.shape)
            bad["whole numbers"] = torch.ones_like(tensor, dtype=torch.int64)
        for what, value in bad.items():
            if name in ("k", "group_sizes") or (what == "whole numbers" and name.startswith("dataset_")):
                continue
            save(others | {name: value}, weights)
            refused(made)
        save(others, weights)
        if name not in optional:
            refused(made)
    save(original | {"W_skip": torch.zeros(2)}, weights)
    assert "W_skip" in refused(made)


@pytest.mark.parametrize(
    "content", [b"", b"\x00garbage\xff", b"[]", b"null", b'"x"', b"{}", b"{" * 99999, None]
)
@pytest.mark.parametrize("which", [0, 1])
def test_garbage_is_refused(made, which, content):
    path = files_of(made)[which]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    refused(made.parent if content is None else made)


@pytest.mark.parametrize("kept", [1, 8, 100, 0.5, -1])
def test_truncated_weights_are_refused(made, kept):
    path = files_of(made)[1]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    refused(made)


class Touch:
    """A pickle that makes a file when it is loaded the trusting way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["kissane", "dictionary_learning"])
@pytest.mark.parametrize("how", ["torch", "plain"])
def test_a_pickle_with_code_never_runs(tmp_path, kind, how):
    made = MAKERS[kind](tmp_path / "made")[0]
    weights = files_of(made)[1]
    content = load(weights) | {"extra": Touch(tmp_path / "it-ran")}
    if how == "torch":
        torch.save(content, weights)
    else:
        weights.write_bytes(pickle.dumps(content))
    assert "could run code" in refused(made)
    assert not (tmp_path / "it-ran").exists()


def change(path, keys, value):
    config = json.loads(path.read_text())
    place = config
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        place.pop(keys[-1], None)
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "keys", "value", "says"),
    [
        ("saelens", ["architecture"], "temporal", "architecture 'temporal' is not known; allowed: standard"),
        ("saelens", ["architecture"], None, "architecture None"),
        ("saelens", ["normalize_activations"], "expected_average_only_in", "the file does not state"),
        ("saelens", ["normalize_activations"], "whiten", "'whiten' is not known; allowed: none"),
        ("saelens", ["d_sae"], 11, "ask for (6, 11)"),
        ("saelens", ["d_in"], "many", "d_in 'many' is not allowed"),
        ("saelens", ["apply_b_dec_to_input"], "no", "apply_b_dec_to_input 'no'"),
        ("saelens", ["metadata", "hook_name_out"], "blocks.2.hook_mlp_out", "is a transcoder"),
        (
            "saelens",
            ["metadata", "model_from_pretrained_kwargs"],
            {"refactor_factored_attn_matrices": True},
            "refactor_factored",
        ),
        ("kissane", ["dict_size"], 12, "d_sae 12"),
        ("kissane", ["act_size"], 0, "act_size 0"),
        ("sparsify", ["activation"], "groupmax", "'groupmax' is not known; allowed: topk"),
        ("sparsify", ["transcode"], True, "transcode is set"),
        ("sparsify", ["skip_connection"], True, "skip_connection is set"),
        ("sparsify", ["signed"], True, "signed is set"),
        ("sparsify", ["k"], 0, "k 0 is not allowed"),
        ("sparsify", ["k"], 11, "k 11 is not allowed; it must be from 1 to d_sae 10"),
        ("sparsify", ["d_in"], None, "d_in None"),
        ("dictionary_learning", ["trainer"], None, "no 'trainer'"),
        (
            "dictionary_learning",
            ["trainer", "dict_class"],
            "CrossCoder",
            "allowed: AutoEncoder, AutoEncoderNew",
        ),
        ("dictionary_learning", ["trainer", "dict_size"], 9, "d_sae 9"),
        ("dictionary_learning-batchtopk", ["trainer", "k"], 9, "config.json says k 9, ae.pt says 3"),
        ("openmoss", ["sae_type"], "crosscoder", "sae_type 'crosscoder' is not known; allowed: sae"),
        ("openmoss", ["act_fn"], "batchtopk", "act_fn 'batchtopk' is not known"),
        ("openmoss", ["norm_activation"], "batch-wise", "'batch-wise' is not known"),
        ("openmoss", ["use_glu_encoder"], True, "GLU"),
        ("openmoss", ["hook_point_out"], "blocks.9.hook_mlp_out", "is a transcoder"),
        ("openmoss-first", ["norm_activation"], "batch-wise", "'batch-wise' is not known"),
        ("openmoss-first", ["norm_activation"], "dataset-wise", "does not state"),
        (
            "openmoss-first",
            ["apply_decoder_bias_to_pre_encoder"],
            True,
            "after the decoder bias is subtracted",
        ),
        ("openmoss-second", ["jump_relu_threshold"], None, "does not state the jump_relu_threshold"),
        ("openmoss-second", ["dataset_average_activation_norm"], {"in": 5.0, "out": 6.0}, "two norms"),
        ("openmoss-second", ["dataset_average_activation_norm"], {"in": -1.0}, "does not state"),
    ],
)
def test_configs_that_say_something_else(tmp_path, kind, keys, value, says):
    made = MAKERS[kind](tmp_path / "made")[0]
    change(files_of(made)[0], keys, value)
    assert says in refused(made)


def test_old_saelens_configs_that_say_something_else(tmp_path):
    path, _ = foreign.saelens(tmp_path / "a", old=True, normalize_activations=True)
    assert "does not state" in refused(path)
    path, _ = foreign.saelens(tmp_path / "b", old=True, activation_fn_str="tanh-relu")
    assert "'tanh-relu' is not known; allowed: relu, topk" in refused(path)
    path, _ = foreign.saelens(tmp_path / "c", "topk", old=True, activation_fn_kwargs={"k": 3, "signed": True})
    assert "signed" in refused(path)
    path, _ = foreign.saelens(tmp_path / "d", "topk", old=True, activation_fn_kwargs={})
    assert "k None" in refused(path)


def test_saelens_scaling_factors(tmp_path):
    path, _ = foreign.saelens(tmp_path / "s")
    weights = path / "sae_weights.safetensors"
    ones = load_file(weights) | {"scaling_factor": torch.ones(foreign.D_SAE)}
    save_file(ones, weights)
    root, (found,) = find_at(path)
    assert read(found, root, GIVEN, "here").d_sae == foreign.D_SAE
    save_file(ones | {"scaling_factor": torch.full((foreign.D_SAE,), 1.5)}, weights)
    assert "scaling_factor" in refused(path)


def test_a_dataset_norm_that_no_file_states(tmp_path):
    path, _ = foreign.openmoss(tmp_path / "s", norm="dataset-wise", average=None)
    assert "does not state" in refused(path)


def test_a_threshold_that_was_never_set(tmp_path):
    path, _ = foreign.dictionary_learning(tmp_path / "s", "BatchTopKSAE")
    torch.save(load(path / "ae.pt") | {"threshold": torch.tensor(-1.0)}, path / "ae.pt")
    assert "never set" in refused(path)


@pytest.mark.parametrize("kind", ["sparsify", "openmoss-first", "openmoss"])
def test_what_no_file_says_has_to_be_given(tmp_path, kind):
    run = {"run": False} if kind == "sparsify" else {}
    made = foreign.sparsify(tmp_path / "x", name="odd", **run)[0] if run else MAKERS[kind](tmp_path / "x")[0]
    says = refused(made, Given())
    assert "--site" in says if kind != "openmoss" else "--model" in says
    assert "--model" in refused(made, Given(site="L01.z"))


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        ("blocks.1.hook_resid_mid", "is no site here; allowed: hooks of z, q, k"),
        ("blocks.1.ln2.hook_normalized", "is no site here"),
        ("blocks.1.attn.hook_q", "q of all heads of layer 1 together"),
    ],
)
def test_hooks_that_are_no_site(tmp_path, hook, says):
    path, _ = foreign.saelens(tmp_path / "s", hook=hook)
    assert says in refused(path, Given())
    assert "cannot be read" in refused(path, Given(site="somewhere"))


@pytest.mark.parametrize(
    ("site", "d_in", "says"),
    [
        ("L02.mlp_out", 48, "docs-2l has layers 0 to 1"),
        ("L01.H99.z", 8, "docs-2l has heads 0 to"),
        ("L01.z", 7, "has d_in 7, and L01.z of docs-2l has"),
    ],
)
def test_an_sae_that_cannot_belong_to_its_model(tmp_path, site, d_in, says):
    path, _ = foreign.saelens(tmp_path / "s", d_in=d_in)
    (outcome,) = import_path(tmp_path / "home", path, Given(model="docs-2l", site=site))
    assert outcome.entry is None
    assert says in str(outcome.error)


def test_places_that_hold_nothing(tmp_path):
    assert "there is no file or folder" in refused(tmp_path / "nowhere")
    assert "holds no SAE of a known format; looked for saelens (cfg.json" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "holds no SAE" in refused(tmp_path / "notes.txt")
    assert "holds no SAE" in refused(foreign.saelens(tmp_path / "s")[0], only="kissane")
    assert "cannot be read" in refused(tmp_path / ("x" * 300)) or os.name == "nt"
    assert find([]) == []


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 99)
    | st.floats(-9, 9)
    | st.sampled_from(["", "x", "topk", "relu"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["in", "k", "a"]), inner, max_size=2)
    ),
    max_leaves=3,
)


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_a_config_says_it_is_read_or_refused(tmp_path_factory, kind, data):
    """Any value of any key: never another error than ours, and never a line break in it."""
    made = MAKERS[kind](tmp_path_factory.mktemp("odd") / "made")[0]
    path = files_of(made)[0]
    config = json.loads(path.read_text())
    inner = next((config[k] for k in ("metadata", "trainer") if k in config), config)
    for place in data.draw(st.lists(st.sampled_from([config, inner]), min_size=1, max_size=3)):
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(ODD)
    path.write_text(json.dumps(config))
    root, (found,) = find_at(made)
    message = ""
    try:
        read(found, root, data.draw(st.sampled_from([GIVEN, Given(), Given(model="tiny")])), "here")
    except SAEError as error:
        message = str(error)
    assert "\n" not in message
