"""Gemma and Gemma2."""

from __future__ import annotations

from .base import Family
from .registry import register_family


class Gemma2(Family):
    """As Llama: softcap and `query_pre_attn_scalar` belong to the attention call."""

    model_types = ("gemma", "gemma2")


register_family(Gemma2())
