"""A CPU share that the device gave up waiting for, or that failed: noticed in its own step, which is taken back."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import scout_hf  # noqa: E402
from scout_hf.errors import CacheStateError  # noqa: E402
from tests.integration import fake_graph  # noqa: E402
from tests.integration.common import TWO_TIERS, llama, prompt, run  # noqa: E402
from tests.libraries import ISAS  # noqa: E402
from tests.triton import reference  # noqa: E402

pytestmark = pytest.mark.skipif(not ISAS, reason="needs the native library")

EXACT = TWO_TIERS | {"cpu_query": "real", "layer_ahead": True}
LAYERS = 3


@pytest.fixture(params=["flags", "graph"])
def way(request, monkeypatch):
    reference.install(monkeypatch)
    fake_graph.install(monkeypatch)
    return request.param


class GivesUp:
    """The wait of one layer in one step ends before the CPU's share is there, which nobody but its word tells."""

    def __init__(self, monkeypatch, at):
        self.real, self.at, self.calls = reference.KERNELS.wait, at, 0
        monkeypatch.setattr(reference.KERNELS, "wait", fake_graph.recorded(self.wait))

    def wait(self, word, number, late, *args):
        self.calls += 1
        self.real(word, number, late, *args)
        if self.calls == self.at:
            late.copy_(number)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_step_that_it_belongs_to_ends_with_an_error(monkeypatch, way, layer):
    ids, steps = prompt(1, 60), 8
    stock = llama()(ids).logits[0]
    waits = GivesUp(monkeypatch, at=(steps - 1) * LAYERS + layer + 1)
    with scout_hf.patch(llama(), **EXACT, hand_over=way) as handle, torch.no_grad():
        cache = handle.new_cache()
        handle.model(ids[:, :40], past_key_values=cache)
        for place in range(40, 40 + steps - 1):
            handle.model(ids[:, place : place + 1], past_key_values=cache)
        with pytest.raises(CacheStateError, match=f"number {steps} of a layer timed out, and the step was taken back"):
            handle.model(ids[:, 47:48], past_key_values=cache)
        assert waits.calls == steps * LAYERS and cache.get_seq_length() == 47
        for place in range(47, 60):
            got = handle.model(ids[:, place : place + 1], past_key_values=cache).logits[0, 0]
            assert (got - stock[place]).abs().max() <= 3e-6


def test_the_last_token_of_generate_is_not_taken_from_it(monkeypatch, way):
    new = 6
    GivesUp(monkeypatch, at=(new - 1) * LAYERS)
    with scout_hf.patch(llama(), **EXACT, hand_over=way) as handle:
        with pytest.raises(CacheStateError, match="timed out"):
            run(handle.model, prompt(), new=new)


def test_a_job_that_failed_is_no_result_either(monkeypatch, way):
    with scout_hf.patch(llama(), **EXACT, hand_over=way) as handle, torch.no_grad():
        cache = handle.new_cache()
        handle.model(prompt(), past_key_values=cache)
        for step in range(4):
            handle.model(prompt(1, 1, step), past_key_values=cache)
        choose = reference.KERNELS.choose

        def wrong(*args):
            found = choose(*args)
            found.missing.fill_(-7)
            return found

        monkeypatch.setattr(reference.KERNELS, "choose", fake_graph.recorded(wrong))
        for each in cache.layers:
            each.method.changed()
            each.method.executor.handoff.lost = True  # the next step runs without a graph
        with pytest.raises(CacheStateError, match="failed in the native library .status -3., and the step was taken"):
            handle.model(prompt(1, 1), past_key_values=cache)


def test_a_fork_and_other_caches_know_nothing_of_it(monkeypatch, way):
    with scout_hf.patch(llama(), **EXACT, hand_over=way) as handle, torch.no_grad():
        caches = [handle.new_cache() for _ in range(2)]
        for cache in caches:
            handle.model(prompt(), past_key_values=cache)
            handle.model(prompt(1, 1), past_key_values=cache)
        caches[0].late.word(torch.device("cpu")).fill_(1)
        for cache in (caches[0].fork(), caches[1]):
            handle.model(prompt(1, 1), past_key_values=cache)
        with pytest.raises(CacheStateError, match="number 1 of a layer timed out"):
            handle.model(prompt(1, 1), past_key_values=caches[0])
