"""Differences between releases of transformers and between wrappers of models."""
