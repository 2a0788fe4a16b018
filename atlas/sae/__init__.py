"""Sparse autoencoders: architectures, training, metrics, files."""
