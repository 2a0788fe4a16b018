"""Sparse products and the banks' losses and gradients against dense autograd in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.configs import ARCHITECTURES, SAEConfig
from atlas.sae import bank as banks
from atlas.sae.bank import Bank
from atlas.sae.revive import resample
from atlas.sae.sparse import Pattern, selected_preactivations, sparse_decode

from .tiny import CPU

# ---------------------------------------------------------------- sparse products


def problem(seed=0, rows=6, features=8, d=3, most=3):
    """A ragged pattern (some rows empty), values, and dense matrices in float64."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.zeros(rows, features, dtype=torch.bool)
    for r in range(rows):
        count = int(torch.randint(0, most + 1, (1,), generator=g))
        dense[r, torch.randperm(features, generator=g)[:count]] = True
    row, feature = dense.nonzero(as_tuple=True)
    draw = [(len(row),), (features, d), (rows, d), (features,), (rows, d)]
    pattern = Pattern(row, feature, rows, features)
    return pattern, [torch.randn(s, generator=g, dtype=torch.float64) for s in draw]


def densely(pattern, values):
    out = torch.zeros(pattern.n_rows, pattern.n_features, dtype=torch.float64)
    return out.index_put((pattern.row, pattern.feature), values)


def test_sparse_decode_is_the_dense_product_with_its_gradients():
    pattern, (values, W, _, _, weight) = problem()
    values.requires_grad_()
    W.requires_grad_()
    out, dense = sparse_decode(values, W, pattern), densely(pattern, values)
    torch.testing.assert_close(out, dense @ W)
    found = torch.autograd.grad((out * weight).sum(), (values, W))
    expected = torch.autograd.grad(((dense @ W) * weight).sum(), (values, W))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_selected_preactivations_have_the_dense_gradients():
    pattern, (weight, W, x, b, _) = problem(1)
    W.requires_grad_()
    b.requires_grad_()
    dense = (x @ W.T + b)[pattern.row, pattern.feature]
    out = selected_preactivations(x, W, b, dense.detach(), pattern)
    assert torch.equal(out, dense)
    found = torch.autograd.grad((out.square() * weight).sum(), (W, b))
    expected = torch.autograd.grad((dense.square() * weight).sum(), (W, b))
    for a, c in zip(found, expected, strict=True):
        torch.testing.assert_close(a, c)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5), st.integers(5, 8))
def test_scatter_and_sums_against_loops(seed, rows, most, features):
    pattern, (values, _, x, _, _) = problem(seed, rows, features, most=most)
    by_row, total = np.zeros((features, x.shape[1])), np.zeros(features)
    for r, f, v in zip(pattern.row.tolist(), pattern.feature.tolist(), values.tolist(), strict=True):
        by_row[f] += v * x[r].numpy()
        total[f] += v
    np.testing.assert_allclose(pattern.scatter(values, x).numpy(), by_row, atol=1e-12)
    np.testing.assert_allclose(pattern.sum_by_feature(values).numpy(), total, atol=1e-12)
    half = torch.arange(len(values)) % 2 == 0
    kept = pattern.where(half)
    torch.testing.assert_close(
        sparse_decode(values[half], torch.eye(features, dtype=torch.float64), kept),
        densely(pattern, values * half),
    )


# ---------------------------------------------------------------- losses of a bank

D_IN, D_SAE, BATCH = 5, 12, 16
SMALL = {"d_sae": D_SAE, "k": 3}


def bank_in_float64(configs, seed=0):
    """A bank with random parameters, nonzero biases and unequal encoder and decoder."""
    bank = Bank(configs, D_IN, [f"s{i}" for i in range(len(configs))], 0, CPU)
    g = torch.Generator().manual_seed(seed)
    for name in bank.parameters():
        random = torch.randn(getattr(bank, name).shape, generator=g, dtype=torch.float64)
        setattr(bank, name, random * (0.3 if name in ("log_threshold", "r_mag") else 1.0))
    bank.b_dec = bank.b_dec.double()
    return bank


def inputs(n=2, seed=5):
    return torch.randn(n, BATCH, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest(pre, k):
    return torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)


def feature_acts(config, pre, p):
    """What fires, as the papers write it."""
    if config.architecture == "topk":
        return pre.relu() * largest(pre, config.k)
    if config.architecture in ("batchtopk", "matryoshka"):
        return pre.relu() * largest(pre.reshape(1, -1), config.k * len(pre)).reshape(pre.shape)
    if config.architecture == "jumprelu":
        return pre * (pre > p["log_threshold"].exp())
    return pre.relu()


