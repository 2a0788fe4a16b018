"""Named queries behind the app's views: pure functions from a read-only connection to rows.

Every function takes a DuckDB connection on which a release's tables can be named plainly (see
``atlas.store.connection``) and returns a ``pyarrow.Table`` or small frozen dataclasses. Look-ups go by the
sort key of the table (sae, feature, ...), so that a view reads only what it shows.
"""
