"""Circuits through features: splice SAEs into a model, trace a feature to its sources, and the IOI suite."""
