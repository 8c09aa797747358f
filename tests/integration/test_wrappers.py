"""What people put around a model: the known is taken off before patching, the rest is refused by name."""

import warnings

import pytest
import torch
from torch import nn

import scout_hf
from scout_hf import PatchError, ScoutCache, UnsupportedModelError
from scout_hf.compat.cache_names import CACHE
from tests.integration.common import ONE_TIER, TWO_TIERS, assert_close, assert_equal, llama, prompt, run
from tests.integration.models import snapshot


@pytest.fixture
def model():
    return llama(num_hidden_layers=2)


class Forwarding(nn.Module):
    """A value head, or anybody's own class: has all that the model has, by handing on."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.head = nn.Linear(4, 1)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Hiding(Forwarding):
    """The same, with the model where torch does not see it."""

    def __init__(self, model):
        nn.Module.__init__(self)
        self.__dict__["inner"] = model

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)


def compiled(model):
    return torch.compile(model, backend="eager")


KNOWN = {
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "compiled twice": lambda model: compiled(nn.DataParallel(compiled(model))),
}


@pytest.mark.parametrize("way", KNOWN)
def test_known_wrappers_are_taken_off(model, way):
    stock, wrapper = run(model, prompt()), KNOWN[way](model)
    before = snapshot(model)
    handle = scout_hf.patch(wrapper, **TWO_TIERS)
    assert handle.model is model
    output = run(model, prompt())
    assert isinstance(output[CACHE], ScoutCache)
    assert_close(output, stock)
    assert handle.stats().steps == 9
    for again in (wrapper, model, KNOWN[way](model)):
        with pytest.raises(PatchError, match="patched already"):
            scout_hf.patch(again, **ONE_TIER)
    scout_hf.unpatch(wrapper)
    assert snapshot(model) == before
    assert_equal(run(model, prompt()), stock)


def test_generate_of_a_compiled_model_is_served(model):
    stock = run(model, prompt())
    wrapper = compiled(model)
    with scout_hf.patch(wrapper, **TWO_TIERS) as handle:
        assert_close(run(wrapper, prompt()), stock)
        assert handle.stats().steps == 9
    torch._dynamo.reset()


def test_a_compiled_model_that_ran_before_it_was_patched(model):
    """torch does not look for new hooks by itself."""
    wrapper = compiled(model)
    with torch.no_grad():
        wrapper(prompt())
        stock = [wrapper(prompt(), use_cache=True).logits]
        with scout_hf.patch(wrapper, **TWO_TIERS) as handle:
            cache = handle.new_cache()
            got = [wrapper(prompt(), **{CACHE: cache}).logits]
            wrapper(prompt(tokens=1), **{CACHE: cache})
            assert handle.stats().steps == 1
    torch._dynamo.reset()
    assert (got[0] - stock[0]).abs().max() <= 3e-6


@pytest.mark.parametrize("wrap", [Forwarding, Hiding])
@pytest.mark.parametrize("patched", [False, True])
def test_unknown_wrappers_are_refused(model, wrap, patched):
    """Also around a patched model: nothing is patched twice by another name."""
    if patched:
        scout_hf.patch(model, **ONE_TIER)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=f"{wrap.__name__} is .*patch"):
        scout_hf.patch(wrap(model), **ONE_TIER)
    assert snapshot(model) == before


def test_the_way_out_that_the_message_names(model):
    stock, wrapper = run(model, prompt()), Forwarding(model)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*scout_hf\.patch\(model\.inner\)"):
        scout_hf.patch(wrapper)
    with scout_hf.patch(wrapper.inner, **ONE_TIER) as handle:
        assert_close(run(wrapper, prompt()), stock)
        assert handle.stats().steps == 9


def test_two_heads_on_one_decoder(model):
    other = llama(1, num_hidden_layers=2)
    other.model = model.model
    with scout_hf.patch(model, **ONE_TIER), pytest.raises(PatchError, match="same decoder"):
        scout_hf.patch(other, **ONE_TIER)
    with scout_hf.patch(other, **ONE_TIER) as handle:
        run(other, prompt())
        assert handle.stats().steps == 9


def test_a_generate_that_does_not_reach_the_hooks_warns(model):
    stock = run(model, prompt())
    handle = scout_hf.patch(model, **ONE_TIER)
    for module in (model, model.model):
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()
    with pytest.warns(UserWarning, match="patched LlamaForCausalLM does not reach the hooks") as warned:
        output = run(model, prompt())
    assert len([one for one in warned if "hooks" in str(one.message)]) == 1
    assert_close(output, stock)
    assert handle.stats().steps == 0


def test_a_cache_that_came_to_the_hooks_may_go_anywhere(model):
    handle = scout_hf.patch(model, **ONE_TIER)
    cache = run(model, prompt())[CACHE]
    handle.remove()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(prompt(tokens=1), **{CACHE: cache})
        model(prompt(), **{CACHE: handle.new_cache()})