def auxiliary(config, x, x_hat, pre, p, dead):
    """AuxK or ghost gradients, densely."""
    error = (x - x_hat).detach()
    if config.revival == "none" or not dead.any() or (config.revival == "auxk" and not config.aux_k):
        return x.new_zeros(())
    if config.revival == "auxk":
        chosen = largest(pre.masked_fill(~dead, -torch.inf), min(config.aux_k, int(dead.sum())))
        return config.aux_coefficient * (error - (pre.relu() * chosen) @ p["W_dec"]).square().sum(1).mean()
    ghost = pre[:, dead].clamp_max(10).exp() @ p["W_dec"][dead]
    ghost = ghost * (error.norm(dim=1) / (2 * ghost.norm(dim=1) + 1e-8)).detach()[:, None]
    loss = (error - ghost).square().sum(1).mean()
    return loss * (error.square().sum(1).mean() / (loss + 1e-8)).detach()


def book_loss(config, x, p, dead, warm=1.0):
    """One SAE's losses as they are written in books: dense, by hand, for autograd."""
    pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_gate" if config.architecture == "gated" else "b_enc"]
    f, penalised, extra = feature_acts(config, pre, p), pre.relu(), x.new_zeros(())
    if config.architecture == "gated":
        f = ((pre - p["b_gate"]) * p["r_mag"].exp() + p["b_enc"]).relu() * (pre > 0)
        by_gate = pre.relu() @ p["W_dec"].detach() + p["b_dec"].detach()
        extra = (x - by_gate).square().sum(1).mean()
    x_hat = f @ p["W_dec"] + p["b_dec"]
    mse = (x - x_hat).square().sum(1).mean()
    fit, sparsity = mse, x.new_zeros(())
    if config.architecture == "matryoshka":
        ends = [max(1, round(share * D_SAE)) for share in config.prefixes]
        parts = [(x - f[:, :e] @ p["W_dec"][:e] - p["b_dec"]).square().sum(1).mean() for e in ends]
        fit = sum(parts) / len(parts)
    if config.architecture in ("relu", "gated"):
        norms = p["W_dec"].norm(dim=1) if config.decoder == "free" else 1.0
        sparsity = warm * config.l1_coefficient * (penalised * norms).sum(1).mean()
    aux = extra + auxiliary(config, x, x_hat, pre, p, dead)
    return mse, config.mse_coefficient * fit + sparsity + aux, sparsity, aux, f


CASES = {
    "topk": SAEConfig("topk", aux_k=2, aux_coefficient=0.5, **SMALL),
    "topk-without-aux": SAEConfig("topk", aux_k=0, **SMALL),
    "topk-all": SAEConfig("topk", d_sae=D_SAE, k=D_SAE, aux_k=100, aux_coefficient=0.5),
    "batchtopk": SAEConfig("batchtopk", aux_k=2, aux_coefficient=0.5, **SMALL),
    "matryoshka": SAEConfig("matryoshka", prefixes=(0.25, 0.5, 1.0), aux_k=2, **SMALL),
    "relu": SAEConfig("relu", l1_coefficient=0.7, **SMALL),
    "relu-free": SAEConfig("relu", l1_coefficient=0.7, decoder="free", mse_coefficient=0.5, **SMALL),
    "relu-auxk": SAEConfig("relu", l1_coefficient=0.7, dead_features="auxk", aux_k=3, **SMALL),
    "relu-ghost": SAEConfig("relu", l1_coefficient=0.7, dead_features="ghost", **SMALL),
    "relu-no-bias": SAEConfig("relu", l1_coefficient=0.7, decoder_bias=False, **SMALL),
    "gated": SAEConfig("gated", l1_coefficient=0.7, **SMALL),
    "gated-ghost": SAEConfig("gated", l1_coefficient=0.7, dead_features="ghost", **SMALL),
}
NONE_DEAD, SOME_DEAD, ALL_DEAD = (torch.zeros(2, D_SAE, dtype=torch.bool) for _ in range(3))
SOME_DEAD[0, [1, 4, 5, 9]] = True
ALL_DEAD[:] = True


def member(bank, s):
    """One member's parameters as leaves for the book's loss."""
    p = {name: t[s].clone().requires_grad_() for name, t in bank.parameters().items()}
    return {"b_dec": bank.b_dec[s], **p}


