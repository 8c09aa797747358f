"""Decode steps of models that choose with an indexer what they attend to: stock's masks beside scout_hf's pages.

python examples/indexed_decode.py 32768

Random models with attention as in MiniMax M3 (4 KV heads; 16 blocks of 128 tokens) and DeepSeek V3.2 (latents; 2048
tokens), but narrow, of two layers, and of 16 heads for DeepSeek. The cache is filled with random numbers, not by a
prompt. Both attend to the same tokens, so that the logits agree.
"""

import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import scout_hf
from scout_hf import CACHE, UnsupportedModelError

SHARED = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 1024}
SHARED |= {"num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 1 << 20}
SHARED |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mlp_layer_types": ["dense"] * 2}
MODELS = {
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse"] * 2, "dense_intermediate_size": 1024},
    "deepseek_v32": {"num_attention_heads": 16, "num_key_value_heads": 16, "index_n_heads": 16},
}


def fill(cache, model, tokens):
    """Random keys, values and keys of the indexer in every layer, in the shapes that the model gives them."""
    like, numbers = DynamicCache(config=model.config), torch.Generator().manual_seed(0)
    step(model, like, 3)

    def random_as(tensor):
        return torch.randn((*tensor.shape[:-2], tokens, tensor.shape[-1]), generator=numbers)

    for index, held in enumerate(like.layers):
        cache.update(random_as(held.keys), random_as(held.values), index)
        if hasattr(held, "idx_keys"):
            cache.layers[index].update_index(random_as(held.idx_keys))
        else:
            cache.update_indexer(random_as(held.indexer_keys), index)
    return cache


@torch.no_grad()
def step(model, cache, token):
    start = time.perf_counter()
    logits = model(torch.tensor([[token]]), **{CACHE: cache}, use_cache=True).logits[0, -1]
    return logits.float(), time.perf_counter() - start


def compare(kind, tokens, steps):
    config = AutoConfig.for_model(kind, **SHARED, **MODELS[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stock = fill(DynamicCache(config=config), model, tokens)
    ours = fill(scout_hf.ScoutCache(config), model, tokens)
    took, apart = {"stock": [], "scout_hf": []}, 0.0
    for number in range(steps):
        expected, seconds = step(model, stock, 3 + number)
        took["stock"].append(seconds)
        with scout_hf.patch(model) as handle:
            got, seconds = step(model, ours, 3 + number)
            attended = handle.stats().attended_tokens
        took["scout_hf"].append(seconds)
        apart = max(apart, ((got - expected).abs().max() / expected.abs().max()).item())
    # The first step of each sets things up.
    best = {name: 1e3 * min(seconds[1:]) for name, seconds in took.items()}
    print(f"{kind}, {tokens} tokens, {attended:.0f} attended: {best['stock']:.1f} ms a step with stock,", end=" ")
    print(f"{best['scout_hf']:.1f} ms with scout_hf; logits differ by {apart:.1e} of the largest")
    return apart


if __name__ == "__main__":
    tokens = int(sys.argv[1]) if sys.argv[1:] else 4096
    compared = 0
    for kind in MODELS:
        if kind not in CONFIG_MAPPING:
            print(f"{kind}: not in this release of transformers")
            continue
        try:
            apart = compare(kind, tokens, steps=6)
        except UnsupportedModelError as error:
            print(error)
            continue
        if apart > 1e-4:
            sys.exit(f"{kind}: logits differ by {apart:.1e}")
        compared += 1
    print(f"{compared} of {len(MODELS)} compared")
    print("ok")
