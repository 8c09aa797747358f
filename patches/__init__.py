"""Model families: how a layer computes query, keys and values from a hidden state, one short file per family.

To add a family, write a file with a `Family` subclass that ends in `register_family(...)`, and import it below.
"""

from .base import Family
from .probe import ProbeFamily
from .quiet import call
from .registry import family_of, register_family

# Importing a family's file registers it.
from . import (  # isort: skip  # noqa: F401
    cohere,
    gemma2,
    gemma3,
    gemma4,
    gpt2,
    gpt_neox,
    gpt_oss,
    hybrids,
    indexed,
    latent,
    llama,
    olmo,
    opt,
    phi,
    phi3,
    qwen3,
    qwen_vl,
    smollm3,
    unpredicted,
)

__all__ = ["Family", "ProbeFamily", "call", "family_of", "register_family"]
