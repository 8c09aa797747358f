"""gpt-oss."""

from __future__ import annotations

from .base import Family
from .registry import register_family


class GptOss(Family):
    """As Llama: the attention sinks belong to the attention call (`s_aux`)."""

    model_types = ("gpt_oss",)


register_family(GptOss())
