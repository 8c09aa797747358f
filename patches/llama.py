"""Llama, and families that compute their query as Llama does."""

from __future__ import annotations

from .base import Family
from .registry import register_family


class Llama(Family):
    """Pre-norm, one q_proj (with or without bias), rotary embedding by the model's own function.

    Differences between these families (bias, softmax multiplier, experts, sliding window, interleaved or partial rotary
    embedding) are in the modules and functions that are called.
    """

    model_types: tuple[str, ...] = (
        "llama",
        "mistral",
        "mixtral",
        "ministral",
        "qwen2",
        "qwen2_moe",
        "granite",
        "granitemoe",
        "granitemoeshared",
        "starcoder2",
        "seed_oss",
        "ernie4_5",
        "ernie4_5_moe",
        "glm",
        "glm4",
        "arcee",
        "helium",
        "nemotron",
        "phimoe",
    )


register_family(Llama())
