"""The pocket model at 4k tokens: exact settings give the tokens of stock attention, sparse ones the answers."""

import pytest
import torch

import scout_hf
from scout_hf.eval.pocket import load_pocket, make_document

TOKENS, NEW = 4096, 24


@pytest.fixture(scope="module")
def prompt(pocket):
    document = make_document(TOKENS - 8, 16, seed=3)
    text = f"{document.text} {document.prompt(document.facts[5])}"
    return pocket[1](text, return_tensors="pt")


@pytest.fixture(scope="module")
def stock(pocket, prompt):
    return greedy(pocket[0], prompt)


def greedy(model, prompt):
    return model.generate(**prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


@pytest.mark.thin(2)
@pytest.mark.parametrize("split", ["off", "cpu"])
@pytest.mark.parametrize("settings", [{"budget": None}, {"budget": 1.0}, {"dense_layers": 6}])
def test_exact_settings_give_the_same_tokens(pocket, prompt, stock, split, settings):
    options = {"layer_ahead": False, "block_size": 16, "resident": 512}
    with scout_hf.patch(pocket[0], split=split, **options | settings) as handle:
        assert torch.equal(greedy(pocket[0], prompt), stock)
        stats = handle.stats()
    assert stats.attended_tokens == pytest.approx(stats.context_tokens)
    assert (stats.cpu_ratio is not None and stats.cpu_ratio > 0.5) == (split == "cpu")


def test_beams_over_pages_that_they_share(pocket, prompt):
    prompt = {name: part[:, -1024:] for name, part in prompt.items()}
    options = dict(num_beams=3, num_return_sequences=3, max_new_tokens=12, do_sample=False)
    expected = pocket[0].generate(**prompt, **options)
    for split in ("off", "cpu"):
        with scout_hf.patch(pocket[0], budget=None, layer_ahead=False, split=split, resident=512):
            assert torch.equal(pocket[0].generate(**prompt, **options), expected)


def test_the_answer_survives_half_precision(pocket, prompt, stock):
    model, _ = load_pocket(dtype=torch.bfloat16)
    expected = greedy(model, prompt)[0, prompt.input_ids.shape[1] :][:3]
    with scout_hf.patch(model, budget=0.25, block_size=16):
        found = greedy(model, prompt)[0, prompt.input_ids.shape[1] :][:3]
    assert torch.equal(found, expected)
