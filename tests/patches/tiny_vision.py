"""Tiny random vision-language models of every family, and prompts with images for them: nothing is downloaded.

from tests.patches.tiny_vision import SEEING, prompt_with_images, tiny_seeing
model, inputs = tiny_seeing("qwen2_5_vl"), prompt_with_images("qwen2_5_vl", rows=2, images=1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.patches.tiny import _SHAPE, SLIDING_THEN_FULL, roughen

IMAGE, VIDEO, START, END = 120, 121, 122, 123
"""Token ids of the tiny models: an image's place, a video's, and what stands before and after one."""

_TEXT = _SHAPE | {"num_hidden_layers": 3}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_BY_INDEX = {"image_token_index": IMAGE}
_BY_ID = {"image_token_id": IMAGE}
_GRID = _BY_ID | {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_PINPOINTS = {"image_grid_pinpoints": [[28, 28], [28, 56]]}


def _pixels(images: int, *shape: int) -> torch.Tensor:
    return torch.randn(images, *shape, generator=torch.Generator().manual_seed(5))


def _square(images: int, rows: int, size: int = 28) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(images, 3, size, size)}


def _sized(images: int, rows: int) -> dict[str, torch.Tensor]:
    return _square(images, rows) | {"image_sizes": torch.full((images, 2), 28)}


def _tiles(images: int, rows: int) -> dict[str, torch.Tensor]:
    """The image as a whole and as one tile."""
    return {"pixel_values": _pixels(images, 2, 3, 28, 28), "image_sizes": torch.full((images, 2), 28)}


def _by_row(images: int, rows: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _pixels(images, 3, 28, 28).view(rows, images // rows, 3, 28, 28)}


def _flat(images: int, rows: int) -> dict[str, torch.Tensor]:
    """All patches of an image in one row, with a mask over them."""
    sizes, seen = torch.full((images, 2), 8), torch.ones(images, 64, dtype=torch.long)
    return {"pixel_values": _pixels(images, 64, 48), "spatial_shapes": sizes, "pixel_attention_mask": seen}


def _grid(height: int, width: int, *numbers: int) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """Patches of all images in one list, so many numbers each, and how many in each direction."""

    def make(images: int, rows: int) -> dict[str, torch.Tensor]:
        grid = torch.tensor([[1, height, width]] * images)
        return {"pixel_values": _pixels(images * height * width, *numbers), "image_grid_thw": grid}

    return make


@dataclass(frozen=True)
class Seeing:
    """One entry of `SEEING`: what a tiny model needs, and what an image of it looks like."""

    tokens: int
    """Tokens that stand for one image."""
    text: dict
    vision: dict = field(default_factory=dict)
    top: dict = field(default_factory=dict)
    pixels: Callable[[int, int], dict[str, torch.Tensor]] = _square
    model_type: str = ""
    types: str = ""
    """The argument that says what kind each token is."""


def _text(model_type: str, **more) -> dict:
    return _TEXT | {"model_type": model_type} | more


_LLAMA, _QWEN2 = _text("llama"), _text("qwen2", use_sliding_window=False)
_CLIP = _VISION | {"model_type": "clip_vision_model"}
_SIGLIP = _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
_COHERE2 = _text("cohere2", sliding_window=16, num_hidden_layers=4, layer_types=SLIDING_THEN_FULL)
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
_PROJECTED = _QWEN_VISION | {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32}
_GLM = _BY_ID | {"video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END}
_GLM |= {"video_start_token_id": 124, "video_end_token_id": 125}

SEEING: dict[str, Seeing] = {
    "gemma3": Seeing(
        4,
        _text(
            "gemma3_text",
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=16,
            num_hidden_layers=4,
            layer_types=SLIDING_THEN_FULL,
        ),
        _SIGLIP,
        _BY_INDEX | {"mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": END},
        types="token_type_ids",
    ),
    "paligemma": Seeing(
        4,
        _text("gemma", head_dim=16),
        _SIGLIP | {"projection_dim": 64},
        _BY_INDEX | {"projection_dim": 64, "hidden_size": 64},
        types="token_type_ids",
    ),
    "paligemma2": Seeing(
        4,
        _text(
            "gemma2",
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=16,
            num_hidden_layers=4,
            layer_types=SLIDING_THEN_FULL,
        ),
        _SIGLIP | {"projection_dim": 64},
        _BY_INDEX | {"projection_dim": 64, "hidden_size": 64},
        model_type="paligemma",
        types="token_type_ids",
    ),
    "qwen2_vl": Seeing(
        6,
        _text("qwen2_vl_text", rope_parameters=_MROPE, use_sliding_window=False),
        _QWEN_VISION | {"embed_dim": 32, "hidden_size": 64},
        _GRID,
        _grid(4, 6, 96),
        types="mm_token_type_ids",
    ),
    "qwen2_5_vl": Seeing(
        6,
        _text("qwen2_5_vl_text", rope_parameters=_MROPE, use_sliding_window=False),
        _PROJECTED | {"window_size": 16} | {"fullatt_block_indexes": [1]},
        _GRID,
        _grid(4, 6, 96),
        types="mm_token_type_ids",
    ),
    "qwen3_vl": Seeing(
        6,
        _text("qwen3_vl_text", rope_parameters=_MROPE | {"mrope_interleaved": True}, head_dim=8),
        _PROJECTED | {"num_position_embeddings": 16} | {"deepstack_visual_indexes": [0, 1]},
        _GRID,
        _grid(4, 6, 96),
        types="mm_token_type_ids",
    ),
    "qwen3_vl_moe": Seeing(
        6,
        _text(
            "qwen3_vl_moe_text",
            rope_parameters=_MROPE | {"mrope_interleaved": True},
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
        _PROJECTED | {"num_position_embeddings": 16} | {"deepstack_visual_indexes": [0]},
        _GRID,
        _grid(4, 6, 96),
        types="mm_token_type_ids",
    ),
    "qwen3_5": Seeing(
        6,
        _text(
            "qwen3_5_text",
            rope_parameters=_MROPE | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention", "full_attention"],
        ),
        _PROJECTED | {"num_position_embeddings": 16},
        _GRID,
        _grid(4, 6, 96),
        types="mm_token_type_ids",
    ),
    "glm4v": Seeing(
        6,
        _text("glm4v_text", rope_parameters=_MROPE),
        _PROJECTED | {"image_size": 28},
        _GLM,
        _grid(4, 6, 96),
        types="mm_token_type_ids",
    ),
    "glm4v_moe": Seeing(
        6,
        _text(
            "glm4v_moe_text",
            rope_parameters=_MROPE | {"partial_rotary_factor": 1.0},
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
        _PROJECTED | {"image_size": 28},
        _GLM,
        _grid(4, 6, 96),
        types="mm_token_type_ids",
    ),
    "glm46v": Seeing(
        6,
        _text("glm4v_text", rope_parameters=_MROPE),
        _PROJECTED | {"image_size": 28, "model_type": "glm4v_vision"},
        _GLM,
        _grid(4, 6, 96),
        types="mm_token_type_ids",
    ),
    "glm_ocr": Seeing(
        6,
        _text("glm_ocr_text", rope_parameters=_MROPE, head_dim=8),
        _PROJECTED | {"image_size": 28},
        _GLM,
        _grid(4, 6, 96),
        types="mm_token_type_ids",
    ),
    "paddleocr_vl": Seeing(
        6,
        _text("paddleocr_vl_text", rope_parameters=_MROPE, head_dim=8),
        _VISION | {"patch_size": 4, "spatial_merge_size": 2},
        _GRID,
        _grid(4, 6, 3, 4, 4),
        types="mm_token_type_ids",
    ),
    "exaone4_5": Seeing(
        6,
        _text("exaone4", sliding_window=16, num_hidden_layers=4, layer_types=SLIDING_THEN_FULL, head_dim=8),
        _PROJECTED | {"window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 1},
        _BY_ID | {"video_token_id": VIDEO},
        _grid(4, 6, 96),
    ),
    "aria": Seeing(
        3,
        _text("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        _VISION | {"model_type": "idefics3_vision"},
        _BY_INDEX | {"projector_patch_to_query_dict": {4: 3}},
    ),
    "got_ocr2": Seeing(
        1,
        _QWEN2,
        _VISION
        | {"num_hidden_layers": 1, "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [0]}
        | {"mlp_dim": 32, "output_channels": 16},
        _BY_INDEX | {"image_seq_length": 1},
        lambda images, rows: _square(images, rows, 64),
    ),
    "lighton_ocr": Seeing(
        1,
        _text("qwen3", head_dim=8),
        _VISION | {"model_type": "pixtral"},
        _BY_ID | {"spatial_merge_size": 2},
        _sized,
    ),
    "qianfan_ocr": Seeing(1, _text("qwen3", head_dim=8), _VISION, _BY_ID),
    "deepseek_vl": Seeing(4, _LLAMA, _SIGLIP, _BY_ID),
    "video_llava": Seeing(
        4,
        _LLAMA,
        _CLIP,
        _BY_INDEX | {"video_token_index": VIDEO},
        lambda images, rows: {"pixel_values_images": _pixels(images, 3, 28, 28)},
    ),
    "mistral3": Seeing(
        1,
        _text("mistral", sliding_window=None),
        _VISION | {"model_type": "pixtral"},
        _BY_INDEX | {"spatial_merge_size": 2},
        _sized,
    ),
    "idefics2": Seeing(
        3,
        _text("mistral", sliding_window=None),
        _VISION,
        _BY_ID
        | {
            "perceiver_config": {
                "hidden_size": 64,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "num_key_value_heads": 1,
            }
        },
        _by_row,
    ),
    "idefics3": Seeing(1, _LLAMA, _VISION, _BY_ID | {"scale_factor": 2}, _by_row),
    "smolvlm": Seeing(1, _LLAMA, _VISION, _BY_ID | {"scale_factor": 2}, _by_row),
    "lfm2_vl": Seeing(
        4,
        _text("lfm2", conv_L_cache=3, block_multiple_of=2, layer_types=["conv", "full_attention", "full_attention"]),
        {"model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 4}
        | {name: _VISION[name] for name in _VISION if not name.endswith("_size")}
        | {"hidden_size": 32, "intermediate_size": 32},
        _BY_ID | {"downsample_factor": 4, "projector_hidden_size": 32},
        _flat,
    ),
    "hunyuan_vl": Seeing(
        8,
        _text(
            "hunyuan_vl_text",
            head_dim=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]},
        ),
        {name: _VISION[name] for name in _VISION if name != "image_size"}
        | {"out_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 1, "max_vit_seq_len": 16}
        | {"max_image_size": 16, "min_image_size": 16},
        _BY_ID,
        _grid(2, 2, 48),
        types="mm_token_type_ids",
    ),
    "janus": Seeing(
        4,
        _LLAMA,
        {name: _VISION[name] for name in _VISION if name != "intermediate_size"}
        | {"projection_dim": 64, "num_image_tokens": 4, "mlp_ratio": 1.0},
        _BY_ID
        | {
            "vq_config": {
                "embed_dim": 4,
                "num_embeddings": 8,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 16,
                "image_token_embed_dim": 64,
            }
        },
    ),
    "internvl": Seeing(1, _QWEN2, _VISION, _BY_ID),
    "llava": Seeing(4, _LLAMA, _CLIP, _BY_INDEX),
    "vipllava": Seeing(4, _LLAMA, _CLIP, _BY_INDEX | {"vision_feature_layers": [-2, -1]}),
    "llava_next": Seeing(10, _LLAMA, _CLIP, _BY_INDEX | _PINPOINTS, _tiles),
    "llava_onevision": Seeing(10, _QWEN2, _SIGLIP, _BY_INDEX | _PINPOINTS | {"video_token_index": VIDEO}, _tiles),
    "aya_vision": Seeing(1, _COHERE2, _SIGLIP, _BY_INDEX),
    "cohere2_vision": Seeing(1, _COHERE2, _SIGLIP, _BY_ID | {"alignment_intermediate_size": 32}),
    "ovis2": Seeing(
        4,
        _QWEN2,
        _VISION | {"vocab_size": 32},
        _BY_ID | {"visual_indicator_token_ids": [115, 116, 117, 118, 119], "hidden_size": 64, "vocab_size": 128},
    ),
}


def missing(name: str) -> str:
    """Why the installed transformers cannot make `SEEING[name]`; empty if it can."""
    model_type = SEEING[name].model_type or name
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return f"this transformers has no {model_type}"
    text = SEEING[name].text["model_type"]
    try:
        CONFIG_MAPPING[text]()
    except Exception as error:  # 5.4 rejects some of its own defaults under a newer huggingface_hub
        return f"this transformers cannot make a config of {text}: {type(error).__name__}"
    recurrent = {"linear_attention", "conv"}.intersection(SEEING[name].text.get("layer_types", ()))
    if recurrent and not hasattr(Cache, "has_previous_state"):
        return f"{text} has a cache class of its own in this transformers"
    return ""


def tiny_seeing(name: str, *, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random vision-language model in eval mode: hidden 64, 3 or 4 layers, 8 heads, 2 KV heads, 128 tokens."""
    seeing = SEEING[name]
    options = {"text_config": dict(seeing.text), "vision_config": dict(seeing.vision)}
    options |= {"tie_word_embeddings": False, "pad_token_id": 0} | seeing.top | overrides
    config = AutoConfig.for_model(seeing.model_type or name, **options)
    implementation = {"attn_implementation": "eager"} if seeing.text["model_type"] == "gemma2" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, **implementation)
        roughen(model)
    return model.eval()


def prompt_with_images(
    name: str, *, rows: int = 1, images: int = 1, padding: tuple[int, ...] = (), tokens: int = 40, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Arguments of `generate`: rows of `tokens` ids with as many images in each, left padding as given.

    Args:
        name: a key of `SEEING`.
        rows, images, tokens: sizes; 0 images makes a prompt of text.
        padding: tokens in front of each row.
    """
    seeing = SEEING[name]
    ids = torch.randint(3, 110, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    for image in range(images):
        first = 12 + image * (seeing.tokens + 3)
        ids[:, first - 1], ids[:, first + seeing.tokens] = START, END
        ids[:, first : first + seeing.tokens] = IMAGE
        types[:, first : first + seeing.tokens] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if seeing.types:
        inputs[seeing.types] = types
    if images:
        inputs |= seeing.pixels(rows * images, rows)
    return inputs
