"""The IOI suite on a toy: metrics by hand, replacements against passes that are edited another way."""

import math

import pytest
import torch

from atlas.circuits.edits import ablate, drop_error
from atlas.circuits.ioi_features import ERROR, ablation_effect, at_s2, by_head, feature_rows, path_effect
from atlas.circuits.ioi_noise import CONJUNCTIONS, noise_rows
from atlas.circuits.ioi_prompts import (
    Batch,
    Prompt,
    abc,
    disguised,
    draw_prompts,
    rejoined,
    resource,
    tokenised,
    words_of,
)
from atlas.circuits.ioi_runs import (
    N_ABC,
    abc_means,
    attention_to,
    kl_at_end,
    logit_difference,
    strongest_heads,
)
from atlas.circuits.ioi_splice import splice_rows
from atlas.circuits.splice import run_spliced
from atlas.configs import ModelConfig
from atlas.errors import ConfigError
from atlas.lm.files import find_model
from atlas.lm.hooks import capture, logits_with
from atlas.sites import Site
from tests import circuit_world as world
from tests.builds import Quiet
from tests.tiny import N_HEADS

JOHN = Prompt(0, "BABA", "John", "Mary", "Tom", "store", "ring")


def test_prompts_say_what_the_paper_says():
    assert JOHN.text == "Then, John and Mary went to the store. John gave a ring to"
    swapped = Prompt(0, "ABBA", "John", "Mary", "Tom", "store", "ring")
    assert swapped.text == "Then, Mary and John went to the store. John gave a ring to"
    assert abc([JOHN])[0].text == "Then, John and Mary went to the store. Tom gave a ring to"
    assert rejoined([JOHN], "with")[0].text == "Then, John with Mary went to the store. John gave a ring to"
    other = disguised([swapped], world.WORDS, seed=3)[0]
    first, second = other.indirect, other.subject
    assert other.text == (
        f"After a long day of work, then, {first} and {second} went to the w20. "
        f"Some time passed and it got late. {second} gave a ring to"
    ).replace("w20", "store")
    assert not {first, second} & {"John", "Mary"}


def test_prompts_are_seeded_balanced_and_paired():
    prompts = draw_prompts(world.WORDS, 40, seed=5)
    assert prompts == draw_prompts(world.WORDS, 40, seed=5)
    assert prompts != draw_prompts(world.WORDS, 40, seed=6)
    assert [p.order for p in prompts] == ["ABBA", "BABA"] * 20
    for one, two in zip(prompts[::2], prompts[1::2], strict=True):
        assert (one.subject, one.indirect, one.template) == (two.subject, two.indirect, two.template)
        assert len({one.subject, one.indirect, one.third}) == 3
    assert {p.template for p in prompts} == set(range(len(resource()["templates"])))
    for n in (0, 3):
        with pytest.raises(ConfigError, match=f"{n} prompts are not allowed"):
            draw_prompts(world.WORDS, n)


def test_positions_point_at_the_names():
    batch = world.runs(30).batch
    for row, prompt in enumerate(batch.prompts):
        said = ["<bos>", *prompt.text.split()]
        where = {name: int(at[row]) for name, at in batch.at.items()}
        assert said[where["S1"]] == said[where["S2"]] == prompt.subject
        assert said[where["IO"]] == prompt.indirect
        assert where["end"] == len(said) - 1
        assert (where["IO"] < where["S1"]) == (prompt.order == "ABBA")
        assert where["name2"] == max(where["S1"], where["IO"])
        assert int(batch.tokens[row, where["S2"]]) == int(batch.subject[row])


def test_words_are_single_tokens_or_substitutes():
    words = words_of(find_model("docs-12l").path)
    assert words.substitute
    assert len(words.names) >= 6
    assert not {"Then", "When", "After"} & set(words.names), "no word of a template stands for a name"
    with pytest.raises(ConfigError, match="single-token names; at least 6"):
        words_of(world.folder())


def test_metrics_by_hand():
    """Two prompts, three words; the ends are at different positions."""
    logits = torch.full((2, 3, 3), 9.0)
    logits[0, 2] = torch.tensor([0.0, math.log(2.0), math.log(5.0)])
    logits[1, 1] = torch.tensor([1.0, 3.0, 2.0])
    at = {"end": torch.tensor([2, 1])}
    batch = Batch(
        (JOHN, JOHN), torch.zeros(2, 3, dtype=torch.long), at, torch.tensor([1, 2]), torch.tensor([2, 1])
    )
    assert logit_difference(logits, batch).tolist() == pytest.approx([math.log(2.5), 1.0])
    flat = torch.zeros(2, 3, 3)
    expected = sum(p * math.log(p * 3) for p in (1 / 8, 2 / 8, 5 / 8))
    assert kl_at_end(logits, flat, batch)[0].item() == pytest.approx(expected)
    assert kl_at_end(logits, logits, batch).tolist() == [0.0, 0.0]


