"""Verdicts on a head's features; comments, agreed verdicts, merged groupings, surveys."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
KINDS = "kind IN ('head', 'feature')"
RATINGS = "IN ('interpretable', 'partly', 'uninterpretable'"
CLASSES = "('monosemantic', 'nearly_monosemantic', 'bisemantic', 'polysemantic', 'unclear')"


def _places() -> list[sa.Column]:
    """What a row is about: a head, or a feature."""
    return [
        sa.Column("model", sa.String(200)),
        sa.Column("layer", sa.Integer()),
        sa.Column("head", sa.Integer()),
        sa.Column("sae", sa.String(300)),
        sa.Column("feature", sa.Integer()),
    ]


def _make_comments() -> None:
    op.create_table(
        "comments",
        sa.Column("id", ROW_NUMBER, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        *_places(),
        sa.Column("author", sa.String(80), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("withdrawn_at", TIME),
        sa.CheckConstraint(KINDS, name=op.f("ck_comments_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_comments")),
    )
    op.create_index("ix_comments_model_layer_head", "comments", ["model", "layer", "head"])
    op.create_index("ix_comments_sae_feature", "comments", ["sae", "feature"])


def _make_adjudications() -> None:
    op.create_table(
        "adjudications",
        sa.Column("id", ROW_NUMBER, nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("place", sa.String(340), nullable=False),
        *_places(),
        sa.Column("adjudicator", sa.String(80), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("groupings", sa.JSON(), nullable=False),
        sa.Column("semanticity", sa.String(40)),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("interpretability", sa.String(40)),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("decided_at", TIME, nullable=False),
        sa.CheckConstraint(KINDS, name=op.f("ck_adjudications_kind")),
        sa.CheckConstraint(f"semanticity IN {CLASSES}", name=op.f("ck_adjudications_semanticity")),
        sa.CheckConstraint(f"interpretability {RATINGS})", name=op.f("ck_adjudications_interpretability")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adjudications")),
        sa.UniqueConstraint("kind", "place", "version", name=op.f("uq_adjudications_kind_place_version")),
    )


def _make_merges() -> None:
    op.create_table(
        "grouping_merges",
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("word", sa.String(60), nullable=False),
        sa.Column("stands_for", sa.String(60), nullable=False),
        sa.Column("merged_by", sa.String(80), nullable=False),
        sa.Column("merged_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("model", "word", name=op.f("pk_grouping_merges")),
    )


def _make_surveys() -> None:
    op.create_table(
        "surveys",
        sa.Column("name", sa.String(120), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("release", sa.String(200), nullable=False),
        sa.Column("n_each", sa.Integer(), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("alive", sa.JSON(), nullable=False),
        sa.Column("sample", sa.JSON(), nullable=False),
        sa.Column("created_by", sa.String(80), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.CheckConstraint("n_each >= 1", name=op.f("ck_surveys_n_each")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_surveys")),
    )
    op.create_table(
        "survey_ratings",
        sa.Column("survey", sa.String(120), nullable=False),
        sa.Column("sae", sa.String(300), nullable=False),
        sa.Column("feature", sa.Integer(), nullable=False),
        sa.Column("annotator", sa.String(80), nullable=False),
        sa.Column("rating", sa.String(40), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("seconds_spent", sa.Double(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("rated_at", TIME, nullable=False),
        sa.CheckConstraint(f"rating {RATINGS}, 'skipped')", name=op.f("ck_survey_ratings_rating")),
        sa.ForeignKeyConstraint(
            ["survey"], ["surveys.name"], name=op.f("fk_survey_ratings_survey_surveys"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("survey", "sae", "feature", "annotator", name=op.f("pk_survey_ratings")),
    )


def upgrade() -> None:
    op.add_column(
        "head_annotations", sa.Column("verdicts", sa.JSON(), nullable=False, server_default=sa.text("'[]'"))
    )
    _make_comments()
    _make_adjudications()
    _make_merges()
    _make_surveys()


def downgrade() -> None:
    op.drop_table("survey_ratings")
    op.drop_table("surveys")
    op.drop_table("grouping_merges")
    op.drop_table("adjudications")
    op.drop_table("comments")
    op.drop_column("head_annotations", "verdicts")
