"""Whole models on a GPU: exactness, both variants alike, no wait for the device, and races. Skipped without one."""

from __future__ import annotations

import random
import time

import pytest
import torch

pytest.importorskip("triton")

import scout_hf  # noqa: E402
from scout_hf.methods.scout import handoff  # noqa: E402
from scout_hf.methods.scout.executor_triton import TritonExecutor  # noqa: E402
from scout_hf.stores.streams import Links  # noqa: E402
from tests.integration.common import (
    LOSSY,
    MODES,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    llama,
    logits,
    prompt,
    run,
)
from tests.libraries import ISAS  # noqa: E402
from tests.patches.tiny import tiny_model  # noqa: E402
from tests.triton.reference import begin_as_nan  # noqa: E402
from tests.unit.naive import poison  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("error:.*continues without graphs"),
]
WAYS = ["join", "flags", "graph"] if ISAS else ["join"]
EXACT = {name: value for name, value in TWO_TIERS.items() if name != "split"} | {
    "cpu_query": "real",
    "layer_ahead": True,
    "block_size": 16,
}
SPARSE = {name: value for name, value in LOSSY.items() if name != "split"} | {"digest": "minmax", "resident": None}
STEPS, TOKENS = 200, 32768
"""Of the longest generation, of the longest context."""
TURNS = 8500, 8980, 9000
"""Where the turns of a long text end; its first is of three pieces."""


def settled(way):
    """Exact choices; in a graph a new block takes an empty slot after the recall, so there no slot may be empty."""
    return SPARSE | {"cpu_query": "real"} | ({"resident": 16} if way == "graph" else {})


