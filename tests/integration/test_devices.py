"""Models spread over devices by accelerate: each layer's tensors stay where the layer computes."""

from __future__ import annotations

import pytest

import scout_hf
from tests.integration.common import LOSSY, TWO_TIERS, assert_close, left_padded, llama, prompt, run

accelerate = pytest.importorskip("accelerate")

PARTS = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")


def spread(model, folder, places):
    """The layers where ``places`` says, the rest on the CPU."""
    where = {part: "cpu" for part in PARTS} | {f"model.layers.{i}": place for i, place in enumerate(places)}
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("places", [("cpu", "disk", "cpu"), ("disk",) * 3], ids=str)
@pytest.mark.parametrize("inputs", [prompt(), left_padded(0, 13)], ids=["one row", "padded"])
def test_layers_on_disk_decode_as_in_memory(tmp_path, places, inputs):
    """Their weights are there only within the layer's own call, so nothing is predicted for them."""
    expected = run(llama(), inputs)
    model = spread(llama(), tmp_path, places)
    with scout_hf.patch(model, **TWO_TIERS | {"layer_ahead": True, "cpu_query": "real"}) as handle:
        assert_close(run(model, inputs), expected)
        predicted = [layer.cosine is not None for layer in handle.stats().layers]
    assert predicted == [False, *(place != "disk" for place in places[1:])]
    assert_close(run(model, inputs), expected)


def test_removal_leaves_the_hooks_of_accelerate(tmp_path):
    model = spread(llama(), tmp_path, ("cpu", "disk", "cpu"))
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    with scout_hf.patch(model, **LOSSY, hand_over="graph"):
        run(model, prompt(), new=4)
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == before
