"""Steps that bring in other SAEs or change trained ones: imports, prune, finetune."""

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np

from atlas.analysis.arrays import read_npy
from atlas.errors import SAEError, StoreError
from atlas.pipeline.execute import Context
from atlas.pipeline.inputs import the_model, the_saes, the_source, the_stream, write_rows
from atlas.pipeline.members import IMPORTS
from atlas.plain import to_plain
from atlas.sae.files import load_sae, save_sae
from atlas.sae.finetune import Finetuning
from atlas.sae.library import folder_digest, folder_of
from atlas.sae.model import SAE
from atlas.sae.prune import measure_firing, pruned, pruned_bits, pruning_row

CHECKPOINT = "finetuning.safetensors"
BITS = "pruned.npy"


def imports(context: Context) -> None:
    """Copy imported SAEs, so that a later change of the library does not reach into finished steps."""
    members = [sae for sae in context.plan.saes if sae.step == IMPORTS]
    for member in members:
        source, folder = folder_of(context.settings.home, member.name), context.out / f"{member.item:05d}"
        try:
            shutil.copytree(source, folder)
        except OSError as error:
            raise SAEError(f"imported SAE {member.name!r} cannot be copied: {error}") from None
        if folder_digest(folder) != member.digest:
            raise SAEError(f"imported SAE {member.name!r} in {str(source)!r} was changed during the build")
        if load_sae(folder).info.name != member.name:
            raise SAEError(f"imported SAE {member.name!r} calls itself otherwise; import it again")
        context.progress.update(member.item + 1, len(members), member.name)


def _stage_before(context: Context, stage: str) -> str:
    stages = context.plan.stages
    return stages[stages.index(stage) - 1]


def _noted(sae: SAE, what: str, config: Any) -> SAE:
    """The SAE with a stage's settings among its own."""
    known = json.loads(sae.info.settings)
    settings = (known if isinstance(known, dict) else {}) | {what: to_plain(config)}
    return replace(sae, info=replace(sae.info, settings=json.dumps(settings, sort_keys=True)))


def prune(context: Context) -> None:
    """Take out features that hardly fire or hardly write, and count which criteria they met."""
    config, model, stream = context.plan.config.prune, the_model(context), the_stream(context)
    if config is None:
        raise StoreError("the build does not ask for pruning")
    saes = the_saes(context, model, _stage_before(context, "pruned"))
    source = the_source(context, model, stream, [sae.info.site for sae in saes])
    rows = []
    firings = measure_firing(source, stream, saes, config.tokens, context.progress)
    for item, (sae, firing) in enumerate(zip(saes, firings, strict=True)):
        bits = pruned_bits(sae.decoder_directions.norm(dim=1), firing, sae.d_in, config)
        folder = context.out / f"{item:05d}"
        save_sae(_noted(pruned(sae, bits), "prune", config), folder)
        np.save(folder / BITS, bits.cpu().numpy())
        rows.append(pruning_row(sae.info.name, bits.cpu().numpy(), firing.n_tokens, config))
    write_rows(context.out, "pruning", rows)


def pruned_of(context: Context, item: int) -> np.ndarray | int:
    """Why each feature of an SAE was pruned, as bits; 0 where nothing was."""
    if "pruned" not in context.plan.stages:
        return 0
    step, folder = context.plan.place(item, "pruned")
    path = context.input(step) / folder / BITS
    try:
        bits: np.ndarray = read_npy(path)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{str(path)!r} cannot be read: {error}") from None
    return bits


def finetune(context: Context) -> None:
    """Train the decoders once more, against feature suppression, with the encoders frozen."""
    build, model, stream = context.plan.config, the_model(context), the_stream(context)
    if build.finetune is None:
        raise StoreError("the build does not ask for finetuning")
    saes = the_saes(context, model, _stage_before(context, "finetuned"))
    source = the_source(context, model, stream, [sae.info.site for sae in saes])
    work = Finetuning(source, stream, saes, build.finetune, build.train)
    for item, sae in enumerate(work.run(context.scratch / CHECKPOINT, context.progress)):
        save_sae(_noted(sae, "finetune", build.finetune), context.out / f"{item:05d}")
