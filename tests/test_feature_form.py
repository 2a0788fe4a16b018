"""The note about a feature: where "next unrated" leads, what others wrote, and what blind mode hides."""

# ruff: noqa: F401, F811 (fixtures are imported and then asked for by name)
from types import SimpleNamespace

import pytest

from app.feature_form import next_open
from atlas.db import adjudication, annotations, vocabulary
from atlas.db.adjudication import Decision
from atlas.db.notes import FeatureAnnotation
from atlas.db.places import FeaturePlace
from tests.test_app_views import HOSTILE, Z0, atlas, home, markup, show, words


def write(settings, feature, who, **fields):
    annotations.save_feature(settings, FeatureAnnotation(Z0, feature, who, **fields), 0)


def test_the_next_unrated_feature_is_one_that_fires_round_the_end(atlas):
    firing = (2, 5, 9)
    scope = SimpleNamespace(settings=atlas, ask=lambda query, sae: firing)
    ref = SimpleNamespace(sae=Z0)
    write(atlas, 5, "ann", interpretability="partly")
    write(atlas, 9, "bob", interpretability="partly")
    assert next_open(scope, ref, 2, "ann") == 9
    assert next_open(scope, ref, 9, "ann") == 2
    assert next_open(scope, ref, 9, "bob") == 2
    for feature in (2, 9):
        write(atlas, feature, "ann", interpretability="uninterpretable")
    assert next_open(scope, ref, 2, "ann") is None


def test_tags_in_use_come_commonest_first(atlas):
    write(atlas, 1, "ann", tags=("b", "a"))
    write(atlas, 2, "bob", tags=("c", "b"))
    annotations.save_feature(atlas, FeatureAnnotation("other", 1, "ann", tags=("d",)), 0)
    assert vocabulary.known_tags(atlas, Z0) == ("b", "a", "c")
    assert [(n.feature, n.annotator) for n in annotations.list_features(atlas, Z0, feature=2)] == [(2, "bob")]


def test_what_others_wrote_and_what_was_agreed_is_shown_as_plain_text(atlas):
    write(atlas, 3, "bob", label=HOSTILE[:100], interpretability="partly", tags=("x",))
    place = FeaturePlace(Z0, 3)
    agreed = Decision(place, "bob", label="digits", interpretability="interpretable", reason="both said so")
    adjudication.decide(atlas, agreed, 0)
    at = show("feature", sae=Z0, feature="3")
    said = [element.value for element in at.text]
    assert "Agreed (bob): digits (interpretable)\nboth said so" in said
    assert any(text.startswith(f"bob (partly): {HOSTILE[:100]}") for text in said)
    assert not any("<script>" in body for body in markup(at))


def test_blind_hides_families_and_other_peoples_labels(atlas):
    assert 'class="ha-chips"' in words(show("feature", sae=Z0, feature="3"))
    write(atlas, 3, "bob", label="hers")
    at = show("feature", sae=Z0, feature="3", blind="1")
    assert 'class="ha-chips"' not in words(at)
    assert not [element.value for element in at.text if "hers" in element.value]
