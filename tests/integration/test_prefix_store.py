"""``patch(store=...)``: what was read once is not read again, and no token changes by that."""

import pytest
import torch

import scout_hf
from scout_hf import CACHE
from scout_hf.prefix import keeping, reuse
from scout_hf.prefix.hashing import block_hashes
from tests.integration.common import (
    EXACT_METHODS,
    ONE_TIER,
    TWO_TIERS,
    assert_close,
    left_padded,
    llama,
    one_llama,
    prompt,
)
from tests.integration.common import run as generate
from tests.patches.tiny import own_cache, tiny_model

SIZE = 8
EXACT = {"one tier": ONE_TIER, "two tiers": TWO_TIERS, **EXACT_METHODS}
SPARSE = {"block_size": SIZE, "window": SIZE, "budget": 32}


def found(handle):
    """Tokens found by the calls since the last time."""
    tokens = handle.stats().found_tokens
    handle.reset_stats()
    return tokens


def longer(output, more: int = 30, seed: int = 5):
    """The next turn: prompt and answer, and something new."""
    ids = output.sequences
    ids = torch.cat([ids, prompt(len(ids), more, seed=seed)], dim=1)
    # Otherwise generate() takes a pad token in an answer for padding.
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# -- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_asked_again_and_asked_on(options, tmp_path):
    """The same prompt, its next turn, another one with the same beginning: each as without the store."""
    model, inputs = one_llama(), {"input_ids": prompt(1, 101)}
    turned = longer(generate(model, inputs))
    other = {"input_ids": torch.cat([inputs["input_ids"][:, :60], prompt(1, 20, seed=9)], dim=1)}
    expected = [generate(model, each) for each in (inputs, turned, other)]
    with scout_hf.patch(model, store=tmp_path, **options) as handle:
        assert_close(generate(model, inputs), expected[0])
        assert found(handle) == 0
        for each, wanted, tokens in zip((inputs, turned, other), expected, (96, 104, 56)):
            got = generate(model, each)
            assert found(handle) == tokens
            assert_close(got, wanted)
        got = generate(model, turned)
        assert found(handle) == 136  # what the next turn read is there too
        assert_close(got, expected[1])
    with scout_hf.patch(model, store=tmp_path, **options) as handle:
        assert_close(generate(model, turned), expected[1])
        assert found(handle) == 136


def test_a_tokenizer_is_no_input_of_the_model(tmp_path):
    """Which generate() takes for stop strings, and hands on to every pass."""
    model, inputs = one_llama(), {"input_ids": prompt(1, 101)}
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        generate(model, inputs, tokenizer=object())
        generate(model, inputs, tokenizer=object())
        assert found(handle) == 96


def test_a_chat_of_many_turns_does_not_become_many_segments(tmp_path, monkeypatch):
    """Small ones are joined behind the first, which may be large."""
    monkeypatch.setattr(keeping, "MANY", 5)
    model, ids = one_llama(), prompt(1, 101)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        for turn in range(13):
            read = ids.shape[1] if not turn else 30
            output = generate(model, ids)
            assert found(handle) >= ids.shape[1] - read - SIZE
            ids = torch.cat([output.sequences, prompt(1, 20, seed=turn)], dim=1)
        context = handle._reuse.context(handle.config)
        pieces = handle.store.find(context.root, block_hashes(ids[0].numpy(), SIZE, context.root), context.chain)
        assert pieces[-1].end >= (ids.shape[1] - 30) // SIZE and 2 <= len(pieces) <= 6
        assert pieces[0].segment.end == 13
        got = generate(model, ids)
    assert_close(got, generate(model, ids))


BATCHES = {
    "left-padded": left_padded(0, 13, 40, tokens=90),
    "several documents": {"input_ids": prompt(3, 77)},
    "all padded": left_padded(3, 3, tokens=60),
    "one document, several questions": {
        "input_ids": torch.cat([prompt(1, 70).expand(3, -1), prompt(3, 12, seed=8)], dim=1)
    },
}


