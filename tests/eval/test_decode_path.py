"""The decode-path scorer: the same routine for every cache, every token a decode step, forks that do not touch."""

import pytest
import torch
from transformers import DynamicCache

import scout_hf
from scout_hf import ScoutConfig
from scout_hf.eval import baselines
from scout_hf.eval.caches import caches_of, stats_and_bytes
from scout_hf.eval.decode_path import answer, answers, ask_all, prefill, tokenize
from scout_hf.eval.pocket import ANSWER_WORDS, make_document
from scout_hf.selection import digest_names

# generate() hands logits out in float32, whose spacing at 16 is 1.9e-6.
TOLERANCE = 3e-6
DOCUMENT = make_document(tokens=500, facts=8, seed=7)
EXACT = [
    {"budget": None},
    {"budget": None, "block_size": 16, "split": "cpu", "layer_ahead": False},
    {"budget": None, "split": "cpu", "cpu_query": "real", "resident": 64},
    {"budget": 1.0, "block_size": 16},
    {"budget": 4096, "block_size": 16, "split": "cpu", "layer_ahead": False},
]
SPARSE = [{"budget": 128, "block_size": 16}, {"budget": 128, "block_size": 16, "split": "cpu", "recall": 1}]


def ask(model, tokenizer, cache, ids, fact):
    return answer(model, tokenizer, cache, ids, fact.question, ANSWER_WORDS)


def session(pocket, facts, config=None):
    """The session of these questions about the document; stock attention without a config."""
    return ask_all(*pocket, config, [(DOCUMENT.text, [fact.question for fact in facts])], ANSWER_WORDS)


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_exact_settings_give_the_logits_of_stock(pocket64, options):
    facts = DOCUMENT.facts[:2]
    stock, exact = session(pocket64, facts), session(pocket64, facts, ScoutConfig(**options))
    for left, right in zip(stock.answers, exact.answers):
        assert left.text == right.text
        torch.testing.assert_close(right.logits, left.logits, rtol=0, atol=TOLERANCE)


def test_exact_answers_in_float32(pocket):
    stock = session(pocket, DOCUMENT.facts).answers
    exact = session(pocket, DOCUMENT.facts, ScoutConfig(budget=None)).answers
    assert [one.text for one in exact] == [one.text for one in stock]
    assert sum(one.text == fact.answer for one, fact in zip(stock, DOCUMENT.facts)) >= 6


@pytest.mark.parametrize("options", [None, *SPARSE], ids=str)
def test_forks_do_not_touch_each_other_or_the_cache(pocket, options):
    model, tokenizer = pocket
    ids = tokenize(tokenizer, DOCUMENT.text)
    handle = scout_hf.patch(model, **options) if options else None
    try:
        cache = prefill(model, handle.new_cache() if handle else DynamicCache(config=model.config), ids)
        first, second = DOCUMENT.facts[:2]
        before = ask(model, tokenizer, cache, ids, first)
        other = ask(model, tokenizer, cache, ids, second)
        again = ask(model, tokenizer, cache, ids, first)
    finally:
        if handle:
            handle.remove()
    assert cache.get_seq_length() == DOCUMENT.tokens
    assert torch.equal(before.logits, again.logits)
    assert not torch.equal(before.logits, other.logits)


@pytest.mark.parametrize("options", [{}, SPARSE[0]], ids=str)
def test_questions_asked_together_leave_the_cache_as_it_is(pocket, options):
    model, tokenizer = pocket
    ids = tokenize(tokenizer, DOCUMENT.text)
    asked = [tokenize(tokenizer, fact.question)[0].tolist() for fact in DOCUMENT.facts[:3]]
    with caches_of(model, **options) as caches:
        cache = prefill(model, caches.new(), ids)
        first, again = (answers(model, cache, asked, ANSWER_WORDS, rows=2).ids for _ in range(2))
        alone = [answers(model, cache, [one], ANSWER_WORDS, rows=1).ids[0] for one in asked]
    assert cache.get_seq_length() == DOCUMENT.tokens
    assert first == again == alone and len({*map(tuple, first)}) == 3


@pytest.mark.parametrize("options", SPARSE, ids=str)
def test_every_question_and_answer_token_is_a_decode_step(pocket, options):
    done = session(pocket, DOCUMENT.facts[:2], ScoutConfig(**options))
    question = len(DOCUMENT.facts[0].question.split())
    assert [one.steps for one in done.answers] == [question + ANSWER_WORDS - 1] * 2
    assert done.stats.steps == sum(one.steps for one in done.answers)
    assert done.stats.prefill_tokens == DOCUMENT.tokens
    assert 0 < done.attended_share < 0.8
    assert done.tokens_per_second > 0 and done.prefill_seconds > 0


