"""A tiny Llama, prompts and comparisons that the integration tests share."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

import scout_hf
from tests.patches.tiny import VOCAB, tiny_config

EXACT = {"budget": None, "layer_ahead": False, "block_size": 8}
ONE_TIER = EXACT | {"split": "off"}
TWO_TIERS = EXACT | {"split": "cpu", "window": 8, "resident": 16}
"""A window of one block and room for two: the rest of a prompt of 50 tokens is the CPU's share."""

_TIERED = {"block_size": 8, "window": 8}
EXACT_METHODS = {
    "dense": _TIERED | {"method": "dense"},
    "dense, head by head": _TIERED | {"method": "dense", "method_options": {"heads": 1}},
    "kvpr": _TIERED | {"method": "kvpr", "method_options": {"share": 0.5}},
    "infinigen": _TIERED | {"method": "infinigen", "budget": None},
    "infinigen, kept": _TIERED | {"method": "infinigen", "budget": None, "method_options": {"keep": True}},
    "hgca": _TIERED | {"method": "hgca", "budget": None, "resident": 16, "method_options": {"threshold": 0}},
}
"""Every other method, where it is exact; KVPR computes half of the host's tokens anew."""

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
    """A random Llama: 4 layers, 8 heads, 2 KV heads, weights spread enough for attention to matter."""
    config = tiny_config("llama", **({"initializer_range": 0.05} | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        # Zero as initialised: a generated pad token would have an all-zero query, and every block the same score.
        model.get_input_embeddings().weight.data[0].normal_(std=config.initializer_range)
    return model.to(dtype).eval()


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
