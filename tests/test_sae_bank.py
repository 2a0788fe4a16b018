"""Selection, sparse products and the banks' losses against sorting and dense autograd in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atlas.configs import SAEConfig
from atlas.sae.bank import PARAMETERS, Bank
from atlas.sae.sparse import Pattern, selected_preactivations, sparse_decode
from atlas.sae.topk import top_k

from .tiny import CPU

# ---------------------------------------------------------------- top k


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_top_k_is_a_stable_sort(data):
    n, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    k = data.draw(st.integers(1, width))
    rows = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=n * width, max_size=n * width))
    x = torch.tensor(rows).reshape(n, width)
    values, index = top_k(x, k)
    for r in range(n):
        chosen = sorted(sorted(range(width), key=lambda i: (-x[r, i].item(), i))[:k])
        assert index[r].tolist() == chosen, "ties go to the lower index, in index order"
        assert values[r].tolist() == x[r, chosen].tolist()


def test_top_k_of_many_random_rows():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    values, index = top_k(x, 9)
    expected = torch.topk(x, 9)
    assert torch.equal(index, expected.indices.sort(1).values)
    assert torch.equal(values.sort(1, descending=True).values, expected.values)


# ---------------------------------------------------------------- sparse products


def problem(seed=0, rows=6, features=8, d=3, k=2):
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(features, generator=g)[:k] for _ in range(rows)])
    draw = [(rows, k), (features, d), (rows, d), (features,), (rows, d)]
    return index, features, [torch.randn(s, generator=g, dtype=torch.float64) for s in draw]


def test_sparse_decode_is_the_dense_product_with_its_gradients():
    index, n, (values, W, _, _, weight) = problem()
    values.requires_grad_()
    W.requires_grad_()
    out = sparse_decode(values, W, Pattern(index, n))
    dense = torch.zeros(len(index), n, dtype=torch.float64).scatter(1, index, values)
    torch.testing.assert_close(out, dense @ W)
    found = torch.autograd.grad((out * weight).sum(), (values, W))
    expected = torch.autograd.grad(((dense @ W) * weight).sum(), (values, W))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_selected_preactivations_have_the_dense_gradients():
    index, n, (weight, W, x, b, _) = problem(1)
    W.requires_grad_()
    b.requires_grad_()
    dense = (x @ W.T + b).gather(1, index)
    out = selected_preactivations(x, W, b, dense.detach(), Pattern(index, n))
    assert torch.equal(out, dense)
    found = torch.autograd.grad((out.square() * weight).sum(), (W, b))
    expected = torch.autograd.grad((dense.square() * weight).sum(), (W, b))
    for a, c in zip(found, expected, strict=True):
        torch.testing.assert_close(a, c)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5), st.integers(5, 8))
def test_scatter_and_sums_against_loops(seed, rows, k, features):
    index, n, (values, _, x, _, _) = problem(seed, rows, features, k=k)
    pattern = Pattern(index, n)
    by_row, total = np.zeros((n, x.shape[1])), np.zeros(n)
    for r in range(rows):
        for j in range(k):
            by_row[index[r, j]] += values[r, j].item() * x[r].numpy()
            total[index[r, j]] += values[r, j].item()
    np.testing.assert_allclose(pattern.scatter(values, x).numpy(), by_row, atol=1e-12)
    np.testing.assert_allclose(pattern.sum_by_feature(values).numpy(), total, atol=1e-12)


# ---------------------------------------------------------------- losses of a bank


D_IN, D_SAE, BATCH = 5, 12, 16


def bank_in_float64(config, names=("a", "b"), seed=0):
    """A bank with random parameters, nonzero biases and unequal encoder and decoder."""
    bank = Bank(config, D_IN, names, 0, CPU)
    g = torch.Generator().manual_seed(seed)
    for name in PARAMETERS:
        shape = getattr(bank, name).shape
        setattr(bank, name, torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_())
    return bank


def inputs(n=2, seed=5):
    return torch.randn(n, BATCH, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_loss(config, x, W_enc, b_enc, W_dec, b_dec, dead):
    """One SAE's losses as they are written in books: dense, by hand, for autograd."""
    pre = (x - b_dec) @ W_enc.T + b_enc
    if config.architecture == "topk":
        mask = torch.zeros_like(pre).scatter(1, pre.topk(config.k, dim=1).indices, 1.0)
        f = torch.relu(pre) * mask
    else:
        f = torch.relu(pre)
    x_hat = f @ W_dec + b_dec
    mse = ((x - x_hat) ** 2).sum(1).mean()
    sparsity = config.l1_coefficient * f.sum(1).mean() if config.architecture == "relu" else mse.new_zeros(())
    aux = mse.new_zeros(())
    if config.architecture == "topk" and dead.any() and config.aux_k:
        hidden = pre.masked_fill(~dead, -torch.inf)
        chosen = hidden.topk(min(config.aux_k, int(dead.sum())), dim=1).indices
        g = torch.relu(pre) * torch.zeros_like(pre).scatter(1, chosen, 1.0)
        aux = config.aux_coefficient * (((x - x_hat).detach() - g @ W_dec) ** 2).sum(1).mean()
    return mse, sparsity, aux, f


