"""Tiny random models of every family, made from configs: nothing is downloaded.

from tests.patches.tiny import TINY, tiny_model
model = tiny_model("gemma3", sliding_window=8)
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from scout_hf.compat.indexed_layers import choosing_layers, keep_positions

VOCAB = 128
LINEAR_THEN_FULL = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
SLIDING_THEN_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16}
_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 16,
    "layer_types": SLIDING_THEN_FULL,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Tiny:
    """One entry of `TINY`: a model type and what its config needs beyond the common shape."""

    model_type: str
    config: dict = field(default_factory=dict)
    eager: bool = False
    """Neither softcap nor sinks are served by sdpa."""


TINY: dict[str, Tiny] = {
    "llama": Tiny("llama"),
    "mistral": Tiny("mistral", {"sliding_window": None}),
    "mixtral": Tiny("mixtral", _LOCAL_EXPERTS | {"sliding_window": None}),
    "ministral": Tiny("ministral", {"layer_types": SLIDING_THEN_FULL, "sliding_window": 16, "head_dim": 8}),
    "qwen2": Tiny("qwen2"),
    "qwen2_sliding": Tiny(
        "qwen2", {"use_sliding_window": True, "sliding_window": 16, "layer_types": SLIDING_THEN_FULL}
    ),
    "qwen2_moe": Tiny("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3": Tiny("qwen3", {"head_dim": 16}),
    "qwen3_moe": Tiny("qwen3_moe", _EXPERTS | {"head_dim": 16}),
    "qwen3_next": Tiny(
        "qwen3_next",
        _EXPERTS
        | {
            "head_dim": 16,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"],
        },
    ),
    "qwen3_5": Tiny("qwen3_5_text", _LINEAR | {"layer_types": LINEAR_THEN_FULL}),
    "qwen3_5_moe": Tiny(
        "qwen3_5_moe_text",
        _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 32, "layer_types": LINEAR_THEN_FULL},
    ),
    "bamba": Tiny("bamba", _STATE_SPACE | {"attn_layer_indices": [1, 2]}),
    "granite_hybrid": Tiny(
        "granitemoehybrid",
        _STATE_SPACE | _LOCAL_EXPERTS | {"shared_intermediate_size": 32, "layer_types": LINEAR_THEN_FULL},
    ),
    "granite_hybrid_rotary": Tiny(
        "granitemoehybrid",
        _STATE_SPACE
        | {"num_local_experts": 0, "shared_intermediate_size": 32, "layer_types": LINEAR_THEN_FULL}
        | {"position_embedding_type": "rope"},
    ),
    "falcon_h1": Tiny(
        "falcon_h1",
        _STATE_SPACE
        | {"mamba_d_ssm": 128, "mamba_d_head": 32, "head_dim": 16, "key_multiplier": 0.5}
        | {"attention_in_multiplier": 1.5, "attention_out_multiplier": 0.8, "ssm_out_multiplier": 0.7},
    ),
    "jamba": Tiny(
        "jamba",
        _EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    ),
    "nemotron_h": Tiny(
        "nemotron_h",
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"],
            "head_dim": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "lfm2": Tiny("lfm2", {"layer_types": ["conv", "full_attention", "full_attention", "conv"]}),
    "lfm2_moe": Tiny(
        "lfm2_moe",
        _EXPERTS | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    "olmo_hybrid": Tiny("olmo_hybrid", _LINEAR | {"layer_types": LINEAR_THEN_FULL}),
    "zaya": Tiny(
        "zaya", _EXPERTS | {"num_experts_per_tok": 1, "head_dim": 16, "router_hidden_size": 16, "rope_parameters": None}
    ),
    "phi3": Tiny("phi3", {"rope_parameters": _PLAIN_ROPE | {"partial_rotary_factor": 0.5}}),
    "phi": Tiny("phi", {"qk_layernorm": True, "rope_parameters": _PLAIN_ROPE | {"partial_rotary_factor": 0.5}}),
    "phimoe": Tiny("phimoe", _LOCAL_EXPERTS | {"sliding_window": None}),
    "gemma": Tiny("gemma", {"head_dim": 16}),
    "gemma2": Tiny(
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16, "layer_types": SLIDING_THEN_FULL},
        eager=True,
    ),
    "gemma3": Tiny(
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16, "layer_types": SLIDING_THEN_FULL},
    ),
    "gemma4": Tiny("gemma4_text", _GEMMA4),
    "gemma4_k_eq_v": Tiny("gemma4_text", _GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4_shared": Tiny("gemma4_text", _GEMMA4 | {"num_kv_shared_layers": 2}),
    "gemma3n": Tiny(
        "gemma3n_text",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "layer_types": SLIDING_THEN_FULL,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 3,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
    "gpt_oss": Tiny(
        "gpt_oss",
        _LOCAL_EXPERTS | {"head_dim": 16, "sliding_window": 16, "layer_types": SLIDING_THEN_FULL},
        eager=True,
    ),
    "gpt_neox": Tiny("gpt_neox", {"rope_parameters": _PLAIN_ROPE | {"partial_rotary_factor": 0.5}}),
    "gpt2": Tiny("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 8, "n_positions": 512}),
    "opt": Tiny("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt_post_norm": Tiny("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": False}),
    "granite": Tiny("granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "granitemoe": Tiny("granitemoe", _LOCAL_EXPERTS | {"attention_multiplier": 0.2}),
    "granitemoeshared": Tiny("granitemoeshared", _LOCAL_EXPERTS | {"shared_intermediate_size": 32}),
    "starcoder2": Tiny("starcoder2", {"sliding_window": None}),
    "seed_oss": Tiny("seed_oss", {"head_dim": 16}),
    "ernie4_5": Tiny("ernie4_5", {"head_dim": 16}),
    "ernie4_5_moe": Tiny("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    "glm": Tiny("glm", {"head_dim": 8}),
    "glm4": Tiny("glm4", {"head_dim": 8}),
    "arcee": Tiny("arcee"),
    "helium": Tiny("helium", {"head_dim": 8}),
    "nemotron": Tiny("nemotron", {"head_dim": 8}),
    "apertus": Tiny("apertus"),
    "stablelm": Tiny("stablelm"),
    "stablelm_qk_norm": Tiny("stablelm", {"qk_layernorm": True}),
    "cohere": Tiny("cohere"),
    "cohere_qk_norm": Tiny("cohere", {"use_qk_norm": True}),
    "cohere2": Tiny("cohere2", {"sliding_window": 16, "layer_types": SLIDING_THEN_FULL}),
    "olmo2": Tiny("olmo2"),
    "olmo3": Tiny("olmo3", {"sliding_window": 16, "layer_types": SLIDING_THEN_FULL}),
    "smollm3": Tiny("smollm3", {"no_rope_layers": [1, 0, 1, 1]}),
}

_RANKS = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8, "num_key_value_heads": 8}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
_ROUTED |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_YARN = _PLAIN_ROPE | {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3}
_YARN |= {"original_max_position_embeddings": 128}
_LLAMA4 = _YARN | {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 16}
_LINEAR_THEN_FULL = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_DELTA = {"layer_types": _LINEAR_THEN_FULL, "linear_head_dim": 8, "linear_num_heads": 4}
_SPARSE = {"mlp_layer_types": ["dense", "dense", "dense", "sparse"], "num_experts": 4, "num_local_experts": 4}

LATENT: dict[str, Tiny] = {
    "deepseek_v2": Tiny("deepseek_v2", _RANKS | _ROUTED | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": Tiny("deepseek_v3", _RANKS | _ROUTED | {"q_lora_rank": 20, "rope_parameters": _YARN}),
    "deepseek_v3_halves": Tiny("deepseek_v3", _RANKS | _ROUTED | {"q_lora_rank": None, "rope_interleave": False}),
    "axk1": Tiny("axk1", _RANKS | _ROUTED | {"q_lora_rank": 20}),
    "glm4_moe_lite": Tiny("glm4_moe_lite", _RANKS | _ROUTED | {"q_lora_rank": 20}),
    "minicpm3": Tiny("minicpm3", _RANKS | {"q_lora_rank": 20}),
    "youtu": Tiny("youtu", _RANKS | {"q_lora_rank": 20}),
    "mistral4": Tiny("mistral4", _RANKS | _ROUTED | {"q_lora_rank": 20, "rope_parameters": _LLAMA4}),
    "longcat_flash": Tiny(
        "longcat_flash",
        _RANKS
        | {
            "q_lora_rank": 20,
            "num_layers": 2,
            "head_dim": 8,
            "n_routed_experts": 4,
            "zero_expert_num": 1,
            "moe_topk": 2,
        }
        | {"ffn_hidden_size": 96, "expert_ffn_hidden_size": 32},
    ),
    "kimi_linear": Tiny("kimi_linear", _RANKS | _ROUTED | _DELTA | _SPARSE | {"q_lora_rank": None}),
    "bailing_hybrid": Tiny("bailing_hybrid", _RANKS | _ROUTED | _DELTA | _SPARSE | {"q_lora_rank": 20}),
}
"""Latent attention: keys of 24 channels, values of 8, latents of 24 with 8 rotated channels beside them."""


_INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 12}
_DSA = _RANKS | _ROUTED | _INDEX | {"q_lora_rank": 20, "num_local_experts": 4}

INDEXED: dict[str, Tiny] = {
    "minimax_m3": Tiny(
        "minimax_m3_vl_text",
        _LOCAL_EXPERTS
        | _INDEX
        | {"head_dim": 16, "rotary_dim": 8, "dense_intermediate_size": 96, "shared_intermediate_size": 32}
        | {"index_block_size": 4, "index_topk_blocks": 3, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
        | {"layer_types": ["minimax_m3_sparse", "full_attention"] * 2},
    ),
    "deepseek_v32": Tiny("deepseek_v32", _DSA),
    "glm_moe_dsa": Tiny("glm_moe_dsa", _DSA | {"indexer_types": ["full", "shared", "full", "shared"]}),
    "axk2": Tiny("axk2", _DSA),
    "hy_v4": Tiny("hy_v4", _DSA, eager=True),
    "dots3": Tiny(
        "dots3_note_text",
        _DSA
        | {"head_dim": 24, "sliding_window": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4}
        | {"swa_q_lora_rank": 20, "swa_kv_lora_rank": 16, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16}
        | {"swa_v_head_dim": 8, "layer_types": ["indexed_attention", "sliding_attention"] * 2},
    ),
    "qwen4_exp": Tiny(
        "qwen4_exp_text",
        _EXPERTS
        | _LINEAR
        | {"shared_expert_intermediate_size": 32, "layer_types": LINEAR_THEN_FULL, "ple_layer_ids": []}
        | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 12}
        | {"indexer_compress_ratio": 4},
    ),
}
"""Their layers choose with an indexer: 3 blocks of 4 tokens, or 12 tokens."""

ALL = TINY | LATENT | INDEXED


def missing(name: str) -> str:
    """Why the installed transformers cannot make `ALL[name]`; empty if it can."""
    model_type = ALL[name].model_type
    if model_type not in CONFIG_MAPPING:
        return f"this transformers has no {model_type}"
    try:
        config = tiny_config(name)
    except Exception as error:  # 5.4 rejects some of its own defaults under a newer huggingface_hub
        return f"this transformers cannot make a config of {model_type}: {type(error).__name__}"
    if not _class_of(config)._can_set_attn_implementation():
        return f"{model_type} does not call the attention interface in this transformers"
    if name in INDEXED and not choosing_layers(config := tiny_config(name)):
        return f"{model_type} keeps the keys of its indexer in its modules in this transformers"
    if name == "qwen4_exp" and not keep_positions(config):
        return f"{model_type} keeps positions on the cache in this transformers"
    return ""


def own_cache(name: str) -> str:
    """`missing(name)`, or that the installed transformers keeps its states in a cache that only this model knows."""
    if (reason := missing(name)) or _class_of(tiny_config(name))._supports_default_dynamic_cache():
        return reason
    return f"this transformers gives {name} a cache of its own"


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal LM; transformers makes that of mistral4 for images and text alone."""
    if config.model_type == "mistral4":
        return importlib.import_module("transformers").Mistral4ForCausalLM
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def longrope(edge: int) -> dict:
    """Settings of a tiny phi3 whose angles change beyond that many tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": edge}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 4.0, 8.0]}
    return {"rope_parameters": rope, "original_max_position_embeddings": edge}


def tiny_config(name: str, **overrides) -> PreTrainedConfig:
    """The config of `tiny_model(name, **overrides)`."""
    tiny = ALL[name]
    return AutoConfig.for_model(tiny.model_type, **(_SHAPE | tiny.config | overrides))


def tiny_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A random causal LM in eval mode: hidden 64, 4 layers, 8 heads, 2 KV heads, 128 tokens (0 pad, 2 eos).

    Args:
        name: a key of `ALL`.
        seed: of the weights.
        dtype: of the weights.
        overrides: config entries.
    """
    config = tiny_config(name, **overrides)
    implementation = {"attn_implementation": "eager"} if ALL[name].eager else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _class_of(config)._from_config(config, **implementation)
        roughen(model)
    return model.to(dtype).eval()


def tiny_gemma3_multimodal() -> PreTrainedModel:
    """Gemma3 with a vision tower, which text never reaches."""
    text = _SHAPE | TINY["gemma3"].config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        roughen(model)
    return model.eval()


@torch.no_grad()
def roughen(model: torch.nn.Module) -> None:
    """Move norms off one, biases off zero and spread the weights.

    As initialised, a forgotten norm weight or bias would show in no test, and attention is almost uniform.
    """
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.add_(0.2 * torch.randn_like(parameter))
        else:
            parameter.mul_(5)
