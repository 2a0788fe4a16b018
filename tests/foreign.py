"""SAE files of other programs, written by hand, each with the published formula in float64 beside it.

Every writer returns the path to import and a function from x [n, d_in] to (feature activations,
reconstruction); they share no code with the readers.
"""

import json

import numpy as np
import torch
from safetensors.torch import save_file

D_IN, D_SAE, K, LAYER = 6, 10, 3, 1


def draw(seed, *shape, scale=0.5):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape) * scale).float()


def f64(tensors):
    return {name: t.double().numpy() for name, t in tensors.items()}


def relu(x):
    return np.maximum(x, 0)


def keep_k(values, by, k):
    """The k entries of each row that are largest in ``by``, the others zero."""
    out = np.zeros_like(values)
    for row, ranked, kept in zip(values, by, out, strict=True):
        best = np.argsort(-ranked, kind="stable")[:k]
        kept[best] = row[best]
    return out


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def saelens(
    folder,
    architecture="standard",
    normalize="none",
    subtract=True,
    rescale=False,
    dtype=torch.float32,
    old=False,
    hook=f"blocks.{LAYER}.hook_resid_pre",
    head=None,
    d_in=D_IN,
    seed=0,
    metadata=None,
    **more,
):
    """SAELens 6, or with ``old`` a flat config of the versions before."""
    t = {"W_enc": draw(seed, d_in, D_SAE), "W_dec": draw(seed, D_SAE, d_in), "b_dec": draw(seed, d_in)}
    t |= {"b_gate": draw(seed + 1, D_SAE), "b_mag": draw(seed + 2, D_SAE), "r_mag": draw(seed + 3, D_SAE)}
    t |= {"b_enc": draw(seed + 4, D_SAE), "threshold": draw(seed + 5, D_SAE).abs()}
    used = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}
    names = ("W_enc", "W_dec", "b_dec", *used.get(architecture, ("b_enc",)))
    t = {name: t[name].to(dtype) for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(t, folder / "sae_weights.safetensors")
    top = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": D_SAE,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cuda",
        "apply_b_dec_to_input": subtract,
        "normalize_activations": normalize,
        "reshape_activations": "hook_z" if hook.endswith("hook_z") and head is None else "none",
    }
    about = {
        "model_name": "gpt2-small",
        "hook_name": hook,
        "hook_head_index": head,
        "context_size": 64,
        "prepend_bos": False,
        "dataset_path": "some/text",
        "model_from_pretrained_kwargs": {},
        "neuronpedia_id": "gpt2-small/1-res-x",
    } | (metadata or {})
    if architecture == "topk":
        top |= {"k": K, "rescale_acts_by_decoder_norm": rescale}
    if not old:
        config = top | more | {"metadata": about | {"sae_lens_version": "6.20.1"}}
    else:
        config = {key: value for key, value in (top | about).items() if key not in ("architecture", "k")}
        config |= {"hook_point": config.pop("hook_name"), "hook_point_head_index": head, "lr": 4e-4}
        config["activation_fn_str"] = "topk" if architecture == "topk" else "relu"
        config["activation_fn_kwargs"] = {"k": K} if architecture == "topk" else {}
        if architecture in ("gated", "jumprelu"):
            config["architecture"] = architecture
        config |= more
    write_json(folder / "cfg.json", config)
    p = f64(t)

    def formula(x):
        mean, size = np.zeros((len(x), 1)), np.ones((len(x), 1))
        if normalize == "constant_norm_rescale":
            size = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(d_in)
        if normalize == "layer_norm":
            mean, size = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
        sae_in = (x - mean) / (size + 1e-5 * (normalize == "layer_norm")) - p["b_dec"] * subtract
        norm = np.linalg.norm(p["W_dec"], axis=1)
        if architecture == "gated":
            gate = sae_in @ p["W_enc"] + p["b_gate"] > 0
            f = gate * relu(sae_in @ (p["W_enc"] * np.exp(p["r_mag"])) + p["b_mag"])
        else:
            pre = sae_in @ p["W_enc"] + p["b_enc"]
            pre = pre * norm if rescale else pre
            if architecture == "topk":
                f = relu(keep_k(pre, pre, K))
            elif architecture == "jumprelu":
                f = relu(pre) * (pre > p["threshold"])
            else:
                f = relu(pre)
        out = (f / norm if rescale else f) @ p["W_dec"] + p["b_dec"]
        return f, out * size + mean

    return folder, formula


