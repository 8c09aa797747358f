"""A patch is put on and taken off between passes, whatever other threads do: no pass is half patched."""

import copy
import threading
import time

import pytest
import torch

import scout_hf
from scout_hf import CACHE, PatchError
from tests.integration.common import ONE_TIER, TWO_TIERS, assert_close, assert_equal, llama, prompt, run

TIERS = pytest.mark.parametrize("settings", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])


def in_pass(model, number, layer, action):
    """Run ``action`` before that layer in pass ``number``, and only there."""
    calls = []

    def hook(*_):
        calls.append(None)
        if len(calls) == number:
            action()

    return model.model.layers[layer].register_forward_pre_hook(hook)


@TIERS
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("number", [1, 4])
def test_removal_waits_for_the_pass_of_another_thread(settings, layer, number):
    """The rest of that generate() is the unpatched model's, over what the cache holds."""
    stock, model, inside, found = run(llama(), prompt()), llama(), threading.Event(), []

    def stay():
        inside.set()
        time.sleep(0.05)

    handle = scout_hf.patch(model, **settings)
    in_pass(model, number, layer, stay)
    thread = threading.Thread(target=lambda: found.append(run(model, prompt())))
    thread.start()
    assert inside.wait(60)
    handle.remove()
    thread.join()
    assert_close(found[0], stock)
    assert found[0][CACHE].get_seq_length() == stock[CACHE].get_seq_length()
    assert not model.__dict__.keys() & {"_scout_handle"} and type(model.config._attn_implementation) is str
    assert_equal(run(model, prompt()), stock)


@TIERS
@pytest.mark.parametrize("way", ["remove", "unpatch", "with"])
def test_a_pass_does_not_remove_its_own_patch(settings, way):
    stock, model = run(llama(), prompt()), llama()
    handle = scout_hf.patch(model, **settings)

    def remove():
        with pytest.raises(PatchError, match="remove it before the pass or after it"):
            if way == "with":
                with handle:
                    pass
            else:
                handle.remove() if way == "remove" else scout_hf.unpatch(model)

    hook = in_pass(model, 3, 1, remove)
    assert_close(run(model, prompt()), stock)
    hook.remove()
    assert_close(run(model, prompt()), stock)
    assert handle.stats().steps == 18
    handle.remove()
    assert_equal(run(model, prompt()), stock)


@TIERS
def test_a_pass_that_an_interrupt_left_is_not_waited_for(settings):
    model = llama()
    handle = scout_hf.patch(model, **settings)

    def interrupt():
        raise KeyboardInterrupt

    in_pass(model, 3, 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, prompt())
    handle.remove()
    assert_equal(run(model, prompt()), run(llama(), prompt()))


@TIERS
def test_removal_at_any_time_in_the_life_of_threads(settings):
    stock = run(llama(), prompt(), new=30)
    for delay in (0.0, 0.01, 0.03, 0.06):
        model, found = llama(), []

        def generate(model=model, found=found):
            found.append(run(model, prompt(), new=30))

        with scout_hf.patch(model, **settings):
            threads = [threading.Thread(target=generate) for _ in range(2)]
            for thread in threads:
                thread.start()
            time.sleep(delay)
        for thread in threads:
            thread.join()
        assert len(found) == 2
        for one in found:
            assert_close(one, stock)
        assert type(model.config._attn_implementation_internal) is str


def test_of_two_patches_at_a_time_one_is_refused(monkeypatch):
    """The second is through while the first tries an unknown family's model."""
    model, stock, made = llama(), run(llama(), prompt()), []
    from scout_hf import patching

    real = patching.check_unknown_family

    def patched_meanwhile(*given):
        monkeypatch.setattr(patching, "check_unknown_family", real)
        made.append(scout_hf.patch(model, **ONE_TIER))
        return real(*given)

    monkeypatch.setattr(patching, "check_unknown_family", patched_meanwhile)
    with pytest.raises(PatchError, match="patched already"):
        scout_hf.patch(model, **TWO_TIERS)
    assert_close(run(model, prompt()), stock)
    assert made[0].stats().steps == 9
    made[0].remove()
    assert_equal(run(model, prompt()), stock)


def test_a_removed_patch_is_not_entered():
    model = llama()
    handle = scout_hf.patch(model)
    handle.remove()
    with pytest.raises(PatchError, match="this patch was removed; patch the model again"), handle:
        pytest.fail("entered")


def test_a_shallow_copy_of_a_patched_model_can_be_patched_once_the_patch_is_gone():
    model, stock = llama(), run(llama(), prompt())
    handle = scout_hf.patch(model, **ONE_TIER)
    twin = copy.copy(model)
    with pytest.raises(PatchError, match="the model that it was copied from"):
        scout_hf.unpatch(twin)
    assert_close(run(model, prompt()), stock)
    handle.remove()
    assert_equal(run(twin, prompt()), stock)
    with scout_hf.patch(twin, **ONE_TIER) as second:
        assert_close(run(twin, prompt()), stock)
        assert second.stats().steps == 9
    assert_equal(run(twin, prompt()), stock)
    assert torch.equal(run(model, prompt()).sequences, stock.sequences)
