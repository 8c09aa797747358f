"""Tiny configs of any model type: what is large by default is made small, field by field."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from scout_hf.eval.families.special import SPECIAL

LAYERS, VOCABULARY = 4, 128

_SIZES: tuple[tuple[int | float, str], ...] = (
    (64, "hidden_size d_model n_embd embedding_size embedding_dim emb_dim word_embed_proj_dim lru_width"),
    (96, "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dff dim_ff n_inner d_inner"),
    (32, "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size shared_expert_intermediate_size"),
    (32, "shared_experts_intermediate_size moe_shared_expert_intermediate_size dense_intermediate_size"),
    (96, "intermediate_size_mlp feed_forward_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    (LAYERS, "encoder_layers num_encoder_layers"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    (4, "num_decoder_attention_heads encoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    (16, "head_dim kv_channels swa_head_dim dim_head d_head attention_head_size d_kv"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length context_length"),
    (16, "sliding_window attention_chunk_size sliding_window_size window_size local_attention attention_window_size"),
    (16, "hidden_size_per_layer_input query_pre_attn_scalar router_hidden_size adapter_rank rotary_dim"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    (1, "n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (16, "kv_lora_rank q_lora_rank v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim o_lora_rank"),
    (16, "index_topk"),
    (4, "index_n_heads mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_heads"),
    (2, "linear_num_key_heads"),
    (16, "linear_key_head_dim linear_value_head_dim linear_head_dim chunk_size mamba_chunk_size"),
    (8, "mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank"),
    (2, "attn_layer_period expert_layer_period"),
    (1, "attn_layer_offset expert_layer_offset"),
    (2, "n_groups mamba_n_groups mamba_ngroups"),
    (0, "pad_token_id"),
    (1, "bos_token_id decoder_start_token_id"),
    (2, "eos_token_id"),
    (0, "num_nextn_predict_layers"),
    (0.0, "attention_dropout attention_probs_dropout_prob"),
)
SIZES = {name: size for size, names in _SIZES for name in names.split()}
"""By the name of a field of a text config."""
_ALWAYS = ("head_dim", "pad_token_id", "bos_token_id", "eos_token_id")
"""Of which also None is replaced."""

_SEEN_AND_HEARD: dict[str, Any] = {
    "hidden_size": 16,
    "embed_dim": 16,
    "d_model": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "encoder_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""The same for towers that text never reaches."""


class NoConfig(Exception):
    """No config of a type can be made."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of four layers with 64 channels; NoConfig if transformers itself cannot make one."""
    special = SPECIAL.get(model_type, {})
    kind = CONFIG_MAPPING[model_type]
    try:
        return kind(**_small(kind, special))
    except Exception as error:  # whatever a config's own checks raise
        raise NoConfig(f"{type(error).__name__}: {error}") from error


def _small(kind: type[PreTrainedConfig], special: dict[str, Any], text: bool = True) -> dict[str, Any]:
    """The arguments of a small config of this class."""
    default = kind(**special.get("first", {}))
    given = {}
    sizes = SIZES if text else _SEEN_AND_HEARD
    for name in _fields(default):
        # Not by attribute: one that layers may have of their own cannot be read of the whole.
        value = default.__dict__.get(name)
        if name in kind.sub_configs:
            if isinstance(value, PreTrainedConfig):
                part = special.get(name, {})
                given[name] = _small(type(value), part, text=value is default.get_text_config(decoder=True))
        elif name in sizes and (value is None or isinstance(value, (int, float, list))):
            if value is not None or name in _ALWAYS:
                given[name] = sizes[name]
        elif text and _is_by_layer(value, default):
            given[name] = _by_layer(value)
    if "kv_lora_rank" in given:
        # Latent attention makes keys for every head.
        given["num_key_value_heads"] = given["num_attention_heads"]
    return given | {name: value for name, value in special.items() if name != "first" and name not in kind.sub_configs}


def _fields(config: PreTrainedConfig) -> Iterable[str]:
    return sorted(name for name in config.__dict__ if not name.startswith("_"))


def _is_by_layer(value: Any, config: PreTrainedConfig) -> bool:
    return isinstance(value, list) and len(value) > LAYERS and len(value) == getattr(config, "num_hidden_layers", 0)


def _by_layer(values: list[Any]) -> list[Any]:
    """Every kind of layer in turn, in the order in which they first appear."""
    if values == list(range(len(values))):
        return values[:LAYERS]
    kinds = [value for index, value in enumerate(values) if value not in values[:index]]
    return [kinds[index % len(kinds)] for index in range(LAYERS)]
