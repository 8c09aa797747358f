"""Perplexity of a study: the same tokens at every context, each read in a step of its own."""

import pytest
import torch

import scout_hf.eval.fidelity.measure as reading
from scout_hf.eval.fidelity.cells import Cell
from tests.integration.common import llama, prompt

LONGEST, STEPS, WINDOWS = 96, 6, 9
TOLERANCE = 1e-5


@pytest.fixture
def model(monkeypatch):
    """A random model, and random tokens in place of text."""
    made = llama(num_hidden_layers=4)
    ids = prompt(WINDOWS, LONGEST + STEPS + 1)
    monkeypatch.setattr(reading, "LONGEST", LONGEST)
    monkeypatch.setattr(reading, "load_subject", lambda name, stress: (made, None))
    monkeypatch.setattr(reading, "windows", lambda count, steps, seed: ids[:count, : LONGEST + steps + 1])
    return made, ids


def read(tokens, mode="full", **sparse):
    cell = Cell("text", "text", tokens, mode, **sparse)
    return reading.read_text(cell, reading.Effort(windows=WINDOWS, steps=STEPS, watched=2))


def wanted(made, ids, tokens):
    """Losses of the last tokens from one pass over the text."""
    ids = ids[:, LONGEST - tokens :]
    with torch.no_grad():
        logits = made(ids).logits[:, tokens:-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, tokens + 1 :], reduction="none").mean(1)


@pytest.mark.parametrize("tokens", [24, LONGEST])
def test_full_attention_and_everything_attended_are_one_pass_over_the_text(model, tokens):
    losses = wanted(*model, tokens)
    everything = {"block_size": 8, "budget": 1.0, "digest": "minmax"}
    for result in (read(tokens), read(tokens, "real", **everything), read(tokens, "real-two-tiers", **everything)):
        assert torch.allclose(torch.tensor(result["nll"]), losses, atol=TOLERANCE)
        assert result["attended_share"] == 1.0 and result["tokens_per_second"] > 0


def test_less_is_another_loss_and_is_watched(model):
    sparse = {"block_size": 8, "budget": 16, "digest": "recent"}
    losses = torch.tensor(read(LONGEST, "real", **sparse)["nll"])
    assert len(losses) == WINDOWS and (losses - wanted(*model, LONGEST)).abs().max() > 100 * TOLERANCE
    result = read(LONGEST, "predicted", **sparse)
    assert len(result["mass"]) == len(result["cosine"]) == 4 and max(result["mass"]) < 1
    ratios = result["cpu_ratio_by_step"]
    assert list(ratios) == ["0", "1", "2", "3"] and all(len(one) == STEPS for one in ratios.values())
    assert all(0 <= ratio <= 1 for one in ratios.values() for ratio in one)
    mean = sum(sum(one) for one in ratios.values()) / 4 / STEPS
    assert result["cpu_ratio"] == pytest.approx(mean, rel=0.2)


def test_recall_lowers_the_share_of_the_cpu(model):
    sparse = {"block_size": 8, "budget": 64, "digest": "minmax"}
    with_recall, without = (read(LONGEST, mode, **sparse) for mode in ("predicted", "predicted-no-recall"))
    assert with_recall["cpu_ratio"] < without["cpu_ratio"]
    first, last = (sum(one[step] for one in without["cpu_ratio_by_step"].values()) for step in (0, -1))
    assert first <= last


def test_no_longer_context_than_there_is(model):
    with pytest.raises(ValueError, match="96 tokens of context at most"):
        read(LONGEST + 1)
