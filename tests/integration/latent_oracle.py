"""The oracle of ``selection_oracle`` for latent attention: blocks are chosen by latents, once for all heads."""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from scout_hf.compat.cache_names import CACHE
from tests.integration import selection_oracle
from tests.integration.common import run

NAME = "latent_oracle"


class NotingCache(DynamicCache):
    """Keeps what every layer holds as one tensor per layer, (batch, tokens, latent and rotated part)."""

    def update(self, latent, rotated, layer_idx, *args, **kwargs):
        held = super().update(latent, rotated, layer_idx, *args, **kwargs)
        NOTED[layer_idx] = torch.cat(held, dim=-1)[:, 0].double()
        return held


NOTED: dict[int, torch.Tensor] = {}


def projected(module, row):
    """Queries of one row, (heads, width), in the space of latents, head by head."""
    up = module.kv_b_proj.weight.double().view(len(row), -1, module.kv_lora_rank)
    plain = module.qk_nope_head_dim
    return torch.stack([torch.cat([up[h, :plain].T @ q[:plain], q[plain:]]) for h, q in enumerate(row.double())])


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """In float64 over the model's own keys and values, of the tokens that the oracle chooses."""
    oracle, layer = selection_oracle.ACTIVE[-1], module.layer_idx
    oracle.mask = None if attention_mask is None else attention_mask.bool()
    batch, _, length, _ = query.shape
    total, out = key.shape[2], []
    for row in range(batch):
        last, latents = projected(module, query[row, :, -1]), NOTED[layer][row]
        if length == 1:
            allowed = oracle.allowed(layer, row, 0, last, latents)[None]
            oracle.attended.setdefault(layer, []).append(int(allowed.sum()))
        else:
            allowed = torch.arange(total) <= torch.arange(total)[:, None]
            if oracle.mask is not None:
                allowed = allowed & oracle.mask[row] | torch.eye(total, dtype=torch.bool)
            oracle.prefilled(layer, row, 0, last, latents)
        scores = query[row].double() @ key[row].double().transpose(1, 2) * scaling
        out.append(scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value[row].double())
    return torch.stack(out).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: kwargs.get("attention_mask"))


def sparse_run(model, inputs, oracle, new):
    """Tokens and logits of a stock model that attends to what the oracle chooses."""
    latent = hasattr(model.model.layers[0].self_attn, "expand_kv")
    model.set_attn_implementation(NAME if latent else selection_oracle.NAME)
    selection_oracle.ACTIVE.append(oracle)
    try:
        return run(model, inputs, new=new, **({CACHE: NotingCache(config=model.config)} if latent else {}))
    finally:
        selection_oracle.ACTIVE.pop()
        NOTED.clear()