def kissane(folder, name="gpt2-small_L1_Hcat_z_lr1.20e-03_ds10_v9", d_in=D_IN, seed=0, layer=LAYER, **config):
    t = {"W_enc": draw(seed, d_in, D_SAE), "b_enc": draw(seed, D_SAE), "b_dec": draw(seed, d_in)}
    t["W_dec"] = torch.nn.functional.normalize(draw(seed, D_SAE, d_in), dim=1)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(t, folder / f"{name}.pt")
    stated = {
        "seed": 49,
        "batch_size": 4096,
        "lr": 1.2e-3,
        "num_tokens": 2_000_000_000,
        "l1_coeff": 1.0,
        "dict_size": D_SAE,
        "seq_len": 128,
        "enc_dtype": "fp32",
        "model_name": "gpt2-small",
        "site": "z",
        "layer": layer,
        "act_name": f"blocks.{layer}.attn.hook_z",
        "act_size": d_in,
        "head": "cat",
    }
    write_json(folder / f"{name}_cfg.json", stated | config)
    p = f64(t)

    def formula(x):
        f = relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        return f, f @ p["W_dec"] + p["b_dec"]

    return folder / f"{name}.pt", formula


def sparsify(folder, name="layers.0.mlp", run=True, **config):
    t = {"encoder.weight": draw(0, D_SAE, D_IN), "encoder.bias": draw(1, D_SAE)}
    t |= {"W_dec": draw(2, D_SAE, D_IN), "b_dec": draw(3, D_IN)}
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    save_file(t, place / "sae.safetensors")
    stated = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE}
    stated |= {"k": K, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN}
    write_json(place / "cfg.json", stated | config)
    if run:
        write_json(
            folder / "config.json", {"model": "EleutherAI/pythia-70m", "dataset": "pile", "ctx_len": 99}
        )
    p = f64(t)

    def formula(x):
        pre = relu((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"])
        f = keep_k(pre, pre, K)
        return f, f @ p["W_dec"] + p["b_dec"]

    return place, formula


def dictionary_learning(folder, kind="AutoEncoder", **trainer):
    enc, dec = draw(0, D_SAE, D_IN), draw(1, D_IN, D_SAE)
    b_enc, b_dec, threshold = draw(2, D_SAE), draw(3, D_IN), 0.3
    linear = {"encoder.weight": enc, "decoder.weight": dec}
    plain = {"W_enc": enc.T.contiguous(), "b_enc": b_enc, "W_dec": dec.T.contiguous(), "b_dec": b_dec}
    k = {"k": torch.tensor(K, dtype=torch.int)}
    one = {"threshold": torch.tensor(threshold)}
    own = draw(4, D_SAE).abs()
    gate = {"r_mag": draw(5, D_SAE), "gate_bias": draw(6, D_SAE), "mag_bias": draw(7, D_SAE)}
    state = {
        "AutoEncoder": linear | {"encoder.bias": b_enc, "bias": b_dec},
        "AutoEncoderNew": linear | {"encoder.bias": b_enc, "decoder.bias": b_dec},
        "GatedAutoEncoder": linear | {"decoder_bias": b_dec} | gate,
        "AutoEncoderTopK": linear | {"encoder.bias": b_enc, "b_dec": b_dec} | k | one,
        "BatchTopKSAE": linear | {"encoder.bias": b_enc, "b_dec": b_dec} | k | one,
        "MatryoshkaBatchTopKSAE": plain | k | one | {"group_sizes": torch.tensor([4, 6])},
        "JumpReluAutoEncoder": plain | {"threshold": own},
    }[kind]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    stated = {"trainer_class": "X", "dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "seed": 5}
    stated |= {
        "layer": LAYER,
        "lm_name": "EleutherAI/pythia-70m",
        "submodule_name": f"resid_post_layer_{LAYER}",
    }
    if "k" in state:
        stated["k"] = K
    write_json(folder / "config.json", {"trainer": stated | trainer, "buffer": {"ctx_len": 128}})
    E, D, be, bd = (t.double().numpy() for t in (enc, dec, b_enc, b_dec))
    r_mag, gate_bias, mag_bias = (gate[n].double().numpy() for n in ("r_mag", "gate_bias", "mag_bias"))
    subtracts = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")

    def formula(x):
        lin = (x - bd * subtracts) @ E.T
        pre = lin + be
        if kind == "GatedAutoEncoder":
            f = (lin + gate_bias > 0) * relu(np.exp(r_mag) * lin + mag_bias)
        elif kind == "AutoEncoderTopK":
            f = keep_k(relu(pre), relu(pre), K)
        elif kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            f = relu(pre) * (relu(pre) > np.float32(threshold))
        elif kind == "JumpReluAutoEncoder":
            f = relu(pre * (pre > own.double().numpy()))
        else:
            f = relu(pre)
        return f, f @ D.T + bd

    return folder, formula


def openmoss(folder, act="relu", norm="inference", by_norm=True, bias=True, average=9.0, **config):
    hook = f"blocks.{LAYER}.hook_mlp_out"
    t = {
        "W_E": draw(0, D_IN, D_SAE),
        "b_E": draw(1, D_SAE),
        "W_D": draw(2, D_SAE, D_IN),
        "b_D": draw(3, D_IN),
    }
    if act == "jumprelu":
        t["activation_function.log_jumprelu_threshold"] = draw(4, D_SAE) - 1
    if not bias:
        del t["b_D"]
    if average is not None:
        t[f"dataset_average_activation_norm.{hook}"] = torch.tensor(average)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(t, folder / "sae_weights.safetensors")
    stated = {"sae_type": "sae", "d_model": D_IN, "expansion_factor": D_SAE / D_IN, "hook_point_in": hook}
    stated |= {"hook_point_out": hook, "use_decoder_bias": bias, "act_fn": act, "norm_activation": norm}
    stated |= {"sparsity_include_decoder_norm": by_norm, "top_k": K, "use_glu_encoder": False}
    write_json(folder / "config.json", stated | config)
    p = f64(t)

    def formula(x):
        """Activations as that program gives them, but for a TopK by decoder norm: times the row's norm as
        it is once a data set's norm is folded in."""
        n = np.ones((len(x), 1))
        if norm == "token-wise":
            n = np.sqrt(D_IN) / np.linalg.norm(x, axis=1, keepdims=True)
        if norm == "dataset-wise":
            n = n * np.sqrt(D_IN) / average
        pre = (x * n) @ p["W_E"] + p["b_E"]
        row = np.linalg.norm(p["W_D"], axis=1) if by_norm else np.ones(D_SAE)
        if act == "topk":
            f = keep_k(relu(pre), relu(pre * row), K)
        elif act == "jumprelu":
            f = pre * (pre * row > np.exp(p["activation_function.log_jumprelu_threshold"]))
        else:
            f = relu(pre)
        out = (f @ p["W_D"] + (p["b_D"] if bias else 0)) / n
        folded = n if norm == "dataset-wise" and by_norm else 1
        return (f * row / folded if act == "topk" else f), out

    return folder, formula


def openmoss_first(folder, norm="token-wise", bias=True, late=False, file="checkpoints/pruned.safetensors"):
    """The dictionaries of early 2024; ``late``: as of June, which normalise after subtracting the bias."""
    t = {"encoder": draw(0, D_IN, D_SAE), "encoder_bias": draw(1, D_SAE), "decoder": draw(2, D_SAE, D_IN)}
    t["feature_act_mask"] = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1.0])
    t["feature_act_scale"] = 1 + draw(4, D_SAE).abs() * torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 0, 1.0])
    if bias:
        t["decoder_bias"] = draw(3, D_IN)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.endswith(".pt"):
        torch.save({"sae": t, "version": "0.1"}, path)
    else:
        save_file(t, path)
    stated = {"d_model": D_IN, "d_sae": D_SAE, "norm_activation": norm, "use_decoder_bias": bias, "lp": 1}
    if late:
        hook = f"blocks.{LAYER}.hook_attn_out"
        stated |= {"apply_decoder_bias_to_pre_encoder": True, "hook_point_in": hook, "hook_point_out": hook}
    if norm == "dataset-wise":
        stated["dataset_average_activation_norm"] = {"in": 7.0, "out": 7.0}
    write_json(folder / "hyperparams.json", stated)
    p = f64(t)
    b = p["decoder_bias"] if bias else np.zeros(D_IN)

    def formula(x):
        n = np.ones((len(x), 1))
        if norm == "token-wise":
            n = np.sqrt(D_IN) / np.linalg.norm(x, axis=1, keepdims=True)
        if norm == "dataset-wise":
            n = n * np.sqrt(D_IN) / 7.0
        keep = p["feature_act_mask"] * p["feature_act_scale"]
        if late:
            f = keep * relu(((x - b) * n) @ p["encoder"] + p["encoder_bias"]) / n
            # Where the norm is the token's own, activations here are those of the normalised input.
            return (f * n if norm == "token-wise" else f), f @ p["decoder"] + b
        f = keep * relu((x * n - b) @ p["encoder"] + p["encoder_bias"])
        return f, (f @ p["decoder"] + b) / n

    return folder, formula


