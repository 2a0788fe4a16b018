"""Tables on disk: atomic files, Parquet, published DuckDB releases, and SQL over them."""
