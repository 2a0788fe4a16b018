"""Run a model once over text and once over random repeats, and score every head by where it looks."""

import torch

from atlas.corpus.tokens import TokenStore
from atlas.heads.scores import HeadScore, HeadScores, random_repeats
from atlas.lm.hooks import capture
from atlas.lm.load import LanguageModel
from atlas.progress import Progress

BATCH_BLOCKS, N_REPEATS, LENGTH, SEED = 8, 32, 60, 0


@torch.no_grad()
def measure_heads(
    model: LanguageModel, store: TokenStore, blocks: int, progress: Progress
) -> list[HeadScore]:
    """Scores of every head on the first ``blocks`` blocks of the text and on 32 random repeats.

    A repeat is BOS and then 60 random tokens twice (fewer where the model's context is shorter).
    """
    shape, scores = model.shape, HeadScores(model.shape.n_layers, model.shape.n_heads)
    length = min(LENGTH, (shape.n_ctx - 1) // 2)
    repeats = random_repeats(N_REPEATS, length, shape.d_vocab, bos=store.meta.bos, seed=SEED)
    text = torch.from_numpy(store.blocks(range(min(blocks, len(store)))))
    total = len(text) + len(repeats)
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in range(shape.n_layers)]
    done = 0
    for tokens, is_text in [(t, True) for t in torch.split(text, BATCH_BLOCKS)] + [
        (t, False) for t in torch.split(repeats, BATCH_BLOCKS)
    ]:
        batch = tokens.to(model.device)
        _, patterns = capture(model, batch, (), hooks)
        for layer, hook in enumerate(hooks):
            if is_text:
                scores.update_text(layer, patterns[hook].float(), batch)
            else:
                scores.update_repeats(layer, patterns[hook].float(), length)
        done += len(tokens)
        progress.update(done, total)
    return scores.finish()
