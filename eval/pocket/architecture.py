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
_LOOK_BACK_DISTANCES = ((1, 2), (1, 2))
# What layer 1 writes overlaps with what layer 0 wrote, so it starts faint.
_WRITE_SCALES = (0.4, 0.1)
_MATCH_SCALE = 2.8
_MATCH_NORM = 4.0
_MATCH_LAYERS = (2, 3)
_HOP_LAYER = 4
_HOP_SCALE = 1.0
_COPY_SCALE = 0.2
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
    frequencies = model.model.rotary_emb.inv_freq.tolist()
    for number, distances in enumerate(_LOOK_BACK_DISTANCES):
        scales = _LOOK_BACK_SCALES[number], _WRITE_SCALES[number]
        _start_look_back(model.model.layers[number].self_attn, frequencies, scales, distances)
    first = model.model.layers[0].self_attn
    for group, number in enumerate(_MATCH_LAYERS):
        _start_matching(model.model.layers[number].self_attn, first, group)
    attentions = [layer.self_attn for layer in model.model.layers]
    here, later = attentions[_MATCH_LAYERS[0]], attentions[_HOP_LAYER]
    _start_second_hop(here, later, first, [attentions[1], *(attentions[number] for number in _MATCH_LAYERS[1:])])


def _start_look_back(attention: torch.nn.Module, frequencies: list[float], scales: tuple[float, float], distances: tuple[int, int]) -> None:
    """Let query heads 0 and 1, which share KV head 0, attend `distances` tokens back."""
    half = len(frequencies)
    size = 2 * half
    attention.k_proj.weight[:size].normal_(0.0, 0.01)
    attention.q_proj.weight[: 2 * size].normal_(0.0, 0.01)
    for pair, share in enumerate(_SHARES):
        weight = scales[0] * math.sqrt(share)
        attention.k_proj.weight[pair, 0] = weight
        for head, distance in enumerate(distances):
            angle = distance * frequencies[pair]
            attention.q_proj.weight[size * head + pair, 0] = weight * math.cos(angle)
            attention.q_proj.weight[size * head + half + pair, 0] = -weight * math.sin(angle)
    # What is read and where it is written do not overlap, so a token and the two before it stay apart.
    width = attention.v_proj.weight.shape[1]
    frame = torch.nn.init.orthogonal_(torch.empty(width - 1, 3 * size))
    attention.v_proj.weight[:size, 0] = 0.0
    attention.v_proj.weight[:size, 1:] = frame[:, :size].T
    attention.o_proj.weight[1:, : 2 * size] = scales[1] * frame[:, size:]
    if hasattr(attention, "q_norm"):
        attention.q_norm.weight.fill_(3.0)


def _start_matching(attention: torch.nn.Module, first: torch.nn.Module, group: int) -> None:
    """Let both query heads of KV head `group` find what followed this token (0) or its forerunner (1) earlier on.

    `first` is the attention of layer 0, which has written the tokens one and two back into the hidden state.
    """
    traces = _traces(first)
    _start_search(attention, group, traces[group], traces[group + 1])
    rows = _rows(attention, group)
    attention.o_proj.weight[:, _columns(attention, group)] = _COPY_SCALE * attention.v_proj.weight[rows].T.repeat(1, 2)


def _start_second_hop(
    here: torch.nn.Module, later: torch.nn.Module, first: torch.nn.Module, others: list[torch.nn.Module]
) -> None:
    """Let KV head 1 of layer `here` note what followed this token, and KV head 0 of layer `later` what followed that.

    The note has a place of its own in the hidden state, where neither layer 0 nor `others` write.
    """
    traces = _traces(first)
    _start_search(here, 1, traces[0], traces[1])
    # Orthogonal to the constant channel and to all that layer 0 reads and writes.
    taken = torch.cat([torch.eye(1, traces[0].shape[1]), *traces])
    note = torch.linalg.svd(taken).Vh[len(taken) :].T
    note = torch.nn.functional.pad(note, (0, max(0, here.head_dim - note.shape[1])))[:, : here.head_dim]
    here.v_proj.weight[_rows(here, 1)] = traces[0]
    here.o_proj.weight[:, _columns(here, 1)] = _HOP_SCALE * note.repeat(1, 2)
    _start_search(later, 0, note.T, traces[1])
    for attention in others:
        attention.o_proj.weight -= note @ (note.T @ attention.o_proj.weight)
    here.o_proj.weight[:, _columns(here, 0)] -= note @ (note.T @ here.o_proj.weight[:, _columns(here, 0)])
    later.o_proj.weight[:, _columns(later, 0)] = _COPY_SCALE * later.v_proj.weight[_rows(later, 0)].T.repeat(1, 2)


def _traces(first: torch.nn.Module) -> list[torch.Tensor]:
    """Where the hidden state has this token, the one before and the one before that: (head_dim, hidden) each."""
    size = first.head_dim
    traces = [first.v_proj.weight[:size]]
    return traces + [first.o_proj.weight[:, size * head : size * (head + 1)].T / _WRITE_SCALES[0] for head in (0, 1)]


def _rows(attention: torch.nn.Module, group: int) -> slice:
    return slice(attention.head_dim * group, attention.head_dim * (group + 1))


def _columns(attention: torch.nn.Module, group: int) -> slice:
    return slice(2 * attention.head_dim * group, 2 * attention.head_dim * (group + 1))


def _start_search(attention: torch.nn.Module, group: int, wanted: torch.Tensor, offered: torch.Tensor) -> None:
    """Let both query heads of KV head `group` attend where `offered` reads the token that `wanted` reads here."""
    size = attention.head_dim
    # Only the slowly turning half of the channels can compare over thousands of tokens.
    slow = torch.arange(size // 4, size // 2)
    slow = torch.cat([slow, slow + size // 2])
    if hasattr(attention, "q_norm"):
        attention.q_norm.weight.fill_(_MATCH_NORM)
    mix = _MATCH_SCALE * torch.linalg.qr(torch.randn(size, len(slow)))[0].T
    attention.k_proj.weight[_rows(attention, group)].normal_(0.0, 0.01)
    attention.k_proj.weight[size * group + slow] = mix @ offered
    for head in (2 * group, 2 * group + 1):
        attention.q_proj.weight[size * head : size * (head + 1)].normal_(0.0, 0.01)
        attention.q_proj.weight[size * head + slow] = mix @ wanted
