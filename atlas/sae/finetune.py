"""Training after training, against feature suppression: the encoder is frozen, the loss is the MSE alone.

A sparsity penalty makes an SAE answer with activations that are too small, so that ||x^|| < ||x||. Here
the decoder rows D, a scale a per feature and b_dec are trained to rebuild x from the same activations f,

    x^ = (f * a) D + b_dec,      loss = mean over tokens of ||x - x^||^2,

and a is folded into the rows afterwards, which then have any norm. Source: seed 003 (rows D4, D5), after
Wright & Sharkey 2024, "Addressing feature suppression in SAEs".

Which features fire, and how strongly, stays the same bit for bit: the encoder's offset is worked out once,
from the old b_dec, and stored as b_enc of an SAE that no longer subtracts b_dec from its input. (Moving
b_enc by (b_dec_new - b_dec_old) W would keep activations only to rounding, and near a threshold that is a
different feature.) Inputs are scaled as in training; SAEs that normalise theirs are finetuned on normalised
inputs. An SAE without a decoder bias (all zeros) gets none.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atlas.configs import FinetuneConfig, TrainConfig
from atlas.errors import Cancelled, SAEError
from atlas.progress import Progress
from atlas.sae.files import write_tensors
from atlas.sae.harvest import Source, Stream
from atlas.sae.model import SAE
from atlas.sae.normalise import normalise
from atlas.sae.train import learning_rate
from atlas.store.atomic import atomic_file


def frozen(sae: SAE) -> SAE:
    """The same SAE, activations equal bit for bit, with an encoder that no decoder tensor enters."""
    gate = sae.b_gate
    if gate is not None and sae.info.apply_b_dec_to_input:
        gate = gate - sae.b_dec @ sae.W_enc
    info = replace(sae.info, apply_b_dec_to_input=False, rescale_acts_by_decoder_norm=False)
    changed = {"b_enc": sae.bias_term, "W_dec": sae.decoder_directions}
    if gate is not None:
        changed["b_gate"] = gate
    # A gain by the decoder's norm becomes part of W_enc or, since a gate has no part in it, of r_mag.
    if sae.info.rescale_acts_by_decoder_norm and sae.r_mag is not None:
        changed["r_mag"] = sae.r_mag + sae.W_dec.norm(dim=1).log()
    elif sae.info.rescale_acts_by_decoder_norm:
        changed["W_enc"] = sae.encoder_directions
    return replace(sae, info=info, **changed)


class Decoder:
    """The trained part of one SAE: rows, scales and bias, with their gradients in closed form."""

    def __init__(self, sae: SAE, lr: float) -> None:
        self.sae, self.scale = frozen(sae), torch.ones((), device=sae.W_dec.device)
        self.rows, self.gain = self.sae.W_dec.clone(), self.sae.W_dec.new_ones(sae.d_sae)
        self.b_dec, self.has_bias = self.sae.b_dec.clone(), bool(sae.b_dec.any())
        trained = [p.requires_grad_() for p in self.parameters().values()]
        self.optimiser = torch.optim.Adam(trained, lr=lr, fused=True)

    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return {"rows": self.rows, "gain": self.gain, "b_dec": self.b_dec}

    @torch.no_grad()
    def start(self, x: Float[Tensor, "n d_in"]) -> None:
        """Take the scale at which the inputs' mean squared norm is d_in from the first chunk."""
        if self.sae.info.normalize_activations == "none":
            self.scale = (self.sae.d_in / x.square().sum(1).mean().clamp_min(1e-12)).sqrt()
        self.b_dec *= self.scale

    @torch.no_grad()
    def gradients(self, x: Float[Tensor, "n d_in"]) -> float:
        """Set the gradients of a batch and return its loss, at the scale of training.

        Only active features cost anything: f and its transpose are sparse matrices.
        """
        active, n = self.sae.active(x), len(x)
        target = normalise(x, self.sae.scale(x)) * self.scale
        value = active.value * self.scale
        f = _sparse(active.row, active.feature, value * self.gain[active.feature], (n, self.sae.d_sae))
        error = f @ self.rows + self.b_dec - target
        order = torch.argsort(active.feature, stable=True)
        across = _sparse(active.feature[order], active.row[order], value[order], (self.sae.d_sae, n))
        pull = across @ (error * (2 / n))
        self.rows.grad = pull * self.gain[:, None]
        self.gain.grad = (pull * self.rows).sum(1)
        self.b_dec.grad = error.sum(0) * (2 / n) if self.has_bias else torch.zeros_like(self.b_dec)
        return error.square().sum().item() / n

    @torch.no_grad()
    def finished(self) -> SAE:
        """The SAE with its new decoder, for inputs as they are."""
        rows = (self.rows * self.gain[:, None]).detach()
        return replace(self.sae, W_dec=rows, b_dec=(self.b_dec / self.scale).detach())


