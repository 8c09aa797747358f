"""Ctrl-C in the middle of a pass, and passes that use fewer layers than there are."""

import pytest
import torch

import scout_hf
from scout_hf.methods.scout.executor import StepState
from scout_hf.step import active_step
from tests.integration.disturbances import delayed_jobs, interrupt_a_wait
from tests.libraries import ISAS
from tests.patches.tiny import tiny_model

OPTIONS = dict(budget=None, layer_ahead=False, block_size=8, window=8, resident=16, split="cpu")


@pytest.fixture
def model():
    return tiny_model("llama")


def interrupt_once(model, layer):
    handle = model.model.layers[layer].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    return handle


def logits(model, ids, cache):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("layer", [0, 2])
def test_an_interrupted_pass_leaves_nothing_behind(model, layer):
    ids = torch.randint(1, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
    with scout_hf.patch(model, **OPTIONS) as handle:
        cache = handle.new_cache()
        logits(model, ids[:, :30], cache)
        hook = interrupt_once(model, layer)
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids[:, 30:], cache)
        hook.remove()
        found = logits(model, ids[:, 30:], cache)
        assert active_step() is None
        assert {held.get_seq_length() for held in cache.layers} == {40}
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)


def test_after_an_interrupt_a_call_without_a_scout_cache_is_stock(model):
    ids = torch.randint(1, 60, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        with scout_hf.patch(model, **OPTIONS) as handle:
            hook = interrupt_once(model, 1)
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=ids, attention_mask=mask, past_key_values=handle.new_cache())
            hook.remove()
            found = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(found, expected)


def test_early_exit_drafts_leave_no_job_for_a_later_step(model):
    ids = torch.randint(1, 60, (1, 60), generator=torch.Generator().manual_seed(0))
    stock = model.generate(ids, max_new_tokens=20, do_sample=False)
    with scout_hf.patch(model, **OPTIONS):
        ours = model.generate(ids, max_new_tokens=20, do_sample=False, assistant_early_exit=2)
    assert torch.equal(ours, stock)


def test_a_job_that_no_attention_used_is_dropped(model, monkeypatch):
    ids = torch.randint(1, 60, (1, 60), generator=torch.Generator().manual_seed(0))
    with scout_hf.patch(model, **OPTIONS | dict(layer_ahead=True, budget=24, cpu_query="predicted")) as handle:
        cache = handle.new_cache()
        logits(model, ids, cache)
        logits(model, ids[:, :1], cache)
        # As with layer dropping: hooks run, but the attention whose work was started does not.
        monkeypatch.setattr(model.model.layers[2], "forward", lambda hidden, *_, **__: hidden)
        logits(model, ids[:, :1], cache)
        monkeypatch.undo()
        assert cache.layers[2].method.state == StepState()


def test_a_call_nested_inside_a_running_pass_is_refused_and_harms_nothing(model):
    ids = torch.randint(1, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
    with scout_hf.patch(model, **OPTIONS) as handle:
        cache = handle.new_cache()
        logits(model, ids[:, :39], cache)
        nested = lambda *_: model(ids[:, :4], past_key_values=handle.new_cache())  # noqa: E731
        hook = model.model.layers[1].register_forward_pre_hook(nested)
        with pytest.raises(scout_hf.UnsupportedInputError, match="from inside itself"):
            logits(model, ids[:, 39:], cache)
        hook.remove()
        found = logits(model, ids[:, 39:], cache)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("split", ["off", "cpu"])
def test_a_fork_after_an_interrupt_is_whole(model, split):
    ids = torch.randint(1, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
    with scout_hf.patch(model, **OPTIONS | dict(split=split)) as handle:
        cache = handle.new_cache()
        logits(model, ids[:, :39], cache)
        hook = interrupt_once(model, 2)
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids[:, 39:], cache)
        hook.remove()
        assert cache.get_seq_length() == 39
        torch.testing.assert_close(logits(model, ids[:, 39:], cache.fork()), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"cpu_backend": "torch"}, *([{}, {"host_dtype": "int8"}] if ISAS else [])], ids=str
)
@pytest.mark.parametrize("call", [0, 2])
def test_an_interrupt_while_waiting_for_the_cpu(model, monkeypatch, settings, call):
    """A job without a waiter continues while the cache is rolled back and filled again."""
    ids = torch.randint(1, 60, (1, 48), generator=torch.Generator().manual_seed(0))

    with scout_hf.patch(model, **OPTIONS | settings) as handle:
        cache = handle.new_cache()
        logits(model, ids[:, :39], cache)
        expected = [logits(model, ids[:, at : at + 1], twin) for twin in [cache.fork()] for at in range(39, 48)]
        delayed_jobs(monkeypatch)
        waited = interrupt_a_wait(monkeypatch, call)
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids[:, 39:40], cache)
        twin = cache.fork()
        assert cache.get_seq_length() == twin.get_seq_length() == 39 and len(waited) == call + 1
        for each in (cache, twin):
            for at, before in zip(range(39, 48), expected):
                # Residents may be chosen again: sums are rounded otherwise, weights of int8 more so.
                error = (logits(model, ids[:, at : at + 1], each) - before).abs().max()
                assert error <= (5e-3 if "host_dtype" in settings else 3e-6)


def test_stats_call_exact_only_what_ran_exactly(model):
    ids = torch.randint(1, 60, (1, 80), generator=torch.Generator().manual_seed(0))
    with scout_hf.patch(model, budget=None) as handle:
        assert handle.stats().exact
        model.generate(ids, max_new_tokens=3, past_key_values=handle.new_cache(budget=32))
        assert not handle.stats().exact
    with scout_hf.patch(model, budget=32) as handle:
        assert not handle.stats().exact
        model.generate(ids, max_new_tokens=3, past_key_values=handle.new_cache(budget=None))
        assert handle.stats().exact
