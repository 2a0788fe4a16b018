"""The run and annotation database: SQLite by default, PostgreSQL by URL."""