@pytest.mark.parametrize("slices", [1, 1 << 30], ids=["one-by-one", "together"])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dead", [NONE_DEAD, SOME_DEAD, ALL_DEAD], ids=["alive", "some-dead", "all-dead"])
def test_loss_and_gradients_against_a_dense_sae(config, dead, slices, monkeypatch):
    monkeypatch.setitem(banks.SLICE_ELEMENTS, "cpu", slices)
    configs = [config, replace(config, k=min(2, config.k), l1_coefficient=0.2, label="b")]
    bank, x = bank_in_float64(configs), inputs()
    if not config.decoder_bias:
        bank.b_dec.zero_()
    loss = bank.loss(x, dead, warm=0.5, watch=(0, 7))
    for s, mine in enumerate(configs):
        p = member(bank, s)
        mse, total, sparsity, aux, f = book_loss(mine, x[s], p, dead[s], warm=0.5)
        torch.testing.assert_close(loss.mse[s], mse)
        torch.testing.assert_close(loss.total[s], total)
        torch.testing.assert_close(loss.sparsity[s], sparsity)
        torch.testing.assert_close(loss.aux[s], aux)
        torch.testing.assert_close(loss.firings[s], (f > 0).double().sum(0))
        torch.testing.assert_close(loss.peak[s], f[:, [0, 7]].amax(0))
        names = list(bank.parameters())
        expected = torch.autograd.grad(total, [p[n] for n in names], allow_unused=True)
        for name, gradient in zip(names, expected, strict=True):
            found = getattr(bank, name).grad[s]
            wanted = torch.zeros_like(found) if gradient is None else gradient
            torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}")
        if mine.architecture in ("batchtopk", "matryoshka"):
            torch.testing.assert_close(loss.least[s], f[f > 0].min().detach())


