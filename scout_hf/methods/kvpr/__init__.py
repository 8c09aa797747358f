"""KVPR (arXiv 2411.17089): recompute a part of KV while the rest is copied to the device."""

from scout_hf.methods.kvpr.kvpr import KVPR

__all__ = ["KVPR"]
