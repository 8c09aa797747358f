"""Statistics from hand-made tallies, and what they look like in print."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch

from scout_hf import Stats
from scout_hf.counters import SAMPLE_EVERY, Counters
from scout_hf.stats import summarise
from scout_hf.stats_tables import in_bytes


def two_layers():
    """Three decode steps on two layers; layer 1 is on two tiers."""
    counters = Counters()
    counters.prefill_tokens = 40
    for step in range(3):
        counters.steps += 1
        counters.attended(0, 40 + step, 40 + step)
        counters.attended(1, 40 + step, 16 + step)
        counters.cpu_share(1, blocks=step, selected=8)
    counters.recalled(1, 3, 3000)
    counters.recalled(1, 1, 1000)
    counters.exact(0, 40)
    counters.add("join_ms", 1, 6.0)
    return counters


def test_means_and_sums():
    stats = summarise(two_layers(), "scout", False, {"host": 2048, "device": 10})
    assert (stats.method, stats.exact, stats.steps, stats.prefill_tokens) == ("scout", False, 3, 40)
    assert stats.context_tokens == pytest.approx(41)
    assert stats.attended_tokens == pytest.approx((41 + 17) / 2)
    assert stats.cpu_ratio == pytest.approx(3 / 24)
    assert stats.join_wait_ms == pytest.approx(2)
    assert (stats.recalled_blocks, stats.recalled_bytes) == (4, 4000)
    assert stats.kv_bytes == {"host": 2048, "device": 10}
    assert stats.cosine is None
    assert [layer.layer for layer in stats.layers] == [0, 1]
    first, second = stats.layers
    assert (first.context_tokens, first.attended_tokens, first.cpu_ratio) == (41, 41, None)
    assert (first.join_wait_ms, first.recalled_blocks, first.recalled_bytes) == (0, 0, 0)
    assert (second.attended_tokens, second.cpu_ratio, second.join_wait_ms) == (17, 3 / 24, 2)
    assert (second.recalled_blocks, second.recalled_bytes) == (4, 4000)


def test_tallies_may_be_tensors():
    counters = Counters()
    counters.steps = 2
    for context, tokens in ((10, 4), (20, 8)):
        counters.attended(0, torch.tensor(float(context)), torch.tensor(float(tokens)))
    stats = summarise(counters, "scout", False, {})
    assert (stats.context_tokens, stats.attended_tokens) == (15, 6)
    assert all(type(getattr(stats, name)) is float for name in ("context_tokens", "attended_tokens", "join_wait_ms"))


def test_nothing_measured_is_none_or_zero_never_an_error():
    stats = summarise(Counters(), "scout", True, {})
    assert (stats.steps, stats.context_tokens, stats.attended_tokens, stats.join_wait_ms) == (0, 0, 0, 0)
    assert stats.cpu_ratio is None and stats.cosine is None and stats.layers == ()
    assert "exact" in str(stats)
    counters = Counters()
    counters.cpu_share(0, 0, 0)
    assert summarise(counters, "scout", True, {}).cpu_ratio is None


def test_what_a_device_counted_before_a_reset_is_forgotten():
    counters = Counters()
    tally = counters.recall_tally(1, torch.device("cpu"), 1000)
    tally += 5
    counters.reset()
    assert summarise(counters, "scout", False, {}).recalled_blocks == 0
    tally += 2
    stats = summarise(counters, "scout", False, {})
    assert (stats.recalled_blocks, stats.recalled_bytes) == (2, 2000)


def test_a_snapshot_does_not_follow_the_counters():
    counters = two_layers()
    stats = summarise(counters, "scout", False, {})
    counters.attended(0, 1000, 1000)
    counters.steps += 1
    assert stats == summarise(two_layers(), "scout", False, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.steps = 7


def test_reset_and_copies_start_from_nothing():
    counters = two_layers()
    counters.history = {}
    assert summarise(copy.deepcopy(counters), "scout", False, {}).steps == 0
    counters.reset()
    assert summarise(counters, "scout", False, {}) == summarise(Counters(), "scout", False, {})
    assert counters.history is None


def test_cosines_are_sampled_means():
    counters, one = Counters(), torch.randn(2, 4, 1, 8)
    same, opposite = one * 3, -one
    for step in range(1, 2 * SAMPLE_EVERY + 1):
        counters.steps = step
        counters.predicted(2, same if step == 1 else opposite, one)
    stats = summarise(counters, "scout", False, {})
    assert counters.sums["cosine_samples"][2] == 2
    assert stats.cosine == pytest.approx(0, abs=1e-6)  # 1 at the first step, -1 eight steps later, others not looked at
    counters.reset()
    counters.steps = 1
    counters.attended(0, 1, 1)
    counters.predicted(0, same.bfloat16(), one.bfloat16())
    assert summarise(counters, "scout", False, {}).layers[0].cosine == pytest.approx(1, abs=1e-2)


def test_the_history_keeps_every_share_in_order():
    counters = Counters()
    counters.cpu_share(0, 1, 4)
    counters.history = {}
    for blocks, selected in ((1, 4), (2, 4), (0, 0)):
        counters.cpu_share(3, blocks, selected)
    assert counters.history == {3: [0.25, 0.5, 0.0]}


def test_waiting_is_timed_even_when_it_fails():
    counters = Counters()
    with pytest.raises(ValueError), counters.timed(0, "join"):
        raise ValueError
    with counters.timed(0, "join"):
        pass
    assert 0 <= counters.sums["join_ms"][0] < 1000


def table_of(counters, exact=False, **kv_bytes):
    return str(summarise(counters, "scout", exact, kv_bytes))


def test_print_two_tiers():
    counters = two_layers()
    counters.steps = 1
    counters.predicted(1, torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    counters.steps = 3
    text = table_of(counters, host=3 * 2**20, device=1536, digests=100)
    for part in (
        "scout_hf: scout (approximate)",
        "decode steps",
        "29 of 41 (70.7%)",
        "host 3.0 MiB, device 1.5 KiB, digests 100 B",
        "CPU share of selection",
        "12.5%",
        "2.00 ms per step",
        "4 blocks, 3.9 KiB",
        "cosine 1.000",
        "per layer",
    ):
        assert part in text, part
    lines = text.splitlines()
    assert max(map(len, lines)) <= 96 and "\x1b" not in text
    rows = [line.split("│")[1:-1] for line in lines if "│" in line]
    by_layer = [[cell.strip() for cell in row] for row in rows if len(row) == 6]
    assert by_layer == [["0", "41", "-", "-", "0.00", "-"], ["1", "17", "12.5%", "1.000", "2.00", "3.9 KiB"]]


def test_what_crosses_the_link_is_shown_without_a_share_of_the_cpu():
    counters = Counters()
    counters.steps = 2
    for layer in (0, 1):
        counters.attended(layer, 100, 100)
        counters.recalled(layer, 0, 2048)
        counters.add("join_ms", layer, 3.0)
    text = table_of(counters, exact=True, host=1)
    assert "wait for CPU and link" in text and "3.00 ms per step" in text and "4.0 KiB in 2 steps" in text
    assert "wait ms" in text and "brought" in text and "CPU share" not in text and "cosine" not in text


def test_print_says_where_drafts_are_counted():
    counters = two_layers()
    plain = table_of(counters)
    counters.drafted, counters.accepted, counters.checks = 2, 1, 1
    counters.pace.add("decode", 12, 2.0)
    text = table_of(counters)
    assert "drafts" not in plain
    for part in ("3, 2 drafts included, 6.0 tokens/s of text", "29 of 41 (70.7%), drafts included"):
        assert part in text, part
    for part in ("2.00 ms per step, drafts included", "in 3 steps, drafts included", "per layer, drafts included"):
        assert part in text, part


def test_notes_of_several_layers_are_one():
    counters = Counters()
    for layer in (5, 0, 2, 1):
        counters.note("kvpr", "nothing", layer)
    counters.note("kvpr", "something else", 5)
    counters.note("scout", "one tier")
    assert summarise(counters, "kvpr", True, {}).notes == (
        "kvpr: something else (layers 5)",
        "kvpr: nothing (layers 0 to 2)",
        "scout: one tier",
    )


def test_print_one_tier_leaves_out_what_does_not_exist():
    counters = Counters()
    counters.steps = 1
    counters.attended(0, 100, 25)
    text = table_of(counters, exact=True)
    assert "(exact)" in text and "25 of 100 (25.0%)" in text
    for part in ("CPU", "brought", "cosine", "per layer"):
        assert part not in text
    assert "KV held" in text and "-" in text


def test_rich_prints_the_same_tables():
    from rich.console import Console

    stats = summarise(two_layers(), "scout", False, {"host": 1})
    console = Console(width=96, record=True, file=io.StringIO(), color_system=None)
    console.print(stats)
    assert console.export_text().rstrip() == str(stats)
    assert isinstance(stats, Stats)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1023 * 2**10, "1023.0 KiB"),
        (2**20, "1.0 MiB"),
        (1023 * 2**20, "1023.0 MiB"),
        (5 * 2**29, "2.50 GiB"),
        (3 * 2**40, "3072.00 GiB"),
    ],
)
def test_bytes(count, text):
    assert in_bytes(count) == text