def test_jumprelu_gradients_by_its_formulas():
    """d/dtheta through the rectangle kernel K: -(theta/eps) K dL/df for f and -(1/eps) K for the L0."""
    config = SAEConfig("jumprelu", l0_coefficient=0.4, bandwidth=0.6, **SMALL)
    bank, x = bank_in_float64([config]), inputs(1)
    loss = bank.loss(x, NONE_DEAD[:1], warm=0.5)
    p = member(bank, 0)
    pre = (x[0] - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    threshold = p["log_threshold"].detach().exp()
    f = pre * (pre > threshold)
    mse = (x[0] - f @ p["W_dec"] - p["b_dec"]).square().sum(1).mean()
    l0 = (f > 0).sum(1).double().mean()
    torch.testing.assert_close(loss.total[0], mse.detach() + 0.5 * 0.4 * l0)
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    *expected, d_f = torch.autograd.grad(mse, [*(p[n] for n in names), f])
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(getattr(bank, name).grad[0], gradient)
    width = 0.6 * 2 * D_IN / D_SAE
    near = ((pre.detach() - threshold).abs() < width / 2).double()
    by_hand = (-(threshold / width) * near * d_f).sum(0) - 0.5 * 0.4 * near.sum(0) / width / BATCH
    assert near.sum() > 5
    torch.testing.assert_close(bank.log_threshold.grad[0], by_hand * threshold)


def test_aux_loss_moves_dead_features_alone():
    """With k features kept, a dead feature gets a gradient from AuxK and from nowhere else."""
    bank, x = bank_in_float64([CASES["topk"]] * 2), inputs()
    bank.b_enc[0, [1, 4, 5, 9]] = -30
    bank.b_enc[0, 4] = 0.0
    bank.W_enc[0, 4] *= 1e-3  # positive sometimes, never among the k largest
    silent = bank.loss(x, NONE_DEAD)
    assert not silent.firings[0, [1, 5, 9]].any()
    without = bank.W_dec.grad[0].clone()
    bank.loss(x, SOME_DEAD)
    changed = (bank.W_dec.grad[0] != without).any(1).nonzero().squeeze(1).tolist()
    assert changed == [4]


def test_an_objective_adds_its_term_and_gradient():
    config = CASES["relu"]
    bank, x = bank_in_float64([config] * 2), inputs()
    bank.loss(x, NONE_DEAD)
    plain = bank.W_dec.grad.clone()
    loss = bank.loss(x, NONE_DEAD, objective=lambda which, p, out: 3 * out.x_hat.square().sum((1, 2)))
    for s in range(2):
        p = member(bank, s)
        *_, f = book_loss(config, x[s], p, NONE_DEAD[s])
        term = 3 * (f @ p["W_dec"] + p["b_dec"]).square().sum()
        torch.testing.assert_close(loss.objective[s], term.detach())
        (gradient,) = torch.autograd.grad(term, p["W_dec"])
        torch.testing.assert_close(bank.W_dec.grad[s] - plain[s], gradient)


def test_seeds_belong_to_names_not_to_places():
    config = CASES["topk"]

    def make(names, seed=3, config=config):
        return Bank([config] * len(names), D_IN, names, seed, CPU)

    together, alone = make(["a", "b", "c"]), make(["b"])
    assert torch.equal(together.W_dec[1], alone.W_dec[0])
    assert not torch.equal(together.W_dec[0], together.W_dec[1])
    assert not torch.equal(make(["b"], 4).W_dec, alone.W_dec)
    assert torch.equal(together.W_enc, together.W_dec)
    untied = make(["a", "b"], config=replace(config, tied_start=False))
    assert torch.equal(untied.W_dec[0], together.W_dec[0])
    assert not torch.equal(untied.W_enc, untied.W_dec)
    torch.testing.assert_close(together.W_dec.norm(dim=2), torch.ones(3, D_SAE))


def test_a_large_mean_costs_nothing_in_bfloat16():
    """x is centred before it is rounded: pre-activations stay as exact as those of centred inputs."""
    config = SAEConfig("relu", d_sae=64, dead_features="auxk")
    bank = Bank([config], 32, ["a"], 0, CPU, torch.bfloat16)
    x = torch.randn(1, 50, 32, generator=torch.Generator().manual_seed(0))
    plain = bank.forward(slice(0, 1), bank.parameters(), x).pre
    bank.b_dec += 100.0
    shifted = bank.forward(slice(0, 1), bank.parameters(), x + 100.0).pre
    torch.testing.assert_close(shifted, plain, atol=2e-2, rtol=0)
    exact = (x[0].double() @ bank.W_enc[0].double().T).float()
    torch.testing.assert_close(plain[0], exact, atol=2e-2, rtol=0)


def train(bank, batches, dead=None, lr=1e-2):
    optimiser = torch.optim.Adam(list(bank.parameters().values()), lr=lr)
    for x in batches:
        loss = bank.loss(x, torch.zeros(len(x), bank.d_sae, dtype=torch.bool) if dead is None else dead)
        bank.project_gradients()
        optimiser.step()
        bank.renormalise()
    return loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_members_train_as_if_alone(architecture, monkeypatch):
    """Whatever their company, their k and coefficient, and how many are worked on at once."""
    monkeypatch.setitem(banks.SLICE_ELEMENTS, "cpu", 2 * BATCH * D_SAE)
    base = SAEConfig(architecture, l1_coefficient=0.5, l0_coefficient=0.1, **SMALL)
    configs = [base, replace(base, k=2, l1_coefficient=0.1, l0_coefficient=0.02), base]
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(3, BATCH, D_IN, generator=g) for _ in range(15)]
    batches = [x * torch.tensor([1.0, 3.0, 0.5])[:, None, None] for x in batches]
    together = Bank(configs, D_IN, ["a", "b", "c"], 0, CPU)
    assert together.slices(BATCH) == [slice(0, 2), slice(2, 3)]
    train(together, batches)
    for s, name in enumerate("abc"):
        alone = Bank([configs[s]], D_IN, [name], 0, CPU)
        train(alone, [x[s : s + 1] for x in batches])
        for parameter in together.parameters():
            a, b = getattr(together, parameter)[s], getattr(alone, parameter)[0]
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_projection_and_rows_of_each_kind():
    def make(decoder):
        return Bank([SAEConfig("relu", decoder=decoder, **SMALL)], D_IN, ["a"], 0, CPU)

    bank = make("unit")
    bank.loss(inputs(1).float(), torch.zeros(1, D_SAE, dtype=torch.bool))
    before = bank.W_dec.grad.clone()
    bank.project_gradients()
    torch.testing.assert_close(
        (bank.W_dec.grad * bank.W_dec).sum(2), torch.zeros(1, D_SAE), atol=1e-5, rtol=0
    )
    along = ((before - bank.W_dec.grad) * bank.W_dec).sum(2, keepdim=True) * bank.W_dec
    torch.testing.assert_close(before - bank.W_dec.grad, along, atol=1e-5, rtol=1e-4)
    sizes = torch.linspace(0.5, 3, D_SAE)
    wanted = {"unit": torch.ones(D_SAE), "clipped": sizes.clamp_max(1), "free": sizes}
    for decoder, norms in wanted.items():
        bank = make(decoder)
        bank.W_dec *= sizes[:, None]
        bank.renormalise()
        torch.testing.assert_close(bank.W_dec.norm(dim=2)[0], norms)
        bank.loss(inputs(1).float(), torch.zeros(1, D_SAE, dtype=torch.bool))
        before = bank.W_dec.grad.clone()
        bank.project_gradients()
        assert torch.equal(before, bank.W_dec.grad) == (decoder != "unit")