def test_padding_changes_nothing():
    runs = world.runs(30)
    row = int(runs.batch.at["end"].argmin())
    alone = tokenised(runs.model, [runs.batch.prompts[row]])
    assert alone.tokens.shape[1] < runs.batch.tokens.shape[1]
    difference = logit_difference(logits_with(runs.model, alone.tokens, {}), alone)
    assert runs.clean[row].item() == pytest.approx(difference.item(), abs=1e-5)


def test_abc_means_against_loops():
    runs, site = world.runs(8), Site("attn_out", 1)
    means = abc_means(runs, world.WORDS, [site], seed=2)[site]
    row = 3
    prompt = runs.batch.prompts[row]
    number = list(dict.fromkeys((p.template, p.order) for p in runs.batch.prompts)).index(
        (prompt.template, prompt.order)
    )
    total = 0
    for drawn in draw_prompts(world.WORDS, 2 * N_ABC, 2 + number):
        if drawn.order == prompt.order:
            text = abc([drawn])[0].__class__(**{**vars(drawn), "abc": True, "template": prompt.template})
            total = total + capture(runs.model, tokenised(runs.model, [text]).tokens, [site])[0][site][0]
    torch.testing.assert_close(means[row, : len(total)], total / N_ABC, rtol=1e-4, atol=1e-5)


