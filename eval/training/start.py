"""The shape of a pocket model and the start that lets it find retrieval within minutes.

Heads that look back, with all else random, had not formed retrieval after two million tokens. So the layers begin as
the known circuit for it: layers 0 and 1 note the tokens a few places back, layers 2 and 3 attend to the token that once
followed what is being read now and copy it, layer 4 does so from there, the second hop. Each kind of information has
channels of the hidden state to itself. Training does the rest: sharpening, long distances, rival facts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from scout_hf.eval.pocket import vocabulary as vocab

MAX_POSITIONS = 16384
ARCHITECTURES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}

# Layer 1 sees the constant channel under the first layer's output, so it needs the larger weight.
_LOOK_BACK_SCALES = (3.0, 4.0)
# Of the fastest channels, which alone tell one token from the next; the first turns most and counts twice.
_SHARES = (2.0, 1.0, 1.0, 1.0, 1.0, 1.0)
_WRITE_SCALE = 0.4
_MATCH_SCALE = 2.8
_MATCH_NORM = 4.0
_COPY_SCALE = 0.5
_NOTE_SCALE = 1.0
# Every kind of information starts with so many channels of the hidden state to itself.
_PLACE = 24


def build_model(arch: str, seed: int) -> PreTrainedModel:
    """A freshly started model of about one million float32 parameters; `arch` is a key of `ARCHITECTURES`."""
    known = {word: index for index, word in enumerate(vocab.SPECIAL)}
    ids = {"pad_token_id": known[vocab.PAD], "bos_token_id": known[vocab.BEGIN], "eos_token_id": known[vocab.END]}
    return fresh_model(arch, seed, ids, start, vocab_size=vocab.SIZE, hidden_size=128, intermediate_size=256)


def fresh_model(
    arch: str, seed: int, ids: dict[str, int], begin: Callable[[PreTrainedModel], None], **sizes: int
) -> PreTrainedModel:
    """A model of 6 layers with weights that `begin` sets; `ids` are its special tokens."""
    config_class, model_class = ARCHITECTURES[arch]
    config = config_class(
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        **sizes,
        **ids,
    )
    torch.manual_seed(seed)
    model = model_class(config).float()
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    begin(model)
    return model


@torch.no_grad()
def start(model: PreTrainedModel) -> None:
    """Set the starting weights: small random ones, silent outputs, and the look-back and matching heads."""
    embedding = _start_small(model)
    frame = torch.nn.init.orthogonal_(torch.empty(embedding.shape[1] - 1, 5 * _PLACE))
    here, before, second, far, note = torch.nn.functional.pad(frame.T, (1, 0)).split(_PLACE)
    layers = [layer.self_attn for layer in model.model.layers]
    frequencies = model.model.rotary_emb.inv_freq.tolist()
    _look_back(layers[0], frequencies, _LOOK_BACK_SCALES[0], here, {1: before, 2: second})
    _look_back(layers[1], frequencies, _LOOK_BACK_SCALES[1], here, {3: far, 5: far})
    # What followed this token earlier on, for the answer and for the second hop; what followed it there.
    _search(layers[2], 0, [(here, before)])
    _copy(layers[2], 0, here, _COPY_SCALE * here)
    _search(layers[2], 1, [(here, before)])
    _copy(layers[2], 1, here, _NOTE_SCALE * note)
    _search(layers[4], 0, [(note, before)])
    _copy(layers[4], 0, here, _COPY_SCALE * here)
    # What followed the token before this one, and this number after a key that was named three or five tokens ago.
    _search(layers[3], 1, [(before, second)])
    _copy(layers[3], 1, here, _COPY_SCALE * here)
    _search(layers[3], 0, [(here, before), (far, second)])
    _copy(layers[3], 0, here, _COPY_SCALE * here)


@torch.no_grad()
def start_for_text(model: PreTrainedModel) -> None:
    """The same for running text: layer 2 copies what followed the last two tokens together, and that is all.

    A single token says little in running text, and with thousands of tokens to choose from, what other heads copy or
    note would drown the guess; the output layer starts blind to it.
    """
    embedding = _start_small(model)
    places = torch.nn.init.orthogonal_(torch.empty(embedding.shape[1] - 1, 4 * _PLACE))
    here, more, before, second = torch.nn.functional.pad(places.T, (1, 0)).split(_PLACE)
    noted = torch.cat([before, second])
    model.lm_head.weight -= model.lm_head.weight @ noted.T @ noted
    layers = [layer.self_attn for layer in model.model.layers]
    frequencies = model.model.rotary_emb.inv_freq.tolist()
    _look_back(layers[0], frequencies, _LOOK_BACK_SCALES[0], here, {1: before, 2: second})
    for group, place in enumerate((here, more)):
        _search(layers[2], group, [(here, before), (before, second)])
        _copy(layers[2], group, place, 2 * _COPY_SCALE * place)


def _start_small(model: PreTrainedModel) -> torch.Tensor:
    """Small random weights, silent outputs and one channel of the embedding that is constant; returns the embedding."""
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
    return embedding


def _look_back(
    attention: torch.nn.Module,
    frequencies: list[float],
    scale: float,
    read: torch.Tensor,
    writes: dict[int, torch.Tensor],
) -> None:
    """Let query heads 0 and 1, which share KV head 0, attend so many tokens back and write what `read` reads there.

    `read` and the values of `writes` are places, (channels, hidden).
    """
    half = len(frequencies)
    size = 2 * half
    attention.k_proj.weight[:size].normal_(0.0, 0.01)
    attention.q_proj.weight[: 2 * size].normal_(0.0, 0.01)
    attention.v_proj.weight[:size] = 0.0
    attention.v_proj.weight[: len(read)] = read
    for head, (distance, write) in enumerate(writes.items()):
        attention.o_proj.weight[:, size * head : size * head + len(write)] = _WRITE_SCALE * write.T
        for pair, share in enumerate(_SHARES):
            weight, angle = scale * math.sqrt(share), distance * frequencies[pair]
            attention.k_proj.weight[pair, 0] = weight
            attention.q_proj.weight[size * head + pair, 0] = weight * math.cos(angle)
            attention.q_proj.weight[size * head + half + pair, 0] = -weight * math.sin(angle)
    if hasattr(attention, "q_norm"):
        attention.q_norm.weight.fill_(3.0)


def _search(attention: torch.nn.Module, group: int, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Let both query heads of KV head `group` attend where the second place of a pair has what the first has here."""
    size = attention.head_dim
    # Only the slowly turning half of the channels can compare over thousands of tokens.
    slow = torch.arange(size // 4, size // 2)
    slow = torch.stack([slow, slow + size // 2], dim=1).flatten()
    rows = attention.k_proj.weight[size * group : size * (group + 1)].normal_(0.0, 0.01)
    columns = [attention.q_proj.weight[size * head : size * (head + 1)].normal_(0.0, 0.01) for head in _heads(group)]
    for part, (wanted, offered) in zip(slow.chunk(len(pairs)), pairs, strict=True):
        mix = _MATCH_SCALE * torch.linalg.qr(torch.randn(_PLACE, len(part)))[0].T
        rows[part] = mix @ offered
        for column in columns:
            column[part] = mix @ wanted
    if hasattr(attention, "q_norm"):
        attention.q_norm.weight.fill_(_MATCH_NORM)


def _copy(attention: torch.nn.Module, group: int, read: torch.Tensor, write: torch.Tensor) -> None:
    """Let both query heads of KV head `group` write to one place, scaled, what they read in another."""
    size = attention.head_dim
    attention.v_proj.weight[size * group : size * (group + 1)] = 0.0
    attention.v_proj.weight[size * group : size * group + _PLACE] = read
    for head in _heads(group):
        attention.o_proj.weight[:, size * head : size * head + _PLACE] = write.T


def _heads(group: int) -> tuple[int, int]:
    return 2 * group, 2 * group + 1
