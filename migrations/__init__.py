"""Alembic migrations of the run and annotation database; run them with ``atlas db upgrade``."""
