"""Interpretability surveys: a random sample of features, judged blind, and the share that is interpretable.

The sample is drawn once, by a seed, and stored; ratings are kept apart from annotations, so that what was
judged blind is never mixed with what was judged after reading others' labels.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2s

from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError

from atlas.access import demand
from atlas.agreement import krippendorff_alpha, wilson_interval
from atlas.db.models import INTERPRETABILITY
from atlas.db.notes import LABEL_LENGTH, check_length, check_name
from atlas.db.review_models import Survey as SurveyRow
from atlas.db.review_models import SurveyRating as RatingRow
from atlas.db.session import reading, writing
from atlas.errors import ConfigError, ConflictError, one_of
from atlas.settings import Settings

SKIPPED = "skipped"
RATINGS = (*INTERPRETABILITY, SKIPPED)
SURVEY_NAME = 120
MOST_FEATURES = 5_000


@dataclass(frozen=True)
class Survey:
    """A sample of features in the order in which they are shown, mixed over its SAEs."""

    name: str
    model: str
    release: str
    n_each: int
    seed: int
    alive: Mapping[str, int]
    """Of each SAE, how many features fire: what the sample stands for."""
    sample: tuple[tuple[str, int], ...]
    created_by: str
    created_at: datetime


@dataclass(frozen=True)
class Rating:
    """How one annotator judged one feature of a survey."""

    sae: str
    feature: int
    annotator: str
    rating: str
    label: str = ""
    seconds_spent: float = 0.0
    version: int = 0
    rated_at: datetime | None = None


@dataclass(frozen=True)
class Share:
    """The share of features judged interpretable, with its 95% interval; ``sae`` is empty for all SAEs."""

    sae: str
    n: int
    counts: Mapping[str, int]
    share: float
    low: float
    high: float


def draw(alive: Mapping[str, Sequence[int]], n_each: int, seed: int) -> tuple[tuple[str, int], ...]:
    """``n_each`` firing features of every SAE, each equally likely, and all of them in one mixed order.

    Features are ranked by a hash of seed, SAE and number, so the draw is the same on every machine, and a
    larger ``n_each`` extends the sample of a smaller one. An SAE with fewer features gives all it has.

    >>> one = draw({"a": range(100), "b": range(100)}, 3, seed=1)
    >>> len(one), set(one) < set(draw({"a": range(100), "b": range(100)}, 4, seed=1))
    (6, True)
    """

    def place(what: str, sae: str, feature: int) -> bytes:
        return blake2s(f"{what} {seed} {sae} {feature}".encode(), digest_size=16).digest()

    chosen = [
        (sae, feature)
        for sae, features in alive.items()
        for feature in sorted(features, key=partial(place, "draw", sae))[:n_each]
    ]
    return tuple(sorted(chosen, key=lambda one: place("order", *one)))


def create_survey(
    settings: Settings,
    name: str,
    who: str,
    *,
    model: str,
    release: str,
    alive: Mapping[str, Sequence[int]],
    n_each: int,
    seed: int,
) -> Survey:
    """Draw and store a sample from the firing features of some SAEs.

    Raises ConfigError for a value that is not allowed, ConflictError where the name is taken.
    """
    demand("annotate", annotator=who)
    name = " ".join(name.split())
    check_length("survey", name, SURVEY_NAME, least=1)
    check_name("annotator", who)
    if n_each < 1 or not any(alive.values()):
        raise ConfigError(f"a sample of {n_each} from {len(alive)} SAEs is empty; allowed: 1 or more of each")
    sample = draw(alive, n_each, seed)
    if len(sample) > MOST_FEATURES:
        raise ConfigError(f"the sample has {len(sample)} features; allowed: at most {MOST_FEATURES}")
    values = {"name": name, "model": model, "release": release, "n_each": n_each, "seed": seed}
    values |= {"alive": {sae: len(features) for sae, features in alive.items()}, "created_by": who}
    values |= {"sample": [{"sae": s, "feature": int(f)} for s, f in sample], "created_at": datetime.now(UTC)}
    try:
        with writing(settings) as session:
            session.execute(insert(SurveyRow).values(**values))
    except IntegrityError:
        raise ConflictError(f"survey {name!r} is there already; choose another name") from None
    return load_survey(settings, name)


def _survey(row: SurveyRow) -> Survey:
    sample = tuple((one["sae"], one["feature"]) for one in row.sample)
    fields = {name: getattr(row, name) for name in Survey.__dataclass_fields__}
    return Survey(**{**fields, "sample": sample})


def list_surveys(settings: Settings, model: str | None = None) -> list[Survey]:
    """Surveys, the newest first; of one model, or of all."""
    query = select(SurveyRow).order_by(SurveyRow.created_at.desc(), SurveyRow.name)
    if model is not None:
        query = query.where(SurveyRow.model == model)
    with reading(settings) as session:
        return [_survey(row) for row in session.scalars(query)]


def load_survey(settings: Settings, name: str) -> Survey:
    """One survey; ConfigError names those that exist."""
    with reading(settings) as session:
        row = session.get(SurveyRow, name)
        if row is not None:
            return _survey(row)
    one_of("survey", name, [one.name for one in list_surveys(settings)])
    raise ConfigError(f"survey {name!r} was just removed")


def rate(settings: Settings, survey: Survey, one: Rating, expected_version: int = 0) -> Rating:
    """Store a rating on top of ``expected_version`` (0 = the first) and return it as stored.

    Raises ConfigError for a feature outside the sample, ConflictError where it was rated meanwhile.
    """
    demand("annotate", annotator=one.annotator)
    check_name("annotator", one.annotator)
    check_length("label", one.label, LABEL_LENGTH)
    one_of("rating", one.rating, RATINGS)
    if (one.sae, one.feature) not in survey.sample:
        raise ConfigError(f"feature {one.feature} of {one.sae} is not in survey {survey.name!r}")
    key = {"survey": survey.name, "sae": one.sae, "feature": one.feature, "annotator": one.annotator}
    values = {"rating": one.rating, "label": one.label, "seconds_spent": one.seconds_spent}
    values |= {"version": expected_version + 1, "rated_at": datetime.now(UTC)}
    where = [getattr(RatingRow, name) == value for name, value in key.items()]
    try:
        with writing(settings) as session:
            if expected_version == 0:
                session.execute(insert(RatingRow).values(**key, **values))
            else:
                newest = [*where, RatingRow.version == expected_version]
                done = session.execute(update(RatingRow).where(*newest).values(**values))
                if done.rowcount != 1:  # type: ignore[attr-defined]
                    raise ConflictError(f"feature {one.feature} of {one.sae} was rated again meanwhile")
    except IntegrityError:
        raise ConflictError(f"feature {one.feature} of {one.sae} was rated by you already") from None
    return Rating(one.sae, one.feature, one.annotator, **values)  # type: ignore[arg-type]


def ratings(settings: Settings, survey: str, annotator: str | None = None) -> list[Rating]:
    """The ratings of a survey, by SAE, feature and annotator; all or one annotator's."""
    query = select(RatingRow).where(RatingRow.survey == survey)
    if annotator is not None:
        query = query.where(RatingRow.annotator == annotator)
    names = list(Rating.__dataclass_fields__)
    with reading(settings) as session:
        rows = session.scalars(query.order_by(RatingRow.sae, RatingRow.feature, RatingRow.annotator))
        return [Rating(**{name: getattr(row, name) for name in names}) for row in rows]


