"""The k largest entries of each row, with one answer where entries tie."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def top_k(
    rows: Float[Tensor, "n_rows width"], k: int
) -> tuple[Float[Tensor, "n_rows k"], Int[Tensor, "n_rows k"]]:
    """Values and indices of the k largest entries of each row, in index order; ties go to the lower index.

    ``torch.topk`` breaks ties as it likes and, on a CPU, is several times slower than a partition that
    only finds the k-th value.

    >>> values, index = top_k(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2)
    >>> values.tolist(), index.tolist()
    ([[3.0, 3.0]], [[1, 2]])
    """
    n_rows, width = rows.shape
    mask = rows >= _kth_largest(rows, k)
    flat = mask.reshape(-1).nonzero().squeeze(-1)
    if flat.numel() != n_rows * k:
        mask = _break_ties(rows, mask, k)
        flat = mask.reshape(-1).nonzero().squeeze(-1)
    index = flat.reshape(n_rows, k) % width
    return rows.gather(1, index), index


def _kth_largest(rows: Tensor, k: int) -> Tensor:
    if rows.is_cuda:
        return rows.topk(k, dim=1).values[:, -1:]
    place = rows.shape[1] - k
    return torch.from_numpy(np.partition(rows.numpy(), place, axis=1)[:, place : place + 1].copy())


def _break_ties(rows: Tensor, mask: Tensor, k: int) -> Tensor:
    tied = mask.sum(1) != k
    order = rows[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    mask = mask.clone()
    mask[tied] = torch.zeros_like(mask[tied]).scatter_(1, order, torch.ones_like(order, dtype=torch.bool))
    return mask