# ---------------------------------------------------------------- resampling


def test_resampling_points_dead_features_at_badly_reconstructed_tokens():
    bank = bank_in_float64([CASES["relu"]] * 2)
    p, x = bank.parameters(), inputs(1)[0]
    error = torch.zeros_like(x)
    error[3], error[7] = 2.0, 1.0  # squared errors 20 and 5: drawn 16 to 1
    before = {name: t.clone() for name, t in p.items()}
    resample(p, 0, SOME_DEAD[0], x, error, seed=1)
    alive = before["W_enc"][0][~SOME_DEAD[0]].norm(dim=1).mean()
    towards = {i: (x[i] - bank.b_dec[0]) / (x[i] - bank.b_dec[0]).norm() for i in (3, 7)}
    for feature in range(D_SAE):
        row = p["W_dec"][0, feature]
        if not SOME_DEAD[0, feature]:
            assert torch.equal(row, before["W_dec"][0, feature])
            continue
        assert min((row - t).abs().max().item() for t in towards.values()) < 1e-12
        torch.testing.assert_close(p["W_enc"][0, feature], 0.2 * alive * row)
        assert p["b_enc"][0, feature] == 0
    assert all(torch.equal(p[name][1], before[name][1]) for name in p), "the other SAE is left alone"


def test_resampling_draws_by_the_square_of_the_loss():
    config = SAEConfig("relu", d_sae=4000)
    bank = Bank([config], D_IN, ["a"], 0, CPU)
    x, error = inputs(1)[0].float(), torch.zeros(BATCH, D_IN)
    error[3], error[7] = math.sqrt(2.0), 1.0  # squared errors 10 and 5: drawn 4 to 1
    resample(bank.parameters(), 0, torch.ones(4000, dtype=torch.bool), x, error, seed=2)
    direction = x[3] / x[3].norm()
    share = ((bank.W_dec[0] - direction).abs().amax(1) < 1e-5).float().mean().item()
    assert share == pytest.approx(0.8, abs=0.03)


# ---------------------------------------------------------------- do they learn?

N_TRUE, TRUE_K, WIDE = 24, 3, 16
LEARNERS = [
    SAEConfig("topk", d_sae=48, k=3, aux_k=16),
    SAEConfig("batchtopk", d_sae=48, k=3, aux_k=16),
    SAEConfig("matryoshka", d_sae=48, k=3, aux_k=16, prefixes=(0.5, 1.0)),
    SAEConfig("relu", d_sae=48, l1_coefficient=1.0),
    SAEConfig("relu", d_sae=48, l1_coefficient=1.0, decoder="free"),
    SAEConfig("relu", d_sae=48, l1_coefficient=2.0, dead_features="ghost"),
    SAEConfig("jumprelu", d_sae=48),
    SAEConfig("gated", d_sae=48, l1_coefficient=2.0),
]


@pytest.mark.parametrize("config", LEARNERS, ids=lambda c: f"{c.architecture}-{c.decoder}-{c.revival}")
def test_every_architecture_learns_a_known_dictionary(config):
    """Sums of 3 of 24 random directions in 16 dimensions: nearly every direction is found again."""
    g, steps = torch.Generator().manual_seed(0), 800
    truth = torch.nn.functional.normalize(torch.randn(N_TRUE, WIDE, generator=g), dim=1)
    bank = Bank([config], WIDE, ["a"], 0, CPU)
    optimiser = torch.optim.Adam(list(bank.parameters().values()), lr=1e-2)
    silent = torch.zeros(1, 48)
    for step in range(steps):
        chosen = torch.rand(256, N_TRUE, generator=g).topk(TRUE_K, dim=1).indices
        f = torch.zeros(256, N_TRUE).scatter(1, chosen, 0.5 + torch.rand(256, TRUE_K, generator=g))
        x = f @ truth
        x = x * (WIDE / x.square().sum(1).mean()).sqrt()
        optimiser.param_groups[0]["lr"] = 1e-2 * min(1.0, (steps - step) / 300)
        loss = bank.loss(x[None], silent > 2000, warm=min(1.0, step / 100))
        bank.project_gradients()
        optimiser.step()
        bank.renormalise()
        silent = torch.where(loss.firings > 0, 0.0, silent + 256)
    rows = torch.nn.functional.normalize(bank.W_dec[0], dim=1)
    assert (truth @ rows.T).max(1).values.mean() >= 0.9
    assert loss.mse.item() < 0.25 * WIDE
    assert loss.firings.sum().item() / 256 < 8
