"""What reaches native code by address must be what it is taken for, wherever it comes from."""

from __future__ import annotations

import pytest
import torch

import scout_hf
from scout_hf.stores import PackedKV, PagedKV
from tests.integration.common import assert_equal, left_padded, llama, prompt, run

SPARSE = {"budget": 24, "block_size": 8, "window": 8, "layer_ahead": False}


@pytest.mark.parametrize("split", ["off", "cpu"])
def test_a_mask_that_is_not_contiguous(split):
    model, inputs = llama(), left_padded(0, 13, tokens=60)
    turned = inputs | {"attention_mask": inputs["attention_mask"].t().contiguous().t()}
    with scout_hf.patch(model, **SPARSE, split=split):
        assert_equal(run(model, turned), run(model, inputs))


def test_a_mask_with_too_few_rows():
    model = llama()
    with scout_hf.patch(model, **SPARSE) as handle, torch.no_grad():
        with pytest.raises(scout_hf.UnsupportedInputError, match="1 rows, the inputs have 2"):
            model(prompt(2), attention_mask=torch.ones(1, 50), past_key_values=handle.new_cache())


@pytest.mark.parametrize("kind", [PagedKV, PackedKV])
def test_another_default_device(kind):
    """Scripts set one; what native code reads must be in host memory all the same."""
    keys = torch.randn(2, 1, 2, 40, 16)
    with torch.device("meta"):
        store = kind(1, 2, 16, 8, torch.float32, torch.device("cpu"))
        store.append(*keys[:, :, :, :29])
        twin = store.fork()
        store.append(*keys[:, :, :, 29:])
        twin.crop(11)
    assert (store.read(0, 40)[0] - keys[0]).abs().max() < 0.1 and twin.length == 11


@pytest.mark.parametrize("kind", [PagedKV, PackedKV])
def test_blocks_that_are_not_there(kind):
    store = kind(1, 2, 16, 8, torch.float32, "cpu")
    store.append(*torch.randn(2, 1, 2, 40, 16))
    with pytest.raises((RuntimeError, IndexError)):
        store.read(0, 100_000)


def test_a_step_taken_back_leaves_int8_as_it_was():
    store = PackedKV(1, 2, 16, 8, torch.float32, "cpu")
    keys = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    store.append(keys[:, :, :31], keys[:, :, :31])
    before = store.read(24, 31)
    store.append(keys[:, :, 31:32], keys[:, :, 31:32])
    store.crop(31)
    assert all(torch.equal(a, b) for a, b in zip(store.read(24, 31), before))


def test_an_append_that_fails_leaves_int8_as_it_was(monkeypatch):
    store = PackedKV(1, 2, 16, 8, torch.float32, "cpu")
    keys = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    store.append(keys[:, :, :13], keys[:, :, :13])
    before = store.read(8, 13)
    real = PagedKV.append

    def interrupted(self, keys, values):
        length = self.length
        real(self, keys, values)
        self.length = length
        raise KeyboardInterrupt

    monkeypatch.setattr(PagedKV, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.append(keys[:, :, 13:], keys[:, :, 13:])
    assert all(torch.equal(a, b) for a, b in zip(store.read(8, 13), before))
