"""The shape of a pocket model and the start that lets it find retrieval within minutes.

Heads that look back, with all else random, had not formed retrieval after two million tokens. So the layers begin as
the known circuit for it: layers 0 and 1 look one and two tokens back, layers 2 and 3 attend to the token that once
followed what is being read now (by its last word and by the one before) and copy it. Training does the rest:
sharpening, long distances, rival facts.
"""

import math

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from . import vocabulary as vocab

MAX_POSITIONS = 16384
ARCHITECTURES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}

# Layer 1 sees the constant channel under the first layer's output, so it needs the larger weight.
_LOOK_BACK_SCALES = (3.0, 4.0)
_WRITE_SCALE = 0.4
_MATCH_SCALE = 4.0
_MATCH_LAYERS = (2, 3)
# Of the fastest channels, which alone tell one token from the next; the first turns most and counts twice.
_SHARES = (2.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def build_model(arch: str, seed: int) -> PreTrainedModel:
    """A freshly started model of about one million float32 parameters; `arch` is a key of `ARCHITECTURES`."""
    config_class, model_class = ARCHITECTURES[arch]
    known = {word: index for index, word in enumerate(vocab.SPECIAL)}
    ids = {"pad_token_id": known[vocab.PAD], "bos_token_id": known[vocab.BEGIN], "eos_token_id": known[vocab.END]}
    config = config_class(
        vocab_size=vocab.SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        **ids,
    )
    torch.manual_seed(seed)
    model = model_class(config).float()
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    start(model)
    return model


@torch.no_grad()
def start(model: PreTrainedModel) -> None:
    """Set the starting weights: small random ones, silent outputs, and the look-back and matching heads."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            silent = "o_proj" in name or "down_proj" in name
            weight.normal_(0.0, 0.2 if "embed" in name else 0.0 if silent else 0.08)
    embedding = model.model.embed_tokens.weight
    # What a head copies should be readable at once.
    model.lm_head.weight.copy_(0.5 * embedding)
    # A channel that is the same for every token gives RoPE something constant to turn: then only distance counts.
    embedding[:, 0] = 0.8
    model.lm_head.weight[:, 0] = 0.0
    for layer, scale in zip(model.model.layers, _LOOK_BACK_SCALES, strict=False):
        _start_look_back(layer.self_attn, model.model.rotary_emb.inv_freq.tolist(), scale)
    first = model.model.layers[0].self_attn
    for group, number in enumerate(_MATCH_LAYERS):
        _start_matching(model.model.layers[number].self_attn, first, group)


def _start_look_back(attention: torch.nn.Module, frequencies: list[float], scale: float) -> None:
    """Let query heads 0 and 1, which share KV head 0, attend one and two tokens back."""
    half = len(frequencies)
    size = 2 * half
    attention.k_proj.weight[:size].normal_(0.0, 0.01)
    attention.q_proj.weight[: 2 * size].normal_(0.0, 0.01)
    for pair, share in enumerate(_SHARES):
        weight = scale * math.sqrt(share)
        attention.k_proj.weight[pair, 0] = weight
        for head, distance in enumerate((1, 2)):
            angle = distance * frequencies[pair]
            attention.q_proj.weight[size * head + pair, 0] = weight * math.cos(angle)
            attention.q_proj.weight[size * head + half + pair, 0] = -weight * math.sin(angle)
    # What is read and where it is written do not overlap, so a token and the two before it stay apart.
    width = attention.v_proj.weight.shape[1]
    frame = torch.nn.init.orthogonal_(torch.empty(width - 1, 3 * size))
    attention.v_proj.weight[:size, 0] = 0.0
    attention.v_proj.weight[:size, 1:] = frame[:, :size].T
    attention.o_proj.weight[1:, : 2 * size] = _WRITE_SCALE * frame[:, size:]
    if hasattr(attention, "q_norm"):
        attention.q_norm.weight.fill_(3.0)


def _start_matching(attention: torch.nn.Module, first: torch.nn.Module, group: int) -> None:
    """Let both query heads of KV head `group` find what followed this token (0) or its forerunner (1) earlier on.

    `first` is the attention of layer 0, which has written the tokens one and two back into the hidden state.
    """
    size = attention.head_dim
    traces = [first.v_proj.weight[:size]]
    traces += [first.o_proj.weight[:, size * head : size * (head + 1)].T / _WRITE_SCALE for head in (0, 1)]
    # Only the slowly turning half of the channels can compare over thousands of tokens.
    slow = torch.arange(size // 4, size // 2)
    slow = torch.cat([slow, slow + size // 2])
    mix = _MATCH_SCALE * torch.linalg.qr(torch.randn(size, len(slow)))[0].T
    rows = slice(size * group, size * (group + 1))
    attention.k_proj.weight[rows].normal_(0.0, 0.01)
    attention.k_proj.weight[size * group + slow] = mix @ traces[group + 1]
    for head in (2 * group, 2 * group + 1):
        columns = slice(size * head, size * (head + 1))
        attention.q_proj.weight[columns].normal_(0.0, 0.01)
        attention.q_proj.weight[size * head + slow] = mix @ traces[group]
        attention.o_proj.weight[:, columns] = 0.5 * attention.v_proj.weight[rows].T
