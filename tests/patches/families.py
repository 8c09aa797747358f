"""What the tests of handwritten families share: their names, those that lack a part, and ways to break one."""

from __future__ import annotations

import inspect

import pytest

from scout_hf.compat.shared_kv import storing_layers
from scout_hf.patches import ProbeFamily
from tests.patches.tiny import INDEXED, LATENT, TINY, own_cache


def case(name: str, *others):
    """`name`, and what goes with it, as parameters, skipped where the installed transformers has nothing to patch."""
    reason = own_cache(name)
    return pytest.param(name, *others, marks=pytest.mark.skipif(bool(reason), reason=reason))


UNPREDICTED = {"longcat_flash", "zaya", *INDEXED} - {"minimax_m3"}
NAMES = [case(name) for name in TINY if name not in UNPREDICTED]
LATENT_NAMES = [case(name) for name in LATENT if name not in UNPREDICTED]
"""Their keys and values are not what reaches the cache."""
NO_NORM = {"olmo2", "olmo3", "olmo_hybrid", "opt_post_norm"}
STACKED = {"gemma3n"}
"""Their layers get several hidden states at once."""
NO_ROTARY = {"opt", "opt_post_norm", "gpt2", "jamba", "nemotron_h", "granite_hybrid", "kimi_linear"}


def attending(step) -> list[int]:
    """The layers with softmax attention."""
    return [index for index, seen in enumerate(step.layers) if seen.keys is not None]


def storing(model, step) -> list[int]:
    """The attending layers that have keys and values of their own."""
    return [index for index in attending(step) if index not in storing_layers(model.config)]


def unprobed(family, model) -> bool:
    """Whether layers put keys and values where others find them, which one by itself cannot."""
    layer = family.layers(family.decoder(model))[-1]
    return "shared_kv_states" in inspect.signature(layer.forward).parameters


def rotated(name: str, step) -> int:
    """An attending layer that has a rotary embedding, the last where all have."""
    return attending(step)[0] if name == "cohere2" else attending(step)[-1]


def changed(family, **methods):
    """The family with some methods replaced, for negative controls."""
    return type("Changed", (type(family),), methods)()


def known(module_class):
    """A class of modules as if it came from a package of layers that may be called at any time."""
    module_class.forward.__module__ = "peft.tuners.stand_in"
    return module_class


def probe_of(family):
    """A probe that finds the layers where `family` does."""
    return changed(ProbeFamily(), layers=lambda self, decoder: family.layers(decoder))
