"""Text in, token blocks out: sources behind one interface, and a memory-mapped token store."""
