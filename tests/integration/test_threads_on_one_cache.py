"""Two threads that change one cache at the same time: one of them does, the other is told, and no layer is ahead."""

import contextlib
import threading

import pytest
import torch

import scout_hf
from scout_hf import CacheStateError
from scout_hf import cache as cache_module
from scout_hf.padding import Padding
from scout_hf.token_log import TokenLog
from tests.integration.common import ONE_TIER, TOLERANCE, TWO_TIERS, llama, prompt

IDS = prompt(2, 60)
TIERS = pytest.mark.parametrize("tiers", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
AT_THE_SAME_TIME = "another thread began to change this cache at the same time as .* fork"


@pytest.fixture
def world(tiers):
    """A patched model, a cache of 45 tokens, and the logits of the next one."""
    model = llama()
    with scout_hf.patch(model, **tiers) as handle, torch.no_grad():
        expected = model(IDS[:, :46]).logits[:, -1]
        cache = handle.new_cache()
        model(IDS[:, :45], past_key_values=cache)
        yield model, cache, expected


def step(model, cache, at=45):
    with torch.no_grad():
        return model(IDS[:, at : at + 1], past_key_values=cache).logits[:, -1]


def lengths(cache):
    return {layer.get_seq_length() for layer in cache.layers}


def once_meanwhile(monkeypatch, owner, name, call):
    """Before the next call of that function another thread calls `call`, to the end."""
    real, calls, found = getattr(owner, name), [call], []

    def wrapped(*args, **kwargs):
        if calls:
            thread = threading.Thread(target=lambda ask: found.append(ask()), args=(calls.pop(),))
            thread.start()
            thread.join()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)
    return found


@TIERS
def test_of_two_passes_that_begin_together_one_is_run(world, monkeypatch):
    model, cache, expected = world
    found = once_meanwhile(monkeypatch, Padding, "of", lambda: step(model, cache))
    with pytest.raises(CacheStateError, match=AT_THE_SAME_TIME):
        step(model, cache)
    assert (found[0] - expected).abs().max() <= TOLERANCE
    assert lengths(cache) == {46} and cache.token_ids.tolist() == IDS[:, :46].tolist()
    step(model, cache, 46)
    assert lengths(cache) == {47}


@TIERS
@pytest.mark.parametrize("name", ["crop", "reset"])
def test_a_pass_that_began_before_a_change_is_not_run_behind_it(world, monkeypatch, name):
    model, cache, expected = world
    change = {"crop": lambda: cache.crop(-5), "reset": cache.reset}[name]
    once_meanwhile(monkeypatch, Padding, "of", change)
    with pytest.raises(CacheStateError, match=AT_THE_SAME_TIME):
        step(model, cache)
    left = {"crop": 40, "reset": 0}[name]
    assert lengths(cache) == {left}
    with torch.no_grad():
        model(IDS[:, left:45], past_key_values=cache)
    assert (step(model, cache) - expected).abs().max() <= TOLERANCE


@TIERS
def test_a_change_that_was_checked_before_a_pass_is_not_made_in_it(world, monkeypatch):
    model, cache, expected = world
    inside, outside, found = threading.Event(), threading.Event(), []

    def wait(*_):
        inside.set()
        outside.wait(30)

    hook = model.model.layers[2].mlp.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.append(step(model, cache)))

    def begin():
        thread.start()
        assert inside.wait(30)

    once_meanwhile(monkeypatch, cache_module, "tokens_to_crop", begin)
    with contextlib.ExitStack() as ends:
        ends.callback(thread.join)
        ends.callback(outside.set)
        ends.callback(hook.remove)
        with pytest.raises(CacheStateError, match="crop.* in the middle of a forward pass of another thread"):
            cache.crop(-5)
    assert (found[0] - expected).abs().max() <= TOLERANCE and lengths(cache) == {46}
    step(model, cache, 46)


@TIERS
@pytest.mark.parametrize("name", ["crop", "rows"])
def test_a_change_that_was_checked_before_a_whole_pass_is_not_made_behind_it(world, monkeypatch, name):
    """What it was to change, such as how many tokens are kept, was reckoned before."""
    model, cache, expected = world
    part, change = {
        "crop": ("tokens_to_crop", lambda: cache.crop(40)),
        "rows": ("rows_asked", lambda: cache.batch_select_indices([0, 0])),
    }[name]
    found = once_meanwhile(monkeypatch, cache_module, part, lambda: step(model, cache))
    with pytest.raises(CacheStateError, match=AT_THE_SAME_TIME):
        change()
    assert (found[0] - expected).abs().max() <= TOLERANCE and lengths(cache) == {46}
    step(model, cache, 46)


@TIERS
def test_a_fork_that_a_pass_went_through_is_not_handed_out(world, monkeypatch):
    model, cache, expected = world
    found = once_meanwhile(monkeypatch, TokenLog, "fork", lambda: step(model, cache))
    with pytest.raises(CacheStateError, match=AT_THE_SAME_TIME):
        cache.fork()
    assert (found[0] - expected).abs().max() <= TOLERANCE
    assert lengths(cache) == lengths(cache.fork()) == {46}


@TIERS
def test_many_threads_at_once(world):
    """What is not told is held, whoever came first."""
    model, cache, _ = world
    for _ in range(5):
        one, told, ready = cache.fork(), [], threading.Barrier(4)

        def work(one=one, told=told, ready=ready):
            ready.wait()
            try:
                step(model, one)
            except CacheStateError as error:
                told.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert lengths(one) == {45 + 4 - len(told)}
