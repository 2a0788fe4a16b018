"""The whole IOI suite as one run: what is chosen where nothing was named, and the rows of its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from atlas.circuits import qk
from atlas.circuits.ioi_features import feature_rows
from atlas.circuits.ioi_noise import noise_rows
from atlas.circuits.ioi_prompts import Words, draw_prompts, resource, tokenised, words_of
from atlas.circuits.ioi_runs import Runs, attention_to, strongest_heads
from atlas.circuits.ioi_splice import GROUPS, splice_rows
from atlas.circuits.opening import Bench, one_per_layer
from atlas.errors import ConfigError
from atlas.progress import Progress
from atlas.sae.model import SAE
from atlas.sites import Site

Head = tuple[int, int]
Rows = list[dict[str, Any]]
MOST_ROUTES = 12


@dataclass(frozen=True)
class Choices:
    """What a run of the suite looks at; empty: chosen by rule, and the choice is written down."""

    prompts: int = 100
    seed: int = 0
    layers: tuple[int, ...] = ()
    """Layers whose features are ablated and whose outputs are noised; else the two whose attn_out at S2 the
    logit difference needs most (GPT-2: 5 and 6)."""
    receivers: tuple[Head, ...] = ()
    """Heads whose values at S2 are patched; else the 4 later heads with the most attention from the end to S2
    (GPT-2: the S-inhibition heads)."""
    movers: tuple[Head, ...] = ()
    """Heads whose scores are split; else the 2 heads after all receivers with the most attention from the
    end to IO (GPT-2: 9.9 and 9.6)."""
    most_features: int = 400
    """Features of each SAE that are ablated: those most active at S2."""
    pairs: int = 8


class IOIStudy:
    """Choices filled in on a model, and the tables that follow from them."""

    def __init__(self, bench: Bench, choices: Choices) -> None:
        self.bench, model = bench, bench.model
        self.words: Words = words_of(model.files.path)
        prompts = draw_prompts(self.words, choices.prompts, choices.seed)
        self.runs = Runs(model, tokenised(model, prompts))
        saes = one_per_layer(bench.saes.values())
        self.attention = {s.info.site.layer: s for s in saes if s.info.site.kind != "resid_pre"}
        self.residual = {s.info.site.layer: s for s in saes if s.info.site.kind == "resid_pre"}
        if not self.attention:
            raise ConfigError("the IOI suite needs SAEs on z or attn_out of whole layers; there is none")
        self.named = choices
        self.choices = self._filled(choices)

    def _filled(self, asked: Choices) -> Choices:
        layers = asked.layers or self._layers()
        missing = [layer for layer in layers if layer not in self.attention]
        if missing:
            allowed = ", ".join(map(str, sorted(self.attention)))
            raise ConfigError(f"layer {missing[0]} has no SAE on attention output; allowed: {allowed}")
        n = self.bench.model.shape.n_layers
        heads = resource()["gpt2_heads"] if self._is_gpt2() else {}
        receivers = asked.receivers or tuple(map(tuple, heads.get("s2 inhibition", ())))
        if not receivers:
            to_s2 = attention_to(self.runs, "end", "S2")
            receivers = tuple(strongest_heads(to_s2, range(min(layers) + 1, n), 4))
        movers = asked.movers or ((9, 9), (9, 6)) if heads else asked.movers
        if not movers:
            last = min(n - 1, min(layer for layer, _ in receivers) + 1) if receivers else n - 1
            movers = tuple(strongest_heads(attention_to(self.runs, "end", "IO"), range(last, n), 2))
        self._check([*receivers, *movers])
        return replace(asked, layers=tuple(layers), receivers=receivers, movers=movers)

    def _is_gpt2(self) -> bool:
        shape = self.bench.model.shape
        return (shape.n_layers, shape.n_heads, shape.d_model, shape.d_vocab) == (12, 12, 768, 50257)

    def _check(self, heads: Sequence[Head]) -> None:
        shape = self.bench.model.shape
        for layer, head in heads:
            if not (0 <= layer < shape.n_layers and 0 <= head < shape.n_heads):
                raise ConfigError(
                    f"head L{layer}H{head} does not exist; allowed: layers 0 to {shape.n_layers - 1}, "
                    f"heads 0 to {shape.n_heads - 1}"
                )

    def _layers(self) -> tuple[int, ...]:
        if self._is_gpt2():
            return tuple(layer for layer in (5, 6) if layer in self.attention)
        drops = {layer: self._drop(layer) for layer in sorted(self.attention)[:-1] or sorted(self.attention)}
        return tuple(sorted(sorted(drops, key=lambda layer: (-drops[layer], layer))[:2]))

    def _drop(self, layer: int) -> float:
        """What the logit difference loses when attn_out of a layer is zero at S2."""
        site, runs = Site("attn_out", layer), self.runs
        nothing = torch.zeros_like(runs.take(site, "S2"))
        return float((runs.clean - runs.difference({site: runs.put("S2", nothing)})).mean())

    def routes(self) -> list[tuple[SAE, SAE, qk.Route]]:
        """Paths of layers' features through receivers to movers, in this order; at most 12."""
        found = [
            (self.attention[layer], self.residual[mover[0]], qk.Route(via, mover))
            for layer in self.choices.layers
            for via in self.choices.receivers
            for mover in self.choices.movers
            if layer < via[0] < mover[0] and mover[0] in self.residual
        ]
        return found[:MOST_ROUTES]

    def rows(self, progress: Progress) -> dict[str, Rows]:
        """The rows of every table, by its name."""
        chosen, runs = self.choices, self.runs
        out: dict[str, Rows] = {
            "ioi_splice": splice_rows(runs, self.words, self.attention, GROUPS),
            "ioi_features": [],
            "ioi_heads": self._head_rows(),
            "ioi_noise": noise_rows(runs, self.words, chosen.layers, chosen.seed + 1),
            "qk_pairs": [],
            "qk_explained": [],
        }
        for layer in chosen.layers:
            out["ioi_features"] += feature_rows(
                runs, self.attention[layer], chosen.receivers, progress, chosen.most_features
            )
        if self.bench.model.W_pos() is not None:
            for attention, residual, route in self.routes():
                self._qk(attention, residual, route, out)
        return out

    def _qk(self, attention: SAE, residual: SAE, route: qk.Route, out: dict[str, Rows]) -> None:
        found = qk.scores(self.runs, attention, residual, route)
        (via_layer, via), (layer, mover) = route
        name = f"L{attention.info.site.layer} > L{via_layer}H{via} > L{layer}H{mover}"
        saes = {"sae": attention.info.name, "key_sae": residual.info.name}
        for order, rows in self.runs.batch.rows.items():
            at = {"route": name, "prompts": order}
            out["qk_explained"].append({**at, **qk.explained_row(found, rows, self.choices.pairs)})
            out["qk_pairs"] += [{**at, **saes, **row} for row in qk.pair_rows(found, rows, 50)]

    def _head_rows(self) -> Rows:
        roles: Mapping[str, tuple[tuple[Head, ...], bool, str]] = {
            "receiver": (self.choices.receivers, bool(self.named.receivers), "S2"),
            "mover": (self.choices.movers, bool(self.named.movers), "IO"),
        }
        out = []
        for role, (heads, named, to) in roles.items():
            attention = attention_to(self.runs, "end", to)
            how = "named" if named else "published" if self._is_gpt2() else "by attention"
            out += [
                {"role": role, "layer": n, "head": h, "attention": float(attention[n, h]), "chosen": how}
                for n, h in dict.fromkeys(heads)
            ]
        return out

    def about(self, command: str) -> dict[str, str]:
        """The columns of ``studies``."""
        import json

        told = asdict(self.choices) | {"substitute_names": self.words.substitute}
        return {
            "kind": "ioi", "model": self.bench.model.name, "release": self.bench.release.label,
            "command": command, "settings": json.dumps(told, sort_keys=True),
        }  # fmt: skip
