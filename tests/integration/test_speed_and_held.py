"""What stats() says of memory and speed: the bytes of all caches that are alive, tokens per second of passes."""

import copy
import gc
import json
import pickle
import threading
import time

import pytest
import torch

import scout_hf
from scout_hf import ScoutCache
from scout_hf.compat.cache_names import CACHE
from tests.integration.common import EXACT_METHODS, ONE_TIER, TWO_TIERS, llama, prompt, run
from tests.patches.tiny import tiny_model

SETTINGS = {"one tier": ONE_TIER, "two tiers": TWO_TIERS, **EXACT_METHODS}
EVERY = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def total(held):
    return sum(held.values())


@EVERY
def test_bytes_of_all_caches_that_are_alive(settings):
    with scout_hf.patch(llama(), **settings) as handle:
        assert (handle.stats().alive_caches, handle.stats().alive_bytes) == (0, {})
        caches = [run(handle.model, prompt(1, tokens))[CACHE] for tokens in (50, 80)]
        stats, each = handle.stats(), [cache.tier_bytes() for cache in caches]
        assert stats.alive_caches == 2
        assert stats.alive_bytes == {tier: each[0][tier] + each[1][tier] for tier in each[0]}
        del caches[0]
        gc.collect()
        assert (handle.stats().alive_caches, handle.stats().alive_bytes) == (1, each[1])
        caches[0].reset()
        assert (handle.stats().alive_caches, handle.stats().alive_bytes) == (0, {})


def test_the_newest_cache_is_told_after_it_is_gone():
    with scout_hf.patch(llama(), **TWO_TIERS) as handle:
        handle.model.generate(prompt(), max_new_tokens=3)
        gc.collect()
        stats = handle.stats()
        assert stats.kv_bytes["host"] > 0 and stats.alive_bytes == {}
        assert "nothing" in next(line for line in str(stats).splitlines() if "KV held now" in line)
        assert "KiB" in next(line for line in str(stats).splitlines() if "KV of the newest cache" in line)


@EVERY
def test_what_forks_share_counts_once(settings):
    with scout_hf.patch(llama(), **settings) as handle:
        cache = run(handle.model, prompt(1, 200))[CACHE]
        one = cache.tier_bytes()
        forks = [cache.fork(), copy.deepcopy(cache)]  # no pass has seen these
        stats = handle.stats()
        shared = "host" if "host" in one else "device"
        assert stats.alive_caches == 3
        for tier in one.keys() - {shared}:
            assert stats.alive_bytes[tier] == one[tier] + sum(fork.tier_bytes()[tier] for fork in forks)
        assert one[shared] <= stats.alive_bytes[shared] < 1.5 * one[shared]
        del cache
        gc.collect()
        # What they share is still held.
        assert one[shared] <= handle.stats().alive_bytes[shared] < 1.5 * one[shared]
        del forks
        gc.collect()
        assert handle.stats().alive_caches == 0


def test_pages_of_one_cache_still_count_in_full_outside_the_sum():
    with scout_hf.patch(llama(), **ONE_TIER) as handle:
        cache = run(handle.model, prompt(1, 200))[CACHE]
        twin = cache.fork()
        handle.stats()
        assert cache.tier_bytes() == twin.tier_bytes() == handle.stats().alive_bytes | {"digests": 0}


def test_every_way_to_a_cache_counts():
    """Handed out and filled by hand, made by hand and given to generate(), or given to a pass."""
    model = llama()
    with scout_hf.patch(model, **ONE_TIER) as handle, torch.no_grad():
        by_hand = handle.new_cache()
        assert handle.stats().alive_caches == 0
        for index in range(3):
            by_hand.update(*torch.zeros(2, 1, 2, 8, 8), index)
        assert handle.stats().alive_caches == 1
        given = ScoutCache(model.config, **ONE_TIER)
        run(model, prompt(), **{CACHE: given})
        passed = ScoutCache(model.config, **ONE_TIER)
        model(prompt(), **{CACHE: passed})
        twin = copy.copy(passed)
        model(prompt(1, 1), **{CACHE: twin})
        assert handle.stats().alive_caches == 3
        assert total(handle.stats().alive_bytes) == total(by_hand.tier_bytes()) + total(given.tier_bytes()) + total(
            passed.tier_bytes()
        )


def test_layers_left_to_transformers_count():
    with scout_hf.patch(tiny_model("qwen2_sliding"), **ONE_TIER) as handle:
        caches = [run(handle.model, prompt())[CACHE] for _ in range(2)]
        assert handle.stats().alive_bytes["stock"] == 2 * caches[0].tier_bytes()["stock"] > 0


def test_a_copied_model_counts_its_own(settings=TWO_TIERS):
    model = llama()
    with scout_hf.patch(model, **settings) as handle:
        cache = run(model, prompt())[CACHE]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other = twin._scout_handle
            assert (other.stats().alive_caches, other.stats().decode_tokens_per_second) == (0, None)
            held = run(twin, prompt())[CACHE]
            assert other.stats().alive_caches == handle.stats().alive_caches == 1
            assert other.stats().decode_tokens_per_second > 0
            del held
        assert cache.get_seq_length() > 0


# -- speed --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

        def __call__(self, seconds):
            def move(*_):
                self.now += seconds

            return move

    clock = Clock()
    monkeypatch.setattr("scout_hf.pace.time", clock)
    return clock


@pytest.fixture
def patched(clock):
    """Every pass of this model takes a second."""
    model = llama()
    model.model.layers[0].register_forward_hook(clock(1.0))
    with scout_hf.patch(model, **ONE_TIER) as handle:
        yield model, handle


