"""transformers calls the KV cache ``cache`` since 5.24, and ``past_key_values`` before; a user may know either name."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import scout_hf
from scout_hf.compat.cache_names import CACHE, NEW, OLD
from tests.integration.common import ONE_TIER, TOLERANCE, llama, prompt

NAMES = [OLD, pytest.param(NEW, marks=pytest.mark.skipif(CACHE == OLD, reason="this release has the old name only"))]
IDS = prompt()


@pytest.fixture
def patched():
    model = llama()
    with torch.no_grad():
        expected = model(IDS).logits
        with scout_hf.patch(model, **ONE_TIER) as handle:
            yield model, handle, expected


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_pass_takes_it(patched, name):
    model, handle, expected = patched
    cache = handle.new_cache()
    out = model(IDS[:, :-1], **{name: cache})
    assert out[CACHE] is cache and cache.get_seq_length() == IDS.shape[1] - 1
    got = torch.cat([out.logits, model(IDS[:, -1:], **{name: cache}).logits], dim=1)
    assert (got - expected).abs().max() <= TOLERANCE
    assert handle.stats().steps == 1


@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_it(patched, name):
    model, handle, _ = patched
    cache = handle.new_cache(block_size=16)
    given = model.generate(IDS, max_new_tokens=6, do_sample=False, **{name: cache})
    assert cache.get_seq_length() == IDS.shape[1] + 5 and cache.scout_layers[0].method.config.block_size == 16
    assert torch.equal(given, model.generate(IDS, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("name", NAMES)
def test_another_cache_is_served_by_stock(patched, name):
    model, handle, expected = patched
    cache = DynamicCache(config=model.config)
    assert torch.equal(model(IDS, **{name: cache}).logits, expected)
    assert cache.get_seq_length() == IDS.shape[1] and handle.stats().prefill_tokens == 0


@pytest.mark.skipif(CACHE == NEW, reason="this release has the new name")
def test_a_name_that_would_be_overlooked_is_refused(patched):
    model, handle, _ = patched
    with pytest.raises(scout_hf.UnsupportedInputError, match="pass it as past_key_values"):
        model(IDS, **{NEW: handle.new_cache()})
    assert model(IDS, **{OLD: handle.new_cache()}).logits.isfinite().all()


def test_the_name_is_public(patched, recwarn):
    model, handle, expected = patched
    out = model(IDS, **{scout_hf.CACHE: handle.new_cache()})
    assert torch.equal(model.generate(IDS, max_new_tokens=1)[:, -1:], out.logits[:, -1:].argmax(-1))
    assert isinstance(out[scout_hf.CACHE], scout_hf.ScoutCache) and (out.logits - expected).abs().max() <= TOLERANCE
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]
