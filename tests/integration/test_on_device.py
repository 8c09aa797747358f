"""``TritonExecutor`` in whole models, through both ways of handing over, also where jobs and copies come late.

What both executors must do alike is tested in the files of what they do, by ``settings`` and ``executor``.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import scout_hf  # noqa: E402
from scout_hf import ScoutConfig  # noqa: E402
from scout_hf.errors import CacheStateError  # noqa: E402
from scout_hf.methods.scout import handoff  # noqa: E402
from scout_hf.methods.scout.executor_triton import TritonExecutor  # noqa: E402
from tests.integration.common import (  # noqa: E402
    LOSSY,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    llama,
    logits,
    prompt,
    run,
)
from tests.integration.disturbances import late  # noqa: E402
from tests.integration.executors import WAYS, count_every_share, use_triton  # noqa: E402
from tests.integration.sparse_cases import INPUTS, TWO_TIER_CASES, check  # noqa: E402
from tests.triton import reference  # noqa: E402


@pytest.fixture(autouse=True, params=WAYS)
def way(request, monkeypatch):
    """Everything on two tiers goes through TritonExecutor, by this way."""
    use_triton(monkeypatch, request.param)
    return request.param


def methods(output):
    return [layer.method for layer in output.past_key_values.layers]


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("case", TWO_TIER_CASES)
@pytest.mark.thin(4)
def test_what_is_attended_is_what_the_rules_say(monkeypatch, case, inputs):
    count_every_share(monkeypatch)
    check(inputs, case, "cpu", torch.float32)


@pytest.mark.parametrize("inputs", [prompt(2, 60), left_padded(0, 13, tokens=60)], ids=["rows", "padded"])
@pytest.mark.parametrize(
    "options", [{}, {"cpu_query": "real"}, {"recall": 3}, {"recall": 0.3}, {"recall": None}], ids=str
)
@pytest.mark.thin(2)
def test_both_variants_decode_alike(inputs, options, monkeypatch, way):
    count_every_share(monkeypatch)
    options = LOSSY | {"digest": "minmax", "resident": None} | options
    with scout_hf.patch(llama(), **options) as handle:
        got = run(handle.model, inputs, new=25)
        assert {type(method.executor) for method in methods(got)} == {TritonExecutor}
        ours = handle.stats()
    with scout_hf.patch(llama(), **options, gpu_kernels="torch") as handle:
        expected = run(handle.model, inputs, new=25)
        theirs = handle.stats()
    assert_close(got, expected, 2e-5)
    for one, other in zip(ours.layers, theirs.layers):
        assert one.recalled_blocks == other.recalled_blocks and one.recalled_bytes == other.recalled_bytes
        if way == "join":  # the last share is counted in the step that follows
            assert one.attended_tokens == pytest.approx(other.attended_tokens, rel=1e-4)
            assert one.cpu_ratio == pytest.approx(other.cpu_ratio)
        else:
            assert abs(one.attended_tokens - other.attended_tokens) <= 1.0
            assert one.cpu_ratio is None or abs(one.cpu_ratio - other.cpu_ratio) < 0.03


FEW = {"recall": None}, {"recall": 1}, {"recall": 0.3}, {"recall": 2, "sinks": 12}, {"recall": 1, "budget": 0.5}


@pytest.mark.parametrize("inputs", [prompt(2, 90), left_padded(0, 13, tokens=90)], ids=["rows", "padded"])
@pytest.mark.parametrize("options", FEW, ids=str)
@pytest.mark.thin(2)
def test_both_variants_keep_the_same_residents(inputs, options):
    """With fewer slots than chosen blocks these are the best ones, not the first."""
    options = LOSSY | {"digest": "minmax", "budget": 48, "resident": 24, "cpu_query": "real"} | options
    found = []
    for kernels in ("auto", "torch"):
        with scout_hf.patch(llama(), **options, gpu_kernels=kernels) as handle:
            cache = run(handle.model, inputs, new=24).past_key_values
        found.append([layer.method.resident.ids.sort(-1).values.tolist() for layer in cache.layers])
    assert found[0] == found[1]


@pytest.mark.parametrize("inputs", [prompt(), left_padded(0, 13)], ids=["one row", "padded"])
def test_not_one_logit_changes_when_jobs_and_copies_are_late(inputs, monkeypatch):
    with scout_hf.patch(llama(), **LOSSY) as handle:
        expected = run(handle.model, inputs, new=40)
    late(monkeypatch)
    with scout_hf.patch(llama(), **LOSSY) as handle:
        assert_equal(run(handle.model, inputs, new=40), expected)


def test_not_waiting_is_seen(monkeypatch, way):
    """That the test above can fail."""
    with scout_hf.patch(llama(), **LOSSY) as handle:
        expected = run(handle.model, prompt(), new=30)
    late(monkeypatch)
    if way == "flags":
        monkeypatch.setattr(reference.KERNELS, "wait", lambda *args: None)
    else:
        monkeypatch.setattr(handoff.Join, "result", lambda self, step: None)
    with scout_hf.patch(llama(), **LOSSY) as handle:
        got = run(handle.model, prompt(), new=30)
    # What is read before it is there may be NaN, or old.
    assert not torch.equal(logits(got), logits(expected))


def test_a_fork_and_its_original_find_their_own_pages():
    """Both write blocks of the same numbers, which a further turn of many tokens reads by way of the device."""
    model, turns = llama(), [prompt(1, 40, seed) for seed in range(5)]
    with torch.no_grad():
        expected = [
            model(torch.cat([turns[at] for at in path], dim=1)).logits[:, -40:] for path in ((0, 1, 3), (0, 2, 4))
        ]
        with scout_hf.patch(model, **TWO_TIERS) as handle:
            cache = handle.new_cache()
            model(turns[0], past_key_values=cache)
            both = cache, cache.fork()
            for each, turn in zip(both, turns[1:3]):
                model(turn, past_key_values=each)
            for each, turn, right in zip(both, turns[3:], expected):
                assert (model(turn, past_key_values=each).logits - right).abs().max() <= 3e-6


@pytest.mark.parametrize("call", [0, 2])
def test_an_interrupt_in_the_middle_of_a_step(monkeypatch, way, call):
    tiny, count = llama(), []
    ids = prompt(1, 60)
    with scout_hf.patch(tiny, **TWO_TIERS) as handle, torch.no_grad():
        cache = handle.new_cache()
        tiny(ids[:, :40], past_key_values=cache)
        twin = cache.fork()
        expected = [tiny(ids[:, at : at + 1], past_key_values=twin).logits for at in range(40, 60)]
        late(monkeypatch)

        def interrupt(*args, **options):
            count.append(1)
            if len(count) == call + 1:
                raise KeyboardInterrupt
            return real(*args, **options)

        real = reference.KERNELS.merge
        monkeypatch.setattr(reference.KERNELS, "merge", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny(ids[:, 40:41], past_key_values=cache)
        for each in (cache.fork(), cache):
            assert each.get_seq_length() == 40
            for at, before in zip(range(40, 60), expected):
                assert (tiny(ids[:, at : at + 1], past_key_values=each).logits - before).abs().max() <= 3e-6


@pytest.mark.skipif("flags" not in WAYS, reason="needs the native library")
def test_a_share_that_never_came_ends_the_run(monkeypatch, way):
    if way != "flags":
        pytest.skip("nothing is given up when the main thread waits")
    with scout_hf.patch(llama(), **TWO_TIERS) as handle, torch.no_grad():
        cache = handle.new_cache()
        handle.model(prompt(), past_key_values=cache)
        handle.model(prompt(1, 1), past_key_values=cache)
        cache.layers[1].method.executor.handoff.mail.late.fill_(1)
        with pytest.raises(CacheStateError, match="CPU attention number 1 of a layer timed out"):
            handle.model(prompt(1, 1), past_key_values=cache)


def test_what_the_kernels_do_not_know_goes_the_other_way():
    for options, dtype in (
        ({"host_dtype": "int8"}, torch.float32),
        ({}, torch.float64),
        ({"gpu_kernels": "torch"}, torch.float32),
    ):
        with scout_hf.patch(llama(dtype=dtype), **TWO_TIERS | options) as handle:
            assert not any(
                isinstance(method.executor, TritonExecutor) for method in methods(run(handle.model, prompt(), new=2))
            )


def test_kernels_that_cannot_run_are_refused(monkeypatch):
    monkeypatch.setattr("scout_hf.kernels.device._load", lambda: None)
    with pytest.raises(scout_hf.ConfigError, match="triton cannot be imported.*leave gpu_kernels='auto'"):
        scout_hf.patch(llama(), **TWO_TIERS, gpu_kernels="triton")
    assert ScoutConfig(gpu_kernels="triton").gpu_kernels == "triton"


def test_without_threads_of_its_own_the_cpu_is_waited_for(monkeypatch, way):
    """In a process with one CPU a job runs when somebody waits for it, which nobody does who watches words."""
    monkeypatch.setattr("scout_hf.kernels.cpu.pool.spare_workers", lambda threads: 0)
    expected = run(llama(), prompt())
    with scout_hf.patch(llama(), **TWO_TIERS) as handle:
        got = run(handle.model, prompt())
        assert all(type(method.executor.handoff) is handoff.Join for method in methods(got))
    assert_close(got, expected)
