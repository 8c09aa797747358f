"""A whole model through the kernels themselves, in the interpreter, beside the same through torch's operations."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import scout_hf  # noqa: E402
from scout_hf.kernels.device import find_kernels  # noqa: E402
from scout_hf.methods.scout.executor_triton import TritonExecutor  # noqa: E402
from tests.integration.common import LOSSY, TWO_TIERS, assert_close, left_padded, llama, prompt, run  # noqa: E402
from tests.libraries import ISAS  # noqa: E402

WAYS = ["join", "flags"] if ISAS else ["join"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def small(**more):
    return llama(num_hidden_layers=2, **more).to(DEVICE)


def to_device(inputs):
    return {name: part.to(DEVICE) for name, part in inputs.items()}


INPUTS = {"one row": {"input_ids": prompt(1, 45)}, "padded": left_padded(0, 13, tokens=45)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.thin(2)
def test_exact_decoding_is_that_of_stock(inputs, way):
    model, given = small(), to_device(INPUTS[inputs])
    expected = run(model, given, new=5)
    with scout_hf.patch(model, **TWO_TIERS, gpu_kernels="triton", hand_over=way) as handle:
        got = run(model, given, new=5)
        assert handle.stats().layers[0].cpu_ratio > 0
    assert all(type(layer.method.executor) is TritonExecutor for layer in got.past_key_values.layers)
    assert_close(got, expected, 3e-6 if DEVICE == "cpu" else 2e-5)


@pytest.mark.parametrize("way", [*(pytest.param(way, marks=pytest.mark.full) for way in WAYS[:-1]), WAYS[-1]])
def test_sparse_decoding_is_that_of_torch(way):
    """With selection, prediction, recall and write-back: the same blocks, so the same logits."""
    model, options = small(), LOSSY | {"digest": "minmax"}
    with scout_hf.patch(model, **options, gpu_kernels="torch") as handle:
        expected = run(model, to_device(INPUTS["padded"]), new=5)
        theirs = handle.stats()
    with scout_hf.patch(model, **options, gpu_kernels="triton", hand_over=way) as handle:
        got = run(model, to_device(INPUTS["padded"]), new=5)
        ours = handle.stats()
    assert_close(got, expected, 1e-5)
    assert [one.recalled_blocks for one in ours.layers] == [one.recalled_blocks for one in theirs.layers]
    assert sum(one.recalled_blocks for one in ours.layers) > 0


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter")
def test_on_a_cpu_the_kernels_run_only_when_asked_for():
    assert find_kernels("auto", torch.device("cpu")) is None and find_kernels("torch", torch.device("cpu")) is None
    assert find_kernels("triton", torch.device("cpu")).INTERPRETED
