"""What a build on a tiny model should find: a small world, and the model and SAEs again in float64.

The transformer is written out here from the weights in its file, and so are the SAEs from their tensors;
nothing of ``atlas.lm``, ``atlas.analysis`` or ``atlas.sae.model`` has a part in the numbers.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from atlas.configs import AnalysisConfig, BuildConfig, CorpusConfig, EvalConfig, ModelConfig
from atlas.corpus.sources import open_source
from atlas.corpus.tokens import TokenStore, build_token_store, load_tokenizer
from atlas.progress import NullProgress
from atlas.sae.files import save_sae
from atlas.sae.library import folder_of
from atlas.sae.model import SAE
from tests import tiny

CONTEXT, BLOCKS, ANALYSED, N_CTX, D_VOCAB = 136, 30, 36, 140, 75
LOSS_BLOCKS, COACTIVATION_BLOCKS = 5, 13
N_LAYERS, N_HEADS, D_MODEL = tiny.N_LAYERS, tiny.N_HEADS, tiny.D_MODEL
D_HEAD = D_MODEL // N_HEADS
AMBIGUOUS = 1e-4
"""Pre-activations closer than this to where a feature begins to fire may fall on either side in float32."""

SAES = (
    {"site": "L00.z", "d_sae": 18, "k": 4},
    {"site": "L01.z", "d_sae": 16, "normalize_activations": "layer_norm"},
    {"site": "L01.H01.z", "d_in": D_HEAD, "d_sae": 12, "architecture": "gated", "seed": 2},
    {"site": "L01.attn_out", "d_sae": 14, "architecture": "jumprelu", "seed": 3},
    {"site": "L00.resid_pre", "d_sae": 12, "normalize_activations": "constant_norm_rescale", "seed": 4},
    {"site": "L01.resid_pre", "d_sae": 15, "k": 3, "rescale_acts_by_decoder_norm": True, "seed": 5},
    {"site": "L01.H02.q", "d_in": D_HEAD, "d_sae": 10, "seed": 6},
    {"site": "L01.H02.k", "d_in": D_HEAD, "d_sae": 11, "k": 2, "seed": 7},
    {"site": "L01.H02.k", "d_in": D_HEAD, "d_sae": 8, "seed": 8},
)
PROCESSINGS = ("raw", "folded")
DEAD, RARE, SINGLE, COPIED, COPY, SILENT = 0, 1, 2, 3, 4, 5
"""Features made to be so: never firing, firing on few tokens, on one; two alike; writing nothing."""
RATES = (0.01, 0.9, 0.1, 0.3, 0.6, 0.04)
"""How often the other features fire, where a bias can say so."""


# ---------------------------------------------------------------- the world


def write_text(path: Path) -> Path:
    """Documents of words with repeats of what came before, near and far, as a folder of text."""
    rng = np.random.default_rng(5)
    words = tiny.WORDS[1:]
    common = 1 / np.arange(1, len(words) + 1)
    path.mkdir()
    for number in range(14):
        ids: list[int] = []
        while len(ids) < 430:
            if len(ids) > 20 and rng.random() < 0.2:
                start, n = rng.integers(0, len(ids) - 8), rng.integers(2, 8)
                ids += ids[start : start + n]
            else:
                ids.append(int(rng.choice(len(words), p=common / common.sum())))
        (path / f"{number:02d}.txt").write_text(" ".join(words[i] for i in ids))
    return path


def make_world(root: Path, processing: str) -> BuildConfig:
    """A model, a text and imported SAEs below ``root``, and the build that summarises them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WORDS", ("<bos>", *(f"w{i}" for i in range(D_VOCAB - 1))))
        patch.setattr(tiny, "D_VOCAB", D_VOCAB)
        patch.setattr(tiny, "N_CTX", N_CTX)
        folder = tiny.save_model(root / "tiny")
        text = write_text(root / "text")
    tokens = _training_text(root, folder, text)
    acts = Model(folder, processing).run(tokens).acts
    names = []
    for known in SAES:
        sae = _with_special_features(tiny.random_sae(processing=processing, **known), acts)
        save_sae(sae, folder_of(root, sae.info.name))
        names.append(sae.info.name)
    return BuildConfig(
        model=ModelConfig(str(folder), processing),
        corpus=CorpusConfig(str(text), blocks=BLOCKS, context=CONTEXT),
        sae=(),
        imports=tuple(names),
        evaluation=EvalConfig(3),
        analysis=AnalysisConfig(
            ANALYSED, 10, coactivation_blocks=COACTIVATION_BLOCKS, loss_blocks=LOSS_BLOCKS, seed=3
        ),
    )


def _training_text(root: Path, model: Path, text: Path) -> np.ndarray:
    folder = root / "calibration"
    folder.mkdir()
    documents, tokenizer = open_source(str(text)).documents(), load_tokenizer(model)
    sizes = {"context": CONTEXT, "blocks": BLOCKS, "progress": NullProgress()}
    build_token_store(folder, "c", documents, tokenizer, **sizes)
    return TokenStore(folder).blocks(range(BLOCKS))


