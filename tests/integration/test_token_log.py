"""A cache knows which token ids it holds, and forgets them when it cannot know."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import scout_hf
from scout_hf import CACHE
from tests.integration.common import llama


@pytest.fixture(scope="module")
def model():
    made = llama()
    with scout_hf.patch(made, budget=64, block_size=16):
        yield made


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def ids():
    return torch.randint(3, 90, (2, 70), generator=torch.Generator().manual_seed(0))


def planted(*given):
    raise RuntimeError("planted")


def filled(model, ids, **more):
    cache = model._scout_handle.new_cache(**more.pop("settings", {}))
    model(ids, **{CACHE: cache}, **more)
    return cache


def step(model, cache, ids, **more):
    model(ids, **{CACHE: cache}, **more)
    return ids


def test_ids_of_generate_and_of_drafts(model, ids):
    cache = model._scout_handle.new_cache()
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, max_new_tokens=9, do_sample=False
    )
    assert torch.equal(cache.token_ids, tokens[:, :-1])
    drafted = model._scout_handle.new_cache()
    tokens = model.generate(ids[:1], **{CACHE: drafted}, max_new_tokens=9, prompt_lookup_num_tokens=3, do_sample=False)
    known = drafted.token_ids
    assert known is not None and torch.equal(known, tokens[:, : known.shape[1]]) and known.shape[1] >= 70 + 8


def test_padding_and_exactness_are_known(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    cache = filled(model, ids, attention_mask=mask)
    held = cache.log.held(70, cache.guard.changes)
    assert torch.equal(held.mask, mask.bool()) and held.exact == 70
    grown = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    step(model, cache, ids[:, :1], attention_mask=grown)
    assert cache.log.held(71, cache.guard.changes).exact == 70  # a sparse step
    exact = filled(model, ids, settings={"budget": None})
    step(model, exact, ids[:, :1])
    step(model, exact, ids[:, :2])
    assert exact.log.held(73, exact.guard.changes).exact == 73


def test_crop_rows_forks_and_failures_keep_them_right(model, ids, monkeypatch):
    cache = filled(model, ids)
    step(model, cache, ids[:, :3])
    cache.crop(-5)
    assert torch.equal(cache.token_ids, ids[:, :68])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.token_ids, ids[[1, 1], :68])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    twin = copy.deepcopy(cache)
    step(model, twin, ids[:, :1])
    assert torch.equal(cache.token_ids, ids[[1, 1], :68])
    assert torch.equal(twin.token_ids, torch.cat([ids[[1, 1], :68], ids[:, :1]], dim=1))
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted"):
        patched.setattr(
            model.model.layers[1].mlp, "forward", lambda *args: (_ for _ in ()).throw(RuntimeError("planted"))
        )
        step(model, twin, ids[:, 5:9])
    assert twin.get_seq_length() == 69 and twin.token_ids.shape == (2, 69)
    step(model, twin, ids[:, 9:11])
    assert torch.equal(twin.token_ids[:, 69:], ids[:, 9:11])
    twin.reset()
    assert twin.token_ids is None
    step(model, twin, ids)
    assert torch.equal(twin.token_ids, ids)


def test_a_loop_that_reuses_its_input_tensor(model, ids):
    cache = filled(model, ids)
    given = torch.empty(2, 1, dtype=torch.int64)
    for number in range(5):
        step(model, cache, given.fill_(number + 3))
    assert cache.token_ids[0, 70:].tolist() == [3, 4, 5, 6, 7]


UNKNOWN = {
    "embeddings": lambda model, cache, ids: model(inputs_embeds=model.get_input_embeddings()(ids), **{CACHE: cache}),
    "own positions": lambda model, cache, ids: model(ids, position_ids=torch.arange(90, 94)[None], **{CACHE: cache}),
    "update()": lambda model, cache, ids: [layer.update(*torch.randn(2, 2, 2, 4, 8)) for layer in cache.layers],
    "something else": lambda model, cache, ids: model.model(ids, pixel_values=torch.ones(1), **{CACHE: cache}),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_it_cannot_know_it_does_not_claim(model, ids, what):
    cache = filled(model, ids)
    UNKNOWN[what](model, cache, ids[:, :4])
    assert cache.get_seq_length() == 74 and cache.token_ids is None
    step(model, cache, ids[:, :2])
    assert cache.token_ids is None
    cache.crop(-6)
    step(model, cache, ids[:, :4])
    assert cache.token_ids is None


def test_a_session_has_them_unless_told_not_to(model, ids, tmp_path):
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    cache = filled(model, ids, attention_mask=mask)
    cache.save(tmp_path / "a")
    cache.save(tmp_path / "b", token_ids=False)
    opened = scout_hf.ScoutCache.load(tmp_path / "a", model)
    assert torch.equal(opened.token_ids, ids)
    assert torch.equal(opened.log.held(70, opened.guard.changes).mask, mask.bool())
    step(model, opened, ids[:, :2], attention_mask=torch.cat([mask, mask.new_ones(2, 2)], dim=1))
    assert torch.equal(opened.token_ids, torch.cat([ids, ids[:, :2]], dim=1))
    assert scout_hf.ScoutCache.load(tmp_path / "b", model).token_ids is None


def test_ids_that_are_not_those_of_the_cache_are_told_of(model, ids):
    cache = filled(model, ids)
    turned = torch.cat([ids, ids[:, :5]], dim=1)
    mask = torch.ones_like(turned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(turned, attention_mask=mask, **{CACHE: cache.fork()}, max_new_tokens=2)
    other = turned.clone()
    other[1, 30] = 99
    with pytest.warns(RuntimeWarning, match="other tokens .* from token 30 on"):
        model.generate(other, attention_mask=mask, **{CACHE: cache.fork()}, max_new_tokens=2)
