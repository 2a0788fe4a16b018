"""Annotations of heads and features, and their history."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def _make_history() -> None:
    op.create_table(
        "annotation_history",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("model", sa.String(200)),
        sa.Column("layer", sa.Integer()),
        sa.Column("head", sa.Integer()),
        sa.Column("sae", sa.String(300)),
        sa.Column("feature", sa.Integer()),
        sa.Column("annotator", sa.String(80), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("saved_at", TIME, nullable=False),
        sa.CheckConstraint("kind IN ('head', 'feature')", name=op.f("ck_annotation_history_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_annotation_history")),
    )
    op.create_index(
        "ix_annotation_history_model_layer_head", "annotation_history", ["model", "layer", "head"]
    )
    op.create_index("ix_annotation_history_sae_feature", "annotation_history", ["sae", "feature"])


def _make_feature_annotations() -> None:
    op.create_table(
        "feature_annotations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("sae", sa.String(300), nullable=False),
        sa.Column("feature", sa.Integer(), nullable=False),
        sa.Column("annotator", sa.String(80), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("interpretability", sa.String(40)),
        sa.Column("notes", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.CheckConstraint(
            "interpretability IN ('interpretable', 'partly', 'uninterpretable')",
            name=op.f("ck_feature_annotations_interpretability"),
        ),
        sa.CheckConstraint("feature >= 0", name=op.f("ck_feature_annotations_feature")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feature_annotations")),
        sa.UniqueConstraint(
            "sae", "feature", "annotator", name=op.f("uq_feature_annotations_sae_feature_annotator")
        ),
    )


def _make_head_annotations() -> None:
    op.create_table(
        "head_annotations",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("head", sa.Integer(), nullable=False),
        sa.Column("annotator", sa.String(80), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("groupings", sa.JSON(), nullable=False),
        sa.Column("semanticity", sa.String(40)),
        sa.Column("confidence", sa.Integer()),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("star", sa.Boolean(), nullable=False),
        sa.Column("novel", sa.Boolean(), nullable=False),
        sa.Column("notes", sa.Text(), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("seconds_spent", sa.Double(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.CheckConstraint(
            "semanticity IN ('monosemantic', 'nearly_monosemantic', 'bisemantic', 'polysemantic', 'unclear')",
            name=op.f("ck_head_annotations_semanticity"),
        ),
        sa.CheckConstraint("status IN ('draft', 'done')", name=op.f("ck_head_annotations_status")),
        sa.CheckConstraint("confidence BETWEEN 1 AND 5", name=op.f("ck_head_annotations_confidence")),
        sa.CheckConstraint("layer >= 0 AND head >= 0", name=op.f("ck_head_annotations_indices")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_head_annotations")),
        sa.UniqueConstraint(
            "model",
            "layer",
            "head",
            "annotator",
            name=op.f("uq_head_annotations_model_layer_head_annotator"),
        ),
    )


def upgrade() -> None:
    _make_history()
    _make_feature_annotations()
    _make_head_annotations()


def downgrade() -> None:
    op.drop_table("head_annotations")
    op.drop_table("feature_annotations")
    op.drop_table("annotation_history")
