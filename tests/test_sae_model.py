"""SAEs in use and on disk, the sums of their metrics, and evaluation inside the model."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas.errors import SAEError
from atlas.sae.files import load_sae, save_sae

from .tiny import D_HEAD, D_MODEL, random_sae


def encode_by_hand(sae, x):
    """(x - b_dec) W_enc + b_enc, the k largest with ties to the lower index, ReLU; in float64."""
    pre = (x - sae.b_dec).double().numpy() @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
    f = np.maximum(pre, 0)
    if sae.info.k is not None:
        for row, out in zip(pre, f, strict=True):
            keep = np.argsort(-row, kind="stable")[: sae.info.k]
            out[np.setdiff1d(np.arange(len(row)), keep)] = 0
    return f


@pytest.mark.parametrize("k", [1, 20])
def test_active_features_of_no_tokens(k):
    active = random_sae(k=k).active(torch.zeros(0, D_MODEL))
    assert [len(part) for part in active] == [0, 0, 0]


def test_weights_are_finite_one_by_one():
    """A sum may be too large where no weight is, and must not hide two infinities that differ in sign."""
    sae = random_sae()
    large = torch.full_like(sae.W_dec, 3e38)
    assert sae.with_tensors({"W_dec": large}).W_dec is large
    for bad in (torch.tensor([torch.inf, -torch.inf]), torch.tensor([torch.nan, 0.0])):
        W_dec = sae.W_dec.clone()
        W_dec[0, :2] = bad
        with pytest.raises(SAEError, match="W_dec holds NaN or infinity"):
            sae.with_tensors({"W_dec": W_dec})
    assert sae.to(torch.device("cpu")) is sae


@pytest.mark.parametrize("k", [None, 1, 4, 20])
def test_encode_decode_and_active(k):
    sae, x = random_sae(k=k), torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(1))
    f = encode_by_hand(sae, x)
    np.testing.assert_allclose(sae.encode(x).numpy(), f, atol=1e-5)
    active = sae.active(x)
    row, feature = np.nonzero(f)
    assert (active.row.tolist(), active.feature.tolist()) == (row.tolist(), feature.tolist())
    np.testing.assert_allclose(active.value.numpy(), f[row, feature], atol=1e-5)
    x_hat = f @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy()
    np.testing.assert_allclose(sae.reconstruct(x).numpy(), x_hat, atol=1e-5)
    shaped = x.reshape(3, 3, D_MODEL)
    assert sae.reconstruct(shaped).shape == shaped.shape
    torch.testing.assert_close(sae.reconstruct(shaped).reshape(9, -1), sae.reconstruct(x))


SAES = [
    random_sae("L00.z", k=4, scale=0.6),
    random_sae("L01.z", seed=1, scale=0.6),
    random_sae("L01.H02.z", d_in=D_HEAD, k=3, seed=2),
]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("sae", SAES, ids=lambda s: s.info.name)
def test_files_keep_every_bit(tmp_path, sae):
    save_sae(sae, tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    assert again.info == sae.info
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(again, name), getattr(sae, name))
    assert again.digest() == sae.digest()


@pytest.fixture
def saved(tmp_path):
    save_sae(SAES[0], tmp_path / "sae")
    return tmp_path / "sae"


def refused(folder):
    with pytest.raises(SAEError) as caught:
        load_sae(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("damage", ["missing", "nan", "infinite", "shape", "flat"])
def test_damaged_tensors_are_refused_by_name(saved, name, damage):
    tensors = load_file(saved / "sae_weights.safetensors")
    old = tensors.pop(name)
    if damage in ("nan", "infinite"):
        old.view(-1)[-1] = float("nan" if damage == "nan" else "-inf")
    new = {"shape": old[:-1].contiguous(), "flat": torch.zeros(())}.get(damage, old)
    save_file(tensors if damage == "missing" else tensors | {name: new}, saved / "sae_weights.safetensors")
    message = refused(saved)
    assert name in message or "W_enc" in message


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"\xff\xfe\x00", b"[]", b"{}", b"null", b'"x"'])
def test_garbage_is_refused(saved, file, content):
    (saved / file).unlink()
    if content is not None:
        (saved / file).write_bytes(content)
    refused(saved)


@pytest.mark.parametrize("keep", [1, 8, 100, -1])
def test_truncated_weights_are_refused(saved, keep):
    path = saved / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"site": "nonsense"},
        {"site": 5},
        {"extra": 1},
        {"k": 21},
        {"k": 0},
        {"k": "many"},
        {"architecture": "gru"},
    ],
    ids=str,
)
def test_metadata_that_make_no_sense_are_refused(saved, change):
    config = json.loads((saved / "cfg.json").read_text())
    config["metadata"]["head_atlas"] |= change
    (saved / "cfg.json").write_text(json.dumps(config))
    refused(saved)


@pytest.mark.parametrize("d_sae", ["20", None, 20.0])
def test_a_width_that_is_no_number_is_refused(saved, d_sae):
    config = json.loads((saved / "cfg.json").read_text())
    (saved / "cfg.json").write_text(json.dumps(config | {"d_sae": d_sae}))
    refused(saved)


HEAD_ATLAS = ("metadata", "head_atlas")
PATHS = [("d_in",), ("metadata",), (*HEAD_ATLAS, "site"), (*HEAD_ATLAS, "model")]


@pytest.mark.parametrize("path", PATHS)
def test_missing_keys_are_refused(saved, path):
    config = json.loads((saved / "cfg.json").read_text())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    (saved / "cfg.json").write_text(json.dumps(config))
    refused(saved)