@pytest.fixture(autouse=True)
def single_precision():
    """TF32 would hide what is looked for."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(inputs):
    inputs = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else inputs
    return {name: part.cuda() for name, part in inputs.items()}


def decode(way, inputs, options, new=40, dtype=torch.float32):
    with scout_hf.patch(llama(dtype=dtype).cuda(), **options, hand_over=way) as handle:
        got = run(handle.model, on_gpu(inputs), new=new)
        assert all(isinstance(layer.method.executor, TritonExecutor) for layer in got.past_key_values.layers)
        if way == "graph":
            captures = list(handle.model.model.forward._captures.values())
            assert captures and captures[0].graph is not None and captures[0].steps >= new - 3
        return got, handle.stats()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
def test_exact_decoding_is_that_of_stock(mode, way):
    inputs, options = MODES[mode]
    stock, model = llama().cuda(), llama().cuda()
    found = []
    with scout_hf.patch(model, **EXACT, hand_over=way):
        for each in (stock, model):
            torch.manual_seed(0)
            found.append(run(each, on_gpu(inputs), **options))
    assert_close(found[1], found[0], 2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_no_more_than_stock(dtype, way):
    """Against float64 over the same tokens: at most twice what stock loses."""
    ids = prompt(2, 200)
    exact = llama(dtype=torch.float64)(ids).logits[:, 100:]
    errors = {}
    for name in ("stock", "scout"):
        model = llama(dtype=dtype).cuda()
        with torch.no_grad():
            if name == "scout":
                cache = scout_hf.patch(model, **EXACT, hand_over=way).new_cache()
            else:
                cache = None
            out = model(ids[:, :100].cuda(), past_key_values=cache, use_cache=True)
            found = []
            for at in range(100, 200):
                out = model(ids[:, at : at + 1].cuda(), past_key_values=out.past_key_values)
                found.append(out.logits.double().cpu())
        errors[name] = (torch.cat(found, 1) - exact).abs().max()
    assert errors["scout"] <= 2 * errors["stock"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_modules_in_one_launch_give_what_their_own_operations_give(family, way):
    model, found = tiny_model(family).cuda(), []
    for fused in (True, False):
        with scout_hf.patch(model, **EXACT, hand_over=way, fused=fused):
            found.append(run(model, on_gpu(left_padded(0, 13, tokens=60)), new=20))
    assert_close(*found, 1e-5 * logits(found[1]).abs().max().item())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inputs", [prompt(2, 60), left_padded(0, 13, tokens=60)], ids=["rows", "padded"])
def test_the_gpu_decodes_as_the_cpu_does(inputs, way):
    options = settled(way)
    got, ours = decode(way, inputs, options)
    with scout_hf.patch(llama(), **options, split="cpu", gpu_kernels="torch") as handle:
        expected = run(handle.model, inputs, new=40)
        theirs = handle.stats()
    assert torch.equal(got.sequences.cpu(), expected.sequences)
    assert (logits(got).cpu() - logits(expected)).abs().max() <= 5e-4
    assert [one.recalled_blocks for one in ours.layers] == [one.recalled_blocks for one in theirs.layers]


@pytest.mark.parametrize("way", WAYS)
def test_torch_operations_do_the_same(way):
    expected, _ = decode(way, prompt(2, 60), settled(way))
    with scout_hf.patch(llama().cuda(), **settled(way), gpu_kernels="torch") as handle:
        got = run(handle.model, on_gpu(prompt(2, 60)), new=40)
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recall", [0.12, 1])
def test_no_step_waits_for_the_device(way, padded, recall):
    """torch refuses every call that would; ``join`` waits for the CPU, which is no such call."""
    inputs = on_gpu(left_padded(0, 13, tokens=60) if padded else prompt(2, 60))
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    with scout_hf.patch(llama().cuda(), **SPARSE | {"recall": recall}, hand_over=way) as handle, torch.no_grad():
        cache = handle.new_cache()
        token = handle.model(**inputs, past_key_values=cache).logits[:, -1:].argmax(-1)
        for step in range(40):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            places = mask.sum(-1, keepdim=True) - 1
            # Kernels are compiled, buffers and graphs made in the first steps and where something grows.
            torch.cuda.set_sync_debug_mode("error" if step >= 6 and way != "graph" else "default")
            try:
                out = handle.model(token, attention_mask=mask, position_ids=places, past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            token = out.logits[:, -1:].argmax(-1)


class LateLinks(Links):
    """Side streams begin late."""

    dice = random.Random(0)

    def beside(self, name, device, *tensors, after=None):
        context = super().beside(name, device, *tensors, after=after)

        class Late:
            def __enter__(self):
                mark = context.__enter__()
                torch.cuda._sleep(LateLinks.dice.randrange(2_000_000))
                return mark

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Late()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inputs", [prompt(2, 60), left_padded(0, 13, tokens=60)], ids=["rows", "padded"])
def test_not_one_logit_changes_when_streams_and_jobs_are_late(inputs, way, monkeypatch):
    """Every buffer that is used again begins as NaN."""
    expected, _ = decode(way, inputs, SPARSE, new=STEPS)
    poison(monkeypatch)
    begin_as_nan(monkeypatch)
    monkeypatch.setattr("scout_hf.pass_hooks.Links", LateLinks)
    attend_when, dice = handoff._attend_when, random.Random(1)

    def late(*args):
        time.sleep(dice.random() * 0.003)
        return attend_when(*args)

    monkeypatch.setattr(handoff, "_attend_when", late)
    got, _ = decode(way, inputs, SPARSE, new=STEPS)
    assert_equal(got, expected)


def test_the_gpu_holds_a_small_part():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with scout_hf.patch(llama(max_position_embeddings=1 << 16).cuda(), budget=256, block_size=32) as handle:
        weights = torch.cuda.memory_allocated()
        with torch.no_grad():
            cache = handle.new_cache()
            for first in range(0, TOKENS, 4096):
                handle.model(prompt(1, 4096, first).cuda(), past_key_values=cache, logits_to_keep=1)
        held = torch.cuda.memory_allocated() - weights
        kv = cache.tier_bytes()
        assert weights > before and held < 0.12 * kv["host"]
        assert all(
            slab.is_pinned() for layer in cache.scout_layers for pool in layer.method.pools() for slab in pool.slabs
        )


def test_a_next_turn_longer_than_a_piece_is_exact():
    stock, model = llama(max_position_embeddings=1 << 14).cuda(), llama(max_position_embeddings=1 << 14).cuda()
    ids = prompt(2, TURNS[-1]).cuda()
    with scout_hf.patch(model, **EXACT) as handle, torch.no_grad():
        cache, other = handle.new_cache(), None
        for first, last in zip((0, *TURNS), TURNS):
            got = model(ids[:, first:last], past_key_values=cache).logits
            out = stock(ids[:, first:last], past_key_values=other, use_cache=True)
            other = out.past_key_values
            assert (got - out.logits).abs().max() <= 2e-4


@pytest.mark.parametrize("way", WAYS)
def test_awkward_calls(way):
    """Inference mode, shares with padding, masks on the CPU, caches dropped at once, removal at once."""
    inputs = on_gpu(left_padded(0, 13, tokens=60))
    options = SPARSE | {"cpu_query": "real"}
    with torch.inference_mode():
        got, _ = decode(way, left_padded(0, 13, tokens=60), options)
    expected, _ = decode(way, left_padded(0, 13, tokens=60), options)
    assert torch.equal(got.sequences, expected.sequences)
    with scout_hf.patch(llama().cuda(), **options | {"budget": 0.3}, hand_over=way) as handle:
        run(handle.model, inputs, new=20)
    model = llama().cuda()
    with scout_hf.patch(model, **options, hand_over=way) as handle, torch.no_grad():
        for _ in range(5):
            cache = handle.new_cache()
            mask = inputs["attention_mask"].cpu()
            model(inputs["input_ids"], attention_mask=mask, past_key_values=cache)
            for _ in range(6):
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                places = mask.sum(-1, keepdim=True).cuda() - 1
                out = model(inputs["input_ids"][:, :1], attention_mask=mask, position_ids=places, past_key_values=cache)
            del cache
    assert bool(out.logits.isfinite().all())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_heads(dtype, way):
    """What does not fit into shared memory with the usual tile."""
    big = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64}
    model = llama(dtype=dtype, **big).cuda()
    expected = run(model, on_gpu(prompt(2, 60)), new=10)
    with scout_hf.patch(model, **EXACT, hand_over=way):
        got = run(model, on_gpu(prompt(2, 60)), new=10)
    assert (logits(got)[0] - logits(expected)[0]).abs().max() <= (1e-4 if dtype == torch.float32 else 0.1)
