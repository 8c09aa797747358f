"""A tiny random model of a type, with weights that let attention matter."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from scout_hf.eval.families.tiny import tiny_config

SPREAD, NOISE = 0.1, 0.1
"""Standard deviations of weights, and of what is added to norms and biases."""


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model in eval mode and float32.

    NoConfig, or whatever transformers raises if it cannot make one.
    """
    config = tiny_config(model_type)
    # sdpa leaves softcaps out before transformers 5.24; scout_hf never does.
    how = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **how)
        spread(model)
    return model.eval()


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Widen weights and move norms off one and biases off zero.

    As initialised, attention is almost uniform, and a forgotten norm or bias changes nothing.
    """
    for parameter in model.parameters():
        if not bool(parameter.isfinite().all()) or float(parameter.abs().max()) > 1e4:
            parameter.normal_(std=SPREAD)  # memory that the model's own code leaves as it finds it
        elif parameter.ndim < 2 or not float(parameter.std()):
            parameter.add_(NOISE * torch.randn_like(parameter))
        elif (now := float(parameter.std())) < SPREAD:
            parameter.mul_(SPREAD / now)
