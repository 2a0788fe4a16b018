"""The two SAEs of one head: what its queries and keys, rebuilt from features, still do, and which do it."""
