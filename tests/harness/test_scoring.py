"""Decode-path scores: equal to one dense pass where everything is attended, sparse where it is not."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import scout_hf
from scout_hf import ScoutConfig
from scout_hf.eval.caches import caches_of
from scout_hf.eval.pocket import make_document, questions
from scout_hf.eval.scoring import Score, decode_steps, score_pairs
from tests.patches.tiny import VOCAB, tiny_config

EXACT = [
    None,
    ScoutConfig(budget=None),
    ScoutConfig(budget=None, block_size=8, split="cpu", layer_ahead=False, window=8, resident=16),
    ScoutConfig(budget=None, block_size=8, split="cpu", cpu_query="real", window=8, resident=16),
]


def words(seed: int, count: int) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


LONG, SHORT, ONE = words(1, 40), words(2, 23), words(3, 1)
PAIRS = [
    (LONG, words(10, 3)),
    (SHORT, words(11, 7)),
    (ONE, words(12, 5)),
    (LONG, [5]),
    (LONG, [6]),
    (LONG, words(10, 2) + [9]),
    (ONE, [7]),
    (SHORT, words(11, 1)),
    (words(4, 39), words(13, 12)),
    (LONG, [5]),
]
"""Shared contexts, unequal lengths, one-token contexts and continuations, equal beginnings, the same pair twice."""


def tiny(family: str, dtype: torch.dtype = torch.float64, **overrides):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(family, **overrides)).to(dtype).eval()


@torch.no_grad()
def dense(model, context, continuation) -> Score:
    """The pair alone, in one pass over all of it."""
    ids = torch.tensor([[*context, *continuation]])
    logits = model(ids[:, :-1]).logits[0, -len(continuation) :].double()
    target = torch.tensor(continuation)
    return Score(
        logits.log_softmax(-1).gather(1, target[:, None]).sum().item(), bool((logits.argmax(-1) == target).all())
    )


def assert_scores(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert math.isclose(one.log_probability, other.log_probability, abs_tol=tolerance), (found, expected)
        assert one.greedy == other.greedy


@pytest.mark.parametrize("config", EXACT, ids=str)
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_exact_scores_are_those_of_one_dense_pass(config, batch_size):
    model = tiny("llama", initializer_range=0.2)
    expected = [dense(model, *pair) for pair in PAIRS]
    with caches_of(model, config) as caches:
        found = score_pairs(model, PAIRS, caches.new, batch_size)
    assert_scores(found, expected, 1e-5)
    assert len({score.log_probability for score in expected}) >= 8


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "gpt_neox", "qwen3"])
def test_positions_sliding_layers_and_query_norms(family):
    """GPT-2 and OPT have absolute positions, Gemma 3 a sliding window: padding must not shift either."""
    model = tiny(family, torch.float32)
    expected = [dense(model, *pair) for pair in PAIRS]
    for config in (None, ScoutConfig(budget=None, block_size=8)):
        with caches_of(model, config) as caches:
            assert_scores(score_pairs(model, PAIRS, caches.new, 4), expected, 2e-4)


def test_greedy_means_every_token(pocket):
    model, tokenizer = pocket
    prompt, answer = questions(make_document(400, 8, seed=5))[2]
    context, said = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
    others = [said[:2] + [said[0]], [said[1], *said[1:]], said[:2]]
    with caches_of(model, None) as caches:
        scores = score_pairs(model, [(context, one) for one in (said, *others)], caches.new, 4)
    assert [score.greedy for score in scores] == [True, False, False, True]
    assert scores[0].log_probability > max(score.log_probability for score in scores[1:3])


def test_shared_contexts_are_prefilled_once_and_every_other_token_is_decoded():
    model = tiny("llama")
    alone = [pair for pair in PAIRS if pair[0] is LONG]
    with scout_hf.patch(model, budget=None) as handle:
        ticks = []
        score_pairs(model, alone, handle.new_cache, 1, ticks.append)
        stats = handle.stats()
    assert stats.prefill_tokens == len(LONG) - 1
    # The two of three tokens differ in the last one only, and the three of one token do.
    assert stats.steps == sum(ticks) == decode_steps(alone) == 3 + 1


def test_as_many_continuations_as_contexts_go_to_their_own():
    """Longest first, which here is not the order of the contexts; then two of one context and none of the other."""
    model, first, second = tiny("llama"), words(1, 20), words(2, 19)
    letter, sentence, other = (first, [5]), (second, words(3, 4)), (second, words(4, 4))
    for pairs in ([letter, sentence], [letter, sentence, other]):
        expected = [dense(model, *pair) for pair in pairs]
        with caches_of(model, ScoutConfig(budget=None)) as caches:
            assert_scores(score_pairs(model, pairs, caches.new, 2), expected, 1e-5)


def test_rows_that_are_done_leave():
    model = tiny("llama")
    pairs = [(words(seed, 20), words(seed + 50, length)) for seed, length in enumerate((30, 2, 2, 1))]
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(args[0].shape)), with_kwargs=True
    )
    with scout_hf.patch(model, budget=None) as handle:
        found = score_pairs(model, pairs, handle.new_cache, 4)
    hook.remove()
    assert seen == [(4, 19), (4, 1), (4, 1), *[(1, 1)] * 28]
    assert_scores(found, [dense(model, *pair) for pair in pairs], 1e-5)


@pytest.mark.parametrize("split", ["off", "cpu"])
def test_sparse_scores_of_padded_and_branching_rows_are_those_of_the_row_alone(pocket, split):
    """Padding of whole blocks moves no block border, so that the same blocks are chosen.

    Recall and trust are for all rows together.
    """
    model, tokenizer = pocket
    config = ScoutConfig(budget=0.25, block_size=16, window=16, split=split, recall=None, cpu_query="predicted")
    pairs = []
    for tokens, seed in ((512, 1), (400, 2), (304, 3)):
        (_, answer), (_, other) = questions(document := make_document(tokens, 8, seed=seed))[2:4]
        # Padding comes in front of all but the last token, which the decode begins with.
        context = tokenizer(document.text).input_ids + tokenizer(document.facts[2].question).input_ids
        pairs += [(context, tokenizer(text).input_ids) for text in (answer, other)]
    assert len({len(context) % 16 for context, _ in pairs}) == 1
    with scout_hf.patch(model, config) as handle:
        alone = [score_pairs(model, [pair], handle.new_cache)[0] for pair in pairs]
        handle.reset_stats()
        together = score_pairs(model, pairs, handle.new_cache, 6)
        stats = handle.stats()
    assert stats.attended_tokens < 0.5 * stats.context_tokens
    assert_scores(together, alone, 1e-3)
    full = [dense(model, *pair) for pair in pairs]
    assert max(abs(one.log_probability - other.log_probability) for one, other in zip(alone, full)) > 0.01


def test_a_single_token_is_scored_by_a_sparse_step_too(pocket):
    """What a harness asks most: one letter. Predicted from the prefill it would have been attended exactly."""
    model, tokenizer = pocket
    document = make_document(600, 8, seed=4)
    context = tokenizer(questions(document)[0][0]).input_ids
    target = tokenizer(document.facts[0].answer).input_ids[:1]
    with caches_of(model, ScoutConfig(budget=32, block_size=16, window=16, digest="minmax")) as caches:
        sparse = score_pairs(model, [(context, target)], caches.new)[0]
    assert abs(sparse.log_probability - dense(model, context, target).log_probability) > 0.01


def test_what_cannot_be_scored_is_refused(pocket):
    model, _ = pocket
    with caches_of(model, None) as caches:
        with pytest.raises(ValueError, match="pair 1 has 0 tokens of context and 2"):
            score_pairs(model, [([4], [5]), ([], [4, 5])], caches.new)
        with pytest.raises(ValueError, match="pair 0 has 1 tokens of context and 0"):
            score_pairs(model, [([4], [])], caches.new)
        with pytest.raises(ValueError, match="batch_size=0"):
            score_pairs(model, [([4], [5])], caches.new, 0)
        assert score_pairs(model, [], caches.new) == []
