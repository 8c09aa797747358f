"""Sparse decoding beside the oracle: prompts, settings, and one comparison that every executor has to pass."""

import functools

import pytest
import torch

import scout_hf
from tests.integration import selection_oracle
from tests.integration.common import assert_close, left_padded, prompt, run, spiky
from tests.integration.selection_oracle import Oracle, Rules

NEW = 10
INPUTS = {
    "one row": prompt(1, 90),
    "rows": prompt(2, 91),
    "padded": left_padded(0, 5, 61, tokens=93),
    "all padded": left_padded(12, 19, tokens=88),
    "short": prompt(1, 9),
}
CASES = {
    "budget": {"budget": 32},
    "smallest": {"budget": 8},
    "share": {"budget": 0.37},
    "small share": {"budget": 0.2},
    "no window": {"budget": 24, "window": 0},
    "wide window": {"budget": 40, "window": 20},
    "window beyond the budget": {"budget": 16, "window": 32},
    "no sinks": {"budget": 32, "sinks": 0},
    "many sinks": {"budget": 40, "sinks": 17},
    "sinks beyond the budget": {"budget": 24, "sinks": 40},
    "dense layers": {"budget": 16, "dense_layers": (0, 2)},
    "leading dense layers": {"budget": 16, "dense_layers": (0, 1)},
    "everything": {"budget": None},
    "blocks of 16": {"budget": 48, "block_size": 16},
}
TWO_TIER_CASES = {name: case for name, case in CASES.items() if not isinstance(case["budget"], float)} | {
    "fewer residents than budget": {"budget": 40, "resident": 16},
    "more residents than budget": {"budget": 24, "resident": 48},
    "everything, few residents": {"budget": None, "resident": 16},
}


@functools.cache
def reference(inputs: str, case: str, two_tiers: bool = False, dtype=torch.float64, new: int = NEW):
    """Tokens and logits of a stock model that attends to what the oracle chooses, and how much that was, by layer."""
    rules = (TWO_TIER_CASES if two_tiers else CASES)[case]
    model, oracle = spiky(dtype), Oracle(Rules(**rules, two_tiers=two_tiers))
    model.set_attn_implementation(selection_oracle.NAME)
    selection_oracle.ACTIVE.append(oracle)
    try:
        output = run(model, INPUTS[inputs], new=new)
    finally:
        selection_oracle.ACTIVE.pop()
    output.past_key_values = None
    return output, {layer: sum(counts) / len(counts) for layer, counts in oracle.attended.items()}


def settings(case, **more):
    plain = {"digest": "minmax", "block_size": 8, "window": 8, "layer_ahead": False, "recall": None}
    return plain | case | more


def check(inputs: str, case: str, split: str, dtype=torch.float64) -> None:
    """What is attended, and what comes of it, is what the oracle says."""
    two_tiers = split == "cpu"
    expected, attended = reference(inputs, case, two_tiers, dtype)
    model = spiky(dtype)
    with scout_hf.patch(model, **settings((TWO_TIER_CASES if two_tiers else CASES)[case], split=split)) as handle:
        got = run(model, INPUTS[inputs], new=NEW)
    assert_close(got, expected, 1e-5)
    for layer in handle.stats().layers:
        assert layer.attended_tokens == pytest.approx(attended[layer.layer])