def _sparse(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR matrix of triples that are sorted by row."""
    counts = torch.bincount(row, minlength=shape[0])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.sparse_csr_tensor(starts, column, value, shape, check_invariants=False)


class Finetuning:
    """The state of finetuning several SAEs in one pass over the text, stoppable anywhere.

    ``train`` gives the batch, the learning rate's rise and fall, and the time between checkpoints.

    Raises:
        SAEError: the loss is no longer finite, or a checkpoint is damaged.
    """

    def __init__(
        self,
        source: Source,
        stream: Stream,
        saes: Sequence[SAE],
        config: FinetuneConfig,
        train: TrainConfig,
    ) -> None:
        self.source, self.stream, self.config, self.train = source, stream, config, train
        self.decoders = [Decoder(sae, config.lr) for sae in saes]
        self.n_chunks = math.ceil(config.tokens / (train.batch * train.chunk_batches))
        self.n_steps = self.n_chunks * train.chunk_batches
        self.chunk = 0
        self.whole = True
        """Whether the state is that between two chunks."""
        self.first: list[float] = []
        """Each SAE's loss on the first batch."""

    def run(self, checkpoint: Path, progress: Progress) -> list[SAE]:
        """Finetune to the end, going on from ``checkpoint`` if there is one, and return the SAEs."""
        if checkpoint.exists():
            self.restore(checkpoint)
        saved = time.monotonic()
        progress.update(self.chunk * self.train.chunk_batches, self.n_steps)
        first = self.chunk
        try:
            while self.chunk < self.n_chunks:
                ratio = self.train_chunk()
                message = f"squared error {ratio:.3f} of the start"
                progress.update(self.chunk * self.train.chunk_batches, self.n_steps, message)
                if time.monotonic() - saved > self.train.checkpoint_seconds and self.chunk < self.n_chunks:
                    self.save(checkpoint)
                    saved = time.monotonic()
        except Cancelled:
            if self.whole and self.chunk > first:
                self.save(checkpoint)
            raise
        return [decoder.finished() for decoder in self.decoders]

    def train_chunk(self) -> float:
        """Take the steps of one chunk; the loss of its last batch over that of the first, SAEs averaged."""
        chunk = self.source.chunk(self.chunk)
        order = torch.from_numpy(self.stream.token_order(self.chunk))
        last = []
        self.whole = False
        for decoder in self.decoders:
            rows = chunk.rows(decoder.sae.info.site)
            x = rows[order.to(rows.device)]
            if self.chunk == 0:
                decoder.start(x)
            last.append(self._steps(decoder, x))
        self.chunk += 1
        self.whole = True
        return sum(a / max(b, 1e-12) for a, b in zip(last, self.first, strict=True)) / max(len(last), 1)

    def _steps(self, decoder: Decoder, x: Float[Tensor, "n d_in"]) -> float:
        loss = 0.0
        for b, batch in enumerate(torch.split(x, self.train.batch)):
            step = self.chunk * self.train.chunk_batches + b
            rate = self.config.lr * learning_rate(self.train, step, self.n_steps)
            decoder.optimiser.param_groups[0]["lr"] = rate
            loss = decoder.gradients(batch)
            if not math.isfinite(loss):
                name = decoder.sae.info.name
                raise SAEError(
                    f"finetuning of {name!r} diverged at step {step + 1}; "
                    f"try a smaller lr than {self.config.lr:g}"
                )
            if step == 0:
                self.first.append(loss)
            decoder.optimiser.step()
        return loss

    def save(self, path: Path) -> None:
        """Write the whole state, atomically: decoders, Adam's moments, input scales, position."""
        tensors: dict[str, Tensor] = {}
        for i, decoder in enumerate(self.decoders):
            tensors[f"{i}.scale"] = decoder.scale
            for name, p in decoder.parameters().items():
                tensors[f"{i}.{name}"] = p.detach()
                tensors |= {f"{i}.{name}.{key}": value for key, value in decoder.optimiser.state[p].items()}
        state = json.dumps({"chunk": self.chunk, "first": self.first})
        with atomic_file(path) as work:
            write_tensors(work, tensors, {"state": state})

    def restore(self, path: Path) -> None:
        """Go on from what ``save`` wrote."""
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                state = json.loads(file.metadata()["state"])
                chunk, first = int(state["chunk"]), [float(loss) for loss in state["first"]]
                for i, decoder in enumerate(self.decoders):
                    _restore(file, i, decoder)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise SAEError(
                f"checkpoint {str(path)!r} cannot be read ({reason}); delete it to start anew"
            ) from None
        self.chunk, self.first = chunk, first

    @property
    def device(self) -> torch.device:
        """Where the SAEs lie."""
        return self.decoders[0].rows.device if self.decoders else torch.device("cpu")


def _restore(file: Any, i: int, decoder: Decoder) -> None:
    decoder.scale = file.get_tensor(f"{i}.scale")
    for name, p in decoder.parameters().items():
        with torch.no_grad():
            p.copy_(file.get_tensor(f"{i}.{name}"))
        keys = [key for key in file.keys() if key.startswith(f"{i}.{name}.")]  # noqa: SIM118 - not a dict
        decoder.optimiser.state[p] = {key.rsplit(".", 1)[1]: file.get_tensor(key) for key in keys}
