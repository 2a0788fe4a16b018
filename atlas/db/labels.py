"""Labels of the features that a page shows, in one query, however many features have been annotated."""

from collections.abc import Collection, Mapping

from sqlalchemy import and_, or_, select

from atlas.db.models import FeatureNote
from atlas.db.session import reading
from atlas.settings import Settings


def feature_labels(
    settings: Settings,
    features: Mapping[str, Collection[int]],
    *,
    annotator: str | None = None,
    alone: bool = False,
) -> dict[tuple[str, int], str]:
    """The label of each of some features that has one, by SAE and feature; ``features`` lists them by SAE.

    Of several annotators' labels, that of ``annotator``, else that of the first by name; with ``alone`` only
    the former.
    """
    asked = [
        and_(FeatureNote.sae == sae, FeatureNote.feature.in_(sorted(numbers)))
        for sae, numbers in features.items()
        if numbers
    ]
    if not asked:
        return {}
    query = select(FeatureNote.sae, FeatureNote.feature, FeatureNote.annotator, FeatureNote.label)
    query = query.where(or_(*asked), FeatureNote.label != "")
    if alone:
        query = query.where(FeatureNote.annotator == annotator)
    found: dict[tuple[str, int], str] = {}
    with reading(settings) as session:
        for sae, feature, name, label in session.execute(query.order_by(FeatureNote.annotator)):
            if name == annotator or (sae, feature) not in found:
                found[sae, feature] = label
    return found