def test_bytes_of_both_kinds_of_cache(pocket):
    stock, scout = session(pocket, []).kv_bytes, session(pocket, [], ScoutConfig(budget=None)).kv_bytes
    layers, heads, size = 6, 2, 32
    assert stock == {"stock": layers * 2 * heads * size * DOCUMENT.tokens * 4}
    assert scout["host"] >= stock["stock"]


@pytest.mark.parametrize("options", SPARSE, ids=str)
def test_all_that_is_held_is_told(pocket, options):
    model, tokenizer = pocket
    with caches_of(model, **options) as caches:
        cache = prefill(model, caches.new(), tokenize(tokenizer, DOCUMENT.text))
        found, held = stats_and_bytes(caches.handle, cache), cache.tier_bytes()
    assert held["digests"] and found["device_bytes"] + found["host_bytes"] == sum(held.values())


def test_what_cannot_be_asked_is_refused(pocket):
    model, tokenizer = pocket
    ids = tokenize(tokenizer, DOCUMENT.text)
    with pytest.raises(ValueError, match="holds 0 tokens, the document has 500"):
        answer(model, tokenizer, DynamicCache(config=model.config), ids, "what", 3)
    cache = prefill(model, DynamicCache(config=model.config), ids)
    with pytest.raises(ValueError, match="question=''"):
        answer(model, tokenizer, cache, ids, "", 3)
    with pytest.raises(ValueError, match="length=0"):
        answer(model, tokenizer, cache, ids, "what", 0)


def test_blind_digests_do_not_look_at_keys():
    assert {"random", "recent"} <= set(digest_names())
    query = torch.randn(2, 4, 1, 8)
    recent, noise = baselines.RecentBlocks(), baselines.RandomBlocks()
    codes = recent.encode(torch.randn(2, 2, 5, 16, 8), None)
    assert codes.shape == (2, 2, 5, 1) and not codes.any()
    assert recent.score(query, codes).argsort(dim=2).tolist() == [[list(range(5))] * 2] * 2
    drawn = noise.score(query, codes)
    assert drawn.shape == (2, 2, 5) and drawn.dtype == torch.float32
    assert not torch.equal(drawn, noise.score(query, codes))


SMALL = {"block_size": 16, "budget": 0.25}


class TestAsking:
    @pytest.mark.parametrize(
        "options",
        [None, {"split": "off"}, {"split": "off", "digest": "sign"}, {"split": "cpu", "recall": None}],
        ids=str,
    )
    def test_together_as_one_by_one(self, pocket, options):
        model, tokenizer = pocket
        document = make_document(512, 8, seed=3)
        ids = tokenize(tokenizer, document.text)
        # One is shorter than the others.
        asked = [fact.question for fact in document.facts]
        asked[3] = asked[3].split(" call ", 1)[1]
        questions = [tokenizer(text, add_special_tokens=False).input_ids for text in asked]
        handle = None if options is None else scout_hf.patch(model, **SMALL, **options)
        try:
            cache = prefill(model, handle.new_cache() if handle else DynamicCache(config=model.config), ids)
            wanted = [answer(model, tokenizer, cache, ids, text, ANSWER_WORDS) for text in asked]
            held = [part.clone() for part in _contents(cache)]
            for rows in (1, 3, 8):
                given = answers(model, cache, questions, ANSWER_WORDS, rows)
                assert [tokenizer.decode(one) for one in given.ids] == [one.text for one in wanted]
                assert given.steps == sum(one.steps for one in wanted) and given.seconds > 0
            assert all(torch.equal(a, b) for a, b in zip(_contents(cache), held, strict=True))
        finally:
            if handle:
                handle.remove()

    @pytest.mark.parametrize("wrong", [{"length": 0}, {"rows": 0}, {"questions": [[5], []]}])
    def test_wrong_input(self, pocket, wrong):
        settings = {"questions": [[5], [6]], "length": 1, "rows": 1} | wrong
        with pytest.raises(ValueError, match="from 1 up"):
            answers(pocket[0], DynamicCache(), **settings)


def _contents(cache):
    for layer in cache.layers:
        yield from layer.method.read_all() if hasattr(layer, "method") else (layer.keys, layer.values)
