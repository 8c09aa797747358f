"""Pocket models, benchmarks and evaluation; uses the public API only."""