def speeds(handle):
    stats = handle.stats()
    return stats.prefill_tokens_per_second, stats.decode_tokens_per_second


def test_nothing_ran_nothing_is_told(patched):
    _, handle = patched
    assert speeds(handle) == (None, None) and "tokens/s" not in str(handle.stats())


def test_all_rows_count(patched):
    model, handle = patched
    run(model, prompt(3, 50), 10)
    assert speeds(handle) == (150, 3)
    text = str(handle.stats())
    assert "150 tokens/s" in text and "3.0 tokens/s" in text


def test_what_is_between_passes_counts_and_what_is_between_calls_does_not(patched, clock):
    """Sampling takes three seconds, the user an hour."""
    model, handle = patched
    slow = [lambda ids, scores: clock(3.0)() or scores]
    cache = handle.new_cache()
    for turn in range(2):
        ids = prompt(1, 50 + 60 * turn)
        run(model, ids, 10, logits_processor=slow, **{CACHE: cache})
        clock(3600.0)()
    # A prompt, then 9 steps of which the last ends with its pass; 50 tokens, and 51 more in the next turn.
    prefill, decode = speeds(handle)
    assert prefill == pytest.approx((50 + 51) / 8) and decode == pytest.approx(18 / (16 * 4 + 2 * 1))


def test_turns_of_one_token_do_not_count_the_time_between_calls(patched, clock):
    model, handle = patched
    out = run(model, prompt(), 2, **{CACHE: handle.new_cache()})
    clock(3600.0)()
    run(model, out.sequences, 2, **{CACHE: out[CACHE]})
    assert speeds(handle)[1] == 1


def test_passes_by_hand(patched, clock):
    model, handle = patched
    with torch.no_grad():
        for _ in range(2):
            cache = handle.new_cache()
            model(prompt(), **{CACHE: cache})
            for _ in range(4):
                model(prompt(1, 1), **{CACHE: cache})
            clock(3600.0)()
    assert speeds(handle) == (50, 1)


def test_chunks_of_a_prompt_are_its_prefill(patched):
    model, handle = patched
    run(model, prompt(1, 64), 2, prefill_chunk_size=16)
    assert speeds(handle) == (16, 1)


def test_a_pass_that_failed_does_not_count(patched, clock):
    model, handle = patched
    cache = handle.new_cache()
    with torch.no_grad():
        model(prompt(), **{CACHE: cache})
        for error in (ValueError, KeyboardInterrupt):
            hook = model.model.layers[2].register_forward_pre_hook(
                lambda *_, error=error: (clock(3600.0)(), (_ for _ in ()).throw(error))
            )
            with pytest.raises(error):
                model(prompt(1, 1), **{CACHE: cache})
            hook.remove()
            model(prompt(1, 1), **{CACHE: cache})
    assert speeds(handle) == (50, 1)


def test_asking_changes_nothing_and_reset_starts_again(patched):
    model, handle = patched
    asked = []

    def ask(ids, scores):
        asked.append(speeds(handle))
        return scores

    run(model, prompt(), 10, logits_processor=[ask])
    assert asked == [(50, None), *[(50, 1)] * 9] and speeds(handle) == (50, 1)
    handle.reset_stats()
    assert speeds(handle) == (None, None)
    run(model, prompt(), 10)
    assert speeds(handle) == (50, 1)


def test_what_a_device_has_not_done_is_not_told(patched, monkeypatch):
    """The end of a pass there is not the end of its work; only what is between two passes counts."""
    model, handle = patched
    monkeypatch.setattr("scout_hf.pace._waits", lambda inputs: False)
    run(model, prompt(), 1)
    assert speeds(handle) == (None, None)
    run(model, prompt(), 10)
    assert speeds(handle) == (50, 1)


def test_threads_do_not_see_each_others_passes(patched, clock):
    """Real time is not needed: a pass in between does not end that of another thread."""
    model, handle = patched
    caches = [handle.new_cache() for _ in range(2)]

    def turn(index, ids):
        def work():
            with torch.no_grad():
                model(ids, **{CACHE: caches[index]})

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with torch.no_grad():
        model(prompt(), **{CACHE: caches[0]})
        turn(1, prompt())
        clock(10.0)()
        model(prompt(1, 1), **{CACHE: caches[0]})
    prefill, decode = speeds(handle)
    assert prefill == pytest.approx(100 / (12 + 1)) and decode == 1


def test_real_time():
    model = llama()
    with scout_hf.patch(model, **ONE_TIER) as handle:
        begin = time.perf_counter()
        run(model, prompt(2, 50), 10)
        took = time.perf_counter() - begin
        prefill, decode = speeds(handle)
        assert 2 * 50 / prefill + 2 * 9 / decode <= took
        json.dumps(handle.stats().to_dict())


@pytest.mark.parametrize(
    ("settings", "owner", "name"),
    [
        (TWO_TIERS, lambda layer: layer.method, "resident"),
        (EXACT_METHODS["kvpr"], lambda layer: layer.method, "inputs"),
        (ONE_TIER, lambda layer: layer, "method"),
    ],
    ids=["residents", "inputs", "reset"],
)
def test_asked_while_another_thread_lets_go(settings, owner, name, monkeypatch):
    """Whatever the generating thread drops after it was looked at once, stats() of another thread adds up."""
    with scout_hf.patch(llama(), **settings) as handle:
        cache = run(handle.model, prompt())[CACHE]
        held = owner(cache.layers[1])
        seen = iter([held.__dict__.pop(name)])
        once = property(lambda self: next(seen, None) if self is held else self.__dict__[name])
        monkeypatch.setattr(type(held), name, once, raising=False)
        assert cache.tier_bytes()
        assert next(seen, None) is None  # it was looked at
