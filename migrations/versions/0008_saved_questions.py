"""Searches and queries that people keep."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "saved_questions",
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("author", sa.String(80), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("shared", sa.Boolean(), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("kind IN ('search', 'sql', 'sql_history')", name=op.f("ck_saved_questions_kind")),
        sa.PrimaryKeyConstraint("kind", "author", "name", name=op.f("pk_saved_questions")),
    )


def downgrade() -> None:
    op.drop_table("saved_questions")
