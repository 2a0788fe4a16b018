"""Run migrations on the connection that :mod:`atlas.db.schema` hands over; it owns the transaction."""

from alembic import context
from sqlalchemy import Connection

from atlas.db import review_models as _review_models  # noqa: F401 (adds its tables to the metadata)
from atlas.db.models import Base
from atlas.errors import DatabaseError


def migrate() -> None:
    """Configure Alembic for this connection and run what was asked for."""
    connection = context.config.attributes.get("connection")
    if not isinstance(connection, Connection):
        raise DatabaseError("migrations run through `atlas db upgrade`, not through alembic alone")
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,
        compare_type=True,
    )
    context.run_migrations()


migrate()