def shares(survey: Survey, rated: Iterable[Rating]) -> tuple[Share, ...]:
    """The share of features judged interpretable: of every SAE, and of all together (``sae`` is empty).

    share = hits / n over the ratings other than skipped, with Wilson's 95% interval. All SAEs together: each
    counts by its number of firing features, p = sum_k w_k p_k with w_k = alive_k / sum alive over the rated
    SAEs; the interval is Wilson's for p and n_eff = 1 / sum_k (w_k^2 / n_k) draws, which is n where the SAEs
    have as many features and ratings; it leaves out what stratifying gains. Ratings of one feature by several
    annotators count by their majority, without one as ``partly``. Dimensionless.
    """
    votes: dict[tuple[str, int], Counter[str]] = {}
    for one in rated:
        if one.rating != SKIPPED:
            votes.setdefault((one.sae, one.feature), Counter())[one.rating] += 1
    by_sae: dict[str, Counter[str]] = {}
    for (sae, _), counts in sorted(votes.items()):
        by_sae.setdefault(sae, Counter())[_majority(counts)] += 1
    found = [_share(sae, counts) for sae, counts in by_sae.items()]
    return (*found, _together(survey, found)) if found else ()


def _majority(counts: Counter[str]) -> str:
    """The rating of more than half; else ``partly``, which no share counts as interpretable."""
    rating, n = counts.most_common(1)[0]
    return rating if 2 * n > counts.total() else "partly"


def _share(sae: str, counts: Counter[str]) -> Share:
    n, hits = counts.total(), counts["interpretable"]
    return Share(sae, n, dict(counts), hits / n, *wilson_interval(hits, n))


def _together(survey: Survey, found: Sequence[Share]) -> Share:
    whole = sum(survey.alive[one.sae] for one in found)
    weights = [survey.alive[one.sae] / whole for one in found]
    p = sum(w * one.share for w, one in zip(weights, found, strict=True))
    n = 1 / sum(w * w / one.n for w, one in zip(weights, found, strict=True))
    counts: Counter[str] = Counter()
    for one in found:
        counts.update(one.counts)
    return Share("", counts.total(), dict(counts), p, *wilson_interval(min(p * n, n), n))


def survey_alpha(rated: Iterable[Rating]) -> float:
    """Krippendorff's alpha of the ratings, as unordered classes; NaN where no feature has two."""
    units: dict[tuple[str, int], list[str]] = {}
    for one in rated:
        if one.rating != SKIPPED:
            units.setdefault((one.sae, one.feature), []).append(one.rating)
    return krippendorff_alpha(units.values())
