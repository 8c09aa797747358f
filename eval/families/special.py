"""What the tiny configs of single model types need beyond small sizes."""

from __future__ import annotations

from typing import Any

_LINEAR_THEN_FULL = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_CONV_THEN_FULL = ["conv", "full_attention", "conv", "full_attention"]
_SLIDING_THEN_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_AS_DECODER = {"is_decoder": True}

SPECIAL: dict[str, dict[str, Any]] = dict.fromkeys(
    (
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
    ),
    _AS_DECODER,
)
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
_INDEXER |= {"indexer_budget": 16, "indexer_compress_ratio": 4}

SPECIAL |= {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": _SLIDING_THEN_FULL,
        "rope_parameters": {"sliding_attention": _PLAIN_ROPE, "full_attention": _PLAIN_ROPE},
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _EXPERTS,
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": _EXPERTS,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 32},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _SLIDING_THEN_FULL},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "first": {"hidden_size_per_layer_input": 0}}
    },
    "granitemoehybrid": {"layer_types": _LINEAR_THEN_FULL},
    "lfm2": {"layer_types": _CONV_THEN_FULL},
    "lfm2_moe": {"layer_types": _CONV_THEN_FULL},
    "mamba2": {"head_dim": 32},
    "ministral": {"layer_types": _SLIDING_THEN_FULL},
    "mistral": {"sliding_window": None},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", *["minimax_m3_sparse"] * 3],
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 3,
    },
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_head_dim": 32},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": _AS_DECODER | {"axial_pos_embds": False},
    "roc_bert": _AS_DECODER | {"pronunciation_vocab_size": 128, "shape_vocab_size": 128},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": _AS_DECODER | {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""Arguments by model type; by the name of a part, those of that part; ``first``: of the default that is made small."""
