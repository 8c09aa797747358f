"""Sparse decoding attends to what its settings say: against a reference that shares no code with it."""

import pytest
import torch

import scout_hf
from scout_hf.kernels.cpu.native_backend import NativeBackend
from tests.integration import selection_oracle
from tests.integration.common import assert_close, decode_after_holes, left_padded, logits, run, spiky
from tests.integration.selection_oracle import Oracle, Rules
from tests.integration.sparse_cases import CASES, INPUTS, NEW, TWO_TIER_CASES, check, reference, settings
from tests.libraries import ISAS


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.thin(3)
def test_one_tier(case, inputs):
    check(inputs, case, "off")


@pytest.mark.parametrize("case", CASES)
def test_one_tier_in_native_code(case):
    check("padded", case, "off", torch.float32)


@pytest.mark.parametrize("case", TWO_TIER_CASES)
def test_two_tiers_in_native_code(case):
    check("padded", case, "cpu", torch.float32)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("case", TWO_TIER_CASES)
@pytest.mark.thin(3)
def test_two_tiers_attend_to_the_union(case, inputs):
    """Residents, and what the real query selects: without recall the residents are those of the prompt."""
    check(inputs, case, "cpu")


@pytest.mark.parametrize("case", [{"budget": 16}, {"budget": 32, "sinks": 0, "resident": 16}], ids=str)
@pytest.mark.parametrize("split", ["off", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_padding_inside_rows(case, split, dtype):
    """Digests of blocks that hold padding, and the CPU's share of them."""
    model, oracle = spiky(dtype), Oracle(Rules(**case, two_tiers=split == "cpu"))
    model.set_attn_implementation(selection_oracle.NAME)
    selection_oracle.ACTIVE.append(oracle)
    try:
        expected = decode_after_holes(model)
    finally:
        selection_oracle.ACTIVE.pop()
    model = spiky(dtype)
    with scout_hf.patch(model, **settings(case, split=split)) as handle:
        got = decode_after_holes(model, handle.new_cache())
    assert (got - expected).abs().max() <= 1e-5


def test_the_reference_reacts_to_every_setting():
    """Two cases that answer alike would test one thing twice."""
    found = {name: logits(reference("one row", name)[0])[1:] for name in CASES}
    stock = logits(run(spiky(), INPUTS["one row"], new=NEW))[1:]
    for name, one in found.items():
        same = (one - stock).abs().max() < 1e-5
        assert same == (name == "everything"), name
        for other in found:
            alike = (one - found[other]).abs().max() < 1e-4
            assert alike == (name == other) or {name, other} == {"budget", "no sinks"}, (name, other)


def test_one_wrong_block_is_seen(monkeypatch):
    """Negative control: the second best instead of the best block, for one KV head of one layer."""
    from scout_hf.selection import selector

    real = selector.choose

    def second_best(scores, count, *args):
        pick = real(scores, count + 1, *args)
        pick.ids[:, 1, count - 1] = pick.ids[:, 1, count]
        return selector.Pick(pick.ids[:, :, :count], None)

    expected, _ = reference("one row", "budget", new=2)
    model = spiky()
    with scout_hf.patch(model, **settings({"budget": 32}, split="off")):
        assert_close(run(model, INPUTS["one row"], new=2), expected, 1e-5)
        monkeypatch.setattr(selector, "choose", second_best)
        got = run(model, INPUTS["one row"], new=2)
    assert (logits(got) - logits(expected)).abs().max() > 1e-3


@pytest.mark.skipif(not ISAS, reason="no native library")
def test_one_wrong_block_of_native_selection_is_seen(monkeypatch):
    """The same: the oldest block that was chosen becomes one that was not."""
    real = NativeBackend.select

    def another(self, scorer, query, codes, *settings):
        lists = real(self, scorer, query, codes, *settings)
        others = set(range(codes.shape[2])) - set(lists.ids[0, 1].tolist())
        lists.ids[0, 1, 1] = min(others)
        return lists

    expected, _ = reference("one row", "budget", dtype=torch.float32, new=2)
    model = spiky(torch.float32)
    with scout_hf.patch(model, **settings({"budget": 32}, split="off")):
        assert_close(run(model, INPUTS["one row"], new=2), expected, 1e-5)
        monkeypatch.setattr(NativeBackend, "select", another)
        got = run(model, INPUTS["one row"], new=2)
    assert (logits(got) - logits(expected)).abs().max() > 1e-3


@pytest.mark.parametrize("split", ["off", "cpu"])
@pytest.mark.parametrize("layer_ahead", [False, True])
@pytest.mark.parametrize("budget", [32, 0.3, 0.1, None])
@pytest.mark.thin(2)
def test_a_padded_row_is_as_if_alone(split, layer_ahead, budget):
    """Whole blocks of padding, so that the row's own blocks lie alike: they cost no budget and change nothing."""
    model, padding = spiky(), (0, 8, 40)
    batch = left_padded(*padding, tokens=96)
    options = settings({"budget": budget, "resident": 24}, split=split, layer_ahead=layer_ahead)
    with scout_hf.patch(model, **options):
        together = logits(run(model, batch, new=10))
        for row, skipped in enumerate(padding):
            alone = logits(run(model, batch["input_ids"][row : row + 1, skipped:], new=10))
            assert (together[:, row] - alone[:, 0]).abs().max() <= 1e-6


@pytest.mark.parametrize("split", ["off", "cpu"])
def test_recall_and_prediction_change_nothing_at_full_budget(split):
    """A share of 1.0 with the real query is exact, whatever moves between the tiers."""
    model = spiky()
    expected = run(model, INPUTS["padded"], new=NEW)
    for recall in (None, 1, 3, 0.12, 1.0):
        options = settings({"budget": 1.0, "resident": 16, "recall": recall}, split=split)
        with scout_hf.patch(model, **options) as handle:
            assert handle.exact
            assert_close(run(model, INPUTS["padded"], new=NEW), expected, 1e-6)


@pytest.mark.parametrize("inputs", ["rows", "padded"])
@pytest.mark.parametrize("split", ["off", "cpu"])
def test_stats_of_a_sparse_run(split, inputs):
    model = spiky()
    with scout_hf.patch(model, **settings({"budget": 32}, split=split)) as handle:
        run(model, INPUTS[inputs], new=NEW)
        stats = handle.stats()
    tokens = torch.tensor([93.0, 88, 32]) if inputs == "padded" else torch.tensor([91.0] * 2)
    assert stats.steps == NEW - 1 and not stats.exact
    assert stats.prefill_tokens == (93 if inputs == "padded" else 91)
    assert stats.context_tokens == pytest.approx((tokens + NEW / 2).mean().item())
    assert len(stats.layers) == 3
    for layer in stats.layers:
        assert layer.context_tokens == pytest.approx(stats.context_tokens)
        most = 32 + 7 if split == "off" else 32 + 24 + 15
        assert 24 < layer.attended_tokens <= most
    assert "attended per step" in str(stats)


def test_tokens_of_padding_are_not_counted():
    """At full budget attended and context tokens are the same number, that of the real tokens."""
    model = spiky()
    for split in ("off", "cpu"):
        with scout_hf.patch(model, **settings({"budget": None, "resident": 16}, split=split)) as handle:
            run(model, INPUTS["padded"], new=NEW)
        stats = handle.stats()
        assert stats.attended_tokens == pytest.approx(stats.context_tokens)
        assert stats.context_tokens == pytest.approx((93 + 88 + 32) / 3 + NEW / 2)
