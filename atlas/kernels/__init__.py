"""Loops over plain arrays, compiled to machine code: what is too uneven for whole-array operations."""
