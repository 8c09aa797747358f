"""Models that a question needs: with silent layers, of a type that nobody has heard of; and all there is of one."""

import copy
import inspect

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scout_hf import ScoutCache
from tests.integration.common import TWO_TIERS, llama

WRITES = ("o_proj", "out_proj", "dense", "down_proj", "fc2", "dense_4h_to_h", "c_proj", "output_linear", "w2", "fc_out")
WRITES += ("per_layer_projection",)


@torch.no_grad()
def silence(model, family) -> int:
    """Let no layer before the last scout layer write to the residual stream; the index of that layer.

    Layer i's input is then layer i+1's, so that the query predicted for layer i+1 is its true query.
    """
    layers = family.layers(family.decoder(model))
    cache = ScoutCache(model.config, **TWO_TIERS)
    last = max(index for layer in cache.scout_layers for index in (layer.layer_idx, *layer.readers))
    for layer in layers[:last]:
        for name, parameter in layer.named_parameters():
            parts = name.removesuffix(".weight").removesuffix(".bias").removesuffix("_bias").split(".")
            if parts[-1] in WRITES:
                parameter.zero_()
    return last


class UnknownConfig(LlamaConfig):
    model_type = "llama_of_tomorrow"


def unknown(model_class=LlamaForCausalLM):
    """A Llama whose type nobody has heard of."""
    stock = llama(initializer_range=0.1)
    config = UnknownConfig(**{k: v for k, v in stock.config.to_dict().items() if k != "model_type"})
    model = model_class(config).eval()
    model.load_state_dict(stock.state_dict())
    return model


def snapshot(model):
    """Every attribute of every module, the items of its dicts, its forward signature, and the configs."""
    held = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            held[name, key] = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)
        held[name, "type"] = type(module)
        held[name, "forward"] = inspect.signature(module.forward)
    for config in (model.config, model.generation_config):
        held[type(config), "content"] = copy.deepcopy(config.to_dict())
        held[type(config), "attributes"] = copy.deepcopy(config.__dict__)
    held["implementation"] = model.config._attn_implementation
    return held
