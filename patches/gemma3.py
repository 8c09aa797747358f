"""Gemma3, text only or as the text decoder of the multi-modal model."""

from __future__ import annotations

from .qwen3 import Qwen3
from .registry import register_family


class Gemma3(Qwen3):
    """Normalises every head of the query; sliding and full layers have different rotary frequencies."""

    model_types = ("gemma3", "gemma3_text")


register_family(Gemma3())
