"""generate() in full, attending to everything with the real query: the logits of the stock model in every mode."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch

import scout_hf
from scout_hf import ScoutCache
from scout_hf.kernels.cpu import BlockLists, find_backend
from tests.integration.common import (
    EXACT_METHODS,
    MODES,
    ONE_TIER,
    TWO_TIERS,
    assert_close,
    both_tiers_hold_tokens,
    left_padded,
    llama,
    logits,
    prompt,
    run,
    stock_mode,
)
from tests.integration.executors import WAYS, use_triton
from tests.libraries import ISAS, without_library

SETTINGS = {
    f"{tier} {size}": options | {"block_size": size, "window": 8}
    for tier, options in (("one tier", ONE_TIER), ("two tiers", TWO_TIERS))
    for size in (8, 16)
}
SETTINGS |= {f"method {name}": options for name, options in EXACT_METHODS.items()}
ALONE = [(tier, "torch alone") for tier in ("one tier 16", "two tiers 8")] if ISAS else []
BY_TRITON = [(f"two tiers {size}", way) for way, size in zip(WAYS, (8, 16))]


@pytest.fixture(params=[*((name, "") for name in SETTINGS), *ALONE, *BY_TRITON], ids=", ".join)
def settings(request, monkeypatch):
    name, how = request.param
    if how in WAYS:
        use_triton(monkeypatch, how)
    with without_library() if how == "torch alone" else nullcontext():
        yield SETTINGS[name]


@pytest.fixture(scope="module")
def stock():
    return llama()


@pytest.fixture(scope="module")
def once():
    """What all settings are compared with is made once."""
    known = {}
    return lambda what, make: known[what] if what in known else known.setdefault(what, make())


@pytest.fixture
def patched(settings):
    """A patched copy of ``stock``; on two tiers each must have had a share by the end."""
    model = llama()
    with scout_hf.patch(model, **settings) as handle:
        yield model
        assert handle.exact
        steps = handle.stats().steps
        assert steps == 0 or settings.get("split") == "off" or both_tiers_hold_tokens(handle)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.thin(3)
def test_mode(patched, mode):
    (inputs, options), found = MODES[mode], [stock_mode(mode)]
    torch.manual_seed(0)
    found.append(run(patched, inputs, **options))
    assert isinstance(found[1].past_key_values, ScoutCache)
    assert_close(found[1], found[0])
    if "output_hidden_states" in options:
        for got, expected in zip(found[1].hidden_states, found[0].hidden_states):
            for a, b in zip(got, expected):
                assert (a[0] - b[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("which", ["target", "assistant", "both"])
@pytest.mark.thin(3)
def test_assisted_decoding(settings, once, which):
    """The assistant is a near copy, so that some drafts are taken and some are not."""
    target, assistant = llama(), llama()
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    alone = once("alone", lambda: run(target, prompt(), new=20))
    expected = once("assisted", lambda: run(target, prompt(), new=20, assistant_model=assistant))
    assert torch.equal(alone.sequences, expected.sequences)
    for name, model in (("target", target), ("assistant", assistant)):
        if which in (name, "both"):
            scout_hf.patch(model, **settings)
    got = run(target, prompt(), new=20, assistant_model=assistant)
    assert isinstance(got.past_key_values, ScoutCache) == (which != "assistant")
    assert_close(got, expected)


def test_early_exit_drafts(stock, patched, once):
    options = {"assistant_early_exit": 2, "new": 16}
    assert_close(run(patched, prompt(), **options), once("early exit", lambda: run(stock, prompt(), **options)))


def test_inference_mode(stock, patched, once):
    expected = once("padded", lambda: run(stock, left_padded(0, 5)))
    with torch.inference_mode():
        got = run(patched, left_padded(0, 5))
    assert_close(got, expected)
    assert_close(run(patched, left_padded(0, 5)), expected)


def test_cache_made_in_inference_mode_continues_without(stock, patched, once):
    first = once("one row", lambda: run(stock, prompt()))
    with torch.inference_mode():
        cache = run(patched, prompt()).past_key_values
    longer = torch.cat([first.sequences, prompt(1, 9, seed=3)], dim=1)
    assert_close(run(patched, longer, past_key_values=cache), once("longer", lambda: run(stock, longer)))


def test_streamer(stock, patched):
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamers = Streamer(), Streamer()
    for model, streamer in zip((stock, patched), streamers):
        run(model, prompt(), streamer=streamer)
        assert streamer.ended
    assert streamers[0].tokens == streamers[1].tokens and len(streamers[0].tokens) == 60


def test_generate_in_another_thread(stock, patched, once):
    """What TextIteratorStreamer users do."""
    found = []
    worker = threading.Thread(target=lambda: found.append(run(patched, prompt())))
    worker.start()
    worker.join()
    assert_close(found[0], once("one row", lambda: run(stock, prompt())))


def test_right_padded_forward(stock, patched):
    """One forward pass over right-padded rows; the logits of the real tokens."""
    ids, mask = prompt(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[1, 33:], mask[2, 9:] = 0, 0
    cache = ScoutCache(patched.config, **ONE_TIER)
    with torch.no_grad():
        expected = stock(ids, attention_mask=mask).logits
        got = patched(ids, attention_mask=mask, past_key_values=cache).logits
    assert ((got - expected)[mask.bool()]).abs().max() <= 3e-6


def test_decoding_after_right_padding(stock, patched, once):
    """Holes in the cache that no row starts with."""

    def decoded(model, cache):
        ids, mask, found = prompt(2, 40), torch.ones(2, 40, dtype=torch.long), []
        mask[1, 20:] = 0
        positions = mask.cumsum(-1) - 1
        for step in range(21):
            output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, prompt(2, 1, seed=step)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            positions = mask.sum(-1, keepdim=True) - 1
            found.append(output.logits[:, -1])
        return torch.stack(found[1:])

    with torch.no_grad():
        expected = once("after right padding", lambda: decoded(stock, None))
        got = decoded(patched, scout_hf.ScoutCache(patched.config, patched._scout_handle.config))
    assert (got - expected).abs().max() <= 3e-6


def turns(model, first, following, **options):
    """Several turns with the returned cache, each with all that was said before; the outputs of all of them."""
    outputs = [run(model, first, **options)]
    mask = first["attention_mask"]
    for ids in following:
        said = outputs[-1].sequences
        mask = torch.nn.functional.pad(mask, (0, said.shape[1] - mask.shape[1] + ids.shape[1]), value=1)
        both = {"input_ids": torch.cat([said, ids], dim=1), "attention_mask": mask}
        outputs.append(run(model, both, past_key_values=outputs[-1].past_key_values, **options))
    return outputs


@pytest.mark.parametrize("padding", [(0,), (0, 5, 21)], ids=["one row", "padded"])
@pytest.mark.thin(2)
def test_multi_turn(stock, patched, once, padding):
    following = [prompt(len(padding), tokens, seed=tokens) for tokens in (1, 23, 8)]
    expected = once(("turns", padding), lambda: turns(stock, left_padded(*padding), following))
    got = turns(patched, left_padded(*padding), following)
    for a, b in zip(got, expected):
        assert_close(a, b)
    if len(padding) == 1:
        fresh = once("without turns", lambda: run(stock, {"input_ids": expected[-1].sequences[:, :-10]}))
        assert torch.equal(fresh.sequences, got[-1].sequences)


def test_multi_turn_with_holes(stock, patched, once):
    """The second turn of a batch is padded on the left too, so that padding lies inside the rows."""
    first, hole = left_padded(0, 5), left_padded(0, 9, tokens=20, seed=7)

    def second(model):
        output = run(model, first)
        ids = torch.cat([output.sequences, hole["input_ids"]], dim=1)
        mask = torch.nn.functional.pad(first["attention_mask"], (0, 10), value=1)
        both = {"input_ids": ids, "attention_mask": torch.cat([mask, hole["attention_mask"]], dim=1)}
        return run(model, both, past_key_values=output.past_key_values, new=20)

    assert_close(second(patched), once("holes", lambda: second(stock)))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda cache: cache.fork() if hasattr(cache, "fork") else
                                     copy.deepcopy(cache)], ids=["deepcopy", "fork"])  # fmt: skip
@pytest.mark.thin(2)
def test_prefix_used_twice(stock, patched, once, copy_of):
    """Copies continue one prefix differently, by turns, and the prefix itself stays usable."""
    prefix = prompt(1, 45)
    longer = [torch.cat([prefix, prompt(1, tokens, seed=tokens)], dim=1) for tokens in (3, 30)]

    def used(model):
        with torch.no_grad():
            cache = model(prefix, use_cache=True, past_key_values=model_cache(model)).past_key_values
        twins = [copy_of(cache), copy_of(cache)]
        outputs = [run(model, ids, past_key_values=twin) for ids, twin in zip(longer, twins)]
        again = [torch.cat([output.sequences, prompt(1, 4, seed=9)], dim=1) for output in outputs]
        outputs += [run(model, ids, past_key_values=twin) for ids, twin in zip(again, twins)]
        return [*outputs, run(model, longer[0], past_key_values=cache)]

    for got, expected in zip(used(patched), once("prefix", lambda: used(stock))):
        assert_close(got, expected)


def test_batch_operations_of_a_cache(stock, patched, once):
    """Repeat and select rows between two turns, as contrastive search and user code do."""

    def selected(model):
        with torch.no_grad():
            cache = model(prompt(2), use_cache=True, past_key_values=model_cache(model)).past_key_values
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 3, 2]))
            cache.reorder_cache(torch.tensor([2, 0, 1]))
            cache.crop(-7)
            steps = []
            for step in range(12):
                steps.append(model(prompt(3, 1, seed=step), past_key_values=cache).logits)
        return torch.stack(steps)

    assert (selected(patched) - once("selected", lambda: selected(stock))).abs().max() <= 3e-6


def model_cache(model):
    handle = model.__dict__.get("_scout_handle")
    return handle.new_cache() if handle else None


@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
@pytest.mark.parametrize("name", ["torch", "native"][: 1 + bool(ISAS)])
def test_a_planted_error_is_seen(stock, monkeypatch, name, options):
    """The tolerance is far below the effect of one block that is left out."""
    backend, left_out = find_backend(name), []

    def without_one(job):
        def start(self, query, store, lists, *args):
            if lists is None:
                lists = BlockLists(torch.arange(store.blocks).expand(store.batch, store.heads, -1).int(), None)
            counts = None if lists.counts is None else (lists.counts - 1).clamp(min=0)
            left_out.append(int(lists.ids.shape[2]))
            return job(self, query, store, BlockLists(lists.ids[:, :, 1:].contiguous(), counts), *args)

        return start

    model = llama()
    with scout_hf.patch(model, **options, cpu_backend=name):
        expected = run(stock, prompt(), new=2)
        assert_close(run(model, prompt(), new=2), expected)
        # On two tiers jobs are started; torch's then call the other.
        changed = "start" if options["split"] == "cpu" else "attend_blocks"
        monkeypatch.setattr(backend, changed, without_one(getattr(backend, changed)))
        got = run(model, prompt(), new=2)
    assert left_out and (logits(got) - logits(expected)).abs().max() > 1e-4