CASES = [
    SAEConfig("topk", d_sae=D_SAE, k=3, aux_k=2, aux_coefficient=0.5),
    SAEConfig("topk", d_sae=D_SAE, k=3, aux_k=0),
    SAEConfig("topk", d_sae=D_SAE, k=D_SAE, aux_k=100, aux_coefficient=0.5),
    SAEConfig("relu", d_sae=D_SAE, l1_coefficient=0.7),
]
NONE_DEAD, SOME_DEAD, ALL_DEAD = (torch.zeros(2, D_SAE, dtype=torch.bool) for _ in range(3))
SOME_DEAD[0, [1, 4, 5, 9]] = True
ALL_DEAD[:] = True


@pytest.mark.parametrize("config", CASES, ids=["aux", "no-aux", "k-all", "relu"])
@pytest.mark.parametrize("dead", [NONE_DEAD, SOME_DEAD, ALL_DEAD], ids=["alive", "some-dead", "all-dead"])
def test_loss_and_gradients_against_a_dense_sae(config, dead):
    bank, x = bank_in_float64(config), inputs()
    loss = bank.loss(x, dead)
    parameters = [getattr(bank, name) for name in PARAMETERS]
    found = torch.autograd.grad(loss.total, parameters)
    dense = [dense_loss(config, x[s], *(p[s] for p in parameters), dead[s]) for s in range(2)]
    for s, (mse, sparsity, aux, f) in enumerate(dense):
        torch.testing.assert_close(loss.mse[s], mse)
        torch.testing.assert_close(loss.sparsity[s], sparsity)
        torch.testing.assert_close(loss.aux[s], aux)
        assert loss.l0[s].item() == pytest.approx((f > 0).double().sum(1).mean().item(), rel=1e-6)
        assert loss.fired[s].tolist() == (f > 0).any(0).tolist()
    expected = torch.autograd.grad(sum(m + p + a for m, p, a, _ in dense), parameters)
    for name, a, b in zip(PARAMETERS, found, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_aux_loss_moves_dead_features_alone():
    """With k features kept, a dead feature gets a gradient from AuxK and from nowhere else."""
    bank, x = bank_in_float64(CASES[0]), inputs()
    with torch.no_grad():
        bank.b_enc[0, [1, 4, 5, 9]] = -30
        bank.b_enc[0, 4] = 0.0
        bank.W_enc[0, 4] *= 1e-3  # positive sometimes, never among the k largest
    silent = bank.loss(x, NONE_DEAD)
    assert not silent.fired[0, [1, 5, 9]].any()
    without = torch.autograd.grad(silent.total, bank.W_dec)[0][0]
    with_aux = torch.autograd.grad(bank.loss(x, SOME_DEAD).total, bank.W_dec)[0][0]
    changed = (with_aux != without).any(1).nonzero().squeeze(1).tolist()
    assert changed == [4]


def test_seeds_belong_to_names_not_to_places():
    config = CASES[0]
    together, alone = Bank(config, D_IN, ["a", "b", "c"], 3, CPU), Bank(config, D_IN, ["b"], 3, CPU)
    assert torch.equal(together.W_dec[1], alone.W_dec[0])
    assert not torch.equal(together.W_dec[0], together.W_dec[1])
    assert not torch.equal(Bank(config, D_IN, ["b"], 4, CPU).W_dec, alone.W_dec)
    assert torch.equal(together.W_enc, together.W_dec)
    torch.testing.assert_close(together.W_dec.norm(dim=2), torch.ones(3, D_SAE))


def train(bank, batches, dead=None):
    optimiser = torch.optim.Adam(list(bank.parameters().values()), lr=1e-2)
    for x in batches:
        optimiser.zero_grad()
        loss = bank.loss(x, torch.zeros(len(x), bank.d_sae, dtype=torch.bool) if dead is None else dead)
        loss.total.backward()
        bank.project_gradients()
        optimiser.step()
        bank.renormalise()
    return loss


@pytest.mark.parametrize("config", [CASES[0], CASES[3]], ids=["topk", "relu"])
def test_members_train_as_if_alone(config):
    g = torch.Generator().manual_seed(1)
    batches = [torch.randn(3, BATCH, D_IN, generator=g) for _ in range(15)]
    batches = [x * torch.tensor([1.0, 30.0, 0.1])[:, None, None] for x in batches]
    together = Bank(config, D_IN, ["a", "b", "c"], 0, CPU)
    train(together, batches)
    for s, name in enumerate("abc"):
        alone = Bank(config, D_IN, [name], 0, CPU)
        train(alone, [x[s : s + 1] for x in batches])
        for parameter in PARAMETERS:
            a, b = getattr(together, parameter)[s], getattr(alone, parameter)[0]
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_projection_and_unit_rows():
    bank = Bank(CASES[0], D_IN, ["a"], 0, CPU)
    bank.loss(inputs(1).float(), torch.zeros(1, D_SAE, dtype=torch.bool)).total.backward()
    before = bank.W_dec.grad.clone()
    bank.project_gradients()
    torch.testing.assert_close(
        (bank.W_dec.grad * bank.W_dec).sum(2), torch.zeros(1, D_SAE), atol=1e-5, rtol=0
    )
    along = ((before - bank.W_dec.grad) * bank.W_dec).sum(2, keepdim=True) * bank.W_dec
    torch.testing.assert_close(before - bank.W_dec.grad, along, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        bank.W_dec *= 7
    bank.renormalise()
    torch.testing.assert_close(bank.W_dec.norm(dim=2), torch.ones(1, D_SAE))


def test_topk_learns_a_known_dictionary():
    """Sums of 3 of 24 random directions in 16 dimensions: every direction is found again."""
    g = torch.Generator().manual_seed(0)
    d_in, n_true, k = 16, 24, 3
    truth = torch.nn.functional.normalize(torch.randn(n_true, d_in, generator=g), dim=1)
    bank = Bank(SAEConfig("topk", d_sae=48, k=k, aux_k=16), d_in, ["a"], 0, CPU)
    optimiser = torch.optim.Adam(list(bank.parameters().values()), lr=1e-2)
    silent = torch.zeros(1, 48)
    for step in range(800):
        chosen = torch.rand(256, n_true, generator=g).topk(k, dim=1).indices
        f = torch.zeros(256, n_true).scatter(1, chosen, 0.5 + torch.rand(256, k, generator=g))
        optimiser.param_groups[0]["lr"] = 1e-2 * min(1.0, (800 - step) / 300)
        optimiser.zero_grad()
        loss = bank.loss((f @ truth)[None], silent > 2000)
        loss.total.backward()
        bank.project_gradients()
        optimiser.step()
        bank.renormalise()
        silent = torch.where(loss.fired, 0.0, silent + 256)
    cosine = (truth @ bank.W_dec[0].detach().T).max(1).values
    assert cosine.mean() >= 0.9
    assert loss.mse.item() < 0.1 * (f @ truth).square().sum(1).mean().item()