def test_splice_rows_against_edited_passes():
    runs = world.runs(8)
    z, _ = world.saes()
    rows = splice_rows(runs, world.WORDS, z, {"both": (0, 2), "absent": (1, 7)})
    assert [r["part"] for r in rows[::3]] == [*(sae.info.name for sae in z.values()), "both"]
    both = {r["prompts"]: r for r in rows if r["part"] == "both"}
    edits = {Site("z", n): z[n].reconstruct for n in (0, 2)}
    changed = logits_with(runs.model, runs.batch.tokens, edits)
    expected = logit_difference(changed, runs.batch)
    assert both["all"]["logit_diff_spliced"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert both["ABBA"]["logit_diff_spliced"] == pytest.approx(expected[::2].mean().item(), abs=1e-5)
    assert both["all"]["kl_spliced"] == pytest.approx(
        kl_at_end(runs.logits, changed, runs.batch).mean().item(), abs=1e-6
    )
    assert both["all"]["logit_diff_clean"] == pytest.approx(runs.clean.mean().item())
    means = abc_means(runs, world.WORDS, [Site("attn_out", n) for n in (0, 2)])
    ablated = logits_with(runs.model, runs.batch.tokens, {s: (lambda _, v=v: v) for s, v in means.items()})
    found = both["all"]["logit_diff_mean"]
    assert found == pytest.approx(logit_difference(ablated, runs.batch).mean().item(), abs=1e-5)
    assert both["all"]["n"] == 8
    assert both["ABBA"]["n"] == both["BABA"]["n"] == 4


@pytest.mark.parametrize("site", ["z", "attn_out"])
def test_ablations_against_splices(site):
    runs = world.runs(8)
    sae = world.random_sae(f"L00.{site}", seed=2, normalize_activations="constant_norm_rescale")
    name, where = sae.info.name, runs.batch.at["S2"]
    seen = at_s2(runs, sae)
    live = [f for f in range(20) if seen.acts[:, f].sum() > 0]
    sometimes = next(f for f in live if (seen.acts[:, f] == 0).any())
    strongest = int(seen.acts.sum(0).argmax())
    for feature in (ERROR, strongest, sometimes):
        edit = drop_error(name, where) if feature == ERROR else ablate(name, feature, where)
        changed, _ = run_spliced(runs.model, runs.batch.tokens, [sae], [edit])
        expected = runs.clean - logit_difference(changed, runs.batch)
        torch.testing.assert_close(ablation_effect(runs, seen, feature), expected, rtol=1e-3, atol=2e-5)
        assert expected.abs().max() > (1e-5 if feature == sometimes else 1e-3)
    assert (ablation_effect(runs, seen, sometimes)[seen.acts[:, sometimes] == 0] == 0).all()


@pytest.mark.parametrize("processing", ["raw", "folded"])
def test_path_patching_against_two_passes(processing):
    """Values of the receivers come from a pass whose stream lacks the part; nothing else does."""
    runs = world.runs(8, processing)
    sae = world.saes(processing)[0][0]
    seen, row, at = at_s2(runs, sae), torch.arange(8), runs.batch.at["S2"]
    feature = int(seen.acts.sum(0).argmax())
    receivers = [(1, 0), (1, 2), (2, 1)]
    part = seen.part(feature) @ runs.model.W_O(0).flatten(0, 1)
    edits = {}
    for layer, head in receivers:
        resid = runs.x[Site("resid_pre", layer)].clone()
        resid[row, at] -= part
        kept = {}

        def keep(x, kept=kept):
            kept["v"] = x
            return x

        def at_s2_alone(x, kept=kept):
            x = x.clone()
            x[row, at] = kept["v"][row, at]
            return x

        places = {Site("resid_pre", layer): lambda _, r=resid: r, Site("v", layer, head): keep}
        logits_with(runs.model, runs.batch.tokens, places)
        edits[Site("v", layer, head)] = at_s2_alone
    changed = logits_with(runs.model, runs.batch.tokens, edits)
    expected = runs.clean - logit_difference(changed, runs.batch)
    found = path_effect(runs, seen, feature, receivers)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    assert expected.abs().max() > 1e-3
    with pytest.raises(ConfigError, match="receiver L0H1 cannot read layer 0"):
        path_effect(runs, seen, feature, [(0, 1)])


def test_heads_of_a_feature_sum_to_its_preactivation():
    runs = world.runs(8)
    for site in ("z", "attn_out"):
        sae = world.random_sae(f"L01.{site}", seed=2, normalize_activations="layer_norm")
        seen = at_s2(runs, sae)
        found = by_head(runs, seen, 3)
        constant = seen.wide.bias[3] + seen.wide.offset[3] / seen.size[:, 0].double()
        pre = sae.preactivations(seen.x)[:, 3].double()
        torch.testing.assert_close(found.sum(1) + constant, pre, rtol=1e-5, atol=1e-5)
        assert found.shape == (8, N_HEADS)


def test_feature_rows_cover_every_live_feature():
    runs, sae = world.runs(8), world.saes()[0][0]
    rows = feature_rows(runs, sae, [(1, 1), (0, 0)], Quiet())
    seen = at_s2(runs, sae)
    live = (seen.acts.sum(0) > 0).nonzero()[:, 0].tolist()
    assert [r["feature"] for r in rows[::3]] == [ERROR, *live]
    one = next(r for r in rows if r["feature"] == live[1] and r["prompts"] == "all")
    assert one["effect"] == pytest.approx(ablation_effect(runs, seen, live[1]).mean().item())
    assert one["path_effect"] == pytest.approx(path_effect(runs, seen, live[1], [(1, 1)]).mean().item())
    assert one["n_active"] == int((seen.acts[:, live[1]] > 0).sum())
    fires = seen.acts[:, live[1]] > 0
    assert one["top_head"] == int(by_head(runs, seen, live[1])[fires].mean(0).argmax())
    assert 0 < one["top_head_share"] <= 1
    assert len(feature_rows(runs, sae, [], Quiet(), most=2)) == 9


def test_noise_against_edits_by_hand():
    runs = world.runs(8)
    rows = {(r["experiment"], r["prompts"]): r for r in noise_rows(runs, world.WORDS, [0, 1], seed=4)}
    assert len(rows) == 3 * (1 + len(CONJUNCTIONS))
    others = {
        "names and filler": disguised(runs.batch.prompts, world.WORDS, 4),
        "and -> with": rejoined(runs.batch.prompts, "with"),
    }
    row, at = torch.arange(8), runs.batch.at["S2"]
    sites = [Site("attn_out", 0), Site("attn_out", 1)]

    def difference(edits):
        return logit_difference(logits_with(runs.model, runs.batch.tokens, edits), runs.batch).mean().item()

    def at_s2_alone(new):
        def edit(x):
            x = x.clone()
            x[row, at] = new
            return x

        return edit

    clean = runs.clean.mean().item()
    zero = difference({s: at_s2_alone(0.0) for s in sites})
    everywhere = difference(dict.fromkeys(sites, torch.zeros_like))
    for name, prompts in others.items():
        batch = tokenised(runs.model, prompts)
        found = capture(runs.model, batch.tokens, sites)[0]
        noised = difference({s: at_s2_alone(found[s][row, batch.at["S2"]]) for s in sites})
        one = rows[name, "all"]
        assert one["logit_diff_noised"] == pytest.approx(noised, abs=1e-5)
        assert one["logit_diff_zero_position"] == pytest.approx(zero, abs=1e-5)
        assert one["logit_diff_zero_all"] == pytest.approx(everywhere, abs=1e-5)
        assert one["kept_position"] == pytest.approx((noised - zero) / (clean - zero), abs=1e-4)
        assert one["kept_all"] == pytest.approx((noised - everywhere) / (clean - everywhere), abs=1e-4)


def test_heads_are_ranked_by_attention():
    runs = world.runs(8)
    found = attention_to(runs, "end", "S2")
    pattern = runs.raw["blocks.2.attn.hook_pattern"]
    by_hand = [pattern[i, 1, runs.batch.at["end"][i], runs.batch.at["S2"][i]].item() for i in range(8)]
    assert found[2, 1].item() == pytest.approx(sum(by_hand) / 8)
    best = strongest_heads(found, range(1, 3), 2)
    assert found[best[0]] == found[1:].max()
    assert best[0] != best[1]


def test_gpt2_names_are_single_tokens_of_its_tokenizer():
    assert len(resource()["names"]) == 99
    assert resource()["gpt2_heads"]["s2 inhibition"] == [[7, 3], [7, 9], [8, 6], [8, 10]]
    assert ModelConfig("gpt2").name == "gpt2"