def _with_special_features(sae: SAE, acts: dict[str, np.ndarray]) -> SAE:
    """Some features that never fire, or rarely; two that are the same; one that writes nothing."""
    tensors = {name: t.clone() for name, t in sae.tensors().items()}
    for name, tensor in tensors.items():
        if name == "W_enc":
            tensor[:, COPY] = tensor[:, COPIED]
        elif name != "b_dec":
            tensor[COPY] = tensor[COPIED]
    if not sae.info.rescale_acts_by_decoder_norm:
        tensors["W_dec"][SILENT] = 0
    if sae.activation != "topk":
        changed = sae.with_tensors(tensors)
        margins = ReferenceSAE(changed).margins(site_of(acts, changed)[:, 1:]).reshape(-1, sae.d_sae)
        for feature in (RARE, SINGLE, *range(SILENT + 1, sae.d_sae)):
            n = {RARE: 7, SINGLE: 1}.get(feature, int(len(margins) * RATES[feature % len(RATES)]))
            # Of a gated SAE the gate may keep it from firing that often.
            least = np.sort(margins[:, feature])[::-1][n - 1 : n + 1].mean()
            tensors["b_enc"][feature] -= float(least)
    tensors["b_enc"][DEAD] = -50
    return sae.with_tensors(tensors)


# ---------------------------------------------------------------- the model, written out


class Run(NamedTuple):
    """Activations by name (layer.kind), and gradients of the blocks' summed loss."""

    acts: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]


