"""Model types whose attention is not supported, each with the reason and what works instead.

A cache layer returns only the new keys and values from `update`, and the attention function must receive exactly these.
That fails for models that change all keys or values in between, or whose attention depends on more than query, key,
value and padding mask.
"""

from __future__ import annotations

_ELSEWHERE = (
    "Use the model unpatched (cache_implementation='offloaded' saves GPU memory too), or a model with "
    "plain multi-head or grouped-query attention, for example of the Llama, Qwen, Mistral or Gemma families."
)

_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "it attends to entries that stand for several tokens each, in cache layers of its own that hold no keys and "
        "values by token.",
        ("deepseek_v4",),
    ),
    (
        "its indexer does not tell the attention function which tokens it chose: the model makes a mask of its choice "
        "that is as long as the keys that the cache returned, and a ScoutCache returns the new ones.",
        ("glm5_next_text",),
    ),
    (
        "it has layers that choose with an indexer among the keys and values of another layer, which they get past the "
        "cache.",
        ("mistral_large4_text",),
    ),
    (
        "it drafts for another model from that model's keys and values, and has none of its own.",
        ("gemma4_assistant", "gemma4_unified_assistant", "muse_glimmer_assistant"),
    ),
    (
        "one set of attention weights serves several layers, so the attention call does not tell which layer "
        "of the cache it belongs to.",
        ("zamba", "zamba2", "hrm_text"),
    ),
    (
        "it runs some of its layers several times in a pass, with copies of their cache layers that it adds to the "
        "cache in the middle of the pass.",
        ("dory",),
    ),
    (
        "its text layers compute attention themselves instead of calling the attention interface of transformers.",
        ("git",),
    ),
    (
        "it rearranges all cached keys or values before the attention call.",
        ("diffllama", "idefics", "jetmoe"),
    ),
    (
        "its attention mask is computed from all cached values.",
        ("doge",),
    ),
    (
        "it adds a position bias to the attention scores, one number per query and key.",
        ("inkling_text", "inkling2_text", "inkling2_loop_text"),
    ),
    (
        "it attends to a second, fixed sequence as well (cross attention).",
        ("blt", "mllama_text_model"),
    ),
    (
        "its recurrent or linear layers need a cache class of the model's own.",
        ("minimax",),
    ),
    (
        "it has no attention whose keys and values grow with the context: there is nothing to offload.",
        ("falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm"),
    ),
)

REFUSED: dict[str, str] = {
    model_type: f"{reason} {_ELSEWHERE}" for reason, model_types in _GROUPS for model_type in model_types
}

# Model types whose generate() runs that of a model inside, and the name of that model.
GENERATES_INSIDE = dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), "language_model")
GENERATES_INSIDE |= dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe"), "thinker")
