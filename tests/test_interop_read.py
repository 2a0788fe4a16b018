"""Files of every format, written by hand: read, and equal to the published formula in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from atlas.interop.foreign import Given
from atlas.interop.formats import find_at, read
from atlas.sae.model import SAE
from tests import foreign

X = np.random.default_rng(7).normal(size=(40, foreign.D_IN)) * 2 + 0.3
MODEL = Given(model="tiny")


def read_one(path, given=MODEL) -> SAE:
    root, (found,) = find_at(path)
    return read(found, root, given, "here")


def check(path, formula, given=MODEL, tolerance=1e-11) -> SAE:
    """Both are evaluated in float64, so that only what folding rounded to float32 differs."""
    sae = read_one(path, given)
    exact = replace(sae, **{name: tensor.double() for name, tensor in sae.tensors().items()})
    x = torch.from_numpy(X)
    f = exact.encode(x)
    theirs, x_hat = formula(X)
    assert 0.05 < (theirs > 0).mean() < 0.95
    np.testing.assert_allclose(f.numpy(), theirs, atol=tolerance)
    decoded = exact.decode(f, exact.scale(x)).numpy()
    np.testing.assert_allclose(decoded, x_hat, atol=tolerance * 3)
    return sae


ARCHITECTURES = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalize", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("subtract", [True, False])
def test_saelens(tmp_path, architecture, normalize, subtract):
    # SAELens multiplies by the standard deviation alone where it divided by that plus 1e-5.
    made = foreign.saelens(tmp_path / "s", architecture, normalize, subtract)
    info = check(*made, given=Given()).info
    assert (info.name, info.model, info.site.name) == (
        f"gpt2/L01.resid_pre.{ARCHITECTURES[architecture]}-10-saelens",
        "gpt2",
        "L01.resid_pre",
    )
    assert (info.origin, info.context, info.corpus) == ("imported from saelens", 64, "some/text")
    assert (info.processing, info.architecture) == ("raw", ARCHITECTURES[architecture])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saelens_topk_by_decoder_norm_in_every_dtype(tmp_path, dtype):
    sae = check(*foreign.saelens(tmp_path / "s", "topk", rescale=True, dtype=dtype))
    assert sae.info.rescale_acts_by_decoder_norm
    assert sae.W_enc.dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_flat_configs_of_before_version_6(tmp_path, architecture):
    hook, head = f"blocks.{foreign.LAYER}.attn.hook_q", 2
    made = foreign.saelens(tmp_path / "s", architecture, old=True, hook=hook, head=head)
    sae = check(*made, given=Given())
    assert (sae.info.site.name, sae.info.model) == ("L01.H02.q", "gpt2")
    assert sae.info.k == (foreign.K if architecture == "topk" else None)


@pytest.mark.parametrize(
    ("hook", "head", "site"),
    [
        ("blocks.3.attn.hook_z", None, "L03.z"),
        ("blocks.3.attn.hook_z", 1, "L03.H01.z"),
        ("blocks.3.attn.hook_v", 0, "L03.H00.v"),
        ("blocks.3.hook_attn_out", None, "L03.attn_out"),
        ("blocks.3.hook_resid_post", None, "L04.resid_pre"),
    ],
)
def test_saelens_hooks(tmp_path, hook, head, site):
    assert read_one(foreign.saelens(tmp_path / "s", hook=hook, head=head)[0]).info.site.name == site


@pytest.mark.parametrize(
    ("hook", "loaded_with", "processing"),
    [
        ("blocks.1.attn.hook_z", {}, "raw"),
        ("blocks.1.attn.hook_z", {"fold_value_biases": True}, "folded"),
        ("blocks.1.attn.hook_z", {"center_writing_weights": True, "fold_ln": True}, "raw"),
        ("blocks.1.hook_resid_pre", {"center_writing_weights": True}, "folded"),
        ("blocks.1.hook_resid_pre", {"fold_ln": True}, "raw"),
    ],
)
def test_processing_follows_from_how_the_model_was_loaded(tmp_path, hook, loaded_with, processing):
    about = {"model_from_pretrained_kwargs": loaded_with}
    path, _ = foreign.saelens(tmp_path / "s", hook=hook, metadata=about)
    assert read_one(path).info.processing == processing
    assert read_one(path, Given(processing="folded")).info.processing == "folded"


def test_kissane_pairs_are_folded(tmp_path):
    path, formula = foreign.kissane(tmp_path, layer=5)
    info = check(path, formula, given=Given()).info
    assert info.name == "gpt2/L05.z.relu-10-kissane"
    assert (info.processing, info.context, info.architecture) == ("folded", 128, "relu")
    assert (info.tokens_trained, info.l1_coefficient, info.seed) == (2_000_000_000, 1.0, 49)
    assert read_one(path.with_name(path.stem + "_cfg.json")).info.site.name == "L05.z"


def test_sparsify(tmp_path):
    path, formula = foreign.sparsify(tmp_path / "run")
    info = check(path, formula, given=Given()).info
    assert info.name == "pythia-70m/L00.mlp_out.topk-10-sparsify"
    assert (info.k, info.corpus, info.context) == (foreign.K, "pile", 99)
    whole_run, (found,) = find_at(tmp_path / "run")
    assert read(found, whole_run, Given(), "here").info == info


def test_sparsify_without_a_run_needs_the_model(tmp_path):
    path, formula = foreign.sparsify(tmp_path / "run", name="layers.2", run=False)
    assert check(path, formula).info.name == "tiny/L03.resid_pre.topk-10-sparsify"


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("AutoEncoder", "relu"),
        ("AutoEncoderNew", "relu"),
        ("GatedAutoEncoder", "gated"),
        ("AutoEncoderTopK", "topk"),
        ("BatchTopKSAE", "batchtopk"),
        ("MatryoshkaBatchTopKSAE", "matryoshka"),
        ("JumpReluAutoEncoder", "jumprelu"),
    ],
)
def test_dictionary_learning(tmp_path, kind, architecture):
    info = check(*foreign.dictionary_learning(tmp_path / "t", kind), given=Given()).info
    assert info.name == f"pythia-70m/L02.resid_pre.{architecture}-10-dictionary_learning"
    assert info.k == (foreign.K if architecture in ("topk", "batchtopk", "matryoshka") else None)
    assert (info.seed, info.context) == (5, 128)


@pytest.mark.parametrize("act", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("norm", ["inference", "token-wise", "dataset-wise"])
@pytest.mark.parametrize("by_norm", [True, False])
def test_openmoss(tmp_path, act, norm, by_norm):
    made = foreign.openmoss(tmp_path / "s", act, norm, by_norm)
    info = check(*made, tolerance=2e-6).info
    assert (info.site.name, info.architecture) == ("L01.mlp_out", act)
    assert info.normalize_activations == ("constant_norm_rescale" if norm == "token-wise" else "none")


def test_openmoss_without_a_decoder_bias(tmp_path):
    sae = check(*foreign.openmoss(tmp_path / "s", bias=False))
    assert not sae.b_dec.any()


@pytest.mark.parametrize("norm", ["none", "token-wise"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("file", ["checkpoints/pruned.safetensors", "sae_weights.pt"])
def test_first_openmoss_dictionaries_with_mask_and_scale(tmp_path, norm, bias, file):
    path, formula = foreign.openmoss_first(tmp_path / "d", norm, bias, file=file)
    sae = check(path, formula, Given(model="gpt2", site="L01.attn_out"), tolerance=1e-6)
    raw = foreign.draw(0, foreign.D_IN, foreign.D_SAE)
    assert torch.equal(sae.W_enc[:, [0, 3, 8]], raw[:, [0, 3, 8]]), "factors of 1 keep every bit"
    masked = [2, 6]
    assert not sae.W_enc[:, masked].any()
    assert not (sae.encode(torch.from_numpy(X).float())[:, masked] > 0).any()


@pytest.mark.parametrize(("norm", "bias"), [("none", True), ("dataset-wise", True), ("token-wise", False)])
def test_first_openmoss_dictionaries_as_of_june_2024(tmp_path, norm, bias):
    path, formula = foreign.openmoss_first(tmp_path / "d", norm, bias, late=True)
    assert check(path, formula, tolerance=1e-6).info.site.name == "L01.attn_out"


@pytest.mark.parametrize("act", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("norm", ["none", "dataset-wise"])
@pytest.mark.parametrize("subtract", [True, False])
def test_llama_scope_dictionaries(tmp_path, act, norm, subtract):
    made = foreign.openmoss_second(tmp_path / "d", act, norm, subtract)
    info = check(*made, given=Given(), tolerance=2e-6).info
    assert (info.model, info.site.name) == ("Llama-X", "L02.resid_pre")


def test_what_the_user_says_wins(tmp_path):
    path, _ = foreign.saelens(tmp_path / "s")
    info = read_one(path, Given("EleutherAI/pythia-70m", "L04.mlp_out", "folded", "mine")).info
    assert (info.name, info.model) == ("pythia-70m/mine", "pythia-70m")
    assert (info.site.name, info.processing) == ("L04.mlp_out", "folded")


def test_a_tree_of_formats_is_found_place_by_place(tmp_path):
    foreign.saelens(tmp_path / "a" / "deep" / "one")
    foreign.kissane(tmp_path / "a" / "pairs")
    foreign.sparsify(tmp_path / "b")
    foreign.dictionary_learning(tmp_path / "c" / "trainer_0")
    foreign.openmoss(tmp_path / "d")
    foreign.openmoss_first(tmp_path / "e")
    (tmp_path / "a" / "deep" / "one" / "sparsity.safetensors").write_bytes(b"")
    _, found = find_at(tmp_path)
    pairs = "a/pairs/gpt2-small_L1_Hcat_z_lr1.20e-03_ds10_v9.pt"
    assert [(f.place.at, f.format.name) for f in found] == [
        ("a/deep/one", "saelens"),
        (pairs, "kissane"),
        ("b/layers.0.mlp", "sparsify"),
        ("c/trainer_0", "dictionary_learning"),
        ("d", "openmoss"),
        ("e", "openmoss-old"),
    ]
    assert [f.format.name for f in find_at(tmp_path, "kissane")[1]] == ["kissane"]
