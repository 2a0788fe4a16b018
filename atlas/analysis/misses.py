"""Near misses: where does a feature almost fire?

Of the tokens on which a feature does not fire, those with the largest pre-activation: at most one per block,
ties to the smaller (block, position). A TopK feature misses where others are stronger, a ReLU feature where
its pre-activation stays just below zero, a gated one where its gate is shut (its magnitude path counts).
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atlas.analysis.arrays import UNREADABLE, read_npz
from atlas.analysis.examples import N_NEGATIVE, Misses
from atlas.errors import StoreError
from atlas.kernels import screen as screened
from atlas.kernels.misses import add_blocks, insert, leave_out
from atlas.sae.model import Active
from atlas.sae.screen import Screen, Seen


class NearMisses:
    """The ``n`` nearest misses of every feature of an SAE; a mergeable summary.

    >>> pre = torch.tensor([[[-1.0], [-0.5]], [[-2.0], [float("-inf")]]])
    >>> found = NearMisses(d_sae=1, context=3)
    >>> found.update(pre, first_block=0)
    >>> found.finish(range(1)).token.tolist(), found.finish(range(1)).pre_activation.tolist()
    ([2, 4], [-0.5, -2.0])
    """

    def __init__(self, d_sae: int, context: int, n: int = N_NEGATIVE) -> None:
        self.context, self.n = context, n
        self.pre = np.full((d_sae, n), -np.inf, np.float32)
        self.token = np.full((d_sae, n), -1, np.int64)

    def update(self, pre: Float[Tensor, "blocks positions d_sae"], first_block: int) -> None:
        """Add consecutive blocks without their position 0; -inf where a feature fires."""
        if pre.is_cuda:
            self._search(pre, first_block)
        else:
            add_blocks(pre.numpy(), first_block * self.context + 1, self.context, self.pre, self.token)

    def update_screened(self, screen: Screen, seen: Seen, found: Active, first_block: int) -> None:
        """``update`` where upper bounds were looked at and ``found`` is what fires; uses up ``seen``."""
        screened.leave_out(seen.keys, found.row.numpy(), found.feature.numpy())
        places, first = self.context - 1, first_block * self.context + 1
        keys = seen.keys.reshape(-1, places, seen.keys.shape[1])
        x = seen.x.reshape(-1, places, seen.x.shape[1])
        screened.add_blocks(keys, x, screen.weights, screen.bias, first, self.context, self.pre, self.token)

    def _search(self, pre: Float[Tensor, "blocks positions d_sae"], first_block: int) -> None:
        """``update`` on a GPU, which finds the largest of all blocks at once."""
        best = pre.amax(1)
        least = torch.from_numpy(self.pre[:, -1]).to(best.device)
        block, feature = ((best >= least) & (best > -torch.inf)).nonzero(as_tuple=True)
        if len(block):
            token = (block + first_block) * self.context + pre[block, :, feature].argmax(1) + 1
            self._add(feature.cpu().numpy(), token.cpu().numpy(), best[block, feature].cpu().numpy())

    def merge(self, other: "NearMisses") -> "NearMisses":
        """The near misses of both texts together; their blocks are different ones."""
        merged = NearMisses(len(self.pre), self.context, self.n)
        for part in (self, other):
            feature, slot = np.nonzero(part.token >= 0)
            merged._add(feature, part.token[feature, slot], part.pre[feature, slot])
        return merged

    def _add(self, feature: np.ndarray, token: np.ndarray, pre: np.ndarray) -> None:
        insert(self.pre, self.token, feature, token, pre)

    def finish(self, features: range) -> Misses:
        """The near misses of a range of features, numbered from its first."""
        token, pre = self.token[features.start : features.stop], self.pre[features.start : features.stop]
        feature, slot = np.nonzero(token >= 0)
        return Misses(feature, token[feature, slot], pre[feature, slot])

    def save(self, path: Path) -> None:
        """Write to an uncompressed .npz file."""
        np.savez(path, context=self.context, pre=self.pre, token=self.token)

    @classmethod
    def load(cls, path: Path) -> "NearMisses":
        """Read what ``save`` wrote; StoreError if it is damaged."""
        try:
            file = read_npz(path)
            pre, token = file["pre"], file["token"]
            found = cls(len(pre), int(file["context"]), pre.shape[1])
        except UNREADABLE as error:
            raise StoreError(f"near misses in {str(path)!r} cannot be read: {error}") from None
        found.pre, found.token = pre, token
        return found


def without_firing(
    pre: Float[Tensor, "n d_sae"], row: Int[Tensor, " n_active"], feature: Int[Tensor, " n_active"]
) -> Float[Tensor, "n d_sae"]:
    """The same pre-activations with -inf where a feature fires, in their place."""
    if pre.is_cuda:
        pre[row, feature] = -torch.inf
    else:
        leave_out(pre.numpy(), row.numpy(), feature.numpy())
    return pre
