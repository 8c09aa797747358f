"""Exact passes of several tokens over a link: copies run ahead of their use, also into the next layer.

What is shown by an emulated link whose clock moves only where somebody waits or computes.
"""

import contextlib
import threading

import pytest
import torch

import scout_hf
from scout_hf import CACHE, ScoutCache
from scout_hf.methods import host_to_device, offloading, several_tokens
from scout_hf.step import Role
from tests.integration.common import EXACT_METHODS, TOLERANCE, left_padded, llama, one_llama, prompt
from tests.integration.disturbances import Planted

TIERED = {"block_size": 8, "window": 8}
METHODS = {
    "scout": TIERED | {"split": "cpu", "resident": 16, "budget": 24, "layer_ahead": False},
    "scout, int8": TIERED | {"split": "cpu", "resident": 16, "budget": 24, "host_dtype": "int8"},
} | {name: options for name, options in EXACT_METHODS.items() if name != "hgca"}
LINK = 0.002
CHUNK = 16
LAYERS = 3


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(offloading, "PAST_CHUNK_TOKENS", CHUNK)


def filled(model, handle, ids, mask=None):
    cache = handle.new_cache()
    model(ids, attention_mask=mask, **{CACHE: cache})
    return cache


def passed(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **{CACHE: cache}).logits


class Watch:
    """The order in which copies start, arrive and are used, and how many buffers they take."""

    def __init__(self, monkeypatch, clock=None, attending=0.0):
        self.events, self.out, self.most, self.nbytes = [], 0, 0, 0
        start, wait, attend = offloading.blocks_to_device, host_to_device.InFlightCopy.wait, several_tokens.attend

        def started(step, host, first, *args):
            copy = start(step, host, first, *args)
            layer = next(each.layer_idx for each in step.cache.layers if each.method.kv.host is host)
            copy.name = layer, first
            self.events.append(("start", *copy.name))
            self.out, self.nbytes = self.out + 1, self.nbytes + copy.nbytes
            self.most = max(self.most, self.out)
            return copy

        def waited(copy):
            found = wait(copy)
            self.events.append(("arrived", *copy.name))
            return found

        def attended(*args, **kwargs):
            self.events.append(("attend",))
            if clock is not None and not kwargs.get("causal"):
                clock.now += attending
            return attend(*args, **kwargs)

        def given_back(copy, real=host_to_device.InFlightCopy.give_back):
            self.out -= 1
            real(copy)

        monkeypatch.setattr(offloading, "blocks_to_device", started)
        monkeypatch.setattr(host_to_device.InFlightCopy, "wait", waited)
        monkeypatch.setattr(host_to_device.InFlightCopy, "give_back", given_back)
        monkeypatch.setattr(several_tokens, "attend", attended)

    def before(self, one, other):
        return self.events.index(one) < self.events.index(other)