class Model:
    """GPT-2 in float64 from the tensors of its file.

    Folded processing moves what does not matter out of the way: LayerNorm weights and value biases into the
    weights after them, means over d_model out of all that is written to the stream. The activations follow
    from the raw ones: values and z without the values' biases, what is in the stream without its mean.
    """

    def __init__(self, folder: Path, processing: str = "raw") -> None:
        self.folded = processing == "folded"
        self.w = {name.removeprefix("transformer."): t.double() for name, t in _weights(folder).items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.w[name].numpy()

    def run(self, tokens: np.ndarray) -> Run:
        """One pass over [blocks, context] tokens, and one back."""
        acts: dict[str, torch.Tensor] = {}
        self._loss(torch.from_numpy(tokens), acts).backward()
        grads = {name: a.grad.numpy() for name, a in acts.items() if a.grad is not None}
        return Run({name: self._processed(name, a.detach().numpy()) for name, a in acts.items()}, grads)

    def _processed(self, name: str, values: np.ndarray) -> np.ndarray:
        """An activation as the processing leaves it; gradients stay the same (only constants are moved)."""
        layer, kind = name.split(".")
        if self.folded and kind in ("v", "z"):
            return values - self._value_bias(int(layer))
        if self.folded and kind in ("resid_pre", "attn_out"):
            return centred(values)
        return values

    def _value_bias(self, layer: int) -> np.ndarray:
        """[n_heads, d_head]: what values hold beside the normalised, weighted stream."""
        at = f"h.{layer}."
        weight, bias = self[at + "attn.c_attn.weight"], self[at + "attn.c_attn.bias"]
        return (self[at + "ln_1.bias"] @ weight + bias)[2 * D_MODEL :].reshape(N_HEADS, D_HEAD)

    def loss(self, tokens: np.ndarray) -> float:
        """Cross-entropy of the next tokens, summed over the blocks."""
        return self._loss(torch.from_numpy(tokens), {}).item()

    def _loss(self, ids: torch.Tensor, acts: dict[str, torch.Tensor]) -> torch.Tensor:
        resid = self.w["wte.weight"][ids] + self.w["wpe.weight"][: ids.shape[1]]
        for layer in range(N_LAYERS):
            resid = self._layer(layer, resid if layer else resid.requires_grad_(), acts)
        logits = self._norm("ln_f", resid) @ self.w["lm_head.weight"].T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    def _layer(self, layer: int, resid: torch.Tensor, acts: dict[str, torch.Tensor]) -> torch.Tensor:
        def keep(name: str, value: torch.Tensor) -> torch.Tensor:
            value.retain_grad()
            acts[f"{layer}.{name}"] = value
            return value

        at = f"h.{layer}."
        keep("resid_pre", resid)
        qkv = self._linear(at + "attn.c_attn", self._norm(at + "ln_1", resid))
        q, k, v = (
            keep(name, part.unflatten(2, (N_HEADS, D_HEAD)))
            for name, part in zip("qkv", qkv.split(D_MODEL, 2), strict=True)
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / D_HEAD**0.5
        future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        pattern = keep("pattern", scores.masked_fill(future, -torch.inf).softmax(3))
        z = keep("z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        out = keep("attn_out", self._linear(at + "attn.c_proj", z.flatten(2)))
        resid = resid + out
        hidden = F.gelu(self._linear(at + "mlp.c_fc", self._norm(at + "ln_2", resid)), approximate="tanh")
        return resid + self._linear(at + "mlp.c_proj", hidden)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (D_MODEL,), self.w[name + ".weight"], self.w[name + ".bias"], 1e-5)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w[name + ".weight"] + self.w[name + ".bias"]

    def W_O(self, layer: int) -> np.ndarray:
        """[n_heads, d_head, d_model]."""
        W = self[f"h.{layer}.attn.c_proj.weight"].reshape(N_HEADS, D_HEAD, D_MODEL)
        return centred(W) if self.folded else W

    def b_O(self, layer: int) -> np.ndarray:
        """[d_model]: what attention writes beside its heads."""
        bias = self[f"h.{layer}.attn.c_proj.bias"]
        if not self.folded:
            return bias
        return centred(bias + np.einsum("hd,hdm->m", self._value_bias(layer), self.W_O(layer)))

    def W_QK(self, layer: int, kind: str, head: int) -> np.ndarray:
        """[d_model, d_head]: what a head's queries or keys read."""
        columns = "qkv".index(kind) * D_MODEL + head * D_HEAD
        W = self[f"h.{layer}.attn.c_attn.weight"][:, columns : columns + D_HEAD]
        return centred((self[f"h.{layer}.ln_1.weight"][:, None] * W).T).T if self.folded else W

    @property
    def W_pos(self) -> np.ndarray:
        """[n_ctx, d_model]."""
        return centred(self["wpe.weight"]) if self.folded else self["wpe.weight"]

    @cached_property
    def unembedding(self) -> np.ndarray:
        """[d_model, d_vocab], with the last LayerNorm's weight, centred both ways."""
        W = self["ln_f.weight"][:, None] * self["lm_head.weight"].T
        W = W - W.mean(0)
        return W - W.mean(1, keepdims=True)


def centred(x: np.ndarray) -> np.ndarray:
    """Without the mean over the last dimension."""
    return x - x.mean(-1, keepdims=True)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    assert json.loads((folder / "config.json").read_text())["activation_function"] == "gelu_new"
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------- an SAE, written out


def site_of(acts: dict[str, np.ndarray], sae: SAE) -> np.ndarray:
    """The SAE's inputs [blocks, context, d_in]."""
    site = sae.info.site
    x = acts[f"{site.layer}.{site.kind}"]
    if site.kind in ("z", "q", "k", "v"):
        x = x.reshape(*x.shape[:2], -1) if site.head is None else x[:, :, site.head]
    return x


class ReferenceSAE:
    """An SAE from its raw tensors, in float64."""

    def __init__(self, sae: SAE) -> None:
        self.info, self.site, self.activation, self.d_sae = sae.info, sae.info.site, sae.activation, sae.d_sae
        self.t = {name: tensor.double().numpy() for name, tensor in sae.tensors().items()}
        norms = np.linalg.norm(self.t["W_dec"], axis=1)
        gain = np.exp(self.t["r_mag"]) if "r_mag" in self.t else np.ones(sae.d_sae)
        self.b_enc, self.W_dec = self.t["b_enc"], self.t["W_dec"]
        if sae.info.rescale_acts_by_decoder_norm:
            gain, self.b_enc, self.W_dec = gain * norms, self.b_enc * norms, self.W_dec / norms[:, None]
        self.W_enc = self.t["W_enc"] * gain

    @property
    def name(self) -> str:
        """The SAE's name."""
        return self.info.name

    @property
    def whole_z(self) -> bool:
        """Whether it reads all heads' z."""
        return self.site.kind == "z" and self.site.head is None

    def scale(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and size taken out of each token, and the size with which a reconstruction is put back."""
        nothing = np.zeros((*x.shape[:-1], 1))
        if self.info.normalize_activations == "layer_norm":
            mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
            return mean, std + 1e-5, std
        if self.info.normalize_activations == "constant_norm_rescale":
            size = np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(x.shape[-1])
            return nothing, size, size
        return nothing, nothing + 1, nothing + 1

    def normalised(self, x: np.ndarray) -> np.ndarray:
        """x as the encoder sees it."""
        mean, size, _ = self.scale(x)
        return (x - mean) / size

    def preactivations(self, x: np.ndarray) -> np.ndarray:
        """[..., d_sae], of a gated SAE those of the magnitude path."""
        return (self.normalised(x) - self.t["b_dec"]) @ self.W_enc + self.b_enc

    @property
    def bias_term(self) -> np.ndarray:
        """What pre-activations hold beside x W."""
        return self.b_enc - self.t["b_dec"] @ self.W_enc

    def margins(self, x: np.ndarray) -> np.ndarray:
        """How far each feature is above (or below) the point where it begins to fire."""
        pre = self.preactivations(x)
        if self.activation == "jumprelu":
            return np.minimum(pre, pre - self.t["threshold"])
        if self.activation == "gated":
            gate = (self.normalised(x) - self.t["b_dec"]) @ self.t["W_enc"] + self.t["b_gate"]
            return np.minimum(pre, gate)
        if self.activation == "topk":
            ordered = np.sort(pre, axis=-1)[..., ::-1]
            last, next_one = ordered[..., self.info.k - 1, None], ordered[..., self.info.k, None]
            # The k-th is as far above the next one as the next one is below it.
            return np.minimum(pre, np.where(pre >= last, pre - next_one, pre - last))
        return pre