@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS, EXACT_METHODS["hgca"], EXACT_METHODS["kvpr"]], ids=str)
@pytest.mark.parametrize("inputs", BATCHES.values(), ids=BATCHES)
def test_rows_of_a_batch(inputs, options, tmp_path):
    model = one_llama()
    expected = generate(model, inputs)
    with scout_hf.patch(model, store=tmp_path, **options) as handle:
        assert_close(generate(model, inputs), expected)
        assert found(handle) == 0
        got = generate(model, inputs)
        assert found(handle) >= min(64, inputs["input_ids"].shape[1] - 2 * SIZE)
        assert_close(got, expected)
        # A row alone finds what it was in the batch, and the other way round.
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        for row in range(len(mask)):
            ids = inputs["input_ids"][row, mask[row].bool()][None]
            wanted = generate(model, {"input_ids": ids})
            handle.reset_stats()
            got = generate(model, {"input_ids": ids})
            assert found(handle) >= ids.shape[1] - 2 * SIZE
            assert_close(got, wanted)


def test_rows_of_one_document_share_its_pages(tmp_path):
    model, inputs = one_llama(), BATCHES["one document, several questions"]
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        generate(model, inputs)
        cache = handle.new_cache()
        generate(model, inputs, **{CACHE: cache})
        assert found(handle) == 64
        table = cache.layers[0].method.kv.table
        assert len(table.pool.guards) >= 1 and len(table.ids[:, :8].unique()) == 8


@pytest.mark.parametrize("more", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}], ids=str)
def test_rows_that_are_made_of_one_prompt(more, tmp_path):
    model, inputs = one_llama(), {"input_ids": prompt(1, 61)}
    torch.manual_seed(0)
    expected = model.generate(**inputs, max_new_tokens=6, **more)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        for tokens in (0, 56):
            torch.manual_seed(0)
            assert torch.equal(model.generate(**inputs, max_new_tokens=6, **more), expected)
            assert found(handle) == tokens


def test_rows_of_which_one_is_new(tmp_path):
    """As many tokens as every row has: none, if a row without padding is new; else what lies behind its padding."""
    model, old = one_llama(), prompt(1, 60)
    with scout_hf.patch(model, store=tmp_path, **ONE_TIER) as handle:
        generate(model, {"input_ids": old})
        mixed = {"input_ids": torch.cat([old, prompt(1, 60, seed=4)])}
        expected = generate(llama(), mixed)
        found(handle)
        assert_close(generate(model, mixed), expected)
        assert found(handle) == 0
        padded = torch.cat([old, torch.nn.functional.pad(prompt(1, 10, seed=6), (50, 0), value=3)])
        mask = torch.ones_like(padded)
        mask[1, :50] = 0
        expected = generate(llama(), {"input_ids": padded, "attention_mask": mask})
        got = generate(model, {"input_ids": padded, "attention_mask": mask})
        assert found(handle) == 50
        assert_close(got, expected)


@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "gpt_oss"])
def test_layers_with_states_of_their_own(name, options, tmp_path, monkeypatch):
    """Sliding and linear layers: a beginning ends where their states were kept, and goes on exactly from there."""
    if reason := own_cache(name):
        pytest.skip(reason)
    model, inputs = tiny_model(name), {"input_ids": prompt(1, 101)}
    monkeypatch.setattr(reuse, "STOP_TOKENS", 40)
    turned = longer(generate(model, inputs))
    other = {"input_ids": torch.cat([inputs["input_ids"][:, :90], prompt(1, 20, seed=9)], dim=1)}
    expected = [generate(model, each) for each in (inputs, turned, other)]
    with scout_hf.patch(model, store=tmp_path, **options) as handle:
        assert_close(generate(model, inputs), expected[0], 2e-5)
        assert found(handle) == 0
        for each, wanted, tokens in zip((inputs, turned, other), expected, (96, 96, 80)):
            got = generate(model, each)
            assert found(handle) == tokens
            assert_close(got, wanted, 2e-5)
    several = {"input_ids": inputs["input_ids"].expand(2, -1)}
    wanted = generate(model, several)
    with scout_hf.patch(model, store=tmp_path, **options) as handle:
        got = generate(model, several)
        assert found(handle) == 96
        assert_close(got, wanted, 2e-5)
