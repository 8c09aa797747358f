"""Tiny random models that hear, and prompts with sound for them: nothing is downloaded.

from tests.patches.tiny_hearing import HEARING, prompt_with_sound, tiny_hearing
model, inputs = tiny_hearing("voxtral"), prompt_with_sound("voxtral", rows=2)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel

from tests.patches.tiny import _SHAPE, roughen
from tests.patches.tiny_vision import _MROPE, _PROJECTED, END, IMAGE, START, VIDEO

SOUND, SOUND_START, SOUND_END = 119, 124, 125
"""Token ids of the tiny models: a sound's place, and what stands before and after one."""

Inputs = dict[str, torch.Tensor]


def _text(model_type: str, **more) -> dict:
    return _SHAPE | {"num_hidden_layers": 3, "model_type": model_type} | more


def _features(name_of_mask: str, frames: int) -> Callable[[int], Inputs]:
    """Mel spectra with 8 bins, all frames of which are heard."""

    def make(rows: int) -> Inputs:
        heard = {name_of_mask: torch.ones(rows, frames, dtype=torch.long)} if name_of_mask else {}
        return {"input_features": _random(rows, 8, frames)} | heard

    return make


def _windows(rows: int) -> Inputs:
    return {"input_features": _random(rows, 30, 16), "input_features_mask": torch.ones(rows, 6, dtype=torch.bool)}


def _sound_and_image(rows: int) -> Inputs:
    image = {"pixel_values": _random(rows * 24, 96), "image_grid_thw": torch.tensor([[1, 4, 6]] * rows)}
    return _features("feature_attention_mask", 24)(rows) | image


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Hearing:
    """One entry of `HEARING`: the model's class, its config, and what a sound of it looks like."""

    model: str
    tokens: int
    """Tokens that stand for one sound."""
    config: dict
    sound: Callable[[int], Inputs]
    sees: bool = False
    """Whether the prompt has an image of 6 tokens as well."""


_SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "num_mel_bins": 8}
_WHISPER = {"d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "encoder_layers": 2, "num_mel_bins": 8}
_QFORMER = {"model_type": "blip_2_qformer", "encoder_hidden_size": 32, "hidden_size": 32, "intermediate_size": 32}
_QFORMER |= {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 16, "cross_attention_frequency": 1}
_SEES = {"vision_start_token_id": START, "vision_end_token_id": END}
_SEES |= {"audio_start_token_id": SOUND_START, "audio_end_token_id": SOUND_END}

HEARING: dict[str, Hearing] = {
    "qwen2_audio": Hearing(
        "Qwen2AudioForConditionalGeneration",
        6,
        {
            "text_config": _text("qwen2", use_sliding_window=False),
            "audio_config": _WHISPER | {"model_type": "qwen2_audio_encoder", "max_source_positions": 12},
            "audio_token_index": SOUND,
        },
        _features("feature_attention_mask", 24),
    ),
    "voxtral": Hearing(
        "VoxtralForConditionalGeneration",
        6,
        {
            "text_config": _text("llama", head_dim=8),
            "audio_config": _SMALL
            | {"model_type": "voxtral_encoder", "intermediate_size": 128, "max_source_positions": 24},
            "audio_token_id": SOUND,
        },
        _features("", 48),
    ),
    "audioflamingo3": Hearing(
        "AudioFlamingo3ForConditionalGeneration",
        6,
        {
            "text_config": _text("qwen2", use_sliding_window=False),
            "audio_config": _SMALL
            | {"model_type": "audioflamingo3_encoder", "intermediate_size": 32, "max_source_positions": 12},
            "audio_token_id": SOUND,
        },
        _features("input_features_mask", 24),
    ),
    "glmasr": Hearing(
        "GlmAsrForConditionalGeneration",
        6,
        {
            "text_config": _text("llama"),
            "audio_config": _SMALL | {"model_type": "glmasr_encoder", "intermediate_size": 128},
            "audio_token_id": SOUND,
        },
        _features("input_features_mask", 48),
    ),
    "granite_speech": Hearing(
        "GraniteSpeechForConditionalGeneration",
        6,
        {
            "text_config": _text("granite"),
            "encoder_config": {
                "model_type": "granite_speech_encoder",
                "context_size": 10,
                "conv_expansion_factor": 2,
                "conv_kernel_size": 3,
                "dim_head": 8,
                "dropout": 0.0,
                "feedforward_mult": 2,
                "hidden_dim": 32,
                "input_dim": 16,
                "num_heads": 4,
                "num_layers": 2,
                "output_dim": 12,
            },
            "projector_config": _QFORMER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            "audio_token_index": SOUND,
            "has_lora_adapter": False,
            "downsample_rate": 5,
            "window_size": 15,
        },
        _windows,
    ),
    "qwen2_5_omni_thinker": Hearing(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        6,
        {
            "text_config": _text("qwen2_5_omni_text", rope_parameters=_MROPE, use_sliding_window=False),
            "audio_config": _WHISPER | {"model_type": "qwen2_5_omni_audio_encoder", "output_dim": 64},
            "vision_config": _PROJECTED | {"embed_dim": 32, "window_size": 16, "fullatt_block_indexes": [1]},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "audio_token_index": SOUND,
        }
        | _SEES,
        _sound_and_image,
        sees=True,
    ),
    "qwen3_omni_moe_thinker": Hearing(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        3,
        {
            "text_config": _text(
                "qwen3_omni_moe_text",
                rope_parameters=_MROPE | {"mrope_interleaved": True},
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
            ),
            "audio_config": _WHISPER
            | {"model_type": "qwen3_omni_moe_audio_encoder", "output_dim": 64, "downsample_hidden_size": 8},
            "vision_config": _PROJECTED | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": SOUND,
        }
        | _SEES,
        _sound_and_image,
        sees=True,
    ),
}


def missing(name: str) -> str:
    """Why the installed transformers cannot make `HEARING[name]`; empty if it can."""
    return "" if hasattr(transformers, HEARING[name].model) else f"this transformers has no {HEARING[name].model}"


def tiny_hearing(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode: hidden 64, 3 layers, 8 heads, 2 KV heads, 128 tokens."""
    cls = getattr(transformers, HEARING[name].model)
    config = cls.config_class(**copy.deepcopy(HEARING[name].config), tie_word_embeddings=False)
    config.pad_token_id = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
        roughen(model)
    return model.eval()


def prompt_with_sound(name: str, *, rows: int = 1, padding: tuple[int, ...] = (), tokens: int = 40) -> Inputs:
    """Arguments of `generate`: rows of `tokens` ids with one sound in each, left padding as given."""
    hearing = HEARING[name]
    ids = torch.randint(3, 110, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    last = 12 + hearing.tokens
    ids[:, 11], ids[:, 12:last], ids[:, last] = SOUND_START, SOUND, SOUND_END
    if hearing.sees:
        ids[:, 24], ids[:, 25:31], ids[:, 31] = START, IMAGE, END
    return {"input_ids": ids, "attention_mask": mask} | hearing.sound(rows)
