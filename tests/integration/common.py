"""A tiny Llama, prompts and comparisons that the integration tests share."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

import scout_hf
from tests.patches.tiny import VOCAB, tiny_config

EXACT = {"budget": None, "layer_ahead": False, "block_size": 8}
ONE_TIER = EXACT | {"split": "off"}
TWO_TIERS = EXACT | {"split": "cpu", "window": 8, "resident": 16}
"""A window of one block and slots for two: the rest of a prompt of 50 tokens is the CPU's share."""

_TIERED = {"block_size": 8, "window": 8}
EXACT_METHODS = {
    "dense": _TIERED | {"method": "dense"},
    "dense, head by head": _TIERED | {"method": "dense", "method_options": {"heads": 1}},
    "kvpr": _TIERED | {"method": "kvpr", "method_options": {"share": 0.5}},
    "infinigen": _TIERED | {"method": "infinigen", "budget": None},
    "infinigen, kept": _TIERED | {"method": "infinigen", "budget": None, "method_options": {"keep": True}},
    "hgca": _TIERED | {"method": "hgca", "budget": None, "resident": 16, "method_options": {"threshold": 0}},
}
"""Every other method, where it is exact; KVPR computes half of the host's tokens again."""

LOSSY = {
    "budget": 24,
    "block_size": 8,
    "split": "cpu",
    "window": 8,
    "resident": 16,
    "recall": 1,
    "cpu_query": "predicted",
}
"""Two tiers, prediction, a sparse budget and a recall in every step."""

TOLERANCE = 3e-6


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
    """A random Llama: 3 layers, 8 heads, 2 KV heads, weights spread enough for attention to matter."""
    config = tiny_config("llama", **({"initializer_range": 0.05, "num_hidden_layers": 3} | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        # Zero as initialised: a generated pad token would have an all-zero query, and every block the same score.
        model.get_input_embeddings().weight.data[0].normal_(std=config.initializer_range)
    return model.to(dtype).eval()


@functools.cache
def one_llama():
    """The same model for all tests that share what it gives: weights that lie elsewhere may give other last bits."""
    return llama()


def prompt(rows: int = 1, tokens: int = 50, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, tokens) without pad, bos and eos."""
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(*padding: int, tokens: int = 50, seed: int = 1) -> dict[str, torch.Tensor]:
    """One row per number, so many padding tokens in front."""
    ids = prompt(len(padding), tokens, seed)
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model, inputs, new: int = 10, **options):
    """``generate`` of exactly ``new`` greedy tokens, with the logits of every step."""
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return model.generate(**inputs, **(fixed | options), return_dict_in_generate=True, output_logits=True)


def without_cache(output):
    """The tokens and logits of an output that is kept: its cache would live on."""
    return SimpleNamespace(sequences=output.sequences, logits=output.logits)


def logits(output) -> torch.Tensor:
    """Logits of all steps as one float64 tensor (steps, rows, vocabulary)."""
    return torch.stack(output.logits).double()


def assert_close(got, stock, tolerance: float = TOLERANCE) -> None:
    """The same tokens, and logits within the tolerance."""
    assert torch.equal(got.sequences, stock.sequences)
    error = (logits(got) - logits(stock)).abs().max().item()
    assert error <= tolerance, error


def assert_equal(got, stock) -> None:
    """The same tokens and bitwise the same logits."""
    assert torch.equal(got.sequences, stock.sequences)
    assert torch.equal(logits(got), logits(stock))


def both_tiers_hold_tokens(handle: scout_hf.Handle) -> bool:
    """Whether both tiers hold something, and what is on the host was attended or came back; False on one tier."""
    stats = handle.stats()
    held = stats.kv_bytes
    return bool(stats.cpu_ratio or stats.recalled_bytes) and held["host"] > 0 and held["device"] > 0


def spiky(dtype=torch.float64):
    """A model whose heads look at a few tokens, so that a wrong block shows; float64 is torch's, float32 native."""
    return llama(dtype=dtype, initializer_range=0.12)


def decode_after_holes(model, cache=None):
    """Logits of 14 tokens behind a prompt whose rows end in padding, inside a block that these tokens fill."""
    ids, mask = prompt(3, 84), torch.ones(3, 84, dtype=torch.long)
    mask[0, :3], mask[1, 60:], mask[2, 29:43] = 0, 0, 0
    mask[2, 81:] = 0
    found = []
    with torch.no_grad():
        for step in range(15):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, prompt(3, 1, seed=step)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            found.append(output.logits[:, -1])
    return torch.stack(found[1:])


@functools.cache
def stock_mode(mode):
    """What an unpatched Llama gives in one of the `MODES`."""
    inputs, options = MODES[mode]
    torch.manual_seed(0)
    return run(one_llama(), inputs, **options)


REPETITIVE = torch.cat([prompt(1, 12)] * 4, dim=1)
MODES = {
    "greedy": (prompt(), {}),
    "greedy, long": (prompt(1, 130), {"new": 24}),
    "one token": (prompt(1, 1), {"new": 60}),
    "batch": (prompt(3), {}),
    "padded": (left_padded(0, 5, 21, 49), {}),
    "padded by whole blocks": (left_padded(0, 16, 32), {"new": 20}),
    "every row padded": (left_padded(3, 17), {}),
    "sampling": (left_padded(0, 5), {"do_sample": True, "temperature": 1.5, "new": 20}),
    "beam": (left_padded(0, 5, 21), {"num_beams": 3, "new": 14}),
    "beam sampling": (left_padded(0, 5), {"num_beams": 2, "do_sample": True, "new": 14}),
    "several answers": (left_padded(0, 5), {"do_sample": True, "num_return_sequences": 3}),
    "several beams": (prompt(), {"num_beams": 3, "num_return_sequences": 3}),
    "prompt lookup": (REPETITIVE, {"prompt_lookup_num_tokens": 4, "new": 20}),
    "prefill in chunks": (prompt(1, 70), {"prefill_chunk_size": 16}),
    "prefill in chunks, padded": (left_padded(0, 5, 40, tokens=70), {"prefill_chunk_size": 13}),
    "hidden states": (left_padded(0, 5), {"output_hidden_states": True}),
    "repetition penalty": (prompt(2), {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
}
