"""KVPR (arXiv 2411.17089): recompute a part of KV while the rest crosses the link."""

from scout_hf.methods.kvpr.kvpr import KVPR

__all__ = ["KVPR"]