@pytest.mark.parametrize("name", METHODS)
def test_copies_run_ahead_of_their_use_within_a_layer_and_into_the_next(name, emulated, monkeypatch):
    model, ids = one_llama(), prompt(2, 100)
    with scout_hf.patch(model, **METHODS[name], link_gbps=LINK) as handle, torch.no_grad():
        cache = filled(model, handle, ids[:, :93])
        cache.drain()
        watch, held = Watch(monkeypatch), cache.layers[0].method.kv.host.length
        passed(model, cache, ids[:, 93:])
    chunks = range(0, held // 8, CHUNK // 8)
    assert len(chunks) >= 5
    for layer in range(LAYERS):
        for here, ahead in zip(chunks, chunks[1:]):
            assert watch.before(("start", layer, ahead), ("arrived", layer, here))
        if layer + 1 < LAYERS:
            for first in chunks[:2]:
                assert watch.before(("start", layer + 1, first), ("arrived", layer, chunks[-1]))
    assert watch.most == 1 + offloading.CHUNKS_AHEAD == 3 and not watch.out
    assert sum(event[0] == "start" for event in watch.events) == LAYERS * len(chunks)


@pytest.mark.parametrize("attending", [0.2, 1.0, 5.0], ids=lambda share: f"attending takes {share} of a copy")
@pytest.mark.parametrize("name", ["scout", "dense"])
def test_a_pass_takes_the_longer_of_copying_and_attending(name, attending, emulated, monkeypatch):
    model, ids = one_llama(), prompt(1, 200)
    with scout_hf.patch(model, **METHODS[name], link_gbps=LINK) as handle, torch.no_grad():
        cache = filled(model, handle, ids[:, :193])
        cache.drain()
        copy = 2 * 8 * CHUNK * cache.layers[0].method.kv_heads * model.config.head_dim * 4 / 8 / (LINK * 1e9)
        watch, begun = Watch(monkeypatch, emulated, attending * copy), emulated.now
        held = cache.layers[0].method.kv.host.length
        passed(model, cache, ids[:, 193:])
        took = emulated.now - begun
    copying, computing = watch.nbytes / (LINK * 1e9), attending * copy * LAYERS * (-(-held // CHUNK) + 1)
    # The first chunk of a pass has nothing to hide behind, nor has the last attention.
    assert max(copying, computing) <= took + 1e-9 <= max(copying, computing) + 2 * (1 + attending) * copy
    assert took < 0.75 * (copying + computing) or attending != 1.0


@pytest.mark.parametrize("padding", [(0, 0), (0, 13)], ids=["plain", "padded"])
@pytest.mark.parametrize("name", METHODS)
def test_the_logits_are_those_without_a_link(name, padding, emulated):
    """Turns and a step, then a fork, a cropped cache, and other rows."""
    model, (ids, mask) = llama(), left_padded(*padding, tokens=110).values()

    def turns(options):
        found = []
        with scout_hf.patch(model, **options) as handle, torch.no_grad():
            cache = filled(model, handle, ids[:, :70], mask[:, :70])
            for first, last in ((70, 83), (83, 84), (84, 90)):
                found.append(passed(model, cache, ids[:, first:last], mask[:, :last]))
            twin = cache.fork()
            cache.crop(-7)
            found.append(passed(model, cache, ids[:, 83:88], mask[:, :88]))
            twin.batch_select_indices(torch.tensor([1]))
            found.append(passed(model, twin, ids[1:, 90:99], mask[1:, :99]))
        return found

    exactly = METHODS[name] | ({"budget": None} if name.startswith("scout") else {})
    for got, wanted in zip(turns(exactly | {"link_gbps": LINK}), turns(exactly)):
        assert (got - wanted).abs().max() <= (TOLERANCE if "int8" not in name else 1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", range(0, 15, 2))
@pytest.mark.parametrize("name", ["scout", "scout, int8", "dense", "kvpr", "infinigen"])
@pytest.mark.thin(2)
def test_an_error_while_copies_run_drops_them(name, after, error, emulated, monkeypatch):
    model, ids = one_llama(), prompt(1, 100)
    options = METHODS[name] | ({"budget": None} if name.startswith("scout") else {})
    with scout_hf.patch(model, **options, link_gbps=LINK) as handle, torch.no_grad():
        cache = filled(model, handle, ids[:, :80])
        wanted = passed(model, cache.fork(), ids[:, 80:])
        places = ((several_tokens, "attend"), (offloading, "blocks_to_device"))
        place, called = places[after // 2 % 2], []
        real = getattr(*place)

        def fail(*args, **kwargs):
            called.append(0)
            if len(called) == after + 1:
                raise error
            return real(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(*place, fail)
            with pytest.raises(error):
                passed(model, cache, ids[:, 80:])
        assert cache.get_seq_length() == 80
        assert not any(layer.method.stream._copies for layer in cache.layers)
        for each in (cache.fork(), cache):
            assert (passed(model, each, ids[:, 80:]) - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["scout", "dense"])
def test_copies_that_no_layer_used_end_with_the_pass(name, emulated, monkeypatch):
    """A layer that is left out, as by early exit."""
    model, ids = llama(), prompt(1, 100)
    with scout_hf.patch(model, **METHODS[name], link_gbps=LINK) as handle, torch.no_grad():
        cache = filled(model, handle, ids[:, :80])
        watch = Watch(monkeypatch)
        monkeypatch.setattr(offloading.OffloadingMethod, "past_chunks", stopping_at(1))
        with contextlib.suppress(Planted):
            passed(model, cache, ids[:, 80:])
        assert not watch.out and any(event[:2] == ("start", 1) for event in watch.events)


def stopping_at(layer, real=offloading.OffloadingMethod.past_chunks):
    def past_chunks(self, *args):
        if self.layer_idx == layer:
            raise Planted
        return real(self, *args)

    return past_chunks


def test_threads_with_caches_of_their_own():
    model, texts = one_llama(), [prompt(1, 100, seed) for seed in range(4)]
    options = METHODS["scout"] | {"budget": None, "link_gbps": 0.05}
    with scout_hf.patch(model, **options) as handle, torch.no_grad():
        wanted = [passed(model, filled(model, handle, ids[:, :80]), ids[:, 80:]) for ids in texts]
        found = [None] * len(texts)

        def go(number):
            with torch.no_grad():
                found[number] = passed(model, filled(model, handle, texts[number][:, :80]), texts[number][:, 80:])

        threads = [threading.Thread(target=go, args=(number,)) for number in range(len(texts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("kept", ["a limit on memory", "a session"])
@pytest.mark.parametrize("name", ["scout", "dense", "kvpr"])
def test_pages_that_lie_in_files(name, kept, emulated, tmp_path):
    """They are brought and checked before a copy of them starts; others that it drives out are read where they are."""
    model, ids = one_llama(), prompt(2, 320)
    options = METHODS[name] | ({"budget": None} if name == "scout" else {}) | {"link_gbps": LINK}

    def turns(cache):
        return [passed(model, cache, ids[:, at : at + 10]) for at in (301, 311)]

    with scout_hf.patch(model, **options) as handle, torch.no_grad():
        whole = filled(model, handle, ids[:, :301])
        if kept == "a session":
            whole.save(tmp_path / "kept")
            cache = ScoutCache.load(tmp_path / "kept", model)
        else:
            cache = handle.new_cache(host_memory=1 << 16)
            model(ids[:, :301], **{CACHE: cache})
        got, wanted = turns(cache), turns(whole)
    assert all(map(torch.equal, got, wanted))
    assert kept == "a session" or cache.layers[0].memory.evicted_bytes > 0


def test_exact_steps_of_drafting_take_this_way(emulated, monkeypatch):
    """Steps outside of ``generate()`` are exact with drafts; checks of drafts too."""
    model, ids = one_llama(), prompt(1, 100)
    options = METHODS["scout"] | {"link_gbps": LINK}
    with scout_hf.patch(model, draft=3, **options) as handle, torch.no_grad():
        cache = filled(model, handle, ids[:, :93])
        for role, tokens in ((Role.ORDINARY, 1), (Role.CHECK, 4)):
            cache.drain()
            cache.role, watch = role, Watch(monkeypatch)
            passed(model, cache, ids[:, 93 : 93 + tokens])
            cache.role = Role.ORDINARY
            assert watch.before(("start", 1, 0), ("arrived", 0, 8)) and watch.most == 3


def test_a_planted_copy_that_is_used_too_early_is_seen(monkeypatch):
    """Had nobody waited, the logits would show it: what is checked above is not vacuous."""
    model, ids = one_llama(), prompt(1, 100)
    with scout_hf.patch(model, **METHODS["dense"], link_gbps=LINK) as handle, torch.no_grad():
        cache = filled(model, handle, ids[:, :80])
        wanted = passed(model, cache.fork(), ids[:, 80:])
        monkeypatch.setattr(
            host_to_device.InFlightCopy, "wait", lambda self: tuple(torch.full_like(part, 7.0) for part in self._buffer)
        )
        got = passed(model, cache, ids[:, 80:])
    assert not torch.allclose(got, wanted, atol=1e-3)