def openmoss_second(folder, act="jumprelu", norm="dataset-wise", subtract=False, by_norm=True, **config):
    """Llama Scope's generation."""
    t = {"encoder.weight": draw(0, D_SAE, D_IN), "encoder.bias": draw(1, D_SAE)}
    t |= {"decoder.weight": draw(2, D_IN, D_SAE), "decoder.bias": draw(3, D_IN)}
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    save_file(t, folder / "checkpoints" / "final.safetensors")
    hook = f"blocks.{LAYER}.hook_resid_post"
    stated = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "norm_activation": norm,
        "use_decoder_bias": True,
        "act_fn": act,
    }
    stated |= {"jump_relu_threshold": 0.4, "top_k": K, "hook_point_in": hook, "hook_point_out": hook}
    stated |= {"apply_decoder_bias_to_pre_encoder": subtract, "sparsity_include_decoder_norm": by_norm}
    stated |= {"dataset_average_activation_norm": {"in": 5.0, "out": 5.0}, "model_name": "Llama-X"}
    write_json(folder / "hyperparams.json", stated | config)
    p = f64(t)

    def formula(x):
        n = np.sqrt(D_IN) / 5.0 if norm == "dataset-wise" else 1.0
        pre = (x * n - p["decoder.bias"] * subtract) @ p["encoder.weight"].T + p["encoder.bias"]
        row = np.linalg.norm(p["decoder.weight"], axis=0) if by_norm else np.ones(D_SAE)
        if act == "topk":
            f = keep_k(relu(pre), relu(pre) * row, K)
        else:
            f = pre * (pre > np.float32(0.4)) if act == "jumprelu" else relu(pre)
        out = (f @ p["decoder.weight"].T + p["decoder.bias"]) / n
        return (f * row / (n if by_norm else 1) if act == "topk" else f), out

    return folder, formula
